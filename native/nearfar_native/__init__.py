"""The C++ engine of nearfar; `_core` is the compiled extension."""
