"""Writes a GGUF 3 file, whole or not at all: what `nearfar import` and the training export end with.

Imports the ground floor only.  The layout is drawn in gguf_reader.py; the alignment is always 32.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import FileError, UsageError
from nearfar.gguf_reader import DEFAULT_ALIGNMENT, DTYPES, MAGIC, MAX_DIMS, MAX_KEY, MAX_NAME, TensorType, ValueType
from nearfar.quant import n_bytes, quantize
from nearfar.text_table import TextTable

VERSION = 3

Value = str | bool | int | float | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float] | NDArray[Any]


Make = Callable[[], NDArray[np.uint8]]  # a tensor's raw bytes, when it is their turn to be written


class GGUFWriter:
    """Collects metadata and tensors; `write` puts them on disk under the final name in one step."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._metadata: dict[str, bytes] = {}
        self._tensors: dict[str, tuple[TensorType, tuple[int, ...], Make]] = {}

    def add(self, key: str, value: Value, type: ValueType | None = None) -> None:
        """Add one key.  `type` is the type of the value, or of the elements of a list.

        Left out, it follows from the value: str, bool, float (f32) as they are; a whole number is a u32, a list of
        whole numbers i32; an array keeps its dtype.  Raises UsageError for a value that does not fit its type.
        """
        if not 1 <= len(key.encode()) <= MAX_KEY or key in self._metadata:
            raise UsageError(f"key {key[:80]!r}: expected 1..{MAX_KEY} bytes, and each key once")
        if key == "general.alignment":
            raise UsageError(f"general.alignment: this writer always aligns to {DEFAULT_ALIGNMENT}")
        self._metadata[key] = _value(key, value, type)

    def add_encoded(self, key: str, encoded: bytes) -> None:
        """Add one key as `GGUFFile.encoded` gave it."""
        self._metadata[key] = encoded

    def add_tensor(
        self,
        name: str,
        data: NDArray[Any],
        type: TensorType = TensorType.F32,
        shape: Sequence[int] | None = None,
    ) -> None:
        """Add one tensor: raw bytes (u8) of `type` and `shape` (numpy order), or f32 numbers, rounded to `type`.

        The array is kept, not copied, until `write`.  Raises UsageError where bytes, type and shape do not fit.
        """
        if data.dtype != np.uint8:
            shape = data.shape
            data = quantize(data, type)
        raw, shape = data, self._checked_shape(name, type, () if shape is None else shape)
        _check_size(name, type, shape, raw)
        self._tensors[name] = (type, shape, lambda: raw)

    def add_made(self, name: str, make: Make, type: TensorType, shape: Sequence[int]) -> None:
        """Add one tensor whose raw bytes (u8) `make` gives when they are to be written, so that a file may be larger
        than memory.  `write` raises UsageError if they do not fit type and shape.
        """
        self._tensors[name] = (type, self._checked_shape(name, type, shape), make)

    def _checked_shape(self, name: str, type: TensorType, shape: Sequence[int]) -> tuple[int, ...]:
        if not 1 <= len(name.encode()) < MAX_NAME or name in self._tensors:  # llama.cpp's names end before 64
            raise UsageError(f"tensor {name[:80]!r}: expected 1..{MAX_NAME - 1} bytes, and each name once")
        if not 1 <= len(shape) <= MAX_DIMS or min(shape) < 1:
            raise UsageError(f"{name}: shape {tuple(shape)}, expected 1..{MAX_DIMS} dimensions of 1 or more")
        n_bytes(type, tuple(shape))  # raises for rows that are not whole blocks
        return tuple(int(n) for n in shape)

    def write(self) -> Path:
        """Write, sync and rename; on failure the old file of that name is as it was.  Raises FileError."""
        write_together([self])
        return self.path

    def n_bytes(self) -> int:
        """The size of the file that `write` would make of what has been added so far."""
        return len(self._header()) + sum(_padded(n_bytes(kind, shape)) for kind, shape, _ in self._tensors.values())

    def _header(self) -> bytes:
        parts = [MAGIC + struct.pack("<IQQ", VERSION, len(self._tensors), len(self._metadata))]
        parts += [_string(key) + value for key, value in self._metadata.items()]
        offset = 0
        for name, (kind, shape, _) in self._tensors.items():
            parts.append(_string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), kind, offset))
            offset += _padded(n_bytes(kind, shape))
        header = b"".join(parts)
        return header + bytes(_padded(len(header)) - len(header))

    def _write_to(self, f: BinaryIO) -> None:
        f.write(self._header())
        for name, (kind, shape, make) in self._tensors.items():
            data = make()
            _check_size(name, kind, shape, data)
            f.write(np.ascontiguousarray(data).data)
            f.write(bytes(_padded(data.size) - data.size))


