"""The C++ engine of nearfar.  Use it through nearfar.lower_native."""

from collections.abc import Mapping, Sequence
from typing import Annotated, overload

import numpy
from numpy.typing import NDArray


class EngineBusy(RuntimeError):
    pass

class Cancelled(RuntimeError):
    pass

class ContextFull(RuntimeError):
    pass

class KVTruncated(RuntimeError):
    pass

class EngineFailure(RuntimeError):
    pass

def isas_available() -> list[str]:
    """Kernel sets that this CPU and build have, worst first."""

def isa(name: str = '') -> str:
    """
    The kernel set that `name` selects ("": the best).  ValueError if the CPU lacks it.
    """

def has_lookups(isa: str = '') -> bool:
    """Whether a kernel set multiplies by lookup."""

def default_threads() -> int:
    """Physical cores that this process may use."""

def read_bandwidth(threads: int, n_bytes: int, n_passes: int = 5, isa: str = '', cpu_time: bool = False) -> float:
    """
    GB/s (1e9) that `threads` read together from `n_bytes` of memory, best pass.
    """

def int8_peak(threads: int, n_passes: int = 5, isa: str = '', cpu_time: bool = False) -> tuple[str, float]:
    """
    The int8 multiplier, and the GOPS (a multiply-add is 2) that `threads` reach with it.
    """

def panel_kinds(isa: str = '') -> list[str]:
    """Kinds of packed matrices that `isa` has."""

def product_speed(kind: str, cols: int, n_bytes: int, m: int, threads: int, seconds: float, isa: str = '', cpu_time: bool = False) -> tuple[int, int, float, float]:
    """
    (rows, bytes, median seconds, fewest seconds) of a product with `m` rows of activations, its matrix of random codes, `cols` wide and of about `n_bytes`.
    """

def largest(z: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> Annotated[NDArray[numpy.int32], dict(shape=(None,))]:
    """
    f32 [M, V] -> i32 [M]: where the largest number of each row is, the first of equals; -1 if not all are finite.
    """

def float_forms(isa: str = '') -> list[str]:
    """
    What matrices of floats can become, of which `isa` has kernels of its own.
    """

PANEL_VERSION: int = 2

def ternary_kind(isa: str, lut: bool, n_weights: int) -> str:
    """
    The panels of ternary matrices in a model with as many ternary weights.
    """

def pack(tensor: tuple[int, int, int, Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]], scale: float, ternary: str) -> tuple[str, Annotated[NDArray[numpy.uint8], dict(shape=(None,), writable=False)], Annotated[NDArray[numpy.uint8], dict(shape=(None,), writable=False)], int, int]:
    """
    (type, rows, cols, bytes) -> kind, panels u8, row scales u8, the checksums of both.
    """

def requantize(tensor: tuple[int, int, int, Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]], scale: float, threads: int) -> tuple[str, Annotated[NDArray[numpy.uint8], dict(shape=(None,), writable=False)], Annotated[NDArray[numpy.uint8], dict(shape=(None,), writable=False)], int, int]:
    """As `pack`, to 4.5 bits: the head of the mode "q4"."""

def checksums(parts: Sequence[Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]], threads: int) -> list[int]:
    """One checksum for each of `parts`, at the speed of memory."""

class ModelSpec:
    """Sizes and variants of one model; immutable."""

    def __init__(self, *, n_layers: int, d_model: int, n_heads: int, n_kv_heads: int, head_dim: int, d_ff: int, n_vocab: int, norm_eps: float, rope_base: float, rope_scale: float, rope_adjacent: bool, relu2: bool, has_sub_norms: bool, has_qk_norms: bool) -> None: ...

class PagedStore:
    """
    Blocks of 64 positions in all layers of a model: K [n, KH, hd, 64] and V [n, KH, 64, hd] each, f32, or f16 as the bits in u16; with `bf16`, bf16 in pairs (paged_attention.h).
    """

    @overload
    def __init__(self, k: Sequence[Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), order='C', device='cpu')]], v: Sequence[Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), order='C', device='cpu')]], bf16: bool = False) -> None: ...

    @overload
    def __init__(self, k: Sequence[Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None, None), order='C', device='cpu')]], v: Sequence[Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None, None), order='C', device='cpu')]], bf16: bool = False) -> None: ...

    @overload
    def __init__(self, k: Sequence[Annotated[NDArray[numpy.uint8], dict(shape=(None, None, None), order='C', device='cpu')]], v: Sequence[Annotated[NDArray[numpy.uint8], dict(shape=(None, None, None), order='C', device='cpu')]], head_dim: int) -> None:
        """
        Of int8 with a scale for each position of a head: u8 [n, KH, hd * 64 + 256].
        """

class KVCache:
    """Keys and values of one sequence; made by Model.new_kv."""

    def length(self, layer: int) -> int:
        """Positions that `layer` has run."""

    def truncate(self, n: int) -> None:
        """Forget the positions from `n` on, in all layers."""

    def fork(self, n: int) -> KVCache:
        """
        An independent cache with the first `n` positions; full blocks are shared.
        """

    @property
    def n_bytes(self) -> int:
        """Bytes of the blocks, shared ones included."""

    @property
    def max_len(self) -> int: ...

