"""A GGUF file as metadata and raw tensors: the first thing a walk opens.  Imports errors, digest and text_table only.

A file is hostile until shown otherwise: every count, size and offset is compared with the bytes that are there before
it is used, and what is kept in memory is bounded by the size of the file.  Layout (GGUF 2 and 3, little-endian):

    "GGUF" | u32 version | u64 n_tensors | u64 n_kv | n_kv x (key, type, value)
           | n_tensors x (name, u32 n_dims, u64 ne[n_dims], u32 type, u64 offset) | pad | tensor bytes

Strings are a u64 length and bytes; `ne[0]` runs fastest; offsets count from the end of the padded header.
"""

from __future__ import annotations

import itertools
import mmap
import os
import stat
import struct
from array import array
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.digest import blake2b
from nearfar.errors import FileError, GGUFError, UnsupportedError
from nearfar.text_table import LARGE, TextTable

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_NAME = 64  # bytes of a tensor's name
MAX_KEY = 65535  # bytes of a metadata key
MAX_ARRAY = 1 << 24  # elements of one metadata array: four times the largest vocabulary that a config accepts
MIN_KV = 8 + 1 + 4 + 1  # bytes of the smallest key-value pair and of the smallest tensor entry
MIN_TENSOR = 8 + 1 + 4 + 8 + 4 + 8

# What a file starts with when it is something else that people try.
_LOOKALIKES = {
    b"vers": "a Git LFS pointer: fetch the real file with `git lfs pull`",
    b"<!DO": "a web page: the download went wrong",
    b"PK\x03\x04": "a PyTorch or zip archive: convert it to GGUF first",
    b"ggml": "a GGML file from before GGUF: convert it again from the original weights",
    b"lmgg": "a GGML file from before GGUF: convert it again from the original weights",
    b"tjgg": "a GGML file from before GGUF: convert it again from the original weights",
}


