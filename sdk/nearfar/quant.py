"""What the bits of a weight mean: ggml's block formats in plain numpy.  Imports errors and gguf_reader only.

The numeric rule of every matrix product in this project, whatever computes it:

    y = fake_quantize_activations(x, ACTIVATION_GRAIN[type]) @ dequantize(W).T

`d` is a block's f16 scale, trits are weights in {-1, 0, 1}, K is the length of a row, N the number of rows.  The
blocks, byte by byte (q: codes; nibbles: low half of each byte first, then the high half):

    Q8_0   32: d, 32 int8 q                             w = q * d
    Q4_0   32: d, 16 bytes of nibbles                   w = d * (q - 8)
    Q4_1   32: d, m, 16 bytes of nibbles                w = d * q + m
    Q2_K  256: 16 bytes scale | min << 4, 64 bytes of 4 x 2 bits, d, dmin       w = (d * scale) * q - dmin * min
    Q3_K  256: 32 bytes of high bits, 64 of 4 x 2 bits, 12 of 6-bit scales, d   w = (d * (scale - 32)) * (q - 4)
    Q4_K  256: d, dmin, 12 bytes of 6-bit scale/min, 128 bytes of nibbles       w = (d * scale) * q - dmin * min
    Q5_K  256: d, dmin, the same 12 bytes, 32 of high bits, 128 of nibbles      w = (d * scale) * q - dmin * min
    Q6_K  256: 128 low nibbles, 64 bytes of 2 high bits, 16 int8 scales, d      w = (d * scale) * (q - 32)
    TQ1_0 256: 48 bytes of 5 trits, 4 bytes of 4 trits, d                       w = d * trit
    TQ2_0 256: 64 bytes of 4 x 2 bits, d                                        w = d * (q - 1)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import NearfarError, UnsupportedError, UsageError
from nearfar.gguf_reader import BLOCKS, READABLE, TensorType

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

TERNARY = (TensorType.TQ1_0, TensorType.TQ2_0)

# How finely int8 activations are scaled for a weight type: None = they stay float, 0 = one scale a row (as BitNet
# b1.58 is trained), else one scale per so many numbers (as ggml does: one a row ruins models with outlier channels).
ACTIVATION_GRAIN: dict[TensorType, int | None] = {
    TensorType.F32: None,
    TensorType.F16: None,
    TensorType.BF16: None,
    TensorType.TQ1_0: 0,
    TensorType.TQ2_0: 0,
    TensorType.Q4_0: 32,
    TensorType.Q4_1: 32,
    TensorType.Q8_0: 32,
    TensorType.Q2_K: 256,
    TensorType.Q3_K: 256,
    TensorType.Q4_K: 256,
    TensorType.Q5_K: 256,
    TensorType.Q6_K: 256,
}

# ggml keeps the scale of 32 activations as an f16.  Rounding ours the same way costs nothing and makes the integer
# products of both engines equal: without it, last bits move values across rounding boundaries of the next layer, and
# after four layers the logits differ by as much as the quantization itself (measured: 0.07 against 0.0000).
F16_SCALE_GRAIN = 32

# A group whose largest magnitude is below this counts as zeros: 127 / max stays finite, no 0 * inf.
SMALLEST_MAX = np.float32(2.0**-120)

SMALLEST_TRIT_SCALE = np.float32(1e-5)  # a matrix of zeros rounds to zeros

_CHUNK = 1 << 14  # blocks decoded at a time: bounds the temporaries to some MB


def fake_quantize_activations(x: F32, grain: int | None) -> F32:
    """x [..., K] -> the same shape, rounded to int8 and back: the numbers that the integer kernels see.

    Per group: s = max|x| / 127, q = rint(x * (127 / max)) (halves to even), result q * s, in f32, except that s of a
    group of 32 is rounded to f16 (below 65504); a group with max|x| < 2^-120 becomes zeros.  `grain` is the group's
    length, 0 = the whole row (as BitNet b1.58, arXiv 2402.17764, eq. 4-5), None = x as it is.
    Raises NearfarError for a number that is not finite.
    """
    if grain is None:
        return x
    q, scale = quantize_activations(x, grain)
    rounded: F32 = q * scale
    return rounded.reshape(x.shape)


def quantize_activations(x: F32, grain: int) -> tuple[F32, F32]:
    """x [..., K] -> q [..., G, grain], whole numbers in -127..127, and scales [..., G, 1]; see above."""
    groups = x.reshape(*x.shape[:-1], -1, grain or x.shape[-1])  # [..., G, grain]
    top = np.max(np.abs(groups), axis=-1, keepdims=True)
    if not np.isfinite(top).all():
        raise NearfarError("the activations hold a number that is not finite: the weights or the input are damaged")
    live = top >= SMALLEST_MAX
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=live)
    q = np.clip(np.rint(groups * inverse), -127, 127)
    scale = np.where(live, top / np.float32(127), np.float32(0))
    if grain == F16_SCALE_GRAIN:
        with np.errstate(over="ignore", under="ignore"):
            scale = np.where(scale < 65504, scale.astype(np.float16), scale).astype(np.float32)
    return q, scale


LUT_GROUP = 3  # trits of a lookup


def lookup_product(x: F32, trits: NDArray[np.int8], row_scales: F32) -> F32:
    """x [T, K] times a matrix of trits [N, K] and one scale a row [N] -> [T, N], by table lookup (`lut="fast"`).

    Per row of x: the int8 numbers q and scale s of `quantize_activations`, then f = min(1, 127 / max(|q0| + |q1| +
    |q2|)) over all groups of three neighbours.  Each group adds rint(f * (t0 q0 + t1 q1 + t2 q2)), 8 bits that a table
    holds for every pattern of trits; the total is worth row_scale * s / f.
    So each group with a trit is off by at most half a unit (and 2^-15, for f is rounded), a product by
    |row_scale| * s / f * 0.50004 * ceil(K / 3).  Symmetrized tables are those of LUT Tensor Core (arXiv 2408.06003).
    """
    rows, scale = quantize_activations(x, 0)  # [T, 1, K], [T, 1, 1]
    pad = (0, -x.shape[-1] % LUT_GROUP)
    q = np.pad(rows[:, 0], ((0, 0), pad)).reshape(len(x), -1, LUT_GROUP).astype(np.float64)  # [T, G, 3]
    t = np.pad(trits, ((0, 0), pad)).reshape(len(trits), -1, LUT_GROUP)  # [N, G, 3]
    most = np.abs(q).sum(axis=-1).max(axis=-1).astype(np.float32)  # [T]
    fits = most <= 127
    with np.errstate(divide="ignore"):
        f = np.where(fits, np.float32(1), np.float32(127) / most)
    step = np.where(fits, np.float32(1), most / np.float32(127))
    y = np.empty((len(x), len(trits)), dtype=np.float32)
    for i in range(len(x)):
        sums = np.einsum("ngi,gi->ng", t, q[i])  # exact in f64, and so is the product with f
        total = np.rint(np.float64(f[i]) * sums).sum(axis=-1).astype(np.float32)
        y[i] = row_scales * (scale[i, 0, 0] * step[i]) * total
    return y


def n_bytes(kind: TensorType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; raises UsageError where its rows are not whole blocks."""
    weights, size = BLOCKS[kind]
    if not shape or shape[-1] % weights:
        raise UsageError(f"{list(shape)}: rows of {kind.name} are made of blocks of {weights} weights")
    return int(np.prod(shape, dtype=np.int64)) // weights * size


