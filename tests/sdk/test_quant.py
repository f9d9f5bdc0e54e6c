"""Block formats: bit for bit those of ggml, as its `gguf` package computes them."""

from __future__ import annotations

import gguf as oracle
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.errors import NearfarError, UnsupportedError, UsageError
from nearfar.gguf_reader import BLOCKS, READABLE, TensorType
from nearfar.quant import (
    ACTIVATION_GRAIN,
    SMALLEST_MAX,
    TERNARY,
    all_finite,
    dequantize,
    fake_quantize_activations,
    n_bytes,
    pack_ternary,
    quantize,
    round_to_trits,
    unpack_ternary,
)

ALL = sorted(READABLE)
QUANTIZED_TO = [TensorType.F32, TensorType.F16, TensorType.BF16, TensorType.Q8_0, TensorType.Q4_0]
PACKED_TO = [TensorType.TQ1_0, TensorType.TQ2_0, TensorType.Q4_0, TensorType.Q8_0]
SCALES_AT = {  # bytes of a block where an f16 stands
    "Q8_0": (0,),
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}

named = pytest.mark.parametrize("kind", ALL, ids=lambda t: t.name)


def _with_scale(blocks: np.ndarray, kind: TensorType, scale: float | np.ndarray) -> np.ndarray:
    """The same blocks [B, bytes] with all their f16 scales set."""
    for at in SCALES_AT[kind.name]:
        blocks[:, at : at + 2] = np.broadcast_to(np.float16(scale), len(blocks)).reshape(-1, 1).copy().view(np.uint8)
    return blocks


def _random(kind: TensorType, n_blocks: int, seed: int = 0) -> np.ndarray:
    """Blocks of random bytes with finite numbers and scales, u8 [n_blocks, bytes]."""
    rng = np.random.default_rng(seed)
    if kind is TensorType.F32:
        return rng.normal(size=(n_blocks, 1)).astype("<f4").view(np.uint8)
    blocks = rng.integers(0, 256, (n_blocks, BLOCKS[kind][1]), dtype=np.uint8)
    if kind.name in SCALES_AT:
        scales = rng.integers(0, 1 << 16, n_blocks).astype("<u2").view("<f2")
        return _with_scale(blocks, kind, np.where(np.isfinite(scales), scales, np.float16(1)))
    words = blocks.view("<u2")  # F16, BF16: keep the exponent below all ones
    words &= 0xBFFF
    return blocks


def _oracle(blocks: np.ndarray, kind: TensorType) -> np.ndarray:
    return oracle.quants.dequantize(blocks, oracle.GGMLQuantizationType[kind.name])


def _bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


@named
def test_dequantizing_random_bytes_gives_the_bits_that_ggml_gives(kind: TensorType) -> None:
    blocks = _random(kind, 600)
    mine = dequantize(blocks.reshape(-1), kind, (100, 6 * BLOCKS[kind][0]))
    np.testing.assert_array_equal(_bits(mine), _bits(_oracle(blocks, kind)).reshape(mine.shape))


@pytest.mark.parametrize("kind", [t for t in ALL if t.name in SCALES_AT], ids=lambda t: t.name)
@pytest.mark.parametrize("octet", [0x00, 0xFF, 0x80, 0x7F, 0x55, 0xAA])
@pytest.mark.parametrize("scale", [0.0, -0.0, 65504.0, -65504.0, 6e-8, 1.0])
def test_extreme_codes_and_scales_give_the_bits_that_ggml_gives(kind: TensorType, octet: int, scale: float) -> None:
    blocks = _with_scale(np.full((2, BLOCKS[kind][1]), octet, np.uint8), kind, scale)
    mine = dequantize(blocks.reshape(-1), kind, (2, BLOCKS[kind][0]))
    np.testing.assert_array_equal(_bits(mine), _bits(_oracle(blocks, kind)))


@pytest.mark.parametrize("kind", TERNARY, ids=lambda t: t.name)
def test_every_byte_of_a_ternary_block_decodes_as_in_ggml(kind: TensorType) -> None:
    blocks = np.repeat(np.arange(256, dtype=np.uint8)[:, None], BLOCKS[kind][1], axis=1)
    blocks = _with_scale(blocks, kind, 0.5)
    np.testing.assert_array_equal(dequantize(blocks.reshape(-1), kind, (256, 256)), _oracle(blocks, kind))