class Model:
    """Layers [first, last) of a model, packed for `isa`."""

    def __init__(self, spec: ModelSpec, matrices: Mapping[str, tuple[int, int, int, Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]]], vectors: Mapping[str, Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)]], panels: Mapping[str, tuple[str, int, int, float, Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)]]], first: int, last: int, threads: int, isa: str = '', lut: bool = False, head: str = 'file', floats: str = 'exact') -> None:
        """
        matrices: GGUF name -> (type, rows, cols, bytes); vectors: name -> f32 [n], with the gains of the heads as "final" and "exit.{layer}"; panels: GGUF name -> (kind, rows, cols, scale, data, row_scales) of what `pack` made before.  Only the bytes of the embedding and of the panels are referred to later.  lut: ternary matrices multiply by lookup, near the exact product.  floats: matrices of floats stay "exact", or become "bf16" that multiply bf16, or "w8", int8 with a scale a row that multiply int8.
        """

    @property
    def isa(self) -> str: ...

    @property
    def n_threads(self) -> int: ...

    def panels(self) -> list[tuple[str, str, int, int, int]]:
        """(name, kind, rows, cols, bytes) of each packed matrix."""

    def new_kv(self, max_len: int, dtype: str, sink: int = 0, window: int = 0) -> KVCache:
        """
        An empty cache in "f16", "f32" or "int8".  With a window, rows see the last `window` positions and the first `sink` ones; without, all.
        """

    def embed(self, ids: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None))]:
        """i32 [T] -> f32 [T, D]"""

    def forward(self, h: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], kv: KVCache, first: int, last: int, cancel: Annotated[NDArray[numpy.uint8], dict(shape=(1), order='C', device='cpu', writable=False)] | None = None) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None))]:
        """
        f32 [T, D] -> f32 [T, D]; the cache grows by T, or by nothing if the call fails.
        """

    def forward_paged(self, h: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], store: PagedStore, spans: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)], blocks: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], first: int, last: int) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None))]:
        """
        f32 [R, D] of many sequences -> f32 [R, D]; spans and blocks as in PagedAttention, whose rows are all of h in order.
        """

    def norm(self, h: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], head: str) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None))]:
        """f32 [M, D] -> f32 [M, D]: what the head multiplies."""

    def logits(self, h: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], head: str) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None))]:
        """f32 [M, D] -> f32 [M, V]: norm and head."""

    @property
    def is_screened(self) -> bool: ...

    def greedy(self, h: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], head: str) -> tuple[Annotated[NDArray[numpy.int32], dict(shape=(None,))], Annotated[NDArray[numpy.float32], dict(shape=(None,))], Annotated[NDArray[numpy.int32], dict(shape=(None,))]]:
        """
        f32 [M, D] -> the ids of the largest logits i32 [M], their probabilities f32 [M], the panels of the head that were read besides the screen i32 [M].
        """

class Matrix:
    """One packed matrix, for tests and benchmarks of the kernels."""

    def __init__(self, type: int, rows: int, cols: int, bytes: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], isa: str = '', lut: bool = False, floats: str = 'exact') -> None: ...

    @property
    def kind(self) -> str: ...

    @property
    def n_bytes(self) -> int: ...

    def multiply(self, x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)]) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None))]:
        """x f32 [M, cols] -> f32 [M, rows], one thread."""

class PagedAttention:
    """Attention of many sequences over one store of blocks of 64 positions."""

    def __init__(self, n_heads: int, n_kv_heads: int, head_dim: int, threads: int, isa: str = '') -> None: ...

    @overload
    def append(self, k: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], v: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], k_store: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), order='C', device='cpu')], v_store: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), order='C', device='cpu')], spans: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)], blocks: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None: ...

    @overload
    def append(self, k: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], v: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], k_store: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None, None), order='C', device='cpu')], v_store: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None, None), order='C', device='cpu')], spans: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)], blocks: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> None:
        """
        k, v f32 [R, KH, hd] into the blocks of their spans, i64 [S, 4]: row, n, start, and where in `blocks` i32 [*] the list of the sequence begins.
        """

    @overload
    def attend(self, q: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], k_store: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), order='C', device='cpu')], v_store: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None, None), order='C', device='cpu')], spans: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)], blocks: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None))]: ...

    @overload
    def attend(self, q: Annotated[NDArray[numpy.float32], dict(shape=(None, None, None), order='C', device='cpu', writable=False)], k_store: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None, None), order='C', device='cpu')], v_store: Annotated[NDArray[numpy.uint16], dict(shape=(None, None, None, None), order='C', device='cpu')], spans: Annotated[NDArray[numpy.int64], dict(shape=(None, None), order='C', device='cpu', writable=False)], blocks: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)]) -> Annotated[NDArray[numpy.float32], dict(shape=(None, None))]:
        """
        q f32 [R, H, hd] -> f32 [R, H * hd]; rows outside the spans are left undefined.
        """
