"""How a hidden row travels: f32 [D] to bytes and back, little-endian.  Ground floor.

    fp16      i16 exponent e | D x fp16 c                                                x = c * 2^e
    int8_os   m x fp16 outliers | ceil(D/64) x fp16 scales | D x int8 q                  x = q * scale
    int4_os   m x fp16 outliers | ceil(D/32) x fp16 scales | ceil(D/2) bytes of nibbles  x = q * scale

Nibbles are two's complement, the even channel low.  A few channels of a trained model are hundreds of times larger than
the rest (massive activations, 2402.17762); one of them in a group leaves no code for its neighbours.  So the m channels
that calibration found travel as fp16 of their own; their places among the codes hold zeros.

Every step is one IEEE operation an element (no sum, no library function that may round either way): the bits of a row
are the same on both sides, on any machine, alone or among others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import UsageError, WireError
from nearfar.wire.messages import GROUPS, MAX_OUTLIERS, CodecId, CodecSpec

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

F16_MAX = np.float32(65504)
LARGEST_CODE = {CodecId.INT8_OS: np.float32(127), CodecId.INT4_OS: np.float32(7)}
TOP_EXPONENT = 15  # a row's largest code lies in [2^14, 2^15]: the smallest of fp16 is then 2^-39 of it
FP16_REACH = F16_MAX * np.float32(2.0**112)  # what is larger, by half a step of fp16, would be rounded out of f32


@dataclass(frozen=True, slots=True)
class Codec:
    """One codec for rows of width `d`; made by `of`."""

    spec: CodecSpec
    d: int

    @classmethod
    def of(cls, spec: CodecSpec, d: int) -> Codec:
        """Raises UsageError for ids, which are no rows, and for outlier channels that rows of width `d` do not have."""
        if spec.id is CodecId.IDS:
            raise UsageError("codec IDS packs no rows: ids travel as they are")
        if d < 1 or (spec.outliers and spec.outliers[-1] >= d):
            raise UsageError(
                f"outlier channels {list(spec.outliers)} of rows of width {d}: calibrated for another model?"
            )
        return cls(spec, d)

    @property
    def n_groups(self) -> int:
        """Scales in a row; the last group is shorter where `d` is no multiple."""
        return -(-self.d // self.spec.group) if self.spec.group else 0

    @property
    def row_bytes(self) -> int:
        if self.spec.id is CodecId.FP16:
            return 2 + 2 * self.d
        codes = self.d if self.spec.id is CodecId.INT8_OS else -(-self.d // 2)
        return 2 * len(self.spec.outliers) + 2 * self.n_groups + codes

    def encode(self, rows: F32) -> list[bytes]:
        """f32 [n, D] -> n times row_bytes.  Raises WireError for a number that is not finite.

        Magnitudes that the layout cannot hold become the largest that it can: 65504 of an outlier channel, 65504 * 127
        (int8) or * 7 (int4) of the others.  Groups below 2^-25 * 127 (or * 7) become zeros.
        """
        assert rows.dtype == np.float32, rows.dtype
        assert rows.ndim == 2, rows.shape
        assert rows.shape[1] == self.d, f"rows of width {rows.shape[1]}, codec of width {self.d}"
        if not np.isfinite(rows).all():
            raise WireError("a row holds a number that is not finite, which no codec carries: the weights are damaged")
        packed = self._encode_fp16(rows) if self.spec.id is CodecId.FP16 else self._encode_groups(rows)
        return [row.tobytes() for row in packed]

    def decode(self, packed: Sequence[bytes] | U8) -> F32:
        """n times row_bytes, or u8 [n, row_bytes] -> f32 [n, D], all finite.  Raises WireError for any other bytes."""
        if bad := {len(row) for row in packed} - {self.row_bytes}:
            name = self.spec.id.name
            raise WireError(f"a row of {min(bad)} bytes: {name} packs rows of width {self.d} in {self.row_bytes}")
        data = packed if isinstance(packed, np.ndarray) else np.frombuffer(b"".join(packed), np.uint8)
        data = data.reshape(len(packed), self.row_bytes)
        rows = self._decode_fp16(data) if self.spec.id is CodecId.FP16 else self._decode_groups(data)
        if not np.isfinite(rows).all():
            raise WireError(f"a row of {self.spec.id.name} holds numbers that are not finite: damaged on its way")
        return rows

    def round_trip(self, rows: F32) -> F32:
        """f32 [n, D] -> the same shape: what the other side computes with."""
        return self.decode(self.encode(rows))

    def _encode_fp16(self, rows: F32) -> U8:
        rows = np.clip(rows, -FP16_REACH, FP16_REACH)
        _, top = np.frexp(np.abs(rows).max(axis=1, keepdims=True))  # [n, 1]  |x| <= 2^top
        exponent = top - TOP_EXPONENT
        codes = rows * np.ldexp(1.0, -exponent)  # f64: 2^163 is no f32, and products stay exact
        return np.concatenate([_bytes(exponent, "<i2"), _bytes(codes, "<f2")], axis=1)

    def _decode_fp16(self, data: U8) -> F32:
        exponent, codes = _numbers(data[:, :2], "<i2"), _numbers(data[:, 2:], "<f2")
        with np.errstate(over="ignore", invalid="ignore"):  # hostile exponents: decode() looks at what comes out
            return (codes.astype(np.float64) * np.ldexp(1.0, exponent.astype(np.int32))).astype(np.float32)

    def _encode_groups(self, rows: F32) -> U8:
        outliers, largest = list(self.spec.outliers), LARGEST_CODE[self.spec.id]
        beside = np.clip(rows[:, outliers], -F16_MAX, F16_MAX)  # [n, m]
        others = np.zeros((len(rows), self.n_groups * self.spec.group), np.float32)  # the last group filled up
        others[:, : self.d] = rows
        others[:, outliers] = 0
        x = others.reshape(len(rows), self.n_groups, self.spec.group)
        scales = np.minimum(np.abs(x).max(axis=2) / largest, F16_MAX).astype("<f2")  # [n, G]
        step = np.where(scales > 0, scales, 1).astype(np.float32)  # without a scale x is so small that it rounds to 0
        q = np.clip(np.rint(x / step[:, :, None]), -largest, largest).astype(np.int8)
        q = q.reshape(others.shape)[:, : self.d]
        codes = _bytes(q, "i1") if self.spec.id is CodecId.INT8_OS else _pack_nibbles(q)
        return np.concatenate([_bytes(beside, "<f2"), _bytes(scales, "<f2"), codes], axis=1)

    def _decode_groups(self, data: U8) -> F32:
        outliers = list(self.spec.outliers)
        a, b = 2 * len(outliers), 2 * len(outliers) + 2 * self.n_groups
        scales, codes = _numbers(data[:, a:b], "<f2").astype(np.float32), data[:, b:]
        if not np.isfinite(scales).all():  # also where only outliers lie in the group
            raise WireError(f"a scale of a row of {self.spec.id.name} is not finite: damaged on its way")
        q = codes.view(np.int8) if self.spec.id is CodecId.INT8_OS else _unpack_nibbles(codes)
        rows: F32 = q[:, : self.d] * np.repeat(scales, self.spec.group, axis=1)[:, : self.d]
        rows[:, outliers] = _numbers(data[:, :a], "<f2")
        return rows


def _bytes(numbers: NDArray[Any], kind: str) -> U8:
    """[n, k] numbers -> u8 [n, k * size], rounded to `kind`."""
    return np.ascontiguousarray(numbers.astype(kind)).view(np.uint8)


def _numbers(data: U8, kind: str) -> NDArray[Any]:
    """u8 [n, k * size] -> [n, k] numbers of `kind`."""
    return np.ascontiguousarray(data).view(kind)


def _pack_nibbles(q: NDArray[np.int8]) -> U8:
    """i8 [n, D] in -8..7 -> u8 [n, ceil(D/2)], the even channel low; a missing last one is zero."""
    nibbles = np.pad(q, ((0, 0), (0, q.shape[1] % 2))).view(np.uint8)
    packed: U8 = np.bitwise_or(nibbles[:, ::2] & np.uint8(15), nibbles[:, 1::2] << np.uint8(4))
    return packed


def _unpack_nibbles(codes: U8) -> NDArray[np.int8]:
    """u8 [n, k] -> i8 [n, 2k]"""
    q = np.empty((len(codes), 2 * codes.shape[1]), np.int8)
    q[:, ::2] = (codes << 4).view(np.int8) >> 4  # shifts of signed numbers carry the sign
    q[:, 1::2] = codes.view(np.int8) >> 4
    return q


def outlier_channels(rows: F32, m: int = MAX_OUTLIERS) -> tuple[int, ...]:
    """rows f32 [n, D] of calibration -> at most `m` channels, rising, that are worth two bytes a row of their own.

    The squared error of a group is proportional to the square of its largest magnitude, so a channel gains what that
    falls by when it leaves, together with the channels of its group that are larger.  It pays if it lowers the error of
    the whole row by more than the same 16 bits would as finer codes: by a factor of 2^(-32 / D).
    """
    d, group = rows.shape[1], GROUPS[CodecId.INT8_OS]
    order, errors = _error_by_left_out(rows, group, m)
    taken = np.zeros(len(errors), np.int64)  # of each group
    while (left := m - int(taken.sum())) > 0:
        now = errors[np.arange(len(errors)), taken]  # [G]
        after = errors[np.arange(len(errors))[:, None], np.minimum(taken[:, None] + np.arange(1, left + 1), m)]
        gain = (now[:, None] - after) / np.arange(1, left + 1)  # [G, left]  of each channel, if so many leave together
        best, n = np.unravel_index(np.argmax(gain), gain.shape)
        if gain[best, n] <= (1 - 2.0 ** (-32 / d)) * now.sum():
            break
        taken[best] += n + 1
    return tuple(sorted(int(g * group + c) for g, n in enumerate(taken) for c in order[g, :n]))


def _error_by_left_out(rows: F32, group: int, m: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """rows [n, D] -> channels of each group, strongest first, and its error without the first 0..m, f64 [G, m + 1]."""
    n, d = rows.shape
    x = np.abs(np.pad(rows, ((0, 0), (0, -d % group)))).reshape(n, -1, group)
    order = np.argsort(-np.square(x, dtype=np.float64).sum(axis=0), axis=1, kind="stable")  # [G, group]
    x = np.take_along_axis(x, order[None], axis=2)
    rest = np.maximum.accumulate(x[:, :, ::-1], axis=2)[:, :, ::-1]  # the largest of this channel and the weaker ones
    errors = np.square(rest, dtype=np.float64).sum(axis=0)  # [G, group]
    return order, np.pad(errors, ((0, 0), (0, max(0, m + 1 - group))))[:, : m + 1]


def relative_error(codec: Codec, rows: F32, leave_out: Sequence[int] = ()) -> float:
    """|round_trip(x) - x| / |x| over rows f32 [n, D], without the channels `leave_out`.

    Massive channels are left out where codecs are compared: they would make any error on the others look small.
    """
    kept = np.setdiff1d(np.arange(codec.d), np.asarray(leave_out, np.int64))
    x = rows[:, kept].astype(np.float64)
    return float(np.linalg.norm(codec.round_trip(rows)[:, kept] - x) / np.linalg.norm(x))
