"""Attention over paged keys and values: the readable form in torch, and the compiled one beside it.

    block b of a sequence: positions [64 b, 64 b + 64)      K [KH, hd, 64], a lane is a position      V [KH, 64, hd]

A row walks the blocks from the first to its own with an online softmax (2112.05682), so its sums depend on positions
alone: not on the rows beside it, not on how its prompt was cut, not on which blocks they are.
"""

from __future__ import annotations

import math
import mmap
import platform
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nearfar_cloud.kv.pool import BLOCK, n_blocks_of

try:
    from nearfar_native import _core as native
except ImportError:  # not built: the readable form serves
    native = None  # type: ignore[assignment]


class Span(NamedTuple):
    """Consecutive positions of one sequence in a batch: rows [row, row + n) stand at positions [start, start + n)."""

    row: int
    n: int
    start: int
    blocks: NDArray[np.int32]  # [ceil((start + n) / BLOCK)]


@dataclass(frozen=True, slots=True)
class Spans:
    """The spans of a batch, and the same as arrays: row, n, start, place of the first block i64 [S, 4]; blocks i32."""

    items: tuple[Span, ...]
    table: NDArray[np.int64]
    blocks: NDArray[np.int32]

    @classmethod
    def of(cls, pieces: Sequence[tuple[int, int, NDArray[np.int32]]]) -> Spans:
        """(n, start, blocks) of each sequence, in the order of the rows."""
        items, table, row, first = [], [], 0, 0
        for n, start, blocks in pieces:
            items.append(Span(row, n, start, blocks[: n_blocks_of(start + n)]))
            assert len(items[-1].blocks) == n_blocks_of(start + n), (start, n, blocks)  # else memory of others is read
            table.append((row, n, start, first))
            row, first = row + n, first + len(items[-1].blocks)
        return cls(tuple(items), np.array(table, np.int64), np.concatenate([s.blocks for s in items]).astype(np.int32))

    def positions(self) -> Tensor:
        """int64 [R]"""
        return torch.cat([torch.arange(s.start, s.start + s.n) for s in self.items])