def dequantize(raw: U8, kind: TensorType, shape: tuple[int, ...]) -> F32:
    """u8 [n_bytes] -> f32 of `shape`, bit for bit what ggml's own dequantization gives.

    Raises UnsupportedError for a type that is not read, UsageError where `raw` has not the size of `shape`.
    """
    if kind not in READABLE:
        raise UnsupportedError(
            f"tensor type {kind.name}: expected one of {', '.join(t.name for t in sorted(READABLE))}"
        )
    blocks = _blocks(raw, kind, shape)
    if kind is TensorType.F32:
        return blocks.view("<f4").astype(np.float32).reshape(shape)
    if kind is TensorType.F16:
        return blocks.view("<f2").astype(np.float32).reshape(shape)
    if kind is TensorType.BF16:
        bits = blocks.view("<u2").astype(np.uint32)
        bits <<= 16
        return bits.view(np.float32).reshape(shape)
    out = np.empty((len(blocks), BLOCKS[kind][0]), dtype=np.float32)
    for i in range(0, len(blocks), _CHUNK):
        out[i : i + _CHUNK] = _DECODERS[kind](blocks[i : i + _CHUNK])
    return out.reshape(shape)


def _blocks(raw: U8, kind: TensorType, shape: tuple[int, ...]) -> U8:
    """u8 [n_bytes] -> u8 [n_blocks, bytes of a block]"""
    expected = n_bytes(kind, shape)
    if raw.dtype != np.uint8 or raw.size != expected:
        raise UsageError(f"{kind.name} {list(shape)} is {expected} bytes: got {raw.size} of {raw.dtype}")
    return np.ascontiguousarray(raw).reshape(-1, BLOCKS[kind][1])


