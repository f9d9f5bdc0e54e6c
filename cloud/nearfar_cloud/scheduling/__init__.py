"""Who runs next and how much of it: pure functions of a view of the engine.  No torch below this folder."""
