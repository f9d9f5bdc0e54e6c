"""The lower layers of a model: what every engine offers, and the one place that picks an engine.

    ids [T] -> embed -> h [T, D] -> forward(first, last) -> h [T, D] -> logits(head) -> [M, V]

`lower_numpy` is the specification, `lower_native` the fast one; tests hold them equal.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nearfar import env
from nearfar.cancel import Cancel
from nearfar.config import ModelConfig
from nearfar.errors import MissingExtraError, UsageError
from nearfar.kv_cache import FULL, KVDtype, Policy
from nearfar.options import EngineOptions
from nearfar.weights import Weights

Array = NDArray[np.float32]
Ids = NDArray[np.int32]


class KV(Protocol):
    """Keys and values of one sequence; each layer has a length of its own."""

    @property
    def n_bytes(self) -> int: ...
    def length(self, layer: int = 0) -> int: ...
    def truncate(self, n: int) -> None: ...
    def fork(self, n: int | None = None) -> KV: ...


class Lower(Protocol):
    """Any range of layers, with the embedding below and the heads above.

    Rows are f32 and C-contiguous.  A row's result depends on its own input and on the rows before it in the cache,
    not on how many rows share the call.
    """

    @property
    def config(self) -> ModelConfig: ...
    @property
    def name(self) -> str: ...
    @property
    def screens(self) -> bool:
        """Whether `greedy` costs less than `logits`."""

    def new_kv(self, max_len: int, dtype: KVDtype = "f16", policy: Policy = FULL) -> KV:
        """An empty cache for at most `max_len` positions, which a Lambda policy does not all keep."""

    def embed(self, ids: Ids) -> Array:
        """i32 [T] -> f32 [T, D]; other modalities pass rows of their own to `forward` instead."""

    def forward(self, h: Array, kv: KV, first: int, last: int, cancel: Cancel | None = None) -> Array:
        """f32 [T, D] -> f32 [T, D]: the raw residual rows, which are the input of layer `last`.

        K and V of the layers [first, last) grow by T positions.  If the call is cancelled or fails, they are as
        they were.  Raises UsageError (bad range, shape, or layers of unequal length), ContextError, Cancelled.
        """

    def norm(self, h: Array, head: str = "final") -> Array:
        """f32 [M, D] -> f32 [M, D]: the rows that the head multiplies."""

    def logits(self, h: Array, head: str = "final") -> Array:
        """f32 [M, D] -> f32 [M, V].  `head` is "final" or "exit.{layer}"."""

    def greedy(self, h: Array, head: str = "final") -> tuple[Ids, Array]:
        """f32 [M, D] -> the ids that `logits(h, head).argmax(1)` gives, i32 [M], and their probabilities f32 [M].

        With a screen the probabilities are estimates, from logits of a copy of fewer bits.
        """


def open_lower(weights: Weights, backend: str | None = None, options: EngineOptions | None = None) -> Lower:
    """The engine for these weights: "native", "numpy", or the better one that is there (`backend=None`).

    NEARFAR_BACKEND, NEARFAR_THREADS and NEARFAR_CACHE stand in for what is None; the reference has one thread.
    """
    options = options or EngineOptions()
    if options.threads is None:
        options = replace(options, threads=env.threads())
    if options.cache is None:
        options = replace(options, cache=env.cache())
    lower = _open(weights, backend or env.backend(), options)
    if level := env.debug_level():
        from nearfar.traced import TracedLower

        return TracedLower(lower, level)
    return lower


def _open(weights: Weights, backend: str | None, options: EngineOptions) -> Lower:
    if backend not in (None, "native", "numpy"):
        raise UsageError(f"backend {backend!r}: expected native or numpy (LLM.open also takes llama)")
    if backend != "numpy":
        try:
            from nearfar.lower_native import NativeLower
        except ImportError as error:
            if backend == "native":
                raise MissingExtraError("nearfar_native", "dev", f"backend native ({error})") from error
            warnings.warn(f"the compiled engine is missing ({error}); numpy stands in, slowly", stacklevel=2)
        else:
            return NativeLower(weights, options)
    from nearfar.lower_numpy import NumpyLower

    return NumpyLower(weights, options)
