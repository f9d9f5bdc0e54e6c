"""The near side of a world: what `collab.py` is to a real model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nearfar.ledger import Draft, Effect, Final, Ledger, Remake, Retract, Rewind, Send
from nearfar.wire.messages import Down, Err, Mode, Need, Opened, Verdict
from tests.sdk.world_oracle import Unsound, rows_of, token_of

if TYPE_CHECKING:
    from tests.sdk.ledger_world import World


class Killed(Exception):
    """The process of the device ends here."""


class Device:
    """What `collab.py` is to a real model."""

    def __init__(self, world: World, ledger: Ledger) -> None:
        self.world, self.ledger, self.s, self.rng = world, ledger, world.s, world.rng
        self.cache: list[bytes] = []  # rows that the lower layers have made: the KV cache
        self.cached: list[int] = []  # the ids that they were made of
        self.n_final = ledger.final
        self.is_open = False  # the link is there, and Opened has come
        self.unsure = False
        self.n_heads = 0

    # ---- what it may do now

    @property
    def ended(self) -> bool:
        """The newest token ends the text."""
        ids = self.ledger.ids
        return len(ids) > self.s.n_prompt and (
            ids[-1] < self.s.n_stops or len(ids) >= self.s.n_prompt + self.s.n_tokens
        )

    @property
    def n_askable(self) -> int:
        n = len(self.ledger.ids) - self.ended
        return n if self.s.by_ids else min(n, self.ledger.n_rows)

    def can_run(self) -> bool:
        return len(self.cache) < len(self.ledger.ids) - self.ended

    def can_draft(self) -> bool:
        if self.s.mode != Mode.LOSSLESS or self.ended or self.is_running_on():
            return False
        if self.is_alone():
            return len(self.cache) == len(self.ledger.ids)
        return self.ledger.n_provisional < self.s.window

    def is_running_on(self) -> bool:
        """The other side goes on by itself: a draft would be in its way."""
        return any(waiting.ask.run > 1 for waiting in self.ledger.open.values())

    def can_ask(self) -> bool:
        n_asks = self.s.n_asks if self.s.mode == Mode.LOSSLESS else 1
        if not (self.is_open or self.s.is_eager) or len(self.ledger.open) >= n_asks:
            return False
        if self.s.mode != Mode.LOSSLESS:
            return self.n_askable == len(self.ledger.ids)
        return self.n_askable > self.ledger.asked

    def can_run_on(self) -> bool:
        """Lossless with ids: behind a text without drafts the other side may go on by itself."""
        ids, final, asked = self.ledger.ids, self.ledger.final, self.ledger.asked
        return self.s.by_ids and self.s.mode == Mode.LOSSLESS and asked == final - 1 == len(ids) - 1

    def must_ask(self) -> bool:
        return self.can_ask() and (self.unsure or not (self.can_draft() or self.can_run()))

    def can_decide(self) -> bool:
        """Lossy, or lossless without a link: its own word counts."""
        if self.ended or len(self.cache) < len(self.ledger.ids) or self.s.mode == Mode.CLOUD_ONLY:
            return False
        if self.s.mode == Mode.LOSSY:
            waits = self.unsure or bool(self.ledger.open)
            return not waits or self.is_alone() or (self.s.finishes and bool(self.ledger.open))
        return self.is_alone() and not self.ledger.n_provisional

    def can_audit(self) -> bool:
        is_there = self.s.by_ids or self.ledger.n_rows == len(self.ledger.ids)
        return self.s.mode == Mode.LOSSY and self.is_open and is_there and len(self.ledger.audits) < 8

    def is_alone(self) -> bool:
        return self.s.finishes and self.world.network.stream is None

    def can_settle(self) -> bool:
        return self.s.mode == Mode.LOSSLESS and self.is_alone() and self.ledger.n_provisional > 0

    # ---- what it does

    def run(self) -> None:
        """Rows of some of the positions that are owed, in one batch."""
        first, ids = len(self.cache), self.ledger.ids
        new = ids[first : self.rng.randint(first + 1, len(ids) - self.ended)]
        self.cache += rows_of(new, self.cache[-1] if self.cache else self.world.kernel)
        self.cached += new
        if not self.s.by_ids:
            self.ledger.add_rows(first, self.cache[first:])

    def draft(self) -> None:
        if self.can_settle():
            self.do(self.ledger.settle())
        self.unsure = self.rng.random() >= self.s.sure
        self.ledger.add_draft(self._guess(), self._head())

    def decide(self) -> None:
        token, head = self._guess(), self._head()
        if self.can_audit() and self.rng.random() < self.s.audit:
            self.do(self.ledger.audit(token, replace(head, is_sure=True)))
        self.do(self.ledger.decide(token, head))
        self.unsure = self.rng.random() >= self.s.sure

    def settle(self) -> None:
        """All drafts, or those before one that it would not say by itself."""
        keep = self.rng.randint(self.ledger.final, len(self.ledger.ids))
        self.do(self.ledger.settle(keep if self.rng.random() < 0.3 else None))

    def upload(self) -> None:
        self.do(self.ledger.unsent())

    def ask(self) -> None:
        ledger, run = self.ledger, 1
        last = self.n_askable - 1
        if self.s.mode == Mode.CLOUD_ONLY or (self.can_run_on() and self.rng.random() < 0.3):
            run = self.s.run
        elif self.s.mode == Mode.LOSSLESS and self.world.is_hasty and self.rng.random() < 0.3:
            last = self.rng.randint(ledger.asked, last)
        self.unsure = False
        self.world.n_asks += 1
        self.do(ledger.make_ask(upto=last, run=run))

    def repeat(self) -> None:
        self.world.counts["repeat"] += 1
        self.do(self.ledger.repeat())

    def _guess(self) -> int:
        """The oracle's token, or another one."""
        n = min(len(self.cache), len(self.ledger.ids))
        before = [self.world.kernel, *self.cache[:n]]
        rows = [*before, *rows_of(self.ledger.ids[n:], before[-1])]
        right = token_of(rows[-1], self.s.n_vocab)
        if self.rng.random() < self.s.right:
            return right
        return (right + self.rng.randint(1, self.s.n_vocab - 1)) % self.s.n_vocab

    def _head(self) -> Draft:
        self.n_heads += 1
        return Draft(f"exit.{self.n_heads}", self.rng.random())

    # ---- what it hears

    def on(self, message: Down) -> None:
        match message:
            case Verdict():
                self.verdict(message)
            case Need():
                self.do(self.ledger.on_need(message))
            case Opened():
                self.is_open = self.world.network.stream is not None  # a late one opens nothing
                self.do(self.ledger.on_opened(message))
            case Err():
                if not message.retryable:
                    raise Unsound(f"the upper side says {message.code.name}: {message.text}")
                self.repeat()

    def verdict(self, v: Verdict) -> None:
        counts, audit = self.ledger.counts, self.ledger.audits.get(v.req)
        n_sure, n_wrong = counts.sure, counts.sure_wrong
        self.do(self.ledger.on_verdict(v))
        if audit is None or counts.sure == n_sure:
            return
        is_wrong = audit.told != token_of(
            rows_of(self.ledger.ids[: audit.ask.pos + 1], self.world.kernel)[-1], self.s.n_vocab
        )
        if (counts.sure, counts.sure_wrong) != (n_sure + 1, n_wrong + is_wrong):
            raise Unsound(f"the audit of position {v.pos0} was counted as another one")
        self.world.n_audits += 1

    def remake(self, first: int, end: int) -> None:
        """Rows that were dropped, in pieces; now and then they come out otherwise, as on another kernel."""
        if self.n_final == len(self.world.text) and self.rng.random() < self.s.wobbles:
            self.world.other_kernel()
        self.world.n_remade += 1
        rows = rows_of(self.ledger.ids[:end], self.world.kernel)
        while first < end and self.ledger.dropped:
            n = self.rng.randint(1, end - first)
            self.do(self.ledger.remade(rows[first : first + n]))
            first += n

    def do(self, effects: list[Effect]) -> None:
        """Journal first, then the rest in order."""
        finals = [e for e in effects if isinstance(e, Final)]
        self.world.written(finals, self.ledger)
        for effect in effects:
            match effect:
                case Send(message):
                    if self.is_open or self.s.is_eager:
                        self.world.network.send(message)
                case Rewind(n):
                    del self.cache[n:], self.cached[n:]
                    self.unsure = False
                case Remake(first, end):
                    self.remake(first, end)
                case Final():
                    self.n_final = effect.index + 1
                    self.world.told(effect)
                case Retract(index):
                    self.world.n_retracts += 1
                    if index < self.n_final:
                        raise Unsound(f"position {index} is taken back after it was final")
