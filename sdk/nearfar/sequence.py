"""One answer in the making: the ids, the cache, and the rows that still wait for the upper layers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import KVTruncated, UsageError
from nearfar.lower import KV
from nearfar.sampling import Sampling

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Ahead:
    """A position that full depth has run before its turn: its logits [V], and the id that the next row comes from.

    `largest`: the id of the largest logit and its probability, where that is all that is asked for.
    """

    logits: Array | None
    draft: int | None
    largest: tuple[int, float] | None = None


@dataclass(slots=True)
class Pause:
    """Steps that nearfar.speculate goes without drafts: `left`, after `n_unsure` passes without a sure first draft."""

    left: int = 0
    n_unsure: int = 0


@dataclass(frozen=True, slots=True)
class SharedStats:
    """What an answer took that two machines made (nearfar.collab).  `link_ms`: waited for, beyond the upper side's own.

    `asks` are round trips; of the `drafted` tokens `accepted` held and `retracted` did not.  Of the tokens that an exit
    was sure of the upper side decided `sure` too (lossless: all of them, lossy: answered `audits`),
    and `sure_wrong` of them otherwise; `disagreement` is their share in all answers of the LLM, `alarm`: that is more
    than calibrated.
    """

    asks: int
    rows_asked: int  # rows that the upper side ran for them
    bytes_up: int
    bytes_down: int
    device_ms: float
    upper_ms: float
    link_ms: float
    drafted: int
    accepted: int
    retracted: int
    reopened: int  # times that the link came back
    replayed: int  # rows that were sent again
    near_ties: int  # decisions whose two largest logits were closer than 1e-4
    sure: int = 0
    sure_wrong: int = 0
    audits: int = 0  # of the asks: behind tokens that had been told
    audit_bytes: int = 0  # of the bytes: those asks and their answers
    loosened: int = 0  # tokens that an exit decided by a threshold that was lowered, as the upper side was overloaded
    disagreement: float = 0.0
    alarm: bool = False


@dataclass(frozen=True, slots=True)
class Notice:
    """What is worth telling beside the tokens of an answer that two machines make.

    "waiting" (n: ms so far), "degraded" (the link is gone), "back", "rebuilding" (n: rows sent again), "retract" (n:
    the first token of the answer whose draft did not hold: provisional text is void from there on), "mode_changed" (ids
    travel from here on, as rows were more than the link carries), "alarm" (once in an LLM, behind an answer: sure
    tokens hold less often than calibrated).
    """

    kind: Literal["waiting", "degraded", "back", "rebuilding", "retract", "mode_changed", "alarm"]
    n: int = 0


@dataclass(slots=True)
class Sequence:
    """Owns the state of one generation.  `n_run` ids have passed the first layers; the rest is pending."""

    kv: KV
    ids: list[int] = field(default_factory=list)
    sampling: Sampling = field(default_factory=Sampling)
    use_exits: bool = True
    ends: frozenset[int] = frozenset()  # ids that end the text
    n_most: int = 256  # tokens that the answer may have
    tells_drafts: bool = False  # a step may return a draft, which is not final; with an upper side
    on_notice: Callable[[Notice], None] | None = None
    n_run: int = 0
    owed: dict[int, Array] = field(default_factory=dict)  # first layer of a stage -> rows [n, D] it has not run
    ahead: deque[Ahead] = field(default_factory=deque)  # nearfar.speculate: good while the drafts are right

    pause: Pause = field(default_factory=Pause)

    def pending(self) -> NDArray[np.int32]:
        """The ids that no layer has seen, i32 [T]."""
        return np.asarray(self.ids[self.n_run :], np.int32)

    def with_owed(self, layer: int, h: Array) -> Array:
        """The rows that wait at `layer`, then `h`: [owed + T, D]."""
        owed = self.owed.get(layer)
        return h if owed is None else np.concatenate([owed, h])

    def owe(self, layer: int, rows: Array) -> None:
        """Let `rows` [n, D], inputs of `layer`, wait there."""
        if len(rows):
            self.owed[layer] = self.with_owed(layer, rows)

    def rewind(self, n: int) -> None:
        """Keep the first `n` run positions, with the rows that their upper layers still wait for.

        Where the cache has forgotten the window behind them, it keeps none, and all ids are pending again.
        """
        self.ahead.clear()
        try:
            self.kv.truncate(n)
        except KVTruncated:
            n = 0
            self.kv.truncate(0)
        self.n_run = min(self.n_run, n, self.kv.length(0))
        for layer, rows in list(self.owed.items()):
            waiting = self.kv.length(layer - 1) - self.kv.length(layer)  # positions that got this far, no further
            if waiting > 0:
                self.owed[layer] = rows[:waiting]
            else:
                del self.owed[layer]

    def finish(self, done: bool = True, *, in_haste: bool = False) -> None:
        """The answer is over, or (not `done`) failed; whoever holds more than memory gives it back here.

        `in_haste`: somebody has ended it early, and waits for nothing.
        """

    def keep_in(self, journal: Path) -> None:
        """Let final tokens stand in a file before they are told.  Raises UsageError where nothing could be lost."""
        raise UsageError("a journal belongs to answers with an upper side (LLM.open, upper=...)")

    def tell(self, notice: Notice) -> None:
        """To whoever wants to hear of it."""
        if self.on_notice is not None:
            self.on_notice(notice)

    def shared_stats(self) -> SharedStats | None:
        """What the other machine did; None where there is none."""
        return None

    def continue_with(self, ids: Ids[int]) -> int:
        """Take `ids` as the new text, keep the cache of the common beginning; returns how much of it was kept.

        At least one id stays pending: the row that the next token is computed from.
        """
        n = 0
        for old, new in zip(self.ids[: self.n_run], ids[:-1], strict=False):
            if old != new:
                break
            n += 1
        self.rewind(n)
        self.ids = list(ids)
        return self.n_run
