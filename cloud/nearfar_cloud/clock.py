"""Times that an engine can go by: the wall's, or one that moves only when it is told to.

    engine = Engine(executor, composer, clock=VirtualClock())

A replay hands requests over between two steps, a little after they came.  Inside `dated(t)` the clock shows t, so that
the engine notes when a request came and not when it was handed over.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager


class Clock(ABC):
    """Seconds from an origin of its own.  Belongs to the thread of the engine."""

    def __init__(self) -> None:
        self._dated: float | None = None

    def __call__(self) -> float:
        return self.now if self._dated is None else self._dated

    @property
    @abstractmethod
    def now(self) -> float: ...

    @abstractmethod
    def wait_until(self, moment: float) -> None:
        """Let the time pass; nothing happens if `moment` is over."""

    @contextmanager
    def dated(self, moment: float) -> Iterator[None]:
        """Show `moment` inside the block."""
        self._dated = moment
        try:
            yield
        finally:
            self._dated = None


class WallClock(Clock):
    """The machine's time."""

    @property
    def now(self) -> float:
        return time.perf_counter()

    def wait_until(self, moment: float) -> None:
        if (left := moment - self.now) > 0:
            time.sleep(left)


class VirtualClock(Clock):
    """Stands still between `advance` and `wait_until`."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    @property
    def now(self) -> float:
        return self._now

    def wait_until(self, moment: float) -> None:
        self._now = max(self._now, moment)

    def advance(self, seconds: float) -> None:
        self._now += seconds
