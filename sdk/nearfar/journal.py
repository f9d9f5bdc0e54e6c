"""The journal of one answer: its final tokens in a file, each written before anybody sees it.  Imports errors only.

A device that was killed reads it and goes on with the next token (`Ledger` with `is_resumed`).  The file is removed
with the answer unless somebody wants to keep it.  Layout (little-endian, no gaps):

    header   "NFANSWER" | u32 version | u32 bytes of the fingerprint | u32 n_prompt | 16s session | 16s settings
             | fingerprint | n_prompt x u32 prompt ids | u32 crc of all this
    records  u32 position | u32 id | u32 crc of its row, 0: unknown | u32 crc of these 12 bytes, begun with the header's

Positions count from n_prompt on without gaps.  What follows the last sound record was torn by the end of the process
or of the machine, and is cut off: its tokens were never told to anybody, or will come out the same again.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from zlib import crc32

from nearfar.errors import FileError

MAGIC = b"NFANSWER"
VERSION = 1
MAX_BYTES = 64 << 20  # a file: four million positions
MAX_FINGERPRINT = 64
_HEADER = struct.Struct("<8sIII16s16s")
_RECORD = struct.Struct("<III")
_CRC = struct.Struct("<I")
RECORD_BYTES = _RECORD.size + _CRC.size


@dataclass(frozen=True, slots=True)
class JournalHead:
    """What an answer began with: whoever takes it up must have the same model and settings."""

    session: bytes  # [16]
    settings: bytes  # [16]  wire.hashes.settings_hash
    fingerprint: bytes  # [<= 64]  of the model
    prompt: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class JournalState:
    """What a journal holds: the ids behind the prompt, and the checksums of their rows (0: unknown)."""

    head: JournalHead
    ids: list[int]
    crcs: list[int]
    n_torn: int  # bytes behind the last sound record

    @property
    def text(self) -> list[int]:
        """Prompt and answer."""
        return [*self.head.prompt, *self.ids]


# ------------------------------------------------------------ bytes


def pack_head(head: JournalHead) -> bytes:
    """The header of a new journal.  Raises FileError for what would not fit or could not be read again."""
    if len(head.session) != 16 or len(head.settings) != 16 or len(head.fingerprint) > MAX_FINGERPRINT:
        sizes = len(head.session), len(head.settings), len(head.fingerprint)
        raise FileError(f"a journal for session, settings and fingerprint of {sizes} bytes: expected 16, 16, <= 64")
    n, n_prompt = len(head.fingerprint), len(head.prompt)
    if 4 * n_prompt > MAX_BYTES // 2:
        raise FileError(f"a journal for a prompt of {n_prompt} ids: expected at most {MAX_BYTES // 8}")
    first = _HEADER.pack(MAGIC, VERSION, n, n_prompt, head.session, head.settings)
    body = first + head.fingerprint + struct.pack(f"<{n_prompt}I", *head.prompt)
    return body + _CRC.pack(crc32(body))


def parse(data: bytes, name: str = "journal") -> JournalState:
    """The sound part of a journal's bytes.  Raises FileError if not even the header is sound."""
    if len(data) < _HEADER.size:
        raise FileError(f"{name}: {len(data)} bytes, shorter than the header of a journal")
    magic, version, n_fingerprint, n_prompt, session, settings = _HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION:
        raise FileError(f"{name}: begins with {magic!r}, version {version}: expected {MAGIC!r}, version {VERSION}")
    end = _HEADER.size + n_fingerprint + 4 * n_prompt
    if n_fingerprint > MAX_FINGERPRINT or end + _CRC.size > len(data):
        raise FileError(f"{name}: {len(data)} bytes, its header speaks of {end + _CRC.size}; the file is cut short")
    (crc,) = _CRC.unpack_from(data, end)
    if crc != crc32(data[:end]):
        raise FileError(f"{name}: the header does not have its checksum; the file is damaged")
    prompt = struct.unpack_from(f"<{n_prompt}I", data, _HEADER.size + n_fingerprint)
    head = JournalHead(session, settings, data[_HEADER.size : _HEADER.size + n_fingerprint], prompt)
    state, at = JournalState(head, [], [], 0), end + _CRC.size
    while (record := _record(data, at, crc)) is not None and record[0] == n_prompt + len(state.ids):
        state.ids.append(record[1])
        state.crcs.append(record[2])
        at += RECORD_BYTES
    return JournalState(head, state.ids, state.crcs, len(data) - at)


def _crc_at_end(head: bytes) -> int:
    """The header's checksum: records begin theirs with it, so none passes for one of another answer."""
    return int.from_bytes(head[-_CRC.size :], "little")


def _pack_record(position: int, token: int, crc: int, begun: int) -> bytes:
    body = _RECORD.pack(position, token, crc)
    return body + _CRC.pack(crc32(body, begun))


def _record(data: bytes, at: int, begun: int) -> tuple[int, int, int] | None:
    """(position, id, crc of the row), or None where no sound record is."""
    if at + RECORD_BYTES > len(data):
        return None
    position, token, crc = _RECORD.unpack_from(data, at)
    (sum_,) = _CRC.unpack_from(data, at + _RECORD.size)
    return (position, token, crc) if sum_ == crc32(data[at : at + _RECORD.size], begun) else None


