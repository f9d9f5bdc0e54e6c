"""Codecs of hidden rows: what comes back, what is refused, and that a row's bits are its own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nearfar.errors import UsageError, WireError
from nearfar.wire.codec import F32, Codec, outlier_channels, relative_error
from nearfar.wire.messages import MAX_OUTLIERS, CodecId, CodecSpec

PACKING = (CodecId.FP16, CodecId.INT8_OS, CodecId.INT4_OS)
WIDTHS = (1, 63, 64, 4096)
F32_MAX = np.finfo(np.float32).max

MASSIVE = {7: 100.0, 130: 200.0, 2000: 300.0}  # channel -> its size beside others of size 1: in three groups of 64
# Relative error on the other channels of such rows.  A uniform step s costs s / sqrt(12), and the largest of 64 (32)
# normal numbers is about 2.6 (2.35), so int8 comes to 0.0059 and int4 to 0.097; fp16 has 11 bits.
MAX_ERROR = {CodecId.FP16: 0.0003, CodecId.INT8_OS: 0.0065, CodecId.INT4_OS: 0.105}
# Without channels of their own the three take the codes of 3 x 63 (3 x 31) neighbours along.
MIN_ERROR_UNSPLIT = {CodecId.INT8_OS: 0.08, CodecId.INT4_OS: 0.15}
MAX_STEPS = {CodecId.INT8_OS: 0.51, CodecId.INT4_OS: 0.51}  # half a step, and the rounding of the scale
STEPS = {CodecId.INT8_OS: 127, CodecId.INT4_OS: 7}

each_codec = pytest.mark.parametrize("codec_id", PACKING, ids=lambda c: c.name.lower())
each_width = pytest.mark.parametrize("d", WIDTHS)


def _rows(n: int, d: int, seed: int = 0) -> F32:
    return np.random.default_rng(seed).normal(0, 1, (n, d)).astype(np.float32)


def _massive_rows(n: int = 64, d: int = 4096) -> F32:
    rows = _rows(n, d)
    rows[:, list(MASSIVE)] *= np.array(list(MASSIVE.values()), np.float32)
    return rows


def _bits(rows: F32) -> list[bytes]:
    return [row.tobytes() for row in rows]


def _split(codec_id: CodecId, d: int) -> CodecSpec:
    """The codec with the outer channels beside it, where it can have any."""
    return CodecSpec(codec_id, outliers=() if codec_id is CodecId.FP16 else tuple(sorted({0, d - 1})))


def _specs(d: int) -> Iterator[CodecSpec]:
    yield from (CodecSpec(codec_id) for codec_id in PACKING)
    yield from (_split(codec_id, d) for codec_id in PACKING[1:])


# ------------------------------------------------------------ layout


def test_a_row_of_4096_numbers_takes_the_bytes_of_the_specification() -> None:
    m = tuple(range(MAX_OUTLIERS))
    assert Codec.of(CodecSpec(CodecId.FP16), 4096).row_bytes == 8192 + 2
    assert Codec.of(CodecSpec(CodecId.INT8_OS, outliers=m), 4096).row_bytes == 4224 + 2 * len(m)
    assert Codec.of(CodecSpec(CodecId.INT4_OS, outliers=m), 4096).row_bytes == 2304 + 2 * len(m)


def test_the_bytes_of_a_small_row_are_these() -> None:
    """Golden bytes, computed by hand from the layout in the module."""
    row = np.array([[127.0, -1.0, 2048.0]], np.float32)
    int8, int4 = (Codec.of(CodecSpec(c, outliers=(2,)), 3) for c in (CodecId.INT8_OS, CodecId.INT4_OS))
    assert int8.encode(row) == [bytes.fromhex("0068" + "003c" + "7fff00")]
    assert int4.encode(row * np.float32(7 / 127)) == [bytes.fromhex("0e57" + "003c" + "0700")]
    # 2048 = 2^14 * 2^-3, 127 * 2^3 = 1016, -1 * 2^3 = -8
    assert Codec.of(CodecSpec(CodecId.FP16), 3).encode(row) == [bytes.fromhex("fdff" + "f063" + "00c8" + "0074")]


def test_the_even_channel_is_the_low_nibble() -> None:
    row = np.array([[7.0, -7.0, 1.0]], np.float32)
    assert Codec.of(CodecSpec(CodecId.INT4_OS), 3).encode(row) == [bytes.fromhex("003c" + "97" + "01")]


# ------------------------------------------------------------ what comes back


@each_width
def test_zeros_come_back_as_zeros(d: int) -> None:
    for spec in _specs(d):
        assert not Codec.of(spec, d).round_trip(np.zeros((3, d), np.float32)).any()


@each_codec
@each_width
def test_a_number_is_at_most_half_a_step_off(codec_id: CodecId, d: int) -> None:
    rows = _rows(5, d, seed=d)
    back = Codec.of(CodecSpec(codec_id), d).round_trip(rows)
    if codec_id is CodecId.FP16:
        np.testing.assert_allclose(back, rows, rtol=2.0**-11, atol=0)
        return
    group = CodecSpec(codec_id).group
    for start in range(0, d, group):  # the last group is shorter where d is no multiple
        x, y = rows[:, start : start + group], back[:, start : start + group]
        step = np.abs(x).max(axis=1, keepdims=True) / STEPS[codec_id]
        assert (np.abs(y - x) <= MAX_STEPS[codec_id] * step).all()


@pytest.mark.parametrize("codec_id", [CodecId.INT8_OS, CodecId.INT4_OS])
@each_width
def test_outlier_channels_come_back_as_fp16(codec_id: CodecId, d: int) -> None:
    spec, rows = _split(codec_id, d), 1000 * _rows(4, d)
    channels = list(spec.outliers)
    np.testing.assert_array_equal(
        Codec.of(spec, d).round_trip(rows)[:, channels], rows[:, channels].astype(np.float16).astype(np.float32)
    )


@each_codec
def test_massive_channels_do_not_disturb_the_others_where_they_travel_apart(codec_id: CodecId) -> None:
    rows, channels = _massive_rows(), tuple(MASSIVE)
    split = CodecSpec(codec_id, outliers=() if codec_id is CodecId.FP16 else channels)
    assert relative_error(Codec.of(split, 4096), rows, channels) <= MAX_ERROR[codec_id]
    if codec_id in MIN_ERROR_UNSPLIT:
        unsplit = relative_error(Codec.of(CodecSpec(codec_id), 4096), rows, channels)
        assert unsplit >= MIN_ERROR_UNSPLIT[codec_id]


def test_fp16_carries_rows_of_any_size_equally_well() -> None:
    codec, rows = Codec.of(CodecSpec(CodecId.FP16), 63), _rows(4, 63)
    for exponent in (-100, -20, 0, 30, 120):
        scaled = np.ldexp(rows, exponent)
        np.testing.assert_array_equal(codec.round_trip(scaled), np.ldexp(codec.round_trip(rows), exponent))


@each_width
def test_the_largest_floats_stay_finite(d: int) -> None:
    rows = np.full((2, d), F32_MAX, np.float32)
    rows[1] *= -1
    for spec in _specs(d):
        back = Codec.of(spec, d).round_trip(rows)
        assert np.isfinite(back).all()
        assert (np.sign(back) == np.sign(rows)).all()
    np.testing.assert_allclose(Codec.of(CodecSpec(CodecId.FP16), d).round_trip(rows), rows, rtol=2.0**-11)


def test_a_number_beyond_the_layout_becomes_the_largest_that_it_holds() -> None:
    rows = np.array([[1e9, 1e9]], np.float32)
    back = Codec.of(CodecSpec(CodecId.INT8_OS, outliers=(0,)), 2).round_trip(rows)
    np.testing.assert_array_equal(back, [[65504.0, 127 * 65504.0]])


def test_the_smallest_floats_become_zeros_or_themselves() -> None:
    rows = np.full((1, 70), np.float32(1e-45))
    for spec in _specs(70):
        back = Codec.of(spec, 70).round_trip(rows)
        assert (back == (rows if spec.id is CodecId.FP16 else 0)).all()


@pytest.mark.parametrize("codec_id", [CodecId.INT8_OS, CodecId.INT4_OS])
def test_a_group_too_small_for_a_scale_is_packed_like_zeros(codec_id: CodecId) -> None:
    codec = Codec.of(CodecSpec(codec_id), 70)
    assert codec.encode(np.full((1, 70), np.float32(1e-7))) == [bytes(codec.row_bytes)]


# ------------------------------------------------------------ a row's bits are its own


@each_width
def test_a_row_has_the_same_bytes_and_bits_alone_and_among_others(d: int) -> None:
    rows = np.concatenate([_rows(5, d), np.zeros((1, d), np.float32), 1e6 * _rows(3, d, seed=2)])
    for spec in _specs(d):
        codec = Codec.of(spec, d)
        packed = codec.encode(rows)
        assert packed == [codec.encode(rows[i : i + 1])[0] for i in range(len(rows))]
        assert _bits(codec.decode(packed)) == [codec.decode([row]).tobytes() for row in packed]


def test_rows_that_lie_scattered_in_memory_have_the_same_bytes() -> None:
    rows = _rows(6, 130)
    for spec in _specs(65):
        codec = Codec.of(spec, 65)
        assert codec.encode(rows[::2, ::2]) == codec.encode(np.ascontiguousarray(rows[::2, ::2]))


def test_an_array_of_bytes_is_decoded_like_a_list_of_rows() -> None:
    for spec in _specs(63):
        codec = Codec.of(spec, 63)
        packed = codec.encode(_rows(4, 63))
        array = np.frombuffer(b"".join(packed), np.uint8).reshape(4, -1)
        assert _bits(codec.decode(array)) == _bits(codec.decode(packed))


def test_no_rows_are_no_bytes() -> None:
    for spec in _specs(63):
        codec = Codec.of(spec, 63)
        assert codec.encode(_rows(0, 63)) == []
        assert codec.decode([]).shape == (0, 63)


# ------------------------------------------------------------ what is refused


@each_codec
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("channel", [0, 40, 62])
def test_a_number_that_is_not_finite_is_refused(codec_id: CodecId, bad: float, channel: int) -> None:
    rows = _rows(3, 63)
    rows[1, channel] = bad
    for spec in (CodecSpec(codec_id), _split(codec_id, 63)):
        with pytest.raises(WireError, match="not finite"):
            Codec.of(spec, 63).encode(rows)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("d", [1, 64])
def test_a_scale_or_outlier_that_is_not_finite_is_refused(bad: float, d: int) -> None:
    value = np.float16(bad).tobytes()
    for codec_id in PACKING[1:]:
        codec = Codec.of(CodecSpec(codec_id, outliers=(0,)), d)
        row = codec.encode(_rows(1, d))[0]
        for damaged in (value + row[2:], row[:2] + value + row[4:]):
            with pytest.raises(WireError, match="not finite"):
                codec.decode([damaged])


def test_an_exponent_that_leaves_the_floats_is_refused() -> None:
    codec = Codec.of(CodecSpec(CodecId.FP16), 2)
    for exponent in (113, 32767):
        with pytest.raises(WireError, match="not finite"):
            codec.decode([np.int16(exponent).tobytes() + np.array([65504, 1], np.float16).tobytes()])
    assert not codec.decode([np.int16(-32768).tobytes() + np.array([65504, 1], np.float16).tobytes()]).any()


def test_a_row_of_another_length_is_refused() -> None:
    for spec in _specs(63):
        codec = Codec.of(spec, 63)
        good = codec.encode(_rows(2, 63))
        for bad in (b"", good[0][:-1], good[0] + b"\0"):
            with pytest.raises(WireError, match=f"a row of {len(bad)} bytes"):
                codec.decode([*good, bad])


def test_outlier_channels_beyond_the_row_are_refused() -> None:
    with pytest.raises(UsageError, match="another model"):
        Codec.of(CodecSpec(CodecId.INT8_OS, outliers=(3, 64)), 64)


def test_ids_have_no_rows_to_pack() -> None:
    with pytest.raises(UsageError, match="ids travel as they are"):
        Codec.of(CodecSpec(CodecId.IDS), 64)


@settings(deadline=None)
@given(st.data(), st.sampled_from([1, 2, 31, 33, 63, 64, 65]))
def test_any_bytes_are_refused_or_give_finite_rows(data: st.DataObject, d: int) -> None:
    codec = Codec.of(data.draw(st.sampled_from(list(_specs(d)))), d)
    n = data.draw(st.integers(0, 3))
    length = st.one_of(st.just(codec.row_bytes), st.integers(0, codec.row_bytes + 2))
    packed = [data.draw(st.binary(min_size=size, max_size=size)) for size in (data.draw(length) for _ in range(n))]
    try:
        rows = codec.decode(packed)
    except WireError:
        return
    assert rows.shape == (n, d)
    assert rows.dtype == np.float32
    assert np.isfinite(rows).all()


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None)
@given(arrays.arrays(np.float32, st.tuples(st.integers(1, 3), st.sampled_from([1, 5, 33, 64, 70])), elements=finite))
def test_any_finite_row_comes_back_finite_and_never_larger_than_it_was(rows: F32) -> None:
    """But for the rounding of a scale, or of a number, to fp16: half a part in 2^10, or half of its smallest step."""
    top = np.abs(rows.astype(np.float64)).max(axis=1, keepdims=True)
    for spec in _specs(rows.shape[1]):
        back = Codec.of(spec, rows.shape[1]).round_trip(rows)
        assert (np.abs(back) <= top * (1 + 2.0**-10) + 127 * 2.0**-25).all()


# ------------------------------------------------------------ calibration


def test_calibration_finds_the_massive_channels_and_no_others() -> None:
    assert outlier_channels(_massive_rows()) == tuple(MASSIVE)


def test_massive_channels_of_one_group_are_found_together() -> None:
    """Either alone gains nothing: the other one would still set the scale."""
    rows = _rows(40, 256)
    rows[:, [65, 70]] *= 500
    assert outlier_channels(rows) == (65, 70)


def test_rows_without_massive_channels_keep_all_in_their_groups() -> None:
    assert outlier_channels(_rows(64, 256)) == ()
    assert outlier_channels(np.zeros((4, 63), np.float32)) == ()


def test_no_more_channels_are_taken_than_may_travel_apart() -> None:
    rows = _rows(40, 4096)
    rows[:, ::100] *= 300
    found = outlier_channels(rows)
    assert len(found) == MAX_OUTLIERS
    assert all(channel % 100 == 0 for channel in found)
    assert outlier_channels(rows, 3) == tuple(sorted(outlier_channels(rows, 3)))
    assert len(outlier_channels(rows, 3)) == 3


def test_the_channels_found_make_a_codec_better() -> None:
    rows = _massive_rows()
    for codec_id in PACKING[1:]:
        split = Codec.of(CodecSpec(codec_id, outliers=outlier_channels(rows[:16])), 4096)
        assert relative_error(split, rows) < relative_error(Codec.of(CodecSpec(codec_id), 4096), rows)
