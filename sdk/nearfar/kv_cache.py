"""Keys and values of the positions that have been run: the readable cache behind `lower_numpy`.

Each layer has its own length, because layers above an early exit may lag behind the layers below it.  Rows are
rounded to the cache's dtype when they are appended and are read back from it, so that a row never depends on
whether its neighbours came in the same call.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nearfar.config import ModelConfig
from nearfar.errors import ContextError, UsageError

Array = NDArray[np.float32]
KVDtype = Literal["f16", "f32"]

BLOCK = 64  # positions that are allocated at once


class KVCache:
    """Owns the K and V arrays of all layers; positions are 0..length(layer)-1."""

    def __init__(self, config: ModelConfig, max_len: int, dtype: KVDtype = "f16") -> None:
        if dtype not in ("f16", "f32"):
            raise UsageError(f"KV dtype {dtype!r}: expected f16 or f32")
        if max_len < 1:
            raise UsageError(f"max_len={max_len}: expected at least 1 position")
        self.config, self.max_len, self.dtype = config, max_len, dtype
        shape = (0, config.n_kv_heads, config.head_dim)
        kind = np.float16 if dtype == "f16" else np.float32
        self._k = [np.empty(shape, kind) for _ in range(config.n_layers)]  # [capacity, KH, hd] each
        self._v = [np.empty(shape, kind) for _ in range(config.n_layers)]
        self._lengths = [0] * config.n_layers

    def length(self, layer: int = 0) -> int:
        """Positions that `layer` has run."""
        return self._lengths[layer]

    def append(self, layer: int, k: Array, v: Array) -> None:
        """Add rows: k and v are [T, KH, hd].  ContextError beyond `max_len`."""
        start = self._lengths[layer]
        stop = start + len(k)
        if stop > self.max_len:
            raise ContextError(f"{stop} positions: the cache holds {self.max_len}")
        if stop > len(self._k[layer]):
            capacity = min(self.max_len, max(2 * len(self._k[layer]), -(-stop // BLOCK) * BLOCK))
            self._k[layer] = _grown(self._k[layer], start, capacity)
            self._v[layer] = _grown(self._v[layer], start, capacity)
        self._k[layer][start:stop] = k
        self._v[layer][start:stop] = v
        self._lengths[layer] = stop

    def read(self, layer: int) -> tuple[Array, Array]:
        """All keys and values of `layer`, each f32 [length, KH, hd]."""
        n = self._lengths[layer]
        return self._k[layer][:n].astype(np.float32), self._v[layer][:n].astype(np.float32)

    def truncate(self, n: int) -> None:
        """Forget the positions from `n` on, in every layer that has them."""
        if n < 0:
            raise UsageError(f"truncate({n}): expected 0 or more positions")
        self._lengths = [min(length, n) for length in self._lengths]

    def lengths(self) -> list[int]:
        """Positions per layer, to hand to `restore` should a call fail."""
        return list(self._lengths)

    def restore(self, lengths: list[int]) -> None:
        """Forget what was appended since `lengths()` was taken."""
        self._lengths = [min(now, then) for now, then in zip(self._lengths, lengths, strict=True)]

    def fork(self, n: int | None = None) -> KVCache:
        """An independent cache with the first `n` positions (default: all) of every layer."""
        other = KVCache(self.config, self.max_len, self.dtype)
        other._k = [k.copy() for k in self._k]
        other._v = [v.copy() for v in self._v]
        other._lengths = list(self._lengths)
        if n is not None:
            other.truncate(n)
        return other

    @property
    def n_bytes(self) -> int:
        """Bytes allocated."""
        return sum(k.nbytes + v.nbytes for k, v in zip(self._k, self._v, strict=True))


def _grown(old: NDArray[np.floating], used: int, capacity: int) -> NDArray[np.floating]:
    new = np.empty((capacity, *old.shape[1:]), old.dtype)
    new[:used] = old[:used]
    return new
