"""Two engines as one model: what a device and its upper layers say together, without a network between.

    ids -> device: embed, layers [0, cut) -> packed and unpacked -> upper: layers [cut, L) -> head

This is the oracle of a split model: the tokens that any way of sharing the work must reproduce.  What the codec does to
a row is a part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nearfar.cancel import Cancel
from nearfar.config import ModelConfig
from nearfar.errors import UsageError
from nearfar.kv_cache import FULL, KVDtype, Policy
from nearfar.lower import KV, Lower

Array = NDArray[np.float32]
RoundTrip = Callable[[Array], Array]  # f32 [T, D] -> the same shape: rows as they arrive


@dataclass(frozen=True, slots=True)
class ComposedKV:
    """The caches of both engines."""

    below: KV
    above: KV
    cut: int

    @property
    def n_bytes(self) -> int:
        return self.below.n_bytes + self.above.n_bytes

    def length(self, layer: int = 0) -> int:
        return (self.below if layer < self.cut else self.above).length(layer)

    def truncate(self, n: int) -> None:
        self.below.truncate(n)
        self.above.truncate(n)

    def fork(self, n: int | None = None) -> ComposedKV:
        return ComposedKV(self.below.fork(n), self.above.fork(n), self.cut)


class Composed:
    """`Lower` out of two: layers [0, cut) of `below`, whose exits it has, and the layers from `cut` on of `above`.

    Raises UsageError where the two are not halves of models of one shape.
    """

    def __init__(self, below: Lower, above: Lower, cut: int, round_trip: RoundTrip | None = None) -> None:
        a, b = below.config, above.config
        if (a.arch, a.n_layers, a.d_model, a.n_vocab) != (b.arch, b.n_layers, b.d_model, b.n_vocab):
            raise UsageError(f"layers of {_named(a)} below and of {_named(b)} above: expected halves of one model")
        if (
            a.role == "upper"
            or b.role == "device"
            or not max(1, b.layers[0]) <= cut <= min(a.layers[1], b.n_layers - 1)
        ):
            raise UsageError(f"layers {a.layers} below and {b.layers} above: they do not meet at layer {cut}")
        self.below, self.above, self.cut, self.round_trip = below, above, cut, round_trip
        exits = tuple(e for e in a.exits if e.layer <= cut)
        self.config: ModelConfig = replace(a, role="full", split_layer=0, row_layer=0, exits=exits)
        self.name = below.name
        self.screens = above.screens

    def new_kv(self, max_len: int, dtype: KVDtype = "f16", policy: Policy = FULL) -> ComposedKV:
        """As `Lower.new_kv`, without windows.  Raises UsageError."""
        if policy != FULL:
            raise UsageError(f"{policy}: a model of two engines keeps every position")
        return ComposedKV(self.below.new_kv(max_len, dtype), self.above.new_kv(max_len, dtype), self.cut)

    def embed(self, ids: NDArray[np.int32]) -> Array:
        return self.below.embed(ids)

    def forward(self, h: Array, kv: KV, first: int, last: int, cancel: Cancel | None = None) -> Array:
        assert isinstance(kv, ComposedKV), "a cache of another engine"
        start = kv.length(first)
        if first < self.cut < last and kv.length(self.cut) != start:
            raise UsageError(f"layers [{first}, {last}) have run different positions: {start}, {kv.length(self.cut)}")
        if first < self.cut:
            h = self.below.forward(h, kv.below, first, min(last, self.cut), cancel)
        if last <= self.cut:
            return h
        try:
            if first <= self.cut and self.round_trip is not None:
                h = self.round_trip(h)
            return self.above.forward(h, kv.above, max(first, self.cut), last, cancel)
        except BaseException:
            if first < self.cut:
                kv.below.truncate(start)  # all or nothing
            raise

    def norm(self, h: Array, head: str = "final") -> Array:
        return self._of(head).norm(h, head)

    def logits(self, h: Array, head: str = "final") -> Array:
        return self._of(head).logits(h, head)

    def greedy(self, h: Array, head: str = "final") -> tuple[NDArray[np.int32], Array]:
        return self._of(head).greedy(h, head)

    def _of(self, head: str) -> Lower:
        return self.above if head == "final" else self.below


def _named(c: ModelConfig) -> str:
    return f"{c.arch} ({c.n_layers} layers of width {c.d_model}, vocabulary {c.n_vocab})"
