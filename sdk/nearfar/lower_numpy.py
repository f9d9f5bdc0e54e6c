"""The forward pass in plain numpy: the specification that every fast path is compared with.

    h [T, D]  ->  for each layer:  h += wo(attention(rope(qkv(norm(h)))));  h += down(act(gate(norm(h))) * up(norm(h)))

One numeric rule covers all weight types: `y = fake_quantize(x) @ dequantize(W).T`, where the grain of the
activations (one scale a row, 256, 32, or none) belongs to the weight type (`quant.ACTIVATION_GRAIN`).  With `lut`,
ternary matrices with one scale a row multiply by lookup instead (`quant.lookup_product`).
Sources: RMSNorm 1910.07467 eq. 4, RoPE 2104.09864 eq. 34, GQA 2305.13245, SwiGLU 2002.05202,
BitNet b1.58 2402.17764 (ternary weights, int8 rows), squared ReLU 2109.08668.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nearfar.cancel import Cancel
from nearfar.config import ModelConfig
from nearfar.errors import ContextError, UsageError
from nearfar.gguf_reader import TensorType
from nearfar.kv_cache import FULL, Full, Held, KVCache, KVDtype, Lambda, Policy
from nearfar.lower import KV
from nearfar.options import EngineOptions
from nearfar.quant import (
    ACTIVATION_GRAIN,
    TERNARY,
    dequantize,
    fake_quantize_activations,
    lookup_product,
    one_scale_a_row,
    quantize,
    unpack_ternary,
)
from nearfar.weights import Weights

Array = NDArray[np.float32]


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """x [..., D], gain [D] -> [..., D]"""
    scale = 1.0 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))  # [..., 1]
    y: Array = x * scale * gain
    return y


def bend(h: Array, down: Array, up: Array, eps: float) -> Array:
    """h [M, D], down [R, D], up [D, R] -> [M, D]: n + up silu(down n) of n = h / rms(h).

    The residual of a low-rank exit, before its norm (EE-Tuning, 2402.00518): what the layers above would add on
    average.  One row at a time, so that a row's bits do not depend on its company.
    """
    n = rms_norm(h, np.ones(1, np.float32), eps)
    with np.errstate(over="ignore"):
        return np.stack([row + up @ _silu(down @ row) for row in n]) if len(n) else n


def _silu(x: Array) -> Array:
    y: Array = x / (1 + np.exp(-x))
    return y


def rope_angles(config: ModelConfig, start: int, n: int, factors: Array | None = None) -> tuple[Array, Array]:
    """cos and sin, f32 [n, hd/2], of positions start..start+n-1; angles in double, for positions near a million.

    `factors` [hd/2] divide the frequencies (`rope_freqs.weight` of Llama 3.1 and later).
    """
    half = config.head_dim // 2
    frequency = config.rope_base ** (-np.arange(half, dtype=np.float64) / half)  # [hd/2]
    if factors is not None:
        frequency = frequency / factors.astype(np.float64)
    position = np.arange(start, start + n, dtype=np.float64) * config.rope_scale
    angle = position[:, None] * frequency[None, :]
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x: Array, cos: Array, sin: Array, pairs: str) -> Array:
    """x [T, H, hd], cos and sin [T, hd/2] -> [T, H, hd].  `pairs` as in ModelConfig.rope_pairs."""
    half = x.shape[-1] // 2
    first = (slice(None), slice(None), slice(0, None, 2) if pairs == "adjacent" else slice(0, half))
    second = (slice(None), slice(None), slice(1, None, 2) if pairs == "adjacent" else slice(half, None))
    a, b, c, s = x[first], x[second], cos[:, None, :], sin[:, None, :]
    out = np.empty_like(x)
    out[first] = a * c - b * s
    out[second] = a * s + b * c
    return out


def softmax(x: Array) -> Array:
    """Along the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    p: Array = e / e.sum(axis=-1, keepdims=True)
    return p


def attention(q: Array, held: Held, start: int, policy: Policy = FULL, far_q: Array | None = None) -> Array:
    """q [T, H, hd] from position start, rotated -> [T, H * hd]; H / KH queries share a key.

    With a Lambda policy row i sees j where i - j < window, and the sinks j < sink from a distance of at most `window`:
    those that have left the window by their unrotated keys and `far_q` [T, H, hd], the query rotated to position
    `window` (LM-Infinite, 2308.16137, section 4).  One softmax over both.
    """
    position = (start + np.arange(len(q)))[:, None]  # [T, 1]
    distance = position - np.arange(held.oldest, held.length)  # [T, S]
    if isinstance(policy, Full):
        return attend([(q, held.k, held.v, distance >= 0)])
    assert far_q is not None
    far = position - np.arange(len(held.sink_k)) >= policy.window  # [T, sinks]
    return attend(
        [
            (far_q, held.sink_k, held.sink_v, far),
            (q, held.k, held.v, (distance >= 0) & (distance < policy.window)),
        ]
    )


