"""Packed matrices in a file of their own: written once, mapped and checked from then on.  Imports errors and digest.

The file is no more trusted than a model's: magic, version, counts, every offset, length and alignment are compared
with the bytes that are there before they are used, header and table carry a digest, and every matrix a checksum over
all of its bytes.  Whoever can write here can write the model beside it, so the digests guard against damage, not
against malice; but no byte of this file leads the engine outside of it.  Layout (little-endian, no gaps inside):

    header   "NFPANELS" | u32 version | u32 n_matrices | u64 file size | 32s source | 32s layout
             | u32 first layer | u32 last layer | 16s digest of header and table, computed with zeros here
    table    n_matrices x (64s name, 16s kind, u64 rows, u64 cols, f32 scale, 4 zeros,
             u64 offset, u64 size, u64 checksum of the panels, and the same of the row scales)
    bytes    panels and row scales, each at a multiple of 64
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from nearfar.digest import blake2b
from nearfar.errors import FileError

Bytes = NDArray[np.uint8]

MAGIC = b"NFPANELS"
VERSION = 1
ALIGNMENT = 64
_HEADER = struct.Struct("<8sIIQ32s32sII16s")
_ENTRY = struct.Struct("<64s16sQQf4xQQQQQQ")
_DIGEST = 16
# Written in pieces of this size at multiples of it, the file lies in the page cache as huge pages (Linux, file systems
# with large folios), and its map reads as fast as anonymous huge pages: 8 % faster than pieces of 64 KiB.
_CHUNK = 4 << 20


@dataclass(frozen=True, slots=True)
class PanelKey:
    """What panels depend on: the file they were packed from, the kernels' layout, the layers [first, last)."""

    source: bytes  # [32]
    layout: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Panels:
    """One packed matrix.  `row_scales` is empty for kinds that have none."""

    kind: str
    rows: int
    cols: int
    scale: float
    data: Bytes
    row_scales: Bytes


