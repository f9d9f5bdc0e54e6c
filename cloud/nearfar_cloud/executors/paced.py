"""A machine that is slower than this one: the same results, each step with a least time.

For trying out what a larger model would feel like, and for benches in which one machine plays two.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from nearfar_cloud.executors.base import BatchWork, Executor, Result


class PacedExecutor:
    """A step of n rows through all layers takes at least `step_s` + n `row_s`; through some layers their share."""

    def __init__(self, inner: Executor, step_s: float, row_s: float) -> None:
        self.inner, self.step_s, self.row_s = inner, step_s, row_s
        self.facts, self.n_blocks = inner.facts, inner.n_blocks
        self.swap_out, self.swap_in = inner.swap_out, inner.swap_in
        self.can_swap, self.drop = inner.can_swap, inner.drop

    def run(self, batch: Sequence[BatchWork]) -> list[Result]:
        """As the inner one; asleep until the step has taken its time."""
        until = time.perf_counter() + self.seconds(batch)
        results = self.inner.run(batch)
        time.sleep(max(0.0, until - time.perf_counter()))
        return results

    def seconds(self, batch: Sequence[BatchWork]) -> float:
        n_layers = self.facts.n_layers
        layers = {i for w in batch for i in range(*w.layers)}  # a layer's weights are read once for all
        row_layers = sum(w.n * w.layers.n for w in batch)
        return self.step_s * len(layers) / n_layers + self.row_s * row_layers / n_layers
