"""Keys and values of the positions that have been run: the readable cache behind `lower_numpy`.

Each layer has its own length, because layers above an early exit may lag behind the layers below it.  Rows are
rounded to the cache's dtype when they are appended and are read back from it, so that a row never depends on
whether its neighbours came in the same call.

What a row at position i sees of position j <= i is the cache's policy:

    Full()                everything
    Lambda(sink, window)  j < sink, as if it were `window` away at most, and i - j < window (LM-Infinite, 2308.16137)

          j   0 .. sink-1                              i-window+1 .. i
        row i [  sinks  ]  . . . forgotten . . . . . . [   window    ]

Behind a Lambda cache memory stays constant and no distance is larger than those the model was trained for, so text
goes on fluently for as long as one likes; what has left the window is gone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from nearfar.config import ModelConfig
from nearfar.errors import ContextError, KVTruncated, UsageError

Array = NDArray[np.float32]
KVDtype = Literal["f16", "int8", "f32"]

BLOCK = 64  # positions that are forgotten at once
SLACK = 64  # positions that may be cut off behind a window and still leave the window whole: drafts, owed rows
INT8_GROUP = 32  # values that share a scale
MAX_WINDOW = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Full:
    """Every row sees all positions before it."""


@dataclass(frozen=True, slots=True)
class Lambda:
    """A row sees the first `sink` positions and the last `window` ones, itself included.

    The paper takes 10 to 100 sinks, and as window what the model was trained for: with both, no distance is new to it.
    """

    sink: int = 16
    window: int = 2048

    def __post_init__(self) -> None:
        if not 0 <= self.sink <= MAX_WINDOW or not 1 <= self.window <= MAX_WINDOW:
            raise UsageError(
                f"Lambda(sink={self.sink}, window={self.window}): expected 0 or more sinks and a window of 1 or more"
            )


Policy = Full | Lambda
FULL = Full()


@dataclass(frozen=True, slots=True)
class Held:
    """What one layer holds, rounded: rows of the positions [oldest, length), and the sinks a second time.

    Keys are rotated by their position; the sinks' second keys are not, for queries that see them from afar.
    """

    k: Array  # [length - oldest, KH, hd]
    v: Array
    sink_k: Array  # [min(sink, length), KH, hd]
    sink_v: Array
    oldest: int = 0

    @property
    def length(self) -> int:
        return self.oldest + len(self.k)


class KVCache:
    """Owns the K and V arrays of all layers; positions are 0..length(layer)-1."""

    def __init__(
        self,
        config: ModelConfig,
        max_len: int,
        dtype: KVDtype = "f16",
        policy: Policy = FULL,
    ) -> None:
        check_dtype(dtype)
        if max_len < 1:
            raise UsageError(f"max_len={max_len}: expected at least 1 position")
        self.config, self.max_len, self.dtype, self.policy = config, max_len, dtype, policy
        nothing = np.empty((0, config.n_kv_heads, config.head_dim), np.float32)
        self._empty = Held(nothing, nothing, nothing, nothing)
        self._layers = [self._empty] * config.n_layers

    def length(self, layer: int | None = None) -> int:
        """Positions that `layer` (default: the lowest one here) has run."""
        return self._layers[self.config.layers[0] if layer is None else layer].length

    def append(self, layer: int, k: Array, v: Array, plain_k: Array | None = None) -> None:
        """Add rows: k and v are [T, KH, hd]; `plain_k` are the keys before rotation, which a Lambda policy needs.

        ContextError beyond `max_len`.
        """
        held = self._layers[layer]
        if held.length + len(k) > self.max_len:
            raise ContextError(f"{held.length + len(k)} positions: the cache holds {self.max_len}")
        k, v = round_to(k, self.dtype), round_to(v, self.dtype)
        sink_k, sink_v, gone = held.sink_k, held.sink_v, 0
        if isinstance(self.policy, Lambda):
            assert plain_k is not None
            n_sinks = max(0, self.policy.sink - held.length)  # among the new rows
            sink_k = np.concatenate([sink_k, round_to(plain_k[:n_sinks], self.dtype)])
            sink_v = np.concatenate([sink_v, v[:n_sinks]])
            oldest = max(0, held.length - self.policy.window - SLACK) // BLOCK * BLOCK
            gone = max(0, oldest - held.oldest)
        self._layers[layer] = Held(
            np.concatenate([held.k[gone:], k]),
            np.concatenate([held.v[gone:], v]),
            sink_k,
            sink_v,
            held.oldest + gone,
        )

    def held(self, layer: int) -> Held:
        return self._layers[layer]

    def read(self, layer: int) -> tuple[Array, Array]:
        """All keys and values of `layer` that are held, each f32 [length - oldest, KH, hd]."""
        return self._layers[layer].k, self._layers[layer].v

    def truncate(self, n: int) -> None:
        """Forget the positions from `n` on, in every layer that has them.

        KVTruncated, and nothing is forgotten, where the next row's window would reach back to positions that are gone
        (more than `SLACK` positions cut off); truncate(0) always works.
        """
        if n < 0:
            raise UsageError(f"truncate({n}): expected 0 or more positions")
        self._layers = [self._cut(held, n) for held in self._layers]

    def snapshot(self) -> list[Held]:
        """What is held, to hand to `restore` should a call fail."""
        return list(self._layers)

    def restore(self, layers: list[Held]) -> None:
        """Forget what happened since `snapshot()` was taken."""
        self._layers = layers

    def fork(self, n: int | None = None) -> KVCache:
        """An independent cache with the first `n` positions (default: all) of every layer; KVTruncated as above."""
        other = KVCache(self.config, self.max_len, self.dtype, self.policy)
        other._layers = self.snapshot()
        if n is not None:
            other.truncate(n)
        return other

    @property
    def n_bytes(self) -> int:
        """Bytes of the arrays, which hold the rounded numbers in f32."""
        return sum(a.nbytes for held in self._layers for a in (held.k, held.v, held.sink_k, held.sink_v))

    def _cut(self, held: Held, n: int) -> Held:
        if n >= held.length:
            return held
        if n == 0:
            return self._empty
        if isinstance(self.policy, Lambda) and held.oldest > max(0, n - self.policy.window + 1):
            raise KVTruncated(
                f"cut to {n} positions: the cache holds {held.oldest} to {held.length} only, "
                f"and a window of {self.policy.window} ends there; cut to 0 and run the text again"
            )
        rows = n - held.oldest
        return Held(held.k[:rows], held.v[:rows], held.sink_k[:n], held.sink_v[:n], held.oldest)


def check_dtype(dtype: str) -> None:
    if dtype not in get_args(KVDtype):
        raise UsageError(f"KV dtype {dtype!r}: expected one of {', '.join(get_args(KVDtype))}")


def round_to(x: Array, dtype: KVDtype) -> Array:
    """x [..., hd] as the cache gives it back."""
    if dtype == "int8":
        return round_to_int8(x)
    y: Array = x.astype(np.float16).astype(np.float32) if dtype == "f16" else x.astype(np.float32)
    return y


def round_to_int8(x: Array) -> Array:
    """x [..., hd]: codes of -127..127 times one f16 scale for each 32 values of a head, or its rest."""
    head_dim = x.shape[-1]
    n_groups = -(-head_dim // INT8_GROUP)
    padded = np.zeros((*x.shape[:-1], n_groups * INT8_GROUP), np.float32)
    padded[..., :head_dim] = x
    groups = padded.reshape(*x.shape[:-1], n_groups, INT8_GROUP)
    largest = np.abs(groups).max(axis=-1, keepdims=True)
    scale = np.minimum(largest / np.float32(127), np.float32(65504)).astype(np.float16).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(scale > 0, np.clip(np.rint(groups / scale), -127, 127), 0)
    y: Array = (codes * scale).astype(np.float32).reshape(padded.shape)[..., :head_dim]
    return y