def _f16(blocks: U8, at: int) -> F32:
    """The f16 at byte `at` of each block -> f32 [B, 1]"""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: U8) -> U8:
    """[..., n] -> [..., 2 n]: all low halves, then all high halves"""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _pairs(packed: U8) -> U8:
    """[B, 64] -> codes 0..3 [B, 256]; element = half * 128 + field * 32 + byte."""
    shift = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    codes: U8 = (packed.reshape(-1, 2, 1, 32) >> shift) & np.uint8(3)
    return codes.reshape(-1, 256)


def _high_bits(packed: U8) -> U8:
    """[B, 32] -> 0 or 1 [B, 256]; element = bit * 32 + byte."""
    bits: U8 = (packed[:, None, :] >> np.arange(8, dtype=np.uint8)[:, None]) & np.uint8(1)
    return bits.reshape(-1, 256)


def _q8_0(b: U8) -> F32:
    return b[:, 2:].view(np.int8).astype(np.float32) * _f16(b, 0)


def _q4_0(b: U8) -> F32:
    return _f16(b, 0) * (_nibbles(b[:, 2:]).astype(np.float32) - np.float32(8))


def _q4_1(b: U8) -> F32:
    return _f16(b, 0) * _nibbles(b[:, 4:]).astype(np.float32) + _f16(b, 2)


def _scaled(q: U8, scale: F32, least: F32) -> F32:
    """Codes [B, 256] with a scale and a min per sub-block, both [B, sub-blocks] -> [B, 256]"""
    w: F32 = scale[:, :, None] * q.reshape(*scale.shape, -1).astype(np.float32) - least[:, :, None]
    return w.reshape(-1, 256)


def _scales_and_mins(s: U8) -> tuple[F32, F32]:
    """[B, 12] -> a 6-bit scale and a 6-bit min per sub-block j of 32, [B, 8] each.  j < 4: low 6 bits of s[j] and
    s[4+j]; j >= 4: low and high nibble of s[4+j], topped by the high 2 bits of s[j-4] and s[j]."""
    scale = np.concatenate([s[:, 0:4] & 63, (s[:, 8:12] & 15) | (s[:, 0:4] >> 6 << 4)], axis=1)
    least = np.concatenate([s[:, 4:8] & 63, (s[:, 8:12] >> 4) | (s[:, 4:8] >> 6 << 4)], axis=1)
    return scale.astype(np.float32), least.astype(np.float32)