def write_together(writers: Sequence[GGUFWriter]) -> None:
    """Write and sync all files, then rename them; on failure the old files of those names are as they were.

    Raises FileError.
    """
    names = [(w.path.with_name(f".{w.path.name}.{os.getpid()}.tmp"), w.path) for w in writers]
    path = Path()
    try:
        for w, (temporary, _) in zip(writers, names, strict=True):
            path = w.path
            with open(temporary, "wb") as f:
                w._write_to(f)
                f.flush()
                os.fsync(f.fileno())
        for temporary, path in names:
            os.replace(temporary, path)
    except OSError as e:
        raise FileError(f"{path} cannot be written: {e.strerror or e}") from None
    finally:
        for temporary, _ in names:
            with suppress(OSError):  # the first failure is the one that is told
                temporary.unlink(missing_ok=True)


def _check_size(name: str, kind: TensorType, shape: tuple[int, ...], data: NDArray[np.uint8]) -> None:
    if data.size != n_bytes(kind, shape):
        raise UsageError(f"{name} {list(shape)} {kind.name} is {n_bytes(kind, shape)} bytes, got {data.size}")


def _padded(n: int) -> int:
    return -(-n // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")  # token bytes that are no UTF-8 go back as they came
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Value, kind: ValueType | None) -> bytes:
    """The type's number and the value's bytes."""
    if isinstance(value, (str, bool, int, float, np.generic)):
        if isinstance(value, np.generic):
            value = value.item()
        kind = _kind_of(value) if kind is None else kind
        return struct.pack("<I", kind) + _elements(key, [value], kind)
    if not isinstance(value, (list, tuple, np.ndarray, TextTable)):
        raise UsageError(f"{key}={value!r:.40}: expected text, a truth value, a number or a list of one of them")
    elements = value.tolist() if isinstance(value, np.ndarray) else list(value)
    if kind is None and isinstance(value, np.ndarray):
        kind = _kind_of_dtype(key, value.dtype)
    if kind is None:
        kinds = {_kind_of(v) for v in elements}
        if kinds <= {ValueType.U32, ValueType.I32} and kinds:
            kinds = {ValueType.I32}
        if len(kinds) != 1:
            raise UsageError(f"{key}: a list of {len(kinds)} types; expected one, or name the type")
        kind = kinds.pop()
    return struct.pack("<IIQ", ValueType.ARRAY, kind, len(elements)) + _elements(key, elements, kind)


def _kind_of(value: object) -> ValueType:
    if isinstance(value, str):
        return ValueType.STRING
    if isinstance(value, bool):
        return ValueType.BOOL
    if isinstance(value, int):
        return ValueType.U32 if value >= 0 else ValueType.I32
    if isinstance(value, float):
        return ValueType.F32
    raise UsageError(f"an element {value!r:.40}: expected text, a truth value or a number")


def _kind_of_dtype(key: str, dtype: np.dtype[Any]) -> ValueType:
    if dtype == np.bool_:
        return ValueType.BOOL
    for kind, name in DTYPES.items():
        if dtype == np.dtype(name):
            return kind
    raise UsageError(f"{key}: an array of {dtype} has no GGUF type")


def _elements(key: str, elements: list[Any], kind: ValueType) -> bytes:
    if kind is ValueType.STRING:
        if not all(isinstance(e, str) for e in elements):
            raise UsageError(f"{key}: expected text")
        return b"".join(map(_string, elements))
    if kind not in DTYPES or not all(isinstance(e, (bool, int, float)) for e in elements):
        raise UsageError(f"{key}: expected numbers for {kind.name}")
    dtype = np.dtype(DTYPES[kind])
    if dtype.kind in "iu" and not all(isinstance(e, int) for e in elements):
        raise UsageError(f"{key}: expected whole numbers for {kind.name}")
    try:
        return np.array(elements, dtype=dtype).tobytes()
    except OverflowError:
        raise UsageError(f"{key}: a number does not fit {kind.name}") from None
