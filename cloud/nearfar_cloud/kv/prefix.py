"""What a block holds, as a hash: of its positions and of all before them, salted by tenant, model and entry layer.

    h_i = H(h_(i-1), block i)        keyed BLAKE2b, 16 bytes; block i: 64 ids, or 64 rows as the bytes that came

Rows are hashed whole.  Their checksums on the wire are CRCs, of which two rows can have the same one: a chain of these
would now and then give a session the keys and values of other rows.

Tenants have salts of their own: a hit would tell one tenant what another one asked (by its timing).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

from nearfar_cloud.kv.pool import BLOCK
from nearfar_cloud.outside import RowPieces

SIZE = 16


def salt(*parts: str) -> bytes:
    """Of tenant, model fingerprint, entry layer: what a block's numbers depend on besides its positions."""
    h = blake2b(digest_size=SIZE)
    for part in parts:
        raw = part.encode()
        h.update(len(raw).to_bytes(8, "little") + raw)
    return h.digest()


class Chain:
    """The hashes of growing ids or rows; each block is hashed once."""

    def __init__(self, salt: bytes) -> None:
        self._salt, self.hashes = salt, list[bytes]()

    def upto(self, text: Sequence[int] | RowPieces, n_positions: int) -> list[bytes]:
        """The hashes of the full blocks among the first `n_positions` of `text`, which only grows between two cuts."""
        n = n_positions // BLOCK
        while len(self.hashes) < n:
            i = len(self.hashes)
            h = blake2b(self.hashes[-1] if i else b"", key=self._salt, digest_size=SIZE)
            for piece in _content(text, i * BLOCK):
                h.update(piece)
            self.hashes.append(h.digest())
        return self.hashes[:n]

    def cut(self, n_positions: int) -> None:
        """Forget the blocks that hold more than the first `n_positions`."""
        del self.hashes[n_positions // BLOCK :]


def _content(text: Sequence[int] | RowPieces, first: int) -> Iterable[bytes]:
    """The block of positions that begins at `first`."""
    if isinstance(text, RowPieces):
        return text.content(first, BLOCK)
    ids = np.asarray(text[first : first + BLOCK], np.int32)
    assert len(ids) == BLOCK
    return (ids.tobytes(),)
