"""Reads `micro-lm-*.bin`: real trained ternary matrices in a format of their own, for the kernels' tests.

Its block (LayerNorm, GELU, biases) is none of the architectures that this project runs, so it is no importer.  After
eight u32 (magic "EOPT", version 3, layers, heads, key-value heads, width, positions, vocabulary): the embedding as f32,
per layer two LayerNorms (gain, bias) around q, k, v, o and before up, down, then a last LayerNorm.  A matrix is one f32
scale, its trits (row-major, four to a byte, lowest bits first, 0: -1, 1: 0, 2: +1) and an f32 bias.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAGIC = 0x54504F45


@dataclass(frozen=True)
class TernaryMatrix:
    """trits int8 [N, K] in {-1, 0, 1}, one scale, bias f32 [N]"""

    trits: np.ndarray
    scale: float
    bias: np.ndarray


@dataclass(frozen=True)
class MicroLM:
    n_layers: int
    n_heads: int
    n_kv_heads: int
    dim: int
    n_ctx: int
    n_vocab: int
    embedding: np.ndarray  # f32 [V, D]
    matrices: dict[str, TernaryMatrix]  # "0.attn_q" ...
    norms: dict[str, tuple[np.ndarray, np.ndarray]]  # gain and bias, f32 [D] each


def read_micro_lm(path: Path) -> MicroLM:
    data = path.read_bytes()
    magic, version, n_layers, n_heads, n_kv_heads, dim, n_ctx, n_vocab = struct.unpack_from("<8I", data)
    assert (magic, version) == (MAGIC, 3), "another format"
    at = 32

    def take(n: int, dtype: str) -> np.ndarray:
        nonlocal at
        x = np.frombuffer(data, dtype, n, at)
        at += x.nbytes
        return x

    def matrix(rows: int, cols: int) -> TernaryMatrix:
        scale = float(take(1, "<f4")[0])
        fields = take(rows * cols // 4, "u1")[:, None] >> np.array([0, 2, 4, 6], np.uint8) & 3
        return TernaryMatrix(fields.astype(np.int8).reshape(rows, cols) - np.int8(1), scale, take(rows, "<f4"))

    embedding = take(n_vocab * dim, "<f4").reshape(n_vocab, dim)
    matrices, norms = {}, {}
    d_kv = dim // n_heads * n_kv_heads
    for i in range(n_layers):
        norms[f"{i}.attn_norm"] = take(dim, "<f4"), take(dim, "<f4")
        for name, rows in (("attn_q", dim), ("attn_k", d_kv), ("attn_v", d_kv), ("attn_output", dim)):
            matrices[f"{i}.{name}"] = matrix(rows, dim)
        norms[f"{i}.ffn_norm"] = take(dim, "<f4"), take(dim, "<f4")
        matrices[f"{i}.ffn_up"] = matrix(4 * dim, dim)
        matrices[f"{i}.ffn_down"] = matrix(dim, 4 * dim)
    norms["output_norm"] = take(dim, "<f4"), take(dim, "<f4")
    assert at == len(data), f"{len(data) - at} bytes are left over"
    return MicroLM(n_layers, n_heads, n_kv_heads, dim, n_ctx, n_vocab, embedding, matrices, norms)