class TensorType(IntEnum):
    """ggml's tensor types by their numbers.  Numbers beyond these become nameless members: see `is_readable`."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    I2_S = 36
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41

    @classmethod
    def _missing_(cls, value: object) -> TensorType | None:
        if not isinstance(value, int) or not 0 <= value < 1 << 32:
            return None
        member = int.__new__(cls, value)
        member._name_, member._value_ = f"number {value}", value
        return member


# type -> (weights of a block, bytes of a block).  Types that are not here have no size that a reader could check.
BLOCKS: dict[TensorType, tuple[int, int]] = {
    TensorType.F32: (1, 4),
    TensorType.F16: (1, 2),
    TensorType.Q4_0: (32, 18),
    TensorType.Q4_1: (32, 20),
    TensorType.Q5_0: (32, 22),
    TensorType.Q5_1: (32, 24),
    TensorType.Q8_0: (32, 34),
    TensorType.Q8_1: (32, 40),
    TensorType.Q2_K: (256, 84),
    TensorType.Q3_K: (256, 110),
    TensorType.Q4_K: (256, 144),
    TensorType.Q5_K: (256, 176),
    TensorType.Q6_K: (256, 210),
    TensorType.Q8_K: (256, 292),
    TensorType.IQ2_XXS: (256, 66),
    TensorType.IQ2_XS: (256, 74),
    TensorType.IQ3_XXS: (256, 98),
    TensorType.IQ1_S: (256, 50),
    TensorType.IQ4_NL: (32, 18),
    TensorType.IQ3_S: (256, 110),
    TensorType.IQ2_S: (256, 82),
    TensorType.IQ4_XS: (256, 136),
    TensorType.I8: (1, 1),
    TensorType.I16: (1, 2),
    TensorType.I32: (1, 4),
    TensorType.I64: (1, 8),
    TensorType.F64: (1, 8),
    TensorType.IQ1_M: (256, 56),
    TensorType.BF16: (1, 2),
    TensorType.TQ1_0: (256, 54),
    TensorType.TQ2_0: (256, 66),
    TensorType.MXFP4: (32, 17),
    TensorType.NVFP4: (64, 36),
    TensorType.Q1_0: (128, 18),
}

# The types whose numbers this project can compute with.
READABLE = frozenset(
    {
        TensorType.F32,
        TensorType.F16,
        TensorType.BF16,
        TensorType.Q8_0,
        TensorType.Q4_0,
        TensorType.Q4_1,
        TensorType.Q2_K,
        TensorType.Q3_K,
        TensorType.Q4_K,
        TensorType.Q5_K,
        TensorType.Q6_K,
        TensorType.TQ1_0,
        TensorType.TQ2_0,
    }
)


class ValueType(IntEnum):
    """The types of metadata values."""

    U8 = 0
    I8 = 1
    U16 = 2
    I16 = 3
    U32 = 4
    I32 = 5
    F32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    U64 = 10
    I64 = 11
    F64 = 12


# numpy's name of each fixed-size value type, little-endian
DTYPES: dict[ValueType, str] = {
    ValueType.U8: "<u1",
    ValueType.I8: "<i1",
    ValueType.U16: "<u2",
    ValueType.I16: "<i2",
    ValueType.U32: "<u4",
    ValueType.I32: "<i4",
    ValueType.F32: "<f4",
    ValueType.BOOL: "<u1",
    ValueType.U64: "<u8",
    ValueType.I64: "<i8",
    ValueType.F64: "<f8",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies.

    `shape` is in numpy order ([rows, cols], cols run fastest; ggml's `ne` reversed), `offset` counts from the start
    of the file.  Where the type's block size is not known, `n_bytes` is the room up to the next tensor.
    """

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class GGUFFile:
    """An open GGUF file: metadata in memory, tensors as views of a read-only map."""

    def __init__(
        self,
        path: Path,
        version: int,
        metadata: dict[str, Any],
        tensors: dict[str, TensorInfo],
        spans: dict[str, tuple[int, int]],
    ) -> None:
        self.path = path
        self.version = version
        self.metadata = metadata
        self.tensors = tensors
        self._spans = spans  # of each key's value, its type included
        self._bytes: NDArray[np.uint8] | None = None
        self._map: mmap.mmap | None = None
        self._mtime_ns = 0

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Map the file and check its whole header.

        Raises FileError (missing, unreadable, not a plain file, empty) or GGUFError (not GGUF, damaged).
        """
        path = Path(path)
        data, mtime_ns = _map(path)
        file = cls(path, *_parse(data, path))
        file._map, file._bytes, file._mtime_ns = data, np.frombuffer(data, dtype=np.uint8), mtime_ns
        return file

    @cached_property
    def fingerprint(self) -> bytes:
        """32 bytes that change with the file, in some milliseconds: for what is derived from it and kept.

        A digest of size, time of the last change (ns), the whole header with the tensor table, and four samples of 64
        bytes from every tensor.  The time tells any ordinary change.  Where files are copied with their times, or all
        times are set to one (reproducible images), the samples tell: training, merging and quantizing touch nearly
        every block of a tensor.  Only who edits a few weights in place and sets the time back goes unnoticed; that is
        the price of not reading a gigabyte.  (Change time and inode would tell even that, but they differ after every
        copy, and a model could not travel with what belongs to it.)
        """
        assert self._bytes is not None, "the file is closed"
        start = min((t.offset for t in self.tensors.values()), default=self._bytes.size)
        digest = blake2b(struct.pack("<QQ", self._bytes.size, self._mtime_ns & (1 << 64) - 1), digest_size=32)
        digest.update(self._bytes[:start].data)
        for t in self.tensors.values():
            for i in range(4):
                at = t.offset + i * max(t.n_bytes - 64, 0) // 3
                digest.update(self._bytes[at : min(at + 64, t.offset + t.n_bytes)].data)
        self.release_pages()  # each sample has brought its neighbours
        return digest.digest()

    def raw(self, name: str) -> NDArray[np.uint8]:
        """The bytes of a tensor, u8 [n_bytes], read-only; they stay valid after `close`.

        Raises GGUFError (no such tensor), UnsupportedError (a type that this project does not compute with).
        """
        info = self.tensors.get(name)
        if info is None:
            raise GGUFError(f"{self.path}: no tensor named {name!r} among its {len(self.tensors)}")
        if info.type not in READABLE:
            raise UnsupportedError(
                f"{self.path}: {name} is of type {info.type.name}; this engine reads "
                f"{', '.join(t.name for t in sorted(READABLE))}: convert the model to one of them"
            )
        assert self._bytes is not None, "the file is closed"
        return self._bytes[info.offset : info.offset + info.n_bytes]

    def encoded(self, key: str) -> bytes:
        """A key's value as the file holds it, its type first: for a copy that changes nothing it does not know."""
        assert self._bytes is not None, "the file is closed"
        start, stop = self._spans[key]
        return self._bytes[start:stop].tobytes()

    def release_pages(self) -> None:
        """Take the pages read so far out of this process; they come back from the page cache when they are read."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the map; it goes away with the last view that `raw` gave out."""
        self._map = self._bytes = None

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _map(path: Path) -> tuple[mmap.mmap, int]:
    """The file's bytes, and when it was last changed (ns)."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # looked at before opening: opening a pipe would wait forever
            kind = "a folder" if path.is_dir() else "not a plain file"
            raise FileError(f"{path} is {kind}: expected a GGUF file")
        with open(path, "rb") as f:
            found = os.fstat(f.fileno())
            if found.st_size == 0:
                raise FileError(f"{path} is empty: expected a GGUF file")
            return mmap.mmap(f.fileno(), found.st_size, access=mmap.ACCESS_READ), found.st_mtime_ns
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except (OSError, ValueError) as e:  # ValueError: a NUL in the path, or the file shrank before it was mapped
        raise FileError(f"{path} cannot be read: {e}") from None


class _Cursor:
    """Bounded reads of a header, front to back."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path = data, path
        self.pos, self.size = 0, len(data)

    def fail(self, message: str) -> GGUFError:
        return GGUFError(f"{self.path}: {message}")

    def need(self, n: int, what: str) -> None:
        left = self.size - self.pos
        if n > left:
            raise self.fail(
                f"cut short or damaged: {what} at byte {self.pos} needs {n} bytes, {left} are left; fetch it again"
            )

    def take(self, n: int, what: str) -> bytes:
        self.need(n, what)
        start, self.pos = self.pos, self.pos + n
        return self.data[start : self.pos]

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def count(self, smallest: int, what: str) -> int:
        """A u64 that announces as many entries of at least `smallest` bytes."""
        n = self.u64(f"the number of {what}")
        if n * smallest > self.size - self.pos:
            raise self.fail(
                f"cut short or damaged: it announces {n} {what} of at least {smallest} bytes, "
                f"{self.size - self.pos} bytes are left; fetch it again"
            )
        return n

    def name(self, limit: int, what: str) -> str:
        n = self.u64(f"the length of {what}")
        if not 1 <= n <= limit:
            raise self.fail(f"damaged: {what} at byte {self.pos} is {n} bytes long, expected 1..{limit}")
        raw = self.take(n, what)
        text = raw.decode("utf-8", "replace")
        if "\ufffd" in text or not text.isprintable():  # names end up on terminals
            raise self.fail(f"damaged: {what} {raw[:40]!r} is not printable text")
        return text

    def strings(self, n: int, what: str) -> list[str] | TextTable:
        """`n` strings: the one loop that matters for opening speed (150k tokens and as many merges)."""
        data, pos, base = self.data, self.pos, self.pos
        starts = array("I")
        append, length = starts.append, struct.Struct("<Q").unpack_from
        try:
            for _ in range(n):  # a length beyond the file moves pos beyond it: the next look there fails
                start = pos + 8
                pos = start + length(data, pos)[0]
                append(start - base)
            append(pos + 8 - base)
        except (struct.error, OverflowError):  # 4 GiB of texts are more than any file has
            pos = self.size + 1
        if pos > self.size:
            raise self.fail(f"cut short or damaged: {what} passes the end of the file; fetch it again")
        self.pos = pos
        table = TextTable(data, starts, base)
        return table if n >= LARGE else list(table)


