"""One answer of a device at the upper side: its machine, its sequence in the engine, and the stream that reads.

    Up ───> UpperSession ─effects─> Append, Forget, Decide ──> Service ──> engine's thread
    Down <── Stream <── Reply ────┘        decided <──────────── outputs <────┘

The sequence begins with the first position and is given up with the last, so a device that only opens costs nothing.
All calls come on the event loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from nearfar.wire.codec import Codec
from nearfar.wire.messages import Ask, Code, Down, Err, Need, Up, Verdict
from nearfar.wire.rpc import Stream
from nearfar.wire.session import Append, Decide, Effect, End, Forget, Reply, UpperSession
from nearfar_cloud.gateway.limits import Key
from nearfar_cloud.gateway.packed_rows import PackedRows
from nearfar_cloud.gateway.refusal import Refusal
from nearfar_cloud.gateway.service import Service
from nearfar_cloud.outside import Question
from nearfar_cloud.types import Output, Request

MAX_FAILURES = 3  # of one answer in a row: then it is not the moment, it is the answer

_numbers = itertools.count(1)  # of questions: one that was cut is never mistaken for the next one


class Asked(NamedTuple):
    """What the engine is answering."""

    number: int  # of the question
    req: int  # of the device
    at: float  # clock: since when it waits for its next token
    n_checked: int  # rows that decide again
    absorbed: int  # positions that were computed before, and have been counted


@dataclass(slots=True)
class Counts:
    """Of all contexts of a server; they only grow."""

    opened: int = 0
    resumed: int = 0  # taken up by another connection, with what was there
    replaced: int = 0  # begun anew under the same name, without the token
    asks: int = 0  # that the engine was given
    repeated: int = 0  # answered from what was kept
    tokens: int = 0  # that verdicts told
    drafted: int = 0
    accepted: int = 0
    needs: int = 0  # rows wanted again
    stale: int = 0  # messages of an earlier generation
    paused: int = 0  # messages for which there was no room
    failed: int = 0  # sequences that the engine ended
    evicted: int = 0  # contexts whose rows had to make room
    expired: int = 0
    early: int = 0  # positions that were run before anybody asked


class Table(Protocol):
    """Whoever holds the contexts."""

    counts: Counts

    def now(self) -> float: ...
    def used(self, context: Context, n_computed: int, waited_s: float) -> None:
        """A verdict: so many positions were computed for it, and it waited so long for the engine."""

    def may_run_early(self, context: Context) -> bool:
        """Whether what comes now may be run before the device asks."""

    def ran_early(self, context: Context, n: int) -> None:
        """So many positions were."""

    def stopped(self, context: Context, n_computed: int) -> None:
        """An ask that nobody waits for any longer: so many positions were computed for it."""

    def ended(self, context: Context, keep_s: int) -> None:
        """The device is done with it."""

    def refused(self, context: Context, err: Err) -> None:
        """It cannot go on."""


class Context:
    """See above.  `stream`: of the connection that reads now; None: the device is away."""

    def __init__(
        self, table: Table, service: Service, key: Key, machine: UpperSession, request: Request, codec: Codec | None
    ) -> None:
        self.table, self.key, self.machine = table, key, machine
        self.stream: Stream | None = None
        self.last_used = self.last_heard = table.now()
        self.until = 0.0  # without a stream: when it is given up
        self.is_over = False
        self.booked = (0, 0, 0)  # sessions, positions and bytes, as its table counts them
        self._service, self._request, self._codec = service, request, codec
        self._seq: int | None = None
        self._asked: Asked | None = None
        self._n_failed = 0
        self._n_cuts = 0  # of the sequence
        self.has_asked = False  # about this turn: what comes behind it is no prompt

    @property
    def is_asking(self) -> bool:
        return self._asked is not None

    def hear(self, message: Up) -> None:
        """A message of the device.  Raises Refusal where the engine has stopped."""
        stale, repeated = self.machine.n_stale, self.machine.n_repeated
        self._do(self.machine.on(message))
        self.table.counts.stale += self.machine.n_stale - stale
        self.table.counts.repeated += self.machine.n_repeated - repeated

    def evict(self) -> None:
        """Rows, keys and values are given up; the device is told when it asks."""
        self._do(self.machine.evict())

    def rest(self) -> None:
        """Nobody waits for an answer any more; positions stay."""
        self.has_asked = False
        if self._asked is not None:
            self._forget(self.machine.n_rows)

    def release(self) -> None:
        """Nothing of it stays in the engine."""
        self._stop_asking()
        if self._seq is not None:
            self._service.forget(self._seq)
            self._seq = None

    # ------------------------------------------------------------ what the machine wants

    def _do(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            match effect:
                case Reply(Err() as err):
                    self.table.refused(self, err)
                case Reply(message):
                    self._say(message)
                case Append(_, rows, ids):
                    self._append(rows, ids)
                case Forget(keep):
                    self._forget(keep)
                case Decide(ask, draft):
                    self._decide(ask, draft)
                case End(keep_s):
                    self.table.ended(self, keep_s)

    def _say(self, message: Down) -> None:
        self.table.counts.needs += isinstance(message, Need)
        if self.stream is not None:
            self.stream.say(message)

    def _append(self, rows: tuple[bytes, ...], ids: tuple[int, ...]) -> None:
        if self._seq is None:
            self._seq, self._n_cuts = self._service.open(self._request, self), 0
        early = self.table.may_run_early(self)
        if self._codec is None:
            self._service.outside.append(self._seq, ids=ids, early=early)
        else:
            self._service.outside.append(self._seq, rows=PackedRows(self._codec, rows), early=early)
        if early:
            self._service.wake()

    def _stop_asking(self) -> None:
        """What has been computed counts, or whoever takes an ask back before its verdict would compute for nothing."""
        asked, self._asked = self._asked, None
        if asked is not None and self._seq is not None:
            n_begun = self._service.outside.n_begun(self._seq)
            self.machine.ran_early(n_begun)
            self.table.stopped(self, max(n_begun - asked.absorbed, asked.n_checked))

    def _forget(self, keep: int) -> None:
        self._stop_asking()
        if keep == 0:
            self.release()
        elif self._seq is not None:
            self._service.outside.cut(self._seq, keep)
            self._n_cuts += 1
            self._service.wake()  # what was cut takes memory until the engine steps, and nobody may ask for long

    def _decide(self, ask: Ask, draft: tuple[int, ...]) -> None:
        assert self._seq is not None  # the machine asks about positions that came
        self.has_asked = True
        machine, n_checked = self.machine, ask.pos - ask.verify_from
        self._asked = Asked(next(_numbers), ask.req, self.table.now(), n_checked, machine.absorbed)
        self.table.counts.asks += 1
        self.table.counts.drafted += len(draft)
        question = Question(
            self._asked.number,
            ask.pos,
            ask.verify_from,
            draft=() if machine.by_ids else draft,  # ids are their own drafts
            run=min(ask.run, machine.max_positions - ask.pos),
            wants_hidden=machine.opening.want_hidden,
        )
        self._service.outside.ask(self._seq, question)
        self._service.wake()

    # ------------------------------------------------------------ what the engine says

    ended = False  # of a reader: it takes whatever comes

    def put(self, out: Output) -> None:
        """An output of its sequence."""
        if out.finish is not None:
            self._seq = None
            self._fail(out.error or "the engine has ended this sequence")
            return
        if out.early is not None:
            if out.early.n_cuts == self._n_cuts:  # else some of them have gone
                self.machine.ran_early(out.early.upto)
                if self._asked is not None:
                    self._asked = self._asked._replace(absorbed=self.machine.absorbed)
            self.table.ran_early(self, out.early.n)
            return
        answer, asked = out.answer, self._asked
        if answer is None or asked is None or answer.req != asked.number:
            return  # it was cut meanwhile
        hidden = b"" if answer.hidden is None else answer.hidden.astype(np.float16).tobytes()
        effects = self.machine.decided(
            asked.req,
            answer.n_accept,
            out.ids[-1],
            margin=answer.margin,
            upper_us=answer.microseconds,
            hidden=hidden,
        )
        self._n_failed, now = 0, self.table.now()
        goes_on = self.machine.queue and self.machine.queue[0].req == asked.req
        self._asked = asked._replace(at=now, n_checked=0, absorbed=self.machine.absorbed) if goes_on else None
        self._count(effects)
        self._do(effects)
        n_computed = max(self.machine.absorbed - asked.absorbed, asked.n_checked) + 1
        self.table.used(self, n_computed, max(0.0, now - asked.at - answer.microseconds / 1e6))

    def end(self, reason: Refusal) -> None:
        """The engine has stopped."""
        self._seq = self._asked = None
        self.table.refused(self, Err(Code.INTERNAL, reason.message, retryable=True, retry_after_ms=1000))

    def _fail(self, text: str) -> None:
        """The sequence is gone; its positions have to come again, unless that has been tried."""
        asked, self._asked = self._asked, None
        self._n_failed += 1
        self.table.counts.failed += 1
        effects = [] if asked is None else self.machine.failed(asked.req, text)
        if self._n_failed >= MAX_FAILURES:
            effects = [Reply(Err(Code.INTERNAL, text))]
        self._do([*self.machine.evict(), *effects])

    def _count(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Reply) and isinstance(effect.message, Verdict):
                self.table.counts.tokens += 1
                self.table.counts.accepted += effect.message.n_accept
