"""Sequences that wait for memory, and the few of them that a plan looks at.

Ten thousand may wait; a plan sees a window.  They stand in lanes, one for each priority, tenant and kind of promise, in
order of arrival, and the window takes from every lane: so that one tenant's flood hides nobody else.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import chain, islice

from nearfar_cloud.types import Seq

WINDOW = 256  # waiting sequences that a plan looks at

Lane = tuple[str, bool]  # tenant, whether a time was promised


def _place(s: Seq) -> tuple[float, int]:
    return s.arrival, s.id


class Waiting:
    """Owns the order in which sequences stand, not the order in which they go: that is for the policies."""

    def __init__(self) -> None:
        self._levels: dict[int, dict[Lane, list[Seq]]] = {}  # priority -> lanes -> by arrival
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def add(self, s: Seq) -> None:
        """By its arrival: who was preempted stands where it stood.  Who is idle waits for nobody's memory."""
        if s.is_idle:
            return
        priority, lane = _key(s)
        line = self._levels.setdefault(priority, {}).setdefault(lane, [])
        line.insert(bisect_left(line, _place(s), key=_place), s)
        self._n += 1

    def discard(self, s: Seq) -> None:
        """Its lane goes behind the others of its priority.  Nothing happens if it does not wait here."""
        priority, lane = _key(s)
        lanes = self._levels.get(priority, {})
        line = lanes.get(lane, [])
        i = bisect_left(line, _place(s), key=_place)
        if i == len(line) or line[i] is not s:
            return
        del line[i], lanes[lane]
        if line:
            lanes[lane] = line
        elif not lanes:
            del self._levels[priority]
        self._n -= 1

    def window(self, n: int = WINDOW) -> list[Seq]:
        """At most `n` sequences: the first of every lane, as many from each; of too many lanes the higher priorities.

        Costs by `n` and by the number of priorities, not by how many wait.
        """
        levels = (self._levels[priority] for priority in sorted(self._levels, reverse=True))
        lanes = list(islice(chain.from_iterable(level.values() for level in levels), n))
        return [s for line in lanes for s in line[: n // len(lanes)]]


def _key(s: Seq) -> tuple[int, Lane]:
    promise = s.req.objective
    return promise.priority, (promise.tenant, promise.deadline_s is not None or promise.ttft_s is not None)