# ------------------------------------------------------------ where the bytes are


class Store(Protocol):
    """Bytes that only grow at their end."""

    name: str

    def write(self, data: bytes) -> None:
        """All of it, or OSError and none of it."""

    def read(self) -> bytes: ...

    def close(self, keep: bool) -> None: ...


class _Memory:
    """For answers that leave no trace: a device that is killed has forgotten them."""

    name = "journal in memory"

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> None:
        self.data += data

    def read(self) -> bytes:
        return bytes(self.data)

    def close(self, keep: bool) -> None:
        if not keep:
            self.data.clear()


class _File:
    """A file that only its owner can read."""

    def __init__(self, path: Path, fd: int, size: int) -> None:
        self.path, self.fd, self.size, self.name = path, fd, size, str(path)

    def write(self, data: bytes) -> None:
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(self.fd, left) :]
        except OSError:
            with suppress(OSError):  # a half record would be cut off at the next opening anyway
                self.cut()
            raise
        self.size += len(data)

    def cut(self) -> None:
        """Forget what lies behind the last record."""
        os.ftruncate(self.fd, self.size)
        os.lseek(self.fd, self.size, os.SEEK_SET)

    def read(self) -> bytes:
        return self.path.read_bytes()

    def close(self, keep: bool) -> None:
        try:
            if keep:
                os.fsync(self.fd)
        finally:
            os.close(self.fd)
            if not keep:
                self.path.unlink(missing_ok=True)


# ------------------------------------------------------------ the journal


class Journal:
    """Of one answer, open for more tokens.  After a failed `append` it holds what it had and takes no more."""

    def __init__(self, store: Store, begun: int, n: int) -> None:
        self.store, self._begun, self._next, self._is_broken = store, begun, n, False

    @classmethod
    def create(cls, path: Path, head: JournalHead) -> Journal:
        """A new file, readable by its owner only.  Raises FileError: it is there already, or cannot be written."""
        data = pack_head(head)
        try:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o600)
        except FileExistsError:
            raise FileError(f"{path}: is there already; take that answer up (Journal.resume), or remove it") from None
        except OSError as error:
            raise FileError(f"{path}: cannot make a journal here: {error.strerror}") from None
        try:
            return cls._begin(_File(path, fd, 0), data, len(head.prompt))
        except FileError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise

    @classmethod
    def in_memory(cls, head: JournalHead) -> Journal:
        """The same without a file."""
        return cls._begin(_Memory(), pack_head(head), len(head.prompt))

    @classmethod
    def _begin(cls, store: Store, data: bytes, n_prompt: int) -> Journal:
        journal = cls(store, _crc_at_end(data), n_prompt)
        journal._write(data)
        return journal

    @classmethod
    def read(cls, path: Path) -> JournalState:
        """What a file holds; nothing is changed.  Raises FileError."""
        try:
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            raise FileError(f"{path}: {error.strerror}") from None
        try:
            return _read(path, fd)
        finally:
            os.close(fd)

    @classmethod
    def resume(cls, path: Path) -> tuple[Journal, JournalState]:
        """A file that an earlier process left, open for more tokens; a torn tail is cut off.  Raises FileError."""
        try:
            fd = os.open(path, os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            raise FileError(f"{path}: {error.strerror}") from None
        try:
            state = _read(path, fd)
            head = pack_head(state.head)
            file = _File(path, fd, len(head) + RECORD_BYTES * len(state.ids))
            file.cut()
        except (FileError, OSError) as error:
            os.close(fd)
            raise error if isinstance(error, FileError) else FileError(f"{path}: {error.strerror}") from None
        return cls(file, _crc_at_end(head), len(state.text)), state

    def append(self, positions: Sequence[int], ids: Sequence[int], crcs: Sequence[int]) -> None:
        """The next final tokens.  Raises FileError (the disk is full); the answer may go on without a journal."""
        assert list(positions) == list(range(self._next, self._next + len(ids))), (self._next, positions)
        self._next += len(ids)
        records = zip(positions, ids, crcs, strict=True)
        self._write(b"".join(_pack_record(*record, self._begun) for record in records))

    def state(self) -> JournalState:
        """What it holds so far.  Raises FileError."""
        try:
            return parse(self.store.read(), self.store.name)
        except OSError as error:
            raise FileError(f"{self.store.name}: cannot be read: {error.strerror}") from None

    def _write(self, data: bytes) -> None:
        if self._is_broken:
            raise FileError(f"{self.store.name}: takes nothing more since a write failed")
        try:
            self.store.write(data)
        except OSError as error:
            self._is_broken = True
            raise FileError(f"{self.store.name}: cannot be written: {error.strerror}; free some space") from None

    def close(self, keep: bool = False) -> None:
        """The answer is over: the journal goes with it, or stays, safe on the disk.  Raises FileError."""
        try:
            self.store.close(keep)
        except OSError as error:
            raise FileError(f"{self.store.name}: cannot be closed: {error.strerror}") from None


def _read(path: Path, fd: int) -> JournalState:
    """All of an open file, at most MAX_BYTES."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
        raise FileError(f"{path}: not a file, or larger than {MAX_BYTES} bytes; a journal is neither")
    try:
        with os.fdopen(fd, "rb", closefd=False) as file:
            return parse(file.read(status.st_size), str(path))
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from None