class KVStore:
    """The blocks of layers [first, last): of each K [n_blocks, KH, hd, BLOCK] and V [n_blocks, KH, BLOCK, hd].

    `k` and `v` begin with layer `first`: the upper half of a model keeps nothing for the layers that it lacks.
    bf16 has the same shapes, its numbers in pairs; int8 is u8 [n_blocks, KH, head_bytes]: codes in pairs, then an f32
    scale for each position (`native/src/paged_attention.h`).
    Memory is there once it has been written: blocks that lower layers never use (`is_sparse`) take none in them.
    """

    def __init__(
        self,
        layers: tuple[int, int],
        n_blocks: int,
        n_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        *,
        is_sparse: bool = False,
    ) -> None:
        self.first, self.head_dim = layers[0], head_dim
        n_layers = layers[1] - layers[0]
        k, v = (head_dim, BLOCK), (BLOCK, head_dim)
        if dtype == torch.int8:
            k = v = (head_bytes(head_dim, dtype),)  # type: ignore[assignment]
            dtype = torch.uint8
        # Zeros: what lies behind the last position of a block is multiplied by zero, and must be finite.
        self.k = zeros(n_layers, (n_blocks, n_kv_heads, *k), dtype, is_sparse=is_sparse)
        self.v = zeros(n_layers, (n_blocks, n_kv_heads, *v), dtype, is_sparse=is_sparse)

    @property
    def block_bytes(self) -> int:
        """Of one block in all layers."""
        return self.bytes_from(self.first)

    def bytes_from(self, first: int) -> int:
        """Of one block in the layers from `first` on."""
        at = first - self.first
        return sum(x[0].nbytes for x in (*self.k[at:], *self.v[at:]))

    def write(self, layer: int, span: Span, k: Tensor, v: Tensor) -> None:
        """k, v [n, KH, hd] of the span's positions into their blocks."""
        position = torch.arange(span.start, span.start + span.n)
        block, lane = torch.from_numpy(span.blocks).long()[position // BLOCK], position % BLOCK
        keys, values = self.k[layer - self.first], self.v[layer - self.first]
        keys[block, :, :, lane] = k.to(keys.dtype)
        values[block, :, lane] = v.to(values.dtype)

    def read(self, blocks: Tensor, first: int | None = None) -> list[Tensor]:
        """A copy of blocks in all layers from `first` on, in order: keys, then values."""
        at = 0 if first is None else first - self.first
        return [x[blocks].clone() for x in (*self.k[at:], *self.v[at:])]

    def restore(self, blocks: Tensor, copies: list[Tensor], first: int | None = None) -> None:
        """What `read` gave, or the first blocks of it, into as many blocks, which may be others.

        Only layers that were read are written, and only those from `first` on.
        """
        half = len(copies) // 2
        n = min(half, len(self.k) - (0 if first is None else first - self.first))
        for mine, theirs in ((self.k, copies[:half]), (self.v, copies[half:])):
            for x, copy in zip(mine[-n:], theirs[-n:], strict=True):
                x[blocks] = copy[: len(blocks)]


# Memory that is shared has no huge pages; Windows knows neither word.
PRIVATE: dict[str, Any] = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
# MAP_NORESERVE, for which Python has no name: Linux else refuses more than the machine has, though little is written.
NO_RESERVE = 0x4000 if sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64") else 0


def zeros(n: int, shape: tuple[int, ...], dtype: torch.dtype, *, is_sparse: bool = False) -> list[Tensor]:
    """`n` tensors of zeros in one piece of memory, in huge pages where the system has them.

    Blocks lie anywhere, so with pages of 4 KiB most of a step would be spent on finding their addresses.
    `is_sparse`: much of it is never written, so the machine may have less.
    """
    n_bytes = math.prod(shape) * dtype.itemsize
    flags = {"flags": PRIVATE["flags"] | NO_RESERVE} if is_sparse and PRIVATE else PRIVATE
    memory = mmap.mmap(-1, n * n_bytes, **flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return [
        torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=i * n_bytes).view(shape) for i in range(n)
    ]


def head_bytes(head_dim: int, dtype: torch.dtype) -> int:
    """Of the keys, or the values, of one head of one block."""
    scales = BLOCK * torch.float32.itemsize if dtype == torch.int8 else 0
    return head_dim * BLOCK * dtype.itemsize + scales


class Attention(Protocol):
    """Puts keys and values into the store and attends."""

    name: str

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
        """q f32 [R, H, hd], k and v f32 [R, KH, hd] of the spans, rotated -> f32 [R, H * hd]"""


def attention(store: KVStore, n_heads: int, name: str = "auto") -> Attention:
    """The compiled form where it is built and fits the store ("native"), the readable one otherwise ("torch")."""
    _, n_kv_heads, head_dim, _ = store.k[0].shape
    fits = native is not None and head_dim % 16 == 0 and store.k[0].dtype in (torch.float32, torch.float16)
    if name == "native" or (name == "auto" and fits):
        assert fits, "the compiled attention does not fit this store"
        return NativeAttention(store, n_heads, n_kv_heads, head_dim)
    return TorchAttention(store)


class NativeAttention:
    """`native/src/paged_attention.h`, on as many threads as torch has."""

    name = "native"

    def __init__(self, store: KVStore, n_heads: int, n_kv_heads: int, head_dim: int) -> None:
        self._first, self._k, self._v = store.first, [bits(x) for x in store.k], [bits(x) for x in store.v]
        self._run = native.PagedAttention(n_heads, n_kv_heads, head_dim, torch.get_num_threads())

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
        store = self._k[layer - self._first], self._v[layer - self._first]
        where = spans.table, spans.blocks
        self._run.append(k.contiguous().numpy(), v.contiguous().numpy(), *store, *where)
        return torch.from_numpy(self._run.attend(q.contiguous().numpy(), *store, *where))


def bits(blocks: Tensor) -> Any:
    """The memory of blocks as numpy: f32 and u8 as they are, f16 and bf16 as their bits in u16."""
    return (blocks.view(torch.uint16) if blocks.dtype.itemsize == 2 else blocks).numpy()


class TorchAttention:
    """The readable form."""

    name = "torch"

    def __init__(self, store: KVStore) -> None:
        self.store = store

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, spans: Spans) -> Tensor:
        rows = []
        for span in spans.items:
            here = slice(span.row, span.row + span.n)
            self.store.write(layer, span, k[here], v[here])
            rows.append(attend(q[here], self.store, layer, span))
        return torch.cat(rows)


def attend(q: Tensor, store: KVStore, layer: int, span: Span) -> Tensor:
    """q [n, H, hd] of a span whose keys and values are written -> f32 [n, H * hd]"""
    n, n_heads, hd = q.shape
    keys, values = store.k[layer - store.first], store.v[layer - store.first]
    n_kv = keys.shape[1]
    q = q.float().reshape(n, n_kv, n_heads // n_kv, hd) * hd**-0.5
    position = torch.arange(span.start, span.start + span.n).view(n, 1, 1, 1)
    top = q.new_full((n, n_kv, n_heads // n_kv, 1), -torch.inf)
    total, out = torch.zeros_like(top), torch.zeros_like(q)
    for b, block in enumerate(span.blocks.tolist()):
        at = torch.arange(b * BLOCK, (b + 1) * BLOCK)
        score = torch.matmul(q, keys[block].float())  # [n, KH, G, BLOCK]
        score = score.masked_fill(at > position, -torch.inf)
        higher = torch.maximum(top, score.amax(-1, keepdim=True))
        p, keep = (score - higher).exp(), (top - higher).exp()
        total = total * keep + p.sum(-1, keepdim=True)
        # Lanes behind the last position may hold what a failed request left there.
        v = values[block].float().masked_fill((at >= span.start + n).view(1, BLOCK, 1), 0)
        out, top = out * keep + torch.matmul(p, v), higher
    return (out / total).reshape(n, n_heads * hd)
