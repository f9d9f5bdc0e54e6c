"""Batches of a fixed list of rows, for the fine-tuning of one task.  Where the mix has many sources, this has one list.

Rows come in an order that the seed draws anew for each epoch, packed one after the other; where the next row does not
fit, the sequence ends.  The same position gives the same batches, as the trainer wants (trainer.Batches).
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import DataError
from nearfar_cloud.training.dev import Encoded
from nearfar_cloud.training.mix import NO_TARGET, Batch, Phase


class RowBatches:
    """Endless batches of `rows`, each of at most `width` tokens (longer ones are left out).

    `prompt_weight` is the loss weight of tokens that the model does not write.  DataError where no row fits.
    """

    def __init__(self, rows: Sequence[Encoded], width: int, *, pad_id: int, prompt_weight: float, seed: int) -> None:
        self.rows = [row for row in rows if len(row[0]) <= width]
        if not self.rows:
            raise DataError(f"expected rows of at most {width} tokens, found none in {len(rows)}; use a wider sequence")
        self.pad_id, self.prompt_weight, self.seed, self.drawn = pad_id, prompt_weight, seed, 0
        self.data_sha256 = sha256(b"".join(ids.tobytes() + written.tobytes() for ids, written in self.rows)).hexdigest()
        self.digest = sha256()  # of what was given, so that arms can show that they saw the same rows
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, np.int64))  # epoch, rows in its order

    def next_batch(self, n_sequences: int, phase: Phase, width: int) -> Batch:
        """The next `n_sequences` sequences of `width` tokens; both phases are alike."""
        shape = (n_sequences, width)
        batch = Batch(
            ids=np.full(shape, self.pad_id, np.int64),
            targets=np.full(shape, NO_TARGET, np.int64),
            weights=np.zeros(shape, np.float32),
            pos=np.zeros(shape, np.int64),
            doc=np.zeros(shape, np.int64),
        )
        for b in range(n_sequences):
            at = n_rows = 0
            while at + len((row := self._row(self.drawn))[0]) <= width:
                ids, written = row
                here, before_last = slice(at, at + len(ids)), slice(at, at + len(ids) - 1)
                batch.ids[b, here], batch.pos[b, here], batch.doc[b, here] = ids, np.arange(len(ids)), n_rows
                batch.targets[b, before_last] = ids[1:]
                batch.weights[b, before_last] = np.where(written[1:], 1.0, self.prompt_weight)
                at, n_rows, self.drawn = at + len(ids), n_rows + 1, self.drawn + 1
            batch.doc[b, at:], batch.pos[b, at:] = n_rows, np.arange(width - at)
        self.digest.update(batch.ids.tobytes())
        return batch

    def _row(self, n: int) -> Encoded:
        epoch, place = divmod(n, len(self.rows))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))
        return self.rows[int(self._order[1][place])]

    def state(self) -> dict[str, Any]:
        """The position."""
        return {"drawn": self.drawn}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a position."""
        self.drawn = int(state["drawn"])
