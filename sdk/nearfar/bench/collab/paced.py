"""A device that is slower than this one: the same layers, each pass with a least time.

Both sides of a bench run on one machine, and the shipped model takes a fraction of a millisecond a token.  What a
shared answer is worth depends on how long a layer takes here and there, so both sides are given a stated rate.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from nearfar.cancel import Cancel
from nearfar.lower import KV, Array, Lower


@dataclass(frozen=True, slots=True)
class Rate:
    """A pass of n rows through all layers takes at least step_ms + n row_ms; through some layers their share of it."""

    step_ms: float
    row_ms: float

    def seconds(self, n_rows: int, n_layers: int, of: int) -> float:
        return (self.step_ms + n_rows * self.row_ms) * n_layers / of / 1000


class Paced:
    """`Lower` that sleeps until a pass has taken its time; everything else is that of the engine within."""

    def __init__(self, lower: Lower, rate: Rate) -> None:
        self.lower, self.rate = lower, rate
        self.config, self.name, self.screens = lower.config, lower.name, lower.screens
        self.new_kv, self.embed, self.norm = lower.new_kv, lower.embed, lower.norm
        self.logits, self.greedy = lower.logits, lower.greedy

    def forward(self, h: Array, kv: KV, first: int, last: int, cancel: Cancel | None = None) -> Array:
        until = time.perf_counter() + self.rate.seconds(len(h), last - first, self.config.n_layers)
        out = self.lower.forward(h, kv, first, last, cancel)
        time.sleep(max(0.0, until - time.perf_counter()))
        return out
