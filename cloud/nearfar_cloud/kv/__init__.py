"""Where keys and values lie: numbers of blocks only.  The blocks themselves belong to the executor."""
