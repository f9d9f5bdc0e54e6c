"""A machine that is slower than this one: the same results, each step with a least time.

For trying out what a larger model would feel like, and for benches in which one machine plays two.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from nearfar_cloud.engine import Engine
from nearfar_cloud.executors.base import BatchWork, Executor, Ids, Result


def slow_down(engine: object, step_s: float, row_s: float) -> None:
    """A step of n rows through all layers of `engine` takes at least step_s + n row_s from now on."""
    assert isinstance(engine, Engine)
    engine.executor = PacedExecutor(engine.executor, step_s, row_s)


class PacedExecutor:
    """`Executor` that sleeps until a step has taken its time; steps through some layers take their share of it."""

    def __init__(self, inner: Executor, step_s: float, row_s: float) -> None:
        self.inner, self.step_s, self.row_s = inner, step_s, row_s
        self.facts, self.n_blocks, self.uppers = inner.facts, inner.n_blocks, inner.uppers

    def run(self, batch: Sequence[BatchWork]) -> list[Result]:
        until = time.perf_counter() + self.seconds(batch)
        results = self.inner.run(batch)
        time.sleep(max(0.0, until - time.perf_counter()))
        return results

    def seconds(self, batch: Sequence[BatchWork]) -> float:
        """Layers that anybody passes are read once; each row costs its own layers."""
        layers = {i for w in batch for i in range(*w.layers)}
        row_layers = sum(w.n * w.layers.n for w in batch)
        return (self.step_s * len(layers) + self.row_s * row_layers) / self.facts.n_layers

    def swap_out(self, seq: int, blocks: Ids) -> None:
        self.inner.swap_out(seq, blocks)

    def swap_in(self, seq: int, blocks: Ids) -> None:
        self.inner.swap_in(seq, blocks)

    def can_swap(self, n_blocks: int) -> bool:
        return self.inner.can_swap(n_blocks)

    def drop(self, seq: int) -> None:
        self.inner.drop(seq)
