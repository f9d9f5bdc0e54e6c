"""GGUF files put together byte by byte, so that a test can make any one field wrong."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from nearfar.gguf_reader import ValueType

U32, STRING, ARRAY = ValueType.U32, ValueType.STRING, ValueType.ARRAY


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw) if length is None else length) + raw


def kv(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + u32(kind) + value


def array(kind: int, n: int, elements: bytes) -> bytes:
    return u32(kind) + u64(n) + elements


def tensor(name: str | bytes, ne: Sequence[int] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + u32(len(ne)) + b"".join(map(u64, ne)) + u32(kind) + u64(offset)


def gguf(
    kvs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    n_kv: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """The file; the counts are those of the lists unless given."""
    head = b"GGUF" + u32(version)
    head += u64(len(tensors) if n_tensors is None else n_tensors) + u64(len(kvs) if n_kv is None else n_kv)
    head += b"".join(kvs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data
