"""The command line: one file per verb, `main.py` is the door.  Top of the sdk; nothing imports it."""

from __future__ import annotations


def entry() -> int:
    """What the installed command calls: `main`, and Ctrl-C while the verbs are still being imported."""
    try:
        from nearfar.cli.main import main

        return main()
    except KeyboardInterrupt:
        return 130