def test_more_blocks_than_one_chunk_decode_alike() -> None:
    blocks = _random(TensorType.Q8_0, (1 << 14) + 3)
    mine = dequantize(blocks.reshape(-1), TensorType.Q8_0, (len(blocks), 32))
    np.testing.assert_array_equal(mine, _oracle(blocks, TensorType.Q8_0))


@pytest.mark.parametrize("kind", QUANTIZED_TO, ids=lambda t: t.name)
@pytest.mark.parametrize("spread", [1e-6, 1.0, 1000.0])
def test_quantizing_gives_the_bytes_that_ggml_gives(kind: TensorType, spread: float) -> None:
    x = (np.random.default_rng(1).normal(size=(64, 256)) * spread).astype(np.float32)
    x[3] = 0
    x[4, 7] = spread * 20  # an outlier
    x[5] = np.float32(spread) * np.tile([1, -1], 128)  # ties for the largest
    x[6] = np.linspace(-127, 127, 256) * spread / 127
    x[7, :128] = np.arange(128) * 0.5  # halves
    theirs = oracle.quants.quantize(x, oracle.GGMLQuantizationType[kind.name])
    np.testing.assert_array_equal(quantize(x, kind), theirs.view(np.uint8).reshape(-1))


@pytest.mark.parametrize("kind", QUANTIZED_TO, ids=lambda t: t.name)
def test_what_was_dequantized_quantizes_to_the_same_numbers(kind: TensorType) -> None:
    x = np.random.default_rng(2).normal(size=(8, 64)).astype(np.float32)
    once = dequantize(quantize(x, kind), kind, x.shape)
    again = dequantize(quantize(once, kind), kind, x.shape)
    np.testing.assert_allclose(again, once, rtol=2e-3, atol=1e-6)  # Q8_0 and Q4_0 re-round their f16 scale
    assert np.abs(once - x).max() <= np.abs(x).max() / (7 if kind is TensorType.Q4_0 else 120)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_quantizing_refuses_what_is_not_finite(bad: float) -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, 3] = bad
    for kind in QUANTIZED_TO:
        with pytest.raises(UsageError, match="must be finite"):
            quantize(x, kind)


def test_quantizing_refuses_what_f16_cannot_hold() -> None:
    with pytest.raises(UsageError, match="too large for 16-bit floats"):
        quantize(np.full((1, 32), 1e6, np.float32), TensorType.F16)
    with pytest.raises(UsageError, match="too large for 16-bit floats"):
        quantize(np.full((1, 32), 1e8, np.float32), TensorType.Q8_0)


def test_numbers_too_small_for_an_inverse_become_zeros() -> None:
    x = np.full((1, 32), 1e-44, np.float32)
    for kind in (TensorType.Q8_0, TensorType.Q4_0):
        assert not dequantize(quantize(x, kind), kind, (1, 32)).any()


def test_three_bits_are_read_by_ggml_as_by_us_and_lose_less_than_scales_from_the_largest_number_alone() -> None:
    x = np.random.default_rng(3).normal(size=(32, 512)).astype(np.float32)
    x[0], x[1, :16], x[2, 5] = 0, 0, 40
    raw = quantize(x, TensorType.Q3_K)
    mine = dequantize(raw, TensorType.Q3_K, x.shape)
    np.testing.assert_array_equal(mine, _oracle(raw.reshape(-1, 110), TensorType.Q3_K).reshape(x.shape))
    groups = x[3:].reshape(-1, 16)
    top = np.take_along_axis(groups, np.abs(groups).argmax(axis=1, keepdims=True), axis=1)
    by_largest = np.clip(np.rint(groups / (top / -4)), -4, 3) * (top / -4)
    error, plain = np.square(mine[3:] - x[3:]).mean(), np.square(by_largest - groups).mean()
    assert error < plain  # although these scales are not rounded to 6 bits
    assert not mine[0].any()
    assert not mine[1, :16].any()


def test_trits_are_rounded_by_the_mean_and_pack_without_another_rounding() -> None:
    x = np.random.default_rng(4).normal(size=(16, 256)).astype(np.float32)
    trits, scale = round_to_trits(x)
    assert scale == np.float16(np.abs(x).mean(dtype=np.float64))
    raw = pack_ternary(trits, scale, TensorType.TQ1_0)
    np.testing.assert_array_equal(dequantize(raw, TensorType.TQ1_0, x.shape), trits * np.float32(scale))
    assert set(np.unique(trits)) == {-1, 0, 1}
    assert not round_to_trits(np.zeros((2, 256), np.float32))[0].any()


# ---- trits


def _trits(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, 2, (n, k)).astype(np.int8)


