"""`Lower` through the compiled engine: the same calls as `lower_numpy`, which says what they compute.

The only importer of `nearfar_native`.  Here Python's objects become the engine's, and its refusals become ours; the
engine releases the GIL while it works and takes one thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nearfar import env
from nearfar.cancel import Cancel
from nearfar.config import ModelConfig
from nearfar.errors import Cancelled, ConfigError, ContextError, EngineBusy, KVTruncated, NearfarError, UsageError
from nearfar.kv_cache import FULL, KVDtype, Lambda, Policy, check_dtype
from nearfar.lower import KV
from nearfar.lower_numpy import bend, check_ids, residuals
from nearfar.options import EngineOptions
from nearfar.panel_file import Panels
from nearfar.panel_store import CacheState, open_panels
from nearfar.quant import TERNARY
from nearfar.weights import Weights
from nearfar_native import _core

Array = NDArray[np.float32]
Matrix = tuple[int, int, int, NDArray[np.uint8]]  # type, rows, cols, bytes


@dataclass(frozen=True, slots=True)
class Panel:
    """One matrix as the engine holds it: what a token reads."""

    name: str
    kind: str  # "i2", "q4", "int8", "f32", ...
    rows: int
    cols: int
    n_bytes: int


@contextmanager
def _our_errors() -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise UsageError(str(error)) from None
    except _core.ContextFull as error:
        raise ContextError(str(error)) from None
    except _core.KVTruncated as error:
        raise KVTruncated(str(error)) from None
    except _core.Cancelled as error:
        raise Cancelled(str(error)) from None
    except _core.EngineBusy as error:
        raise EngineBusy(str(error)) from None
    except _core.EngineFailure as error:
        raise NearfarError(str(error)) from None


class NativeKV:
    """The engine's cache: blocks of 64 positions, shared between forks until one of them changes."""

    def __init__(self, cache: _core.KVCache, first: int) -> None:
        self.cache, self._first = cache, first

    @property
    def n_bytes(self) -> int:
        """Bytes of the blocks referred to, those shared with forks included."""
        with _our_errors():
            return self.cache.n_bytes

    @property
    def max_len(self) -> int:
        return self.cache.max_len

    def length(self, layer: int | None = None) -> int:
        """Positions that `layer` (default: the lowest one here) has run."""
        with _our_errors():
            return self.cache.length(self._first if layer is None else layer)

    def truncate(self, n: int) -> None:
        """Forget the positions from `n` on, in every layer that has them."""
        with _our_errors():
            self.cache.truncate(n)

    def fork(self, n: int | None = None) -> NativeKV:
        """An independent cache with the first `n` positions (default: all); copies at most one block a layer."""
        with _our_errors():
            return NativeKV(self.cache.fork(self.cache.max_len if n is None else n), self._first)


