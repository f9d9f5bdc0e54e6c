"""Joules that this machine's processors take, where Linux counts them (RAPL; kernel documentation, power/powercap).

    /sys/class/powercap/intel-rapl:0/{name, energy_uj, max_energy_range_uj}      package-0, AMD's as well
    /sys/class/powercap/intel-rapl:0:1/...                                       dram: not a part of the package

`core` and `uncore` are parts of a package, `psys` has packages in it, and `intel-rapl-mmio` counts the same package a
second time: none of them is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
MAX_DIGITS = 20  # of a count


@dataclass(frozen=True, slots=True)
class Zone:
    """One counter: microjoules from 0 to `range_uj`, then from 0 again."""

    name: str
    file: Path
    range_uj: int

    def joules(self, before: int, after: int) -> float:
        """Between two readings that lie less than one range apart: hours of a desktop, 20 minutes of a large server."""
        passed = after - before
        return (passed if passed >= 0 else passed + self.range_uj) / 1e6


class Meter:
    """All counters of a machine; `why_not` says why there are none, "" where there are."""

    def __init__(self, folder: Path = POWERCAP) -> None:
        self.zones: list[Zone] = []
        self.why_not = "" if folder.is_dir() else f"{folder} is not there: not Linux, or a kernel or guest without RAPL"
        try:
            for place in sorted(folder.glob("intel-rapl:*")):
                name = (place / "name").read_text().strip()
                if name.startswith("package") or name == "dram":
                    file, range_uj = place / "energy_uj", _count(place / "max_energy_range_uj")
                    _count(file)
                    self.zones.append(Zone(name, file, range_uj))
        except (OSError, ValueError) as error:
            self.zones, self.why_not = [], f"a counter cannot be read ({error}); most systems want root for it"
        if not self.zones and not self.why_not:
            self.why_not = f"no zone of a package in {folder}"

    def read(self) -> list[int]:
        """The counters now; nothing where there are none, or where they cannot be read any more."""
        try:
            return [_count(zone.file) for zone in self.zones]
        except (OSError, ValueError):
            return []

    def joules(self, before: Sequence[int]) -> float | None:
        """Since a reading, of all zones together; None where nobody knows."""
        after = self.read()
        if not self.zones or len(before) != len(self.zones) or len(after) != len(self.zones):
            return None
        return sum(z.joules(b, a) for z, b, a in zip(self.zones, before, after, strict=True))


def _count(file: Path) -> int:
    """Raises OSError, ValueError."""
    with file.open() as opened:
        text = opened.read(MAX_DIGITS + 2).strip()
    if not text.isdecimal() or len(text) > MAX_DIGITS:
        raise ValueError(f"{file} holds {text[:MAX_DIGITS]!r}, expected a count of microjoules")
    return int(text)
