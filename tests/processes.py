"""Who started whom, by /proc.  Used where a test wants to know what is left of a process's children."""

from __future__ import annotations

from pathlib import Path


def parents(*, zombies: bool = True) -> dict[int, int]:
    """Processes of this machine and the parent of each; `zombies`: those too that have ended and are not waited for."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if zombies or fields[0] != "Z":
            found[int(stat.parent.name)] = int(fields[1])
    return found
