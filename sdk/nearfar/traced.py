"""What NEARFAR_DEBUG shows of an engine at work: a `Lower` around another one, writing a line per call to stderr.

Level 1: the time of each stage.  2: shapes, and how sure each head is.  4: a checksum of the rows after each layer,
to be compared line by line between two engines (`diff`).  Times, shapes and checksums only: never a prompt or a token.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.cancel import Cancel
from nearfar.exit import max_softmax
from nearfar.kv_cache import FULL, KVDtype, Policy
from nearfar.lower import KV, Lower

Array = NDArray[np.float32]


class TracedLower:
    """Calls go through unchanged; attributes of the engine inside are found here too."""

    def __init__(self, inner: Lower, level: int) -> None:
        self._inner, self._level = inner, level
        self.config, self.name, self.screens = inner.config, inner.name, inner.screens
        if (state := getattr(inner, "cache", None)) is not None:  # the reference packs nothing
            _say(f"packed matrices: {state}")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def new_kv(self, max_len: int, dtype: KVDtype = "f16", policy: Policy = FULL) -> KV:
        return self._inner.new_kv(max_len, dtype, policy)

    def embed(self, ids: NDArray[np.int32]) -> Array:
        with self._stage(f"embed [{len(ids)}]"):
            return self._inner.embed(ids)

    def forward(self, h: Array, kv: KV, first: int, last: int, cancel: Cancel | None = None) -> Array:
        if self._level >= 4:
            self._checksums(h, kv.fork(), first, last, cancel)
        with self._stage(f"layers [{first}, {last}) rows {list(h.shape)} at {kv.length(first)}"):
            return self._inner.forward(h, kv, first, last, cancel)

    def norm(self, h: Array, head: str = "final") -> Array:
        return self._inner.norm(h, head)

    def logits(self, h: Array, head: str = "final") -> Array:
        with self._stage(f"head {head} rows {list(h.shape)}"):
            z = self._inner.logits(h, head)
        if self._level >= 2:
            _say(f"head {head}: largest probability {max_softmax(z[-1]):.6f}")
        return z

    def greedy(self, h: Array, head: str = "final") -> tuple[NDArray[np.int32], Array]:
        with self._stage(f"head {head}, the largest logit only, rows {list(h.shape)}"):
            return self._inner.greedy(h, head)

    @contextmanager
    def _stage(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        shapes = what if self._level >= 2 else what.split(" rows")[0]
        _say(f"{1000 * (time.perf_counter() - started):9.3f} ms  {shapes}")

    def _checksums(self, h: Array, kv: KV, first: int, last: int, cancel: Cancel | None) -> None:
        """Layer by layer on a copy of the cache, so that the call itself stays all or nothing."""
        for i in range(first, last):
            h = self._inner.forward(h, kv, i, i + 1, cancel)
            norm = float(np.sqrt(np.mean(h.astype(np.float64) ** 2)))
            _say(f"layer {i:3} crc {zlib.crc32(np.ascontiguousarray(h).tobytes()):08x} rms {norm:.6g}")


def _say(line: str) -> None:
    print(f"nearfar: {line}", file=sys.stderr)