@pytest.mark.parametrize("kind", PACKED_TO, ids=lambda t: t.name)
@pytest.mark.parametrize("scale", [0.037, 1.0, 6e-5, 60000.0, 0.0])
def test_packed_trits_come_back_exactly_times_one_scale(kind: TensorType, scale: float) -> None:
    trits = _trits(7, 512)
    trits[2] = 0
    raw = pack_ternary(trits, scale, kind)
    np.testing.assert_array_equal(dequantize(raw, kind, trits.shape), trits * np.float32(np.float16(scale)))
    np.testing.assert_array_equal(
        dequantize(raw, kind, trits.shape), _oracle(raw.reshape(-1, BLOCKS[kind][1]), kind).reshape(trits.shape)
    )


@pytest.mark.parametrize("kind", TERNARY, ids=lambda t: t.name)
def test_packing_writes_the_bytes_that_ggml_writes(kind: TensorType) -> None:
    trits = _trits(5, 768)
    theirs = oracle.quants.quantize(trits * np.float32(0.25), oracle.GGMLQuantizationType[kind.name])
    np.testing.assert_array_equal(pack_ternary(trits, 0.25, kind), theirs.reshape(-1))


@pytest.mark.parametrize("kind", TERNARY, ids=lambda t: t.name)
def test_unpacking_gives_trits_and_the_scale_of_each_block(kind: TensorType) -> None:
    trits = _trits(6, 512)
    got, scales = unpack_ternary(pack_ternary(trits, 0.3, kind), kind, trits.shape)
    np.testing.assert_array_equal(got, trits)
    assert got.dtype == np.int8
    np.testing.assert_array_equal(scales, np.full((6, 2), np.float32(np.float16(0.3))))


@pytest.mark.parametrize("kind", TERNARY, ids=lambda t: t.name)
def test_an_all_zero_block_of_ggml_carries_scale_zero_and_zero_trits(kind: TensorType) -> None:
    x = np.zeros((1, 512), np.float32)
    x[0, 300] = 0.5
    raw = oracle.quants.quantize(x, oracle.GGMLQuantizationType[kind.name]).reshape(-1)
    trits, scales = unpack_ternary(raw, kind, (1, 512))
    assert scales.tolist() == [[0.0, 0.5]]
    np.testing.assert_array_equal(trits * 0.5, x)


def test_code_3_of_tq2_0_means_plus_two() -> None:
    raw = np.full(66, 0xFF, np.uint8)
    raw[64:] = np.array([0.5], "<f2").view(np.uint8)
    trits, _ = unpack_ternary(raw, TensorType.TQ2_0, (1, 256))
    assert set(trits.ravel().tolist()) == {2}
    assert set(dequantize(raw, TensorType.TQ2_0, (1, 256)).ravel().tolist()) == {1.0}


@given(st.lists(st.integers(-1, 1), min_size=256, max_size=256))
def test_any_256_trits_survive_both_ternary_types(values: list[int]) -> None:
    trits = np.array([values], np.int8)
    for kind in TERNARY:
        np.testing.assert_array_equal(unpack_ternary(pack_ternary(trits, 1.0, kind), kind, (1, 256))[0], trits)


