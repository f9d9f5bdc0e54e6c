"""The few faults of a schedule that it takes to fail (ddmin; Zeller & Hildebrandt, "Simplifying and isolating
failure-inducing input", 2002), each as short as it can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

from nearfar.chaos.schedule import Fault, Schedule

Fails = Callable[[Schedule], bool]


def shrink(schedule: Schedule, fails: Fails, max_runs: int = 1000) -> Schedule:
    """A schedule that still fails: no single fault of it can be left out, none can be halved.

    `fails` runs a schedule and says whether it goes wrong; `schedule` itself is known to.  After `max_runs` runs the
    best one so far is returned.
    """
    budget = _Budget(fails, max_runs)
    return _shorter(_fewer(schedule, budget), budget)


class _Budget:
    """`fails` that is asked once for each schedule, and not any more when its runs are used up."""

    def __init__(self, fails: Fails, max_runs: int) -> None:
        self._fails, self._left = fails, max_runs
        self._known: dict[Schedule, bool] = {}

    def __call__(self, schedule: Schedule) -> bool:
        if schedule not in self._known:
            if self._left == 0:
                return False
            self._left -= 1
            self._known[schedule] = self._fails(schedule)
        return self._known[schedule]


def _fewer(schedule: Schedule, fails: Fails) -> Schedule:
    """ddmin: leave parts out, halves first, down to single faults."""
    if fails(schedule.with_faults([])):
        return schedule.with_faults([])
    n_parts = 2
    while len(schedule) > 1:
        n_parts = min(n_parts, len(schedule))
        smaller = next((s for s in _without_a_part(schedule, n_parts) if fails(s)), None)
        if smaller is not None:
            schedule, n_parts = smaller, max(2, n_parts - 1)
        elif n_parts == len(schedule):
            break
        else:
            n_parts *= 2
    return schedule


def _without_a_part(schedule: Schedule, n_parts: int) -> Iterator[Schedule]:
    n = len(schedule)
    edges = [n * i // n_parts for i in range(n_parts + 1)]
    for low, high in pairwise(edges):
        yield schedule.with_faults([*schedule.faults[:low], *schedule.faults[high:]])


def _shorter(schedule: Schedule, fails: Fails) -> Schedule:
    """Halve seconds and bytes of each fault as long as it still fails."""
    for i in range(len(schedule)):
        while (half := _half(schedule.faults[i])) is not None:
            smaller = schedule.with_faults([*schedule.faults[:i], half, *schedule.faults[i + 1 :]])
            if not fails(smaller):
                break
            schedule = smaller
    return schedule


def _half(fault: Fault) -> Fault | None:
    if fault.seconds < 0.01 and fault.n_bytes == 0:
        return None
    return replace(fault, seconds=round(fault.seconds / 2, 3), n_bytes=fault.n_bytes // 2)
