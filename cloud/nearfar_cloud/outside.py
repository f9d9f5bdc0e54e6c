"""What only a sequence has whose positions come from outside: its rows, and what is asked of it.  Imports no torch.

position   0 ......... verify_from | +1 ......... pos | ..... n
known      |---------------------->|                            somebody vouches for them
drafts                             |----------------->|         each holds iff it is what the row before it decides
waiting                                               |------>  nobody has asked yet: nothing runs, or only early
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import UsageError

Array = NDArray[np.float32]


class RowStore(Protocol):
    """Rows that enter the model above its first layer, perhaps packed until they are run.  The engine's once given."""

    width: int  # D

    def __len__(self) -> int: ...

    def take(self, first: int, n: int) -> Array:
        """Rows first..first+n-1, f32 [n, D].  Raises for rows that cannot be read: that ends their sequence."""

    def content(self, first: int, n: int) -> Iterator[bytes]:
        """These rows as bytes for a hash: of two stores equal only if `take` gives equal rows.

        Each row begins with a mark of 16 bytes that says what the rest of it means, and how long that is.
        """

    def truncate(self, n: int) -> None:
        """Forget all but the first `n`."""


class ArrayRows:
    """Rows as they are, f32 [n, D].  Raises UsageError for anything else."""

    def __init__(self, rows: Array) -> None:
        if rows.ndim != 2 or rows.dtype != np.float32:
            raise UsageError(f"rows of {rows.dtype} {rows.shape}: expected f32 [n, D]")
        self._rows, self.width = rows, rows.shape[1]

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, first: int, n: int) -> Array:
        return self._rows[first : first + n]

    def content(self, first: int, n: int) -> Iterator[bytes]:
        mark = mark_of(f"f32 {self.width}")
        for row in self._rows[first : first + n]:
            yield mark
            yield row.tobytes()

    def truncate(self, n: int) -> None:
        self._rows = self._rows[:n]


def mark_of(form: str) -> bytes:
    """What `RowStore.content` puts before each row of a form."""
    return blake2b(form.encode(), digest_size=16).digest()


class RowPieces:
    """Stores behind each other, as they came."""

    def __init__(self, *pieces: RowStore) -> None:
        self._pieces: list[RowStore] = []
        self._starts: list[int] = []  # of each piece
        self._n = 0
        for piece in pieces:
            self.append(piece)

    def __len__(self) -> int:
        return self._n

    def append(self, piece: RowStore) -> None:
        if len(piece):
            self._pieces.append(piece)
            self._starts.append(self._n)
            self._n += len(piece)

    def take(self, first: int, n: int) -> Array:
        """f32 [n, D], a copy.  ValueError: a piece gave other rows than it was asked for."""
        parts: list[Array] = []
        for piece, at, n_here in self._parts(first, n):
            part = piece.take(at, n_here)
            if part.shape != (n_here, piece.width) or part.dtype != np.float32:
                raise ValueError(f"rows of {part.dtype} {part.shape}: expected f32 {(n_here, piece.width)}")
            parts.append(part)
        return np.concatenate(parts)

    def content(self, first: int, n: int) -> Iterator[bytes]:
        """As of `RowStore`, whatever the pieces."""
        for piece, at, n_here in self._parts(first, n):
            yield from piece.content(at, n_here)

    def _parts(self, first: int, n: int) -> Iterator[tuple[RowStore, int, int]]:
        """Where rows first..first+n-1 lie: a piece, the first row in it, how many."""
        assert n > 0
        assert 0 <= first <= self._n - n, (first, n, self._n)
        i, end = bisect_right(self._starts, first) - 1, first + n
        while first < end:
            piece, at = self._pieces[i], first - self._starts[i]
            n_here = min(end - first, len(piece) - at)
            yield piece, at, n_here
            first, i = first + n_here, i + 1

    def truncate(self, n: int) -> None:
        while self._n > n:
            start, piece = self._starts[-1], self._pieces[-1]
            if start >= n:
                del self._starts[-1], self._pieces[-1]
                self._n = start
            else:
                piece.truncate(n - start)
                self._n = n


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked: the tokens behind rows verify_from..pos.  Raises UsageError for what nobody can answer.

        row        verify_from   +1   ...   pos
        decides    +1            +2   ...   pos + 1
        draft      d_0           d_1  ...                of ids they are the ids themselves

    The answer: the drafts that hold, up to the first one that does not, and the token that is decided behind them.
    `run` > 1, of ids: if all hold the engine goes on by itself until it has told so many tokens, or a stop id; the last
    one is told and is no position until it is sent.
    """

    req: int  # the caller's number of it
    pos: int
    verify_from: int
    draft: tuple[int, ...] = ()
    run: int = 1
    wants_hidden: bool = False  # the row behind which the last token was decided is told, too

    def __post_init__(self) -> None:
        if not 0 <= self.verify_from <= self.pos:
            raise UsageError(f"rows {self.verify_from}..{self.pos} are asked about: expected 0 <= verify_from <= pos")
        if self.draft and len(self.draft) != self.pos - self.verify_from:
            raise UsageError(
                f"{len(self.draft)} drafts: expected {self.pos - self.verify_from}, one for each row but one"
            )
        if self.run < 1:
            raise UsageError(f"run={self.run}: expected 1 or more")


@dataclass(slots=True)
class Outside:
    """State of a sequence whose positions come from outside: `rows`, or its ids where there are none."""

    rows: RowPieces | None = None
    question: Question | None = None
    held: list[int] = field(default_factory=list)  # drafts of the question that hold, as far as they have been checked
    seconds: float = 0.0  # of the steps that ran a part of it
    early_end: int = 0  # positions below it may run before anybody asks, where a step has rows left
    early: range = range(0)  # positions that have run so, and that no question has used yet
    n_cuts: int = 0

    def take_up(self, question: Question | None) -> None:
        self.question, self.held, self.seconds = question, [], 0.0

    def ran_early(self, start: int, end: int) -> None:
        """Positions [start, end) have been run, and nobody asks."""
        self.early = range(self.early.start if self.early else start, end)

    def lost(self, n: int) -> int:
        """Positions from `n` on are not computed any longer; how many of them had run early, and in vain."""
        n_lost = max(0, self.early.stop - max(n, self.early.start))
        self.early = self.early[: len(self.early) - n_lost]
        return n_lost

    @property
    def n_known(self) -> int | None:
        """Positions that need no check, or have passed it; None: nobody asks."""
        return None if self.question is None else self.question.verify_from + 1 + len(self.held)