def attend(parts: list[tuple[Array, Array, Array, NDArray[np.bool_]]]) -> Array:
    """One softmax over parts of q [T, H, hd], k and v [S, KH, hd], and which keys a row sees [T, S] -> [T, H * hd]."""
    scores = []
    for q, k, _, visible in parts:
        n_rows, n_heads, head_dim = q.shape
        q = q.reshape(n_rows, k.shape[1], n_heads // k.shape[1], head_dim)
        score = np.einsum("tkgd,skd->kgts", q, k) / np.float32(np.sqrt(head_dim))  # [KH, G, T, S]
        scores.append(np.where(visible, score, np.float32(-np.inf)))
    weights = softmax(np.concatenate(scores, axis=-1))
    o: Array = np.einsum("kgts,skd->tkgd", weights, np.concatenate([v for _, _, v, _ in parts]))
    return o.reshape(n_rows, n_heads * head_dim)


def activate(gate: Array, up: Array, kind: str) -> Array:
    """The gated product of the feed-forward half: "silu" or "relu2"."""
    gated: Array = np.square(np.maximum(gate, 0)) if kind == "relu2" else _silu(gate)
    return gated * up


class NumpyLower:
    """`Lower` in numpy; dequantizes each matrix once, when it is first used."""

    name = "numpy"

    def __init__(self, weights: Weights, options: EngineOptions | None = None) -> None:
        self.weights = weights
        self.config = weights.config
        self._matrices: dict[str, Array] = {}
        self._head = "file" if options is None else options.head
        self.screens = self._head == "screened"  # it does not: it takes the same path through engine.step
        self._by_lookup = options is not None and options.lut == "fast"
        self._trits: dict[str, tuple[NDArray[np.int8], Array] | None] = {}
        self._residuals = residuals(weights)

    def new_kv(self, max_len: int, dtype: KVDtype = "f16", policy: Policy = FULL) -> KVCache:
        return KVCache(self.config, max_len, dtype, policy)

    def embed(self, ids: NDArray[np.int32]) -> Array:
        check_ids(ids, self.config)
        return self._matrix("token_embd.weight")[ids]

    def forward(self, h: Array, kv: KV, first: int, last: int, cancel: Cancel | None = None) -> Array:
        assert isinstance(kv, KVCache), "a cache of another engine"
        start = check_range(h, kv, first, last, self.config)
        if start + len(h) > kv.max_len:
            raise ContextError(f"{start + len(h)} positions: the cache holds {kv.max_len}")
        before = kv.snapshot()
        try:
            with np.errstate(over="ignore"):  # exp(-gate) may overflow to inf: silu is then -0, as it should be
                for i in range(first, last):
                    if cancel is not None:
                        cancel.check()
                    h = self._layer(i, h, kv, start)
        except BaseException:
            kv.restore(before)  # all or nothing
            raise
        return h

    def norm(self, h: Array, head: str = "final") -> Array:
        eps = self.config.norm_eps
        if head in self._residuals:
            h = bend(h, *self._residuals[head], eps)
        return rms_norm(h, self.weights.norm_gain(head), eps)

    def logits(self, h: Array, head: str = "final") -> Array:
        x, name = self.norm(h, head), self.weights.head_name.removesuffix(".weight")
        if self._head != "q4":
            return self._linear(x, name)
        y: Array = fake_quantize_activations(x, ACTIVATION_GRAIN[TensorType.Q4_0]) @ self._requantized(name).T
        return y

    def greedy(self, h: Array, head: str = "final") -> tuple[NDArray[np.int32], Array]:
        z = self.logits(h, head)
        return z.argmax(axis=1).astype(np.int32), 1 / np.exp(z - z.max(axis=1, keepdims=True)).sum(axis=1)

    def _layer(self, i: int, h: Array, kv: KVCache, start: int) -> Array:
        c, block = self.config, f"blk.{i}"

        x = self._norm(h, f"{block}.attn_norm")
        q = self._linear(x, f"{block}.attn_q").reshape(len(x), c.n_heads, c.head_dim)
        k = self._linear(x, f"{block}.attn_k").reshape(len(x), c.n_kv_heads, c.head_dim)
        v = self._linear(x, f"{block}.attn_v").reshape(len(x), c.n_kv_heads, c.head_dim)
        if c.has_qk_norms:
            q, k = self._norm(q, f"{block}.attn_q_norm"), self._norm(k, f"{block}.attn_k_norm")
        factors = self._optional("rope_freqs.weight")
        cos, sin = rope_angles(c, start, len(x), factors)
        far_q = None
        if isinstance(kv.policy, Lambda):
            far_q = rotate(q, *rope_angles(c, kv.policy.window, 1, factors), c.rope_pairs)
        kv.append(i, rotate(k, cos, sin, c.rope_pairs), v, k)
        o = attention(rotate(q, cos, sin, c.rope_pairs), kv.held(i), start, kv.policy, far_q)  # [T, H * hd]
        if c.has_sub_norms:
            o = self._norm(o, f"{block}.attn_sub_norm")
        h = h + self._linear(o, f"{block}.attn_output")

        x = self._norm(h, f"{block}.ffn_norm")
        x = activate(self._linear(x, f"{block}.ffn_gate"), self._linear(x, f"{block}.ffn_up"), c.ffn_act)  # [T, F]
        if c.has_sub_norms:
            x = self._norm(x, f"{block}.ffn_sub_norm")
        return h + self._linear(x, f"{block}.ffn_down")

    def _linear(self, x: Array, name: str) -> Array:
        """x [T, K] times the matrix `name` [N, K] -> [T, N], with its bias and scale where the file has them."""
        kind, _, _ = self.weights.raw(f"{name}.weight")
        if (trits := self._lookup(f"{name}.weight")) is not None:
            y = lookup_product(x, *trits)
        else:
            y = fake_quantize_activations(x, ACTIVATION_GRAIN[kind]) @ self._matrix(f"{name}.weight").T
        scale, bias = self._optional(f"{name}.scale"), self._optional(f"{name}.bias")
        if scale is not None:
            y = y * scale
        return y if bias is None else y + bias

    def _norm(self, x: Array, name: str) -> Array:
        return rms_norm(x, self._matrix(f"{name}.weight"), self.config.norm_eps)

    def _matrix(self, name: str) -> Array:
        if name not in self._matrices:
            self._matrices[name] = self.weights.f32(name)
        return self._matrices[name]

    def _lookup(self, name: str) -> tuple[NDArray[np.int8], Array] | None:
        """Trits and row scales of a matrix that multiplies by lookup."""
        kind, (rows, cols), raw = self.weights.raw(name)
        if not self._by_lookup or kind not in TERNARY:
            return None
        if name not in self._trits:
            self._trits[name] = one_scale_a_row(*unpack_ternary(raw, kind, (rows, cols)))
        return self._trits[name]

    def _requantized(self, name: str) -> Array:
        key = f"{name}, of 4.5 bits"
        if key not in self._matrices:
            w = self._matrix(f"{name}.weight")
            self._matrices[key] = dequantize(quantize(w, TensorType.Q4_0), TensorType.Q4_0, w.shape)
        return self._matrices[key]

    def _optional(self, name: str) -> Array | None:
        return self._matrix(name) if self.weights.has(name) else None


def residuals(weights: Weights) -> dict[str, tuple[Array, Array]]:
    """Head -> down and up of `bend`, for the exits that have them."""
    found = {head: weights.residual(head) for head in weights.heads}
    return {head: pair for head, pair in found.items() if pair is not None}


def check_ids(ids: NDArray[np.int32], config: ModelConfig) -> None:
    """UsageError unless `ids` is a non-empty row of token ids, and the file has an embedding to look them up in."""
    first, last = config.layers
    if first > 0:
        raise UsageError(f"the upper half holds the layers [{first}, {last}) and no embedding: rows enter it, not ids")
    if ids.ndim != 1 or not len(ids):
        raise UsageError(f"token ids of shape {ids.shape}: expected [T], T >= 1")
    if ids.min() < 0 or ids.max() >= config.n_vocab:
        raise UsageError(f"token ids {ids.min()}..{ids.max()}: the vocabulary holds 0..{config.n_vocab - 1}")


def check_range(h: Array, kv: KV, first: int, last: int, config: ModelConfig) -> int:
    """UsageError unless layers [first, last) can run on rows `h`; returns the position of the first row."""
    if h.ndim != 2 or h.shape[1] != config.d_model or not len(h):
        raise UsageError(f"rows of shape {h.shape}: expected [T, {config.d_model}], T >= 1")
    here = config.layers
    if not here[0] <= first < last <= here[1]:
        raise UsageError(f"layers [{first}, {last}): the model has [{here[0]}, {here[1]})")
    lengths = {kv.length(i) for i in range(first, last)}
    if len(lengths) > 1:
        raise UsageError(f"layers [{first}, {last}) have run different positions: {sorted(lengths)}")
    return lengths.pop()