def _q2_k(b: U8) -> F32:
    """Sub-block j of 16 has its 4-bit scale and min in byte j."""
    scale, least = (b[:, :16] & 15).astype(np.float32), (b[:, :16] >> 4).astype(np.float32)
    return _scaled(_pairs(b[:, 16:80]), _f16(b, 80) * scale, _f16(b, 82) * least)


def _q3_k(b: U8) -> F32:
    """Sub-block j of 16 has a 6-bit scale: low nibbles in 8 bytes, all low halves first; 2 high bits in field j / 4 of
    byte j % 4 of the 4 bytes that follow."""
    q = (_pairs(b[:, 32:96]) | _high_bits(b[:, :32]) << np.uint8(2)).reshape(-1, 16, 16).astype(
        np.float32
    ) - np.float32(4)
    pair = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    high = ((b[:, None, 104:108] >> pair) & 3).reshape(-1, 16)
    scale = _f16(b, 108) * ((_nibbles(b[:, 96:104]) | high << 4).astype(np.float32) - np.float32(32))
    w: F32 = scale[:, :, None] * q
    return w.reshape(-1, 256)


def _q4_k(b: U8) -> F32:
    scale, least = _scales_and_mins(b[:, 4:16])
    q = _nibbles(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 256)
    return _scaled(q, _f16(b, 0) * scale, _f16(b, 2) * least)


def _q5_k(b: U8) -> F32:
    scale, least = _scales_and_mins(b[:, 4:16])
    q = _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 256) | _high_bits(b[:, 16:48]) << np.uint8(4)
    return _scaled(q, _f16(b, 0) * scale, _f16(b, 2) * least)


def _q6_k(b: U8) -> F32:
    """Two halves of 128: 64 bytes of nibbles, 32 bytes whose bit pairs are the codes' bits 4 and 5."""
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    pair = np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    high = (b[:, 128:192].reshape(-1, 2, 1, 32) >> pair) & 3
    q = (low | high << 4).reshape(-1, 16, 16).astype(np.float32) - np.float32(32)
    scale = _f16(b, 208) * b[:, 192:208].view(np.int8).astype(np.float32)
    return (scale[:, :, None] * q).reshape(-1, 256)


def _tq1_0_codes(b: U8) -> U8:
    """Codes 0..2.  A byte is ceil(t * 256 / 243) of t = sum trit_i * 3^(4-i): times 3^i (mod 256), the next trit is
    the integer part of three times the fraction byte / 256."""
    powers = np.array([1, 3, 9, 27, 81], dtype=np.uint8)[:, None]
    parts = [(b[:, 0:32], 5), (b[:, 32:48], 5), (b[:, 48:52], 4)]
    t = np.concatenate([(p[:, None, :] * powers[:n]).reshape(len(b), -1) for p, n in parts], axis=1)
    return ((t.astype(np.uint16) * 3) >> 8).astype(np.uint8)


def _tq2_0_codes(b: U8) -> U8:
    return _pairs(b[:, :64])


_TERNARY_CODES: dict[TensorType, tuple[Callable[[U8], U8], int]] = {
    TensorType.TQ1_0: (_tq1_0_codes, 52),  # the codes, and the byte where d stands
    TensorType.TQ2_0: (_tq2_0_codes, 64),
}


def _ternary(kind: TensorType) -> Callable[[U8], F32]:
    codes, at = _TERNARY_CODES[kind]
    return lambda b: _f16(b, at) * (codes(b).astype(np.float32) - np.float32(1))


_DECODERS: dict[TensorType, Callable[[U8], F32]] = {
    TensorType.Q8_0: _q8_0,
    TensorType.Q4_0: _q4_0,
    TensorType.Q4_1: _q4_1,
    TensorType.Q2_K: _q2_k,
    TensorType.Q3_K: _q3_k,
    TensorType.Q4_K: _q4_k,
    TensorType.Q5_K: _q5_k,
    TensorType.Q6_K: _q6_k,
    TensorType.TQ1_0: _ternary(TensorType.TQ1_0),
    TensorType.TQ2_0: _ternary(TensorType.TQ2_0),
}

