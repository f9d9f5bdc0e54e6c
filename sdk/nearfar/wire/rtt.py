"""How long an upper side takes to answer, learned while it does."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

LEAST_S = 0.4  # a deadline is never shorter: the device's clock, a garbage collection, a busy radio
REMEMBERED = 32


@dataclass(slots=True)
class RoundTrips:
    """Seconds from an ask to its verdict (the work of the upper side included), and of pings while nobody has asked."""

    asks: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    pings: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    @property
    def p50_s(self) -> float:
        """0 where nothing is known."""
        known = self.asks or self.pings
        return statistics.median(known) if known else 0.0

    @property
    def deadline_s(self) -> float:
        """When an ask without a verdict is late."""
        return max(3 * self.p50_s, LEAST_S)
