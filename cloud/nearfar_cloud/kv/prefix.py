"""What a block holds, as a hash: of its ids and of all ids before them, salted by tenant and model.

    h_0 = H(salt)    h_i = H(h_(i-1), ids of block i)        keyed BLAKE2b, 16 bytes

Tenants have salts of their own: a hit would tell one tenant what another one asked (by its timing).
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from nearfar_cloud.kv.pool import BLOCK

SIZE = 16


def salt(*parts: str) -> bytes:
    """Of tenant, model fingerprint, KV format, layers: what a block's numbers depend on besides the ids."""
    h = blake2b(digest_size=SIZE)
    for part in parts:
        raw = part.encode()
        h.update(len(raw).to_bytes(8, "little") + raw)
    return h.digest()


class Chain:
    """The hashes of a growing list of ids; each block is hashed once."""

    def __init__(self, salt: bytes) -> None:
        self._salt, self.hashes = salt, list[bytes]()

    def upto(self, ids: Sequence[int], n_positions: int) -> list[bytes]:
        """The hashes of the full blocks among the first `n_positions` of `ids`, which only grow between two cuts."""
        n = n_positions // BLOCK
        while len(self.hashes) < n:
            i = len(self.hashes)
            piece = np.asarray(ids[i * BLOCK : (i + 1) * BLOCK], np.int32)
            assert len(piece) == BLOCK
            before = self.hashes[-1] if i else b""
            self.hashes.append(blake2b(before + piece.tobytes(), key=self._salt, digest_size=SIZE).digest())
        return self.hashes[:n]

    def cut(self, n_positions: int) -> None:
        """Forget the blocks that hold more than the first `n_positions`."""
        del self.hashes[n_positions // BLOCK :]