class PanelFile:
    """An open panel file: its key, and matrices as views of a read-only map."""

    def __init__(
        self, path: Path, key: PanelKey, n_bytes: int, matrices: dict[str, Panels], sums: dict[str, tuple[int, int]]
    ) -> None:
        self.path, self.key, self.n_bytes, self.matrices = path, key, n_bytes, matrices
        self._sums = sums

    @classmethod
    def open(cls, path: Path) -> PanelFile:
        """Map the file and check header and table.  Raises FileError (missing, unreadable, damaged, other version)."""
        try:
            with open(path, "rb") as f:
                size = os.fstat(f.fileno()).st_size
                if size < _HEADER.size:
                    raise _damaged(path, f"{size} bytes, expected at least {_HEADER.size}")
                data = mmap.mmap(f.fileno(), size, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise FileError(f"{path}: no such file") from None
        except (OSError, ValueError) as error:
            raise FileError(f"{path} cannot be read: {error}") from None
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a wish: it also makes a cold file come in by huge pages
                data.madvise(mmap.MADV_HUGEPAGE)
        key, entries = _parse(path, np.frombuffer(data, np.uint8))
        sums = {name: (sum_data, sum_scales) for name, (_, sum_data, sum_scales) in entries.items()}
        return cls(path, key, size, {name: panels for name, (panels, _, _) in entries.items()}, sums)

    def verify(self, checksums: Callable[[list[Bytes]], list[int]]) -> None:
        """Read every byte once.  Raises FileError that names a matrix whose bytes are not those that were written."""
        parts = [part for p in self.matrices.values() for part in (p.data, p.row_scales)]
        found = checksums(parts)
        for name, sum_data, sum_scales in zip(self.matrices, found[::2], found[1::2], strict=True):
            if (sum_data, sum_scales) != self._sums[name]:
                raise _damaged(self.path, f"the checksum of {name} is another one")


def read_key(path: Path) -> PanelKey:
    """The key alone.  Raises FileError as `PanelFile.open` does."""
    return PanelFile.open(path).key


def _damaged(path: Path, what: str) -> FileError:
    return FileError(f"{path} is damaged: {what}")


def _parse(path: Path, data: Bytes) -> tuple[PanelKey, dict[str, tuple[Panels, int, int]]]:
    magic, version, n, size, source, layout, first, last, digest = _HEADER.unpack_from(data.data)
    if magic != MAGIC:
        raise _damaged(path, f"it starts with {magic!r}, expected {MAGIC!r}")
    if version != VERSION:
        raise FileError(f"{path} is of version {version}, expected {VERSION}")
    if size != len(data):
        raise _damaged(path, f"{len(data)} bytes, the header says {size}")
    end = _HEADER.size + n * _ENTRY.size
    if end > size:
        raise _damaged(path, f"{n} matrices announced, {size} bytes are there")
    table = data[_HEADER.size : end].tobytes()
    if digest != _digest(data[: _HEADER.size - _DIGEST].tobytes(), table):
        raise _damaged(path, "the digest of its header is another one")
    entries: dict[str, tuple[Panels, int, int]] = {}
    for name, kind, rows, cols, scale, *where in _ENTRY.iter_unpack(table):
        text = _text(path, name)
        if text in entries:
            raise _damaged(path, f"{text} occurs twice")
        offset, n_data, sum_data, offset_scales, n_scales, sum_scales = where
        parts = [_part(path, data, end, *place) for place in ((offset, n_data), (offset_scales, n_scales))]
        if max(rows, cols) >= 1 << 40:
            raise _damaged(path, f"{text} is [{rows}, {cols}]")
        entries[text] = (Panels(_text(path, kind), rows, cols, scale, *parts), sum_data, sum_scales)
    return PanelKey(source, _text(path, layout), first, last), entries


def _part(path: Path, data: Bytes, end: int, offset: int, size: int) -> Bytes:
    if offset % ALIGNMENT or offset < end or offset + size > len(data):
        raise _damaged(path, f"{size} bytes at {offset}: expected a multiple of {ALIGNMENT} in {end}..{len(data)}")
    return data[offset : offset + size]


def _text(path: Path, raw: bytes) -> str:
    text = raw.rstrip(b"\0").decode("ascii", "replace")
    if not text or not text.isprintable() or not text.isascii():
        raise _damaged(path, f"{raw[:20]!r} is no name")
    return text


def _digest(header: bytes, table: bytes) -> bytes:
    return blake2b(header + table, digest_size=_DIGEST).digest()


class PanelWriter:
    """Streams matrices into a temporary file beside `path`; `finish` gives it the name in one step.

    Nothing but the table is kept in memory.  Leaving the `with` block without `finish` leaves nothing behind.  Every
    method raises OSError where the disk refuses.
    """

    def __init__(self, path: Path, key: PanelKey, n_matrices: int) -> None:
        self.path, self._key, self._n = path, key, n_matrices
        self._entries: list[bytes] = []
        self._temporary = path.with_name(f"{temporary_prefix(path)}{os.getpid()}-{threading.get_ident()}.tmp")
        self._file = open(self._temporary, "wb", buffering=0)  # noqa: SIM115 - closed by __exit__
        self._pending, self._at = bytearray(), 0
        self._append(bytes(_HEADER.size + n_matrices * _ENTRY.size))

    def add(self, name: str, panels: Panels, sums: tuple[int, int]) -> None:
        """Append one matrix; `sums` are the checksums of its panels and of its row scales."""
        where: list[int] = []
        for part, checksum in zip((panels.data, panels.row_scales), sums, strict=True):
            self._append(bytes(-self._at % ALIGNMENT))
            where += [self._at, part.size, checksum]
            self._append(part.data)
        fields = (panels.kind.encode("ascii"), panels.rows, panels.cols, panels.scale)
        self._entries.append(_ENTRY.pack(name.encode("ascii"), *fields, *where))

    def finish(self) -> None:
        """Write what is missing, sync and rename."""
        assert len(self._entries) == self._n, "fewer matrices than announced"
        self._append(b"", everything=True)
        k, table = self._key, b"".join(self._entries)
        layout = k.layout.encode("ascii")
        header = _HEADER.pack(MAGIC, VERSION, self._n, self._at, k.source, layout, k.first, k.last, bytes(_DIGEST))
        header = header[:-_DIGEST]
        self._file.seek(0)
        self._write(header + _digest(header, table) + table)
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)

    def _append(self, data: bytes | memoryview, *, everything: bool = False) -> None:
        self._at += len(data)
        view = memoryview(data)
        while len(self._pending) + len(view) >= _CHUNK or (everything and self._pending):
            taken = _CHUNK - len(self._pending)
            self._pending += view[:taken]
            view = view[taken:]
            self._write(self._pending)
            self._pending.clear()
        self._pending += view

    def _write(self, data: bytes | bytearray) -> None:
        written = 0
        while written < len(data):
            written += self._file.write(memoryview(data)[written:])

    def __enter__(self) -> PanelWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def temporary_prefix(path: Path) -> str:
    """What the names of temporary files of `path` start with."""
    return f".{path.name}."