def _parse(
    data: mmap.mmap, path: Path
) -> tuple[int, dict[str, Any], dict[str, TensorInfo], dict[str, tuple[int, int]]]:
    c = _Cursor(data, path)
    magic = c.take(min(4, c.size), "the magic")
    if magic != MAGIC:
        hint = _LOOKALIKES.get(magic, "is it another format?")
        raise c.fail(f"not a GGUF file: it starts with {magic!r}, expected {MAGIC!r}; {hint}")
    version = c.u32("the version")
    if version and version & 0xFFFF == 0:
        raise c.fail("a big-endian GGUF file: expected little-endian; convert it with gguf-convert-endian")
    if version not in (2, 3):
        raise c.fail(f"GGUF version {version}: expected 2 or 3; convert the model again")
    n_tensors = c.count(MIN_TENSOR, "tensors")
    n_kv = c.count(MIN_KV, "keys")

    metadata: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for _ in range(n_kv):
        key = c.name(MAX_KEY, "a key")
        if key in metadata:
            raise c.fail(f"damaged: the key {key[:80]!r} occurs twice")
        start = c.pos
        metadata[key] = _value(c, f"the value of {key[:80]!r}")
        spans[key] = (start, c.pos)

    entries = [_tensor_entry(c) for _ in range(n_tensors)]
    return version, metadata, _place(c, entries, _alignment(c, metadata)), spans


