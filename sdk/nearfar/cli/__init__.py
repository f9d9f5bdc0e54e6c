"""The command line: one file per verb, `main.py` is the door.  Top of the sdk; nothing imports it."""