class NativeLower:
    """`Lower` in C++: layers [first, last) of a file (default: all), packed for the best kernels of this CPU.

    NEARFAR_ISA forces the kernels; `cache` says what the panel store did.  `weights` must stay open: embeddings are
    read from its file.  Raises ConfigError for an ISA that the CPU lacks, UsageError for a bad range.
    """

    name = "native"

    def __init__(
        self, weights: Weights, options: EngineOptions | None = None, first: int | None = None, last: int | None = None
    ) -> None:
        self.weights, self.options = weights, options or EngineOptions()
        self.config: ModelConfig = weights.config
        here = self.config.layers
        self.first, self.last = here[0] if first is None else first, here[1] if last is None else last
        tensors = weights.file.tensors
        self.n_threads = self.options.threads or _core.default_threads()
        matrices = {}
        self._residuals = residuals(weights)  # small: numpy multiplies them
        for name in (n for n, info in tensors.items() if len(info.shape) == 2 and not n.startswith("exit.")):
            kind, (rows, cols), raw = weights.raw(name)
            matrices[name] = (int(kind), rows, cols, raw)
        vectors = {name: weights.f32(name) for name, info in tensors.items() if len(info.shape) == 1}
        vectors |= {head: weights.norm_gain(head) for head in weights.heads}
        # The engine wants an embedding.  An upper half may have none: the head stands in, and `embed` refuses.
        matrices.setdefault("token_embd.weight", matrices[weights.head_name])
        isa = selected_isa()
        with _our_errors():
            panels, self.cache = self._open_panels(matrices, vectors, isa)
            self._model = _core.Model(
                _core.ModelSpec(**self.config.engine_spec()),
                matrices,
                vectors,
                {n: (p.kind, p.rows, p.cols, p.scale, p.data, p.row_scales) for n, p in panels.items()},
                self.first,
                self.last,
                self.n_threads,
                isa,
                self.options.lut == "fast",
                self.options.head,
            )
        self.screens = self._model.is_screened
        weights.file.release_pages()  # packed: from now on only rows of the embedding are read

    def _open_panels(
        self, matrices: dict[str, Matrix], vectors: dict[str, Array], isa: str
    ) -> tuple[dict[str, Panels], CacheState]:
        """What the store keeps of the matrices that a token reads: those of the layers, and the head."""
        here = self.config.layers
        if not here[0] <= self.first < self.last <= here[1]:
            raise UsageError(f"layers [{self.first}, {self.last}): the model has [{here[0]}, {here[1]})")
        layers = [f"blk.{i}." for i in range(self.first, self.last)]
        names = [n for n in matrices if n.startswith(tuple(layers)) or n == self.weights.head_name]
        n_ternary = sum(matrices[n][1] * matrices[n][2] for n in names if matrices[n][0] in TERNARY)
        requantized = self.options.head == "q4"
        ternary = _core.ternary_kind(isa, self.options.lut == "fast", n_ternary)

        def pack(name: str) -> tuple[Panels, tuple[int, int]]:
            found = vectors.get(f"{name.removesuffix('.weight')}.scale")
            scale = 1.0 if found is None else float(found[0])
            if requantized and name == self.weights.head_name:
                kind, data, row_scales, *sums = _core.requantize(matrices[name], scale, self.n_threads)
            else:
                kind, data, row_scales, *sums = _core.pack(matrices[name], scale, ternary)
            return Panels(kind, *matrices[name][1:3], scale, data, row_scales), (sums[0], sums[1])

        return open_panels(
            self.weights.file,
            names,
            f"{_core.PANEL_VERSION}-{ternary}{'-q4head' * requantized}",
            (self.first, self.last),
            self.options.cache,
            pack,
            lambda parts: _core.checksums(parts, self.n_threads),
            self.n_threads,
        )

    @property
    def isa(self) -> str:
        """The kernels in use: one of `env.ISA_NAMES`."""
        return self._model.isa

    def panels(self) -> list[Panel]:
        """Each packed matrix; a token reads the bytes of all of them."""
        return [Panel(*panel) for panel in self._model.panels()]

    def new_kv(self, max_len: int, dtype: KVDtype = "f16", policy: Policy = FULL) -> NativeKV:
        check_dtype(dtype)
        sink, window = (policy.sink, policy.window) if isinstance(policy, Lambda) else (0, 0)
        with _our_errors():
            return NativeKV(self._model.new_kv(max_len, dtype, sink, window), self.first)

    def embed(self, ids: NDArray[np.int32]) -> Array:
        check_ids(ids, self.config)
        with _our_errors():
            return self._model.embed(np.ascontiguousarray(ids, np.int32))

    def forward(self, h: Array, kv: KV, first: int, last: int, cancel: Cancel | None = None) -> Array:
        assert isinstance(kv, NativeKV), "a cache of another engine"
        with _our_errors():
            return self._model.forward(_rows(h), kv.cache, first, last, None if cancel is None else cancel.flag)

    def norm(self, h: Array, head: str = "final") -> Array:
        with _our_errors():
            return self._model.norm(self._bent(h, head), head)

    def logits(self, h: Array, head: str = "final") -> Array:
        with _our_errors():
            return self._model.logits(self._bent(h, head), head)

    def greedy(self, h: Array, head: str = "final") -> tuple[NDArray[np.int32], Array]:
        ids, sure, _ = self.screen(h, head)
        return ids, sure

    def screen(self, h: Array, head: str = "final") -> tuple[NDArray[np.int32], Array, NDArray[np.int32]]:
        """As `greedy`, and how many panels (64 rows) of the head were read for each row besides the screen, i32 [M]."""
        with _our_errors():
            return self._model.greedy(self._bent(h, head), head)

    def _bent(self, h: Array, head: str) -> Array:
        """The rows that the engine's norm of that head takes."""
        h = _rows(h)
        if head not in self._residuals:
            return h
        if h.shape[1] != self.config.d_model:
            raise UsageError(f"rows of shape {h.shape}: expected [T, {self.config.d_model}]")
        return _rows(bend(h, *self._residuals[head], self.config.norm_eps))