@pytest.mark.parametrize(
    ("trits", "scale", "kind", "said"),
    [
        (np.full((1, 256), 2, np.int8), 1.0, TensorType.TQ2_0, "range 2..2: expected -1..1"),
        (np.zeros((1, 256), np.int8), np.nan, TensorType.TQ2_0, "scale nan"),
        (np.zeros((1, 256), np.int8), 1e6, TensorType.TQ2_0, "scale 1000000"),
        (np.zeros((1, 256), np.int8), 1e-9, TensorType.TQ2_0, "16-bit floats can hold"),
        (np.zeros((1, 100), np.int8), 1.0, TensorType.TQ1_0, "blocks of 256 weights"),
        (np.zeros((1, 256), np.int8), 1.0, TensorType.Q4_K, "expected TQ1_0, TQ2_0, Q4_0 or Q8_0"),
    ],
)
def test_packing_refuses_what_would_not_be_exact(trits: np.ndarray, scale: float, kind: TensorType, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        pack_ternary(trits, scale, kind)


# ---- sizes and types


@named
def test_bytes_that_do_not_fit_the_shape_are_refused(kind: TensorType) -> None:
    k = BLOCKS[kind][0]
    with pytest.raises(UsageError, match=f"is {n_bytes(kind, (3, k))} bytes: got"):
        dequantize(np.zeros(n_bytes(kind, (2, k)), np.uint8), kind, (3, k))


def test_a_type_that_is_not_read_is_named() -> None:
    with pytest.raises(UnsupportedError, match="tensor type IQ2_XXS"):
        dequantize(np.zeros(66, np.uint8), TensorType.IQ2_XXS, (1, 256))


@named
def test_one_number_that_is_not_finite_is_found_wherever_it_stands(kind: TensorType) -> None:
    blocks = _random(kind, 5)
    shape = (5, BLOCKS[kind][0])
    assert all_finite(blocks.reshape(-1), kind, shape)
    bad = {
        "F32": [np.array([x], "<f4").view(np.uint8) for x in (np.nan, np.inf, -np.inf)],
        "BF16": [np.array([x], "<u2").view(np.uint8) for x in (0x7FC0, 0x7F80, 0xFF80)],
    }.get(kind.name, [np.array([x], "<f2").view(np.uint8) for x in (np.nan, np.inf, -np.inf)])
    for octets in bad:
        for at in SCALES_AT.get(kind.name, (0,)):
            for row in (0, 4):
                broken = blocks.copy()
                broken[row, at : at + len(octets)] = octets
                assert not all_finite(broken.reshape(-1), kind, shape)


# ---- activations


def test_every_readable_type_has_a_grain_that_divides_its_block() -> None:
    assert set(ACTIVATION_GRAIN) == READABLE
    for kind, grain in ACTIVATION_GRAIN.items():
        assert (grain is None) == (kind.name in ("F32", "F16", "BF16"))
        assert not grain or grain == BLOCKS[kind][0]


def test_activations_stay_as_they_are_beside_float_weights() -> None:
    x = np.array([[np.pi, -1e9]], np.float32)
    assert fake_quantize_activations(x, None) is x


@pytest.mark.parametrize("grain", [0, 32, 256])
def test_rounded_activations_are_whole_steps_of_their_groups_largest(grain: int) -> None:
    x = np.random.default_rng(3).normal(size=(5, 512)).astype(np.float32)
    groups = x.reshape(5, -1, grain or 512)
    step = np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)
    exact = step
    if grain == 32:  # as ggml stores it
        step = step.astype(np.float16).astype(np.float32)
    rounded = fake_quantize_activations(x, grain)
    assert rounded.dtype == np.float32
    codes = rounded.reshape(groups.shape) / step
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
    assert np.abs(codes).max() == pytest.approx(127)
    assert (np.abs(np.rint(codes) * exact - groups) <= exact * 0.5001).all()


@pytest.mark.parametrize("top", [1e-20, 1e-3, 65504 * 127, 1e30])
def test_scales_of_32_fall_back_to_f32_where_f16_ends(top: float) -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :2] = top, -top / 3
    with np.errstate(all="raise"):
        y = fake_quantize_activations(x, 32)
    if top < 2**-25 * 127:  # half of f16's smallest step: the group is lost, as in ggml
        assert not y.any()
    else:
        np.testing.assert_allclose(y[0, :2], x[0, :2], rtol=0.01)


def test_a_row_is_rounded_alone_as_among_others() -> None:
    x = np.random.default_rng(4).normal(size=(9, 256)).astype(np.float32)
    for grain in (0, 32, 256):
        whole = fake_quantize_activations(x, grain)
        for i in range(9):
            np.testing.assert_array_equal(fake_quantize_activations(x[i : i + 1], grain), whole[i : i + 1])


def test_zero_and_vanishing_rows_become_zeros_without_a_warning() -> None:
    x = np.zeros((4, 32), np.float32)
    x[1, 3] = 1e-45
    x[2, 3] = np.nextafter(SMALLEST_MAX, np.float32(0))
    x[3, 3] = SMALLEST_MAX
    with np.errstate(all="raise", under="ignore"):
        y = fake_quantize_activations(x, 0)
    assert not y[:3].any()
    assert y[3, 3] == pytest.approx(float(SMALLEST_MAX), rel=1e-6)


def test_numbers_near_the_largest_float_do_not_overflow() -> None:
    top = np.float32(2.0**127)
    y = fake_quantize_activations(np.array([[top, -top, 0, 1]], np.float32), 0)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y, [[top, -top, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_are_an_error(bad: float) -> None:
    x = np.zeros((2, 64), np.float32)
    x[1, 40] = bad
    for grain in (0, 32):
        with pytest.raises(NearfarError, match="not finite"):
            fake_quantize_activations(x, grain)