# Where the f16 scales of a block stand.
_SCALES_AT: dict[TensorType, tuple[int, ...]] = {
    TensorType.Q8_0: (0,),
    TensorType.Q4_0: (0,),
    TensorType.Q4_1: (0, 2),
    TensorType.Q2_K: (80, 82),
    TensorType.Q3_K: (108,),
    TensorType.Q4_K: (0, 2),
    TensorType.Q5_K: (0, 2),
    TensorType.Q6_K: (208,),
    TensorType.TQ1_0: (52,),
    TensorType.TQ2_0: (64,),
}


def all_finite(raw: U8, kind: TensorType, shape: tuple[int, ...]) -> bool:
    """Whether every scale (or, in float types, every number) of a tensor is finite: looks at exponents, in chunks."""
    blocks = _blocks(raw, kind, shape)
    if kind is TensorType.F32:
        words, exponent = blocks.view("<u4"), 0x7F800000
    else:  # every block is a whole number of 16-bit words
        words, exponent = blocks.view("<u2"), 0x7F80 if kind is TensorType.BF16 else 0x7C00
    columns = [at // 2 for at in _SCALES_AT.get(kind, (0,))]
    step = 1 << 18
    return not any(
        bool(((words[i : i + step, column] & exponent) == exponent).any())
        for column in columns
        for i in range(0, len(words), step)
    )


def unpack_ternary(raw: U8, kind: TensorType, shape: tuple[int, int]) -> tuple[NDArray[np.int8], F32]:
    """TQ1_0 or TQ2_0 -> (trits int8 [N, K], scales f32 [N, K / 256]).

    TQ2_0 can hold code 3, which means +2 and is no trit: it comes back as 2.  An all-zero block may carry scale 0.
    """
    if kind not in TERNARY:
        raise UsageError(f"{kind.name} holds no trits: expected TQ1_0 or TQ2_0")
    blocks = _blocks(raw, kind, shape)
    codes, at = _TERNARY_CODES[kind]
    trits = np.empty((len(blocks), 256), dtype=np.int8)
    for i in range(0, len(blocks), _CHUNK):
        trits[i : i + _CHUNK] = codes(blocks[i : i + _CHUNK]).view(np.int8) - np.int8(1)
    return trits.reshape(shape), _f16(blocks, at).reshape(shape[0], -1)


def one_scale_a_row(trits: NDArray[np.int8], scales: F32) -> tuple[NDArray[np.int8], F32] | None:
    """What `unpack_ternary` gave -> trits and the scale of each row [N], or None: scales differ in a row, or a +2.

    A block of zeros says nothing about the scale, and one of scale 0 counts as zeros.
    """
    blocks = trits.reshape(*scales.shape, -1)  # [N, B, 256]
    live = blocks.any(axis=-1) & (scales != 0)  # [N, B]
    row = scales[np.arange(len(scales)), live.argmax(axis=-1)] * live.any(axis=-1)  # [N]
    blocks = np.where(live[..., None], blocks, np.int8(0))
    if blocks.max(initial=0) > 1 or (live & (scales != row[:, None])).any():
        return None
    return blocks.reshape(trits.shape), row


def pack_ternary(trits: NDArray[np.int8], scale: float, kind: TensorType) -> U8:
    """Trits int8 [N, K] in {-1, 0, 1} times one scale -> raw bytes of TQ1_0, TQ2_0, Q4_0 or Q8_0.

    Nothing is estimated: every block's scale is f16(scale) and its codes are the trits, so that `dequantize` gives
    trits * f16(scale) exactly.  Raises UsageError for other values or a scale that f16 cannot hold.
    """
    if trits.size and (trits.min() < -1 or trits.max() > 1):
        raise UsageError(f"trits range {trits.min()}..{trits.max()}: expected -1..1")
    with np.errstate(over="ignore"):
        d = np.float16(scale)
    if not np.isfinite(d) or (d == 0 and scale != 0):
        raise UsageError(f"scale {scale}: expected a number that 16-bit floats can hold")
    n_bytes(kind, trits.shape)
    blocks = trits.reshape(-1, BLOCKS[kind][0])
    scales = np.full((len(blocks), 1), d, dtype="<f2").view(np.uint8)
    codes = (blocks.astype(np.int8) + np.int8(1)).view(np.uint8)  # 0..2
    if kind is TensorType.TQ2_0:
        return np.concatenate([_pack_tq2_0(codes), scales], axis=1).reshape(-1)
    if kind is TensorType.TQ1_0:
        return np.concatenate([_pack_tq1_0(codes), scales], axis=1).reshape(-1)
    if kind is TensorType.Q8_0:
        return np.concatenate([scales, blocks.astype(np.int8).view(np.uint8)], axis=1).reshape(-1)
    if kind is TensorType.Q4_0:
        return np.concatenate([scales, _pack_nibbles(codes + np.uint8(7))], axis=1).reshape(-1)
    raise UsageError(f"trits as {kind.name}: expected TQ1_0, TQ2_0, Q4_0 or Q8_0")


def _pack_nibbles(codes: U8) -> U8:
    half = codes.shape[-1] // 2
    return codes[:, :half] | codes[:, half:] << np.uint8(4)


def _pack_tq2_0(codes: U8) -> U8:
    f = codes.reshape(-1, 2, 4, 32)
    packed: U8 = f[:, :, 0] | f[:, :, 1] << np.uint8(2) | f[:, :, 2] << np.uint8(4) | f[:, :, 3] << np.uint8(6)
    return packed.reshape(-1, 64)


def _pack_tq1_0(codes: U8) -> U8:
    powers = np.array([81, 27, 9, 3, 1], dtype=np.uint16)[:, None]
    parts = [(0, 160, 5, 32), (160, 240, 5, 16), (240, 256, 4, 4)]  # first element, last, trits a byte, bytes
    sums = [(codes[:, a:b].reshape(-1, n, width) * powers[:n]).sum(axis=1) for a, b, n, width in parts]
    return ((np.concatenate(sums, axis=1) * 256 + 242) // 243).astype(np.uint8)


def quantize(x: F32, kind: TensorType) -> U8:
    """f32 [..., K] -> raw bytes of F32, F16, BF16, Q8_0, Q4_0 or Q3_K.

    All but Q3_K are rounded as ggml's reference quantizers do; the scales of Q3_K are those of `_q3_k_scales`.
    Raises UsageError for a number that is not finite, or too large for the type's scale.
    """
    n_bytes(kind, x.shape)
    x = np.ascontiguousarray(x, dtype=np.float32)
    if not np.isfinite(x).all():
        raise UsageError("weights to quantize must be finite")
    if kind is TensorType.F32:
        return x.astype("<f4").reshape(-1).view(np.uint8)
    if kind is TensorType.F16:
        return _to_f16(x.reshape(-1)).view(np.uint8)
    if kind is TensorType.BF16:
        bits = x.reshape(-1).view(np.uint32).astype(np.uint64)
        return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype("<u2").view(np.uint8)  # halves to even
    if kind is TensorType.Q3_K:
        return _pack_q3_k(x.reshape(-1, 16, 16))
    blocks = x.reshape(-1, 32)
    if kind is TensorType.Q8_0:
        d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
        codes = _round_half_away(blocks * _inverse(d)).astype(np.int8).view(np.uint8)
    elif kind is TensorType.Q4_0:  # the number of largest magnitude becomes -8
        at = np.abs(blocks).argmax(axis=1, keepdims=True)
        d = np.take_along_axis(blocks, at, axis=1) / np.float32(-8)
        q = np.trunc(blocks * _inverse(d) + np.float32(8.5))
        codes = _pack_nibbles(np.clip(q, 0, 15).astype(np.uint8))
    else:
        raise UsageError(f"quantizing to {kind.name}: expected F32, F16, BF16, Q8_0, Q4_0 or Q3_K")
    return np.concatenate([_to_f16(d).view(np.uint8), codes], axis=1).reshape(-1)


def round_to_trits(x: F32) -> tuple[NDArray[np.int8], float]:
    """f32 [N, K] -> trits int8 [N, K] and their one scale, the mean of |x| as f16 (BitNet b1.58, 2402.17764, eq. 1-3).

    The mean is taken in f64: whoever else takes it, in whatever order, finds the same f16.  `pack_ternary` comes next.
    """
    mean = np.float32(np.abs(x).mean(dtype=np.float64))
    scale = _to_f16(np.maximum(mean, SMALLEST_TRIT_SCALE).reshape(1)).astype(np.float32)[0]
    return np.clip(np.rint(x / scale), -1, 1).astype(np.int8), float(scale)


def _pack_q3_k(x: F32) -> U8:
    """f32 [B, 16, 16]: blocks of 16 groups of 16."""
    d, scales = _q3_k_scales(x)
    half = _to_f16(d)  # [B, 1]
    step = (half.astype(np.float32) * scales)[..., None]  # [B, 16, 1]
    q = np.divide(x, step, out=np.zeros_like(x), where=step != 0)
    codes = (np.clip(np.rint(q), -4, 3) + np.float32(4)).astype(np.uint8).reshape(-1, 256)  # 0..7
    high = (codes >> 2).reshape(-1, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
    six: U8 = (scales + np.float32(32)).astype(np.uint8)  # 0..63
    tops = (six >> 4).reshape(-1, 4, 4) << np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    fields = [high.sum(axis=1, dtype=np.uint8), _pack_tq2_0(codes & np.uint8(3)), _pack_nibbles(six & np.uint8(15))]
    return np.concatenate([*fields, tops.sum(axis=1, dtype=np.uint8), half.view(np.uint8)], axis=1).reshape(-1)


def _q3_k_scales(x: F32) -> tuple[F32, F32]:
    """f32 [B, 16, 16] -> d [B, 1] and the whole scales -32..31 of each group [B, 16], as f32.

    A group's scale first takes its number of largest magnitude to -4; then it is the one of least squares, weighted
    with the square of the number, for the codes so found.  ggml goes on to search for better codes; here the one step
    has to do, and its sums are taken in a fixed order, so that training finds the same bits.
    """
    top = np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1)  # [B, 16, 1]
    u = x * (np.float32(-4) * _inverse(top))
    codes = np.clip(np.rint(u), -4, 3)
    weight = u * u
    above, below = _folded(weight * x * codes), _folded(weight * codes * codes)  # [B, 16]
    best: F32 = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    widest: F32 = np.take_along_axis(best, np.abs(best).argmax(axis=-1, keepdims=True), axis=-1)  # [B, 1]
    whole = np.clip(np.rint(best * (np.float32(-32) * _inverse(widest))), -32, 31)
    d: F32 = widest / np.float32(-32)
    return d, whole


def _folded(x: F32) -> F32:
    """[..., 16] -> sums [...], pairs first: the order is a part of the result."""
    for half in (8, 4, 2, 1):
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def _inverse(d: F32) -> F32:
    """1 / d, and 0 where d is 0 or so small that its inverse is not finite."""
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(1) / d
    return np.where(np.isfinite(inverse), inverse, np.float32(0))


def _round_half_away(x: F32) -> F32:
    size = np.abs(x)
    whole = np.floor(size)
    rounded: F32 = np.copysign(whole + (size - whole >= np.float32(0.5)), x)
    return rounded


def _to_f16(x: F32) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = x.astype("<f2")
    if not np.isfinite(half).all():
        raise UsageError(f"{np.abs(x).max():g} is too large for 16-bit floats (65504)")
    return half