def selected_isa() -> str:
    """The kernels that this process uses: NEARFAR_ISA, or the best that the CPU has.  ConfigError if it lacks them."""
    wanted = env.isa()
    try:
        return _core.isa(wanted or "")
    except ValueError as error:
        raise ConfigError(f"NEARFAR_ISA={wanted}: {error}") from None


def isas_available() -> list[str]:
    """Kernel sets that this CPU and build have, worst first."""
    return _core.isas_available()


def has_lookups() -> bool:
    """Whether the kernels in use multiply by lookup: what `lut="fast"` needs."""
    return _core.has_lookups(selected_isa())


def default_threads() -> int:
    """Physical cores that this process may use."""
    return _core.default_threads()


def read_bandwidth(threads: int, n_bytes: int = 256 << 20, *, n_passes: int = 5, cpu_time: bool = False) -> float:
    """GB/s (1e9) that `threads` read together from memory; `n_bytes` should be 4 times the last cache or more.

    `cpu_time` counts the process's CPU time, divided by the threads, instead of the wall's: for a busy machine.
    """
    with _our_errors():
        return _core.read_bandwidth(threads, n_bytes, n_passes, selected_isa(), cpu_time)


def int8_peak(threads: int, *, n_passes: int = 5, cpu_time: bool = False) -> tuple[str, float]:
    """The int8 multiplier of the kernels in use, and the GOPS (a multiply-add is 2) that `threads` reach with it."""
    with _our_errors():
        return _core.int8_peak(threads, n_passes, selected_isa(), cpu_time)


@dataclass(frozen=True, slots=True)
class ProductSpeed:
    """One product of a packed matrix of `kind`, [rows, cols], and `m` rows of activations: median and best seconds."""

    kind: str
    m: int
    rows: int
    cols: int
    n_bytes: int
    seconds: float
    fastest_seconds: float


def panel_kinds() -> list[str]:
    """The kinds of packed matrices that the kernels in use multiply."""
    return _core.panel_kinds(selected_isa())


def product_speed(
    kind: str, cols: int, n_bytes: int, m: int, threads: int, *, seconds: float = 0.3, cpu_time: bool = False
) -> ProductSpeed:
    """How fast the kernel of `kind` multiplies a matrix of random codes, `cols` wide and of about `n_bytes`."""
    with _our_errors():
        rows, size, median, fastest = _core.product_speed(
            kind, cols, n_bytes, m, threads, seconds, selected_isa(), cpu_time
        )
    return ProductSpeed(kind, m, rows, cols, size, median, fastest)


def _rows(h: Array) -> Array:
    if h.ndim != 2:
        raise UsageError(f"rows of shape {h.shape}: expected [T, D]")
    return np.ascontiguousarray(h, np.float32)
