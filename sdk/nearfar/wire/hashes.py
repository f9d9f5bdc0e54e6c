"""Checksums that both sides take of what has travelled: of a row, of an id, of everything so far.

A row's checksum is zlib's CRC-32 and not CRC-32C: every Python has it, a row takes microseconds, and damage is noticed
just as well, and so are rows that were computed twice and differ.  Malice is the business of TLS.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from hashlib import blake2b
from zlib import crc32

from nearfar.wire.messages import Open

START = b"\0" * 8  # the chain before the first row


def crc_of_id(token: int) -> int:
    """An id as if it were a row of four bytes."""
    return crc32(struct.pack("<I", token))


def chain(before: bytes, crc: int) -> bytes:
    """8 bytes that stand for all rows up to one more, whose checksum is `crc`."""
    return blake2b(before + struct.pack("<I", crc), digest_size=8).digest()


def settings_hash(opening: Open) -> bytes:
    """Of what must not change while an answer lasts: 16 bytes that the upper side echoes."""
    o, s = opening, opening.sampling
    fields: Collection[object] = (
        *(int(o.mode), int(o.codec.id), o.codec.group, o.codec.outliers, o.row_layer, o.stop_ids, o.version),
        *(s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, s.repetition_window, s.seed),
    )
    return blake2b(repr(fields).encode(), digest_size=16).digest()