def _value(c: _Cursor, what: str) -> Any:
    kind = _value_type(c, what)
    if kind is ValueType.STRING:
        return c.take(c.u64(f"the length of {what}"), what).decode("utf-8", "replace")  # only lists hold token bytes
    if kind is not ValueType.ARRAY:
        return _numbers(c, kind, 1, what)[0]
    kind = _value_type(c, what)
    if kind is ValueType.ARRAY:
        raise c.fail(f"{what} is an array of arrays: expected one level")
    n = c.count(8 if kind is ValueType.STRING else np.dtype(DTYPES[kind]).itemsize, f"elements of {what}")
    if n > MAX_ARRAY:
        raise c.fail(f"{what} has {n} elements: expected at most {MAX_ARRAY}")
    return c.strings(n, what) if kind is ValueType.STRING else _numbers(c, kind, n, what)


def _value_type(c: _Cursor, what: str) -> ValueType:
    number = c.u32(f"the type of {what}")
    if number > ValueType.F64:
        raise c.fail(f"damaged: {what} is of type {number}, expected 0..{ValueType.F64:d}")
    return ValueType(number)


def _numbers(c: _Cursor, kind: ValueType, n: int, what: str) -> list[Any]:
    dtype = np.dtype(DTYPES[kind])
    values = np.frombuffer(c.take(n * dtype.itemsize, what), dtype=dtype)
    if kind is ValueType.BOOL:
        if n and values.max() > 1:
            raise c.fail(f"damaged: {what} is a truth value of {values.max()}, expected 0 or 1")
        values = values.astype(bool)
    return list(values.tolist())


def _alignment(c: _Cursor, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 8 <= value <= 1 << 20 or value & (value - 1):
        raise c.fail(f"general.alignment={str(value)[:40]}: expected a power of two, 8..{1 << 20}")
    return value


def _tensor_entry(c: _Cursor) -> tuple[str, TensorType, tuple[int, ...], int]:
    """Name, type, shape and offset as they stand in the header."""
    name = c.name(MAX_NAME, "a tensor's name")
    n_dims = c.u32(f"the number of dimensions of {name}")
    if not 1 <= n_dims <= MAX_DIMS:
        raise c.fail(f"damaged: {name} has {n_dims} dimensions, expected 1..{MAX_DIMS}")
    ne = struct.unpack(f"<{n_dims}Q", c.take(8 * n_dims, f"the shape of {name}"))
    kind = TensorType(c.u32(f"the type of {name}"))
    return name, kind, ne[::-1], c.u64(f"the offset of {name}")


def _place(
    c: _Cursor, entries: list[tuple[str, TensorType, tuple[int, ...], int]], alignment: int
) -> dict[str, TensorInfo]:
    """Check that the tensors lie inside the file, aligned and apart from each other."""
    base = -(-c.pos // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, kind, shape, offset in entries:
        if name in tensors:
            raise c.fail(f"damaged: two tensors are named {name}")
        n_bytes = _n_bytes(c, name, kind, shape)
        if offset % alignment:
            raise c.fail(f"damaged: {name} starts at {offset}, expected a multiple of {alignment}")
        room = max(c.size - base - offset, 0)
        if n_bytes > room:
            raise c.fail(
                f"cut short or damaged: {name} {list(shape)} {kind.name} needs {n_bytes} bytes at byte "
                f"{base + offset}, {room} are there; fetch it again"
            )
        tensors[name] = TensorInfo(name, kind, shape, base + offset, n_bytes)

    in_order = sorted(tensors.values(), key=lambda t: (t.offset, t.n_bytes))
    for a, b in itertools.pairwise(in_order):
        if a.offset + a.n_bytes > b.offset:
            raise c.fail(f"damaged: {a.name} and {b.name} overlap at byte {b.offset}")
    for t, following in itertools.zip_longest(in_order, in_order[1:]):
        if t.type not in BLOCKS:
            end = following.offset if following else c.size
            tensors[t.name] = TensorInfo(t.name, t.type, t.shape, t.offset, end - t.offset)
    return tensors


def _n_bytes(c: _Cursor, name: str, kind: TensorType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor (at least 1 where the type's block size is not known)."""
    n = 1
    for dim in shape:
        n *= dim
        if dim == 0 or n >= 1 << 63:
            raise c.fail(f"damaged: {name} has the shape {list(shape)}, expected dimensions 1..2^63 in all")
    if kind not in BLOCKS:
        return 1
    weights, size = BLOCKS[kind]
    if shape[-1] % weights:
        raise c.fail(f"{name} {list(shape)}: rows of {kind.name} are made of blocks of {weights} weights")
    return n // weights * size
