"""A device in thirty lines, for tests of links: it drafts by chance, asks, and lets the ledger decide."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from random import Random

import numpy as np

from nearfar.ledger import Draft, Effect, Final, Ledger, Rewind, Send
from nearfar.lower import Lower
from nearfar.upper import Link, LocalUpper, Lost
from nearfar.wire.codec import Codec
from nearfar.wire.messages import CodecId, CodecSpec, Err, Mode, Need, Open, Opened, Verdict

ROW_LAYER = 2
BY_IDS, BY_ROWS = CodecSpec(CodecId.IDS), CodecSpec(CodecId.INT8_OS)
PROMPT = [5, 17, 3, 99, 42]


def opening(codec: CodecSpec, session: bytes = b"s" * 16, **fields: object) -> Open:
    row_layer = 0 if codec.id == CodecId.IDS else ROW_LAYER
    return Open(session, 0, Mode.LOSSLESS, codec, row_layer, **fields)  # type: ignore[arg-type]


class Device:
    """Layers [0, ROW_LAYER) of `lower`, and a guesser that is right about half of the time if it knows the `truth`."""

    def __init__(
        self,
        link: Link,
        lower: Lower,
        codec: CodecSpec,
        truth: Sequence[int] = (),
        on_final: Callable[[int], object] = lambda n: None,
        repeat_after_s: float = 5.0,
    ) -> None:
        self.link, self.lower, self.truth = link, lower, truth
        self.on_final, self.repeat_after_s = on_final, repeat_after_s
        self.ledger = Ledger(list(PROMPT), by_ids=codec.id == CodecId.IDS)
        self.packer = None if self.ledger.by_ids else Codec.of(codec, lower.config.d_model)
        self.kv = lower.new_kv(256)
        self.chance = Random(1)
        self.window, self.is_open, self.n_lost = 4, False, 0
        self.finals: list[Final] = []
        self.last_sign = time.monotonic()

    def answer(self, n: int, within_s: float = 60.0) -> list[int]:
        """`n` final tokens."""
        until = time.monotonic() + within_s
        while len(self.finals) < n:
            assert time.monotonic() < until, f"{len(self.finals)} of {n} tokens in {within_s} s"
            self.work()
            for news in self.link.receive(0.02):
                self.on(news)
        return [f.id for f in self.finals[:n]]

    def work(self) -> None:
        """Draft until the window is full, then ask."""
        ledger = self.ledger
        if ledger.n_provisional < self.window:
            ledger.add_draft(self.guess(), Draft("exit.2", 0.9))
        self.run()
        if not self.is_open:
            return
        self.do(ledger.unsent())
        if ledger.n_provisional >= self.window and ledger.n_unasked:
            self.do(ledger.make_ask(deadline_ms=1000))
        elif ledger.open and time.monotonic() - self.last_sign > self.repeat_after_s:
            self.last_sign = time.monotonic()
            self.do(ledger.repeat())

    def guess(self) -> int:
        at = len(self.ledger.ids) - len(PROMPT)
        if at < len(self.truth) and self.chance.random() < 0.6:
            return self.truth[at]
        return self.chance.randrange(self.lower.config.n_vocab)

    def run(self) -> None:
        """The rows of positions that have none."""
        if self.packer is None:
            return
        first = len(self.ledger.rows)
        ids = np.asarray(self.ledger.ids[first:], np.int32)
        if len(ids):
            h = self.lower.forward(self.lower.embed(ids), self.kv, 0, ROW_LAYER)
            self.ledger.add_rows(first, self.packer.encode(h))

    def on(self, news: object) -> None:
        self.last_sign = time.monotonic()
        match news:
            case Opened():
                self.is_open = True
                self.do(self.ledger.on_opened(news))
            case Verdict():
                self.do(self.ledger.on_verdict(news))
            case Need():
                self.do(self.ledger.on_need(news))
            case Lost(reason, final):
                assert not final, reason
                self.is_open = False
                self.n_lost += 1
            case Err(_, text, retryable):
                assert retryable, text

    def do(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Send(message):
                    if self.is_open:
                        self.link.send(message)
                case Rewind(n):
                    self.kv.truncate(min(n, self.kv.length(0)))
                case Final():
                    self.finals.append(effect)
                    self.on_final(len(self.finals))


def oracle(lower: Lower, codec: CodecSpec, n: int) -> list[int]:
    """What any upper side must answer."""
    return Device(LocalUpper(lower, 512).open(opening(codec)), lower, codec).answer(n)
