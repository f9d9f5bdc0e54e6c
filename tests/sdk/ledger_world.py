"""A world around the two machines of an answer, in which everything that may go wrong does, at random.

    Device: ledger, cache, drafter, journal  --up-->  Network  -->  Server: session, rows, oracle
                                             <--down--         <--

A row is a digest of the ids that it was made from, and the oracle's token a function of the row, so that any wrong row
gives other tokens.  In each step one thing happens: somebody computes, a message arrives, or a fault strikes.  Streams
keep their order.  A stream that breaks loses what is under way, except for a beginning of it that may still arrive
late, between the messages of later streams; only another process of the device is never mixed up with an earlier one
(the server ends what the earlier one left when the new one opens).

The world itself looks at what the machines say: each token that becomes final, each row that the other side holds, each
decision that it is asked for.  `Unsound` says what was wrong.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from zlib import crc32

from nearfar.journal import Journal, JournalHead
from nearfar.ledger import Final, Ledger
from nearfar.wire.hashes import crc_of_id
from nearfar.wire.messages import Close, CodecId, CodecSpec, Mode, Open, Up
from tests.sdk.world_device import Device, Killed
from tests.sdk.world_oracle import BREAKS, Setting, Unsound, oracle, rows_of, token_of
from tests.sdk.world_upper import Network, Server, Stream


class World:
    """One answer, from its first step to its last.  `is_hasty`: the device asks now and then before it has to."""

    def __init__(self, s: Setting, rng: random.Random, *, is_hasty: bool = True) -> None:
        self.s, self.rng, self.is_hasty = s, rng, is_hasty
        self.prompt = [rng.randrange(s.n_vocab) for _ in range(s.n_prompt)]
        self.oracle = oracle(self.prompt, s.n_tokens, s)
        self.text, self.last_row = list(self.prompt), rows_of(self.prompt)[-1]  # what the user has seen
        codec = CodecSpec(CodecId.IDS if s.by_ids else CodecId.FP16)
        self.opening = Open(rng.randbytes(16), 0, s.mode, codec, 0 if s.by_ids else 3, stop_ids=tuple(range(s.n_stops)))
        self.journal = Journal.in_memory(JournalHead(self.opening.session, b"s" * 16, b"", tuple(self.prompt)))
        self.network, self.server = Network(), Server(self)
        self.kernel = b""  # that computes the device's rows: another one, other rows
        self.max_row_bytes = None if s.most_rows is None else 8 * s.most_rows
        self.device = Device(self, Ledger(list(self.prompt), s.by_ids, max_row_bytes=self.max_row_bytes))
        self.counts: Counter[str] = Counter()
        self.n_asks = self.n_retracts = self.n_steps = self.n_late = self.n_audits = self.n_remade = 0
        self.most_steps = 200 * (s.n_tokens + 20)
        self.ambush: tuple[str, int] | None = None  # a break that strikes as soon as so many messages are under way
        self.storm = 0  # steps in which faults strike far more often
        self.is_new_process = False  # of the device, and the server has not heard of it
        self.will_die = False  # at the next token, between journal and user
        # Who is slow and who is quick differs from world to world; a slow network has much under way.
        self.pace = {name: rng.choice((0.1, 1, 1, 5)) for name in ("run", "draft", "compute")}
        self.pace |= {name: rng.choice((0.03, 0.2, 1)) for name in ("up", "down", "late")} | {"open": 1}

    @property
    def n_faults(self) -> int:
        return self.counts.total()

    @property
    def is_over(self) -> bool:
        return len(self.text) >= self.s.n_prompt + self.s.n_tokens or (
            len(self.text) > self.s.n_prompt and self.text[-1] < self.s.n_stops
        )

    def play(self) -> World:
        """All of the answer.  Raises Unsound, or what the machines raise."""
        while not self.is_over:
            self.n_steps += 1
            if self.n_steps > self.most_steps:
                raise Unsound(f"no end after {self.n_steps} steps: {len(self.text)} positions")
            try:
                self.step()
            except Killed:
                self.counts["kill"] += 1
                self.start_again()
            self.check_rows()
        self.check_end()
        return self

    def step(self) -> None:
        """One thing happens."""
        self.storm -= 1
        if self.ambush is not None and self.network.n_under_way >= self.ambush[1]:
            kind, self.ambush = self.ambush[0], None
            self.fault(kind)
            return
        p = min(self.s.p_fault * (5 if self.storm > 0 else 1), 0.3)
        if self.n_steps < self.most_steps // 2 and self.rng.random() < p:  # in quiet times it comes to an end
            self.storm = self.rng.choice((self.storm, self.storm, 20))
            kind = self.rng.choice(self.s.faults)
            if kind in BREAKS:
                self.ambush = kind, self.rng.choice((0, 1, 3, 6))
            else:
                self.fault(kind)
            return
        moves = self.moves()
        if not moves:
            raise Unsound(f"stuck at position {len(self.text)} with the link up and nothing under way")
        (move,) = self.rng.choices([m for m, _ in moves], [w for _, w in moves])
        move()

    def moves(self) -> list[tuple[Callable[[], None], float]]:
        """What may happen now, and how eagerly."""
        d, n, pace = self.device, self.network, self.pace
        is_up = n.stream is not None
        all_: list[tuple[bool, Callable[[], None], float]] = [
            (d.can_run(), d.run, pace["run"]),
            (d.can_draft() and not d.must_ask(), d.draft, pace["draft"]),
            (d.can_decide(), d.decide, pace["draft"]),
            (d.can_settle(), d.settle, pace["draft"]),
            (d.is_open and d.ledger.sent < d.ledger.n_rows, d.upload, 1),
            (d.must_ask(), d.ask, 3),
            (self.is_hasty and d.can_ask() and self.s.mode == Mode.LOSSLESS, d.ask, 0.1),
            (self.s.repeats and d.is_open and bool(d.ledger.open) and n.n_under_way < 5, d.repeat, 0.05),
            (not is_up, self.connect, pace["open"]),
            (is_up and n.stream.is_dead, self.notice, 0.3),
            (is_up and bool(n.stream.up), self.deliver_up, pace["up"]),
            (is_up and bool(n.stream.down), self.deliver_down, pace["down"]),
            (any(s.up for s in n.late), self.deliver_late_up, pace["late"]),
            (any(s.down for s in n.late), self.deliver_late_down, pace["late"]),
            (bool(self.server.todo), self.server.compute, pace["compute"]),
        ]
        return [(move, weight) for can, move, weight in all_ if can]

    # ---- messages arrive

    def connect(self) -> None:
        self.network.connect(self.opening)

    def notice(self) -> None:
        """The device sees that its link is gone."""
        self.network.stream, self.device.is_open = None, False

    def deliver_up(self) -> None:
        assert self.network.stream is not None
        self.arrive(self.network.stream.up.popleft(), self.network.stream)

    def deliver_down(self) -> None:
        assert self.network.stream is not None
        self.device.on(self.network.stream.down.popleft())

    def deliver_late_up(self) -> None:
        self.n_late += 1
        self.arrive(self.rng.choice([s.up for s in self.network.late if s.up]).popleft(), None)

    def deliver_late_down(self) -> None:
        self.n_late += 1
        self.device.on(self.rng.choice([s.down for s in self.network.late if s.down]).popleft())

    def arrive(self, message: Up, stream: Stream | None) -> None:
        if not isinstance(message, Open):
            self.server.on(message)
        elif stream is not None:  # a late one opens nothing
            if self.is_new_process:
                self.network.late.clear()
                self.is_new_process = False
            self.server.opened(message, stream)

    # ---- faults

    def fault(self, kind: str) -> None:
        self.counts[kind] += 1
        match kind:
            case "reset":
                self.network.die(self.rng, self.s.is_late)
                self.notice()
            case "half-open":
                self.network.die(self.rng, self.s.is_late)
            case "restart":
                self.network.die(self.rng, self.s.is_late)
                self.server.restart()
                self.notice()
            case "evict":
                self.server.evict()
            case "fail":
                self.server.fail()
            case "kill":
                self.start_again()
            case "kill between":
                self.will_die = True
            case "power loss":
                self.start_again(n_lost=self.rng.randint(0, 3) if self.s.mode != Mode.LOSSY else 0)

    def start_again(self, n_lost: int = 0) -> None:
        """Another process of the device, made of what the journal holds; `n_lost` tokens never reached the disk."""
        self.network.die(self.rng, self.s.is_late)
        for stream in self.network.late:
            stream.down.clear()  # nobody is there to hear it
        self.notice()
        self.is_new_process, self.will_die = True, False
        if self.s.finishes or self.kernel:
            n_lost = 0  # what the device decided by itself, or by another kernel's rows, may come out otherwise
        state = self.journal.state()
        n = max(0, len(state.ids) - n_lost)
        self.journal = Journal.in_memory(state.head)
        n_prompt = len(state.head.prompt)
        self.journal.append(range(n_prompt, n_prompt + n), state.ids[:n], state.crcs[:n])
        ids = [*state.head.prompt, *state.ids[:n]]
        self.tell(ids[len(self.text) :])  # the user's side takes up at its own last index
        self.device = Device(self, Ledger(ids, self.s.by_ids, True, self.max_row_bytes, n_prompt=n_prompt))

    def other_kernel(self) -> None:
        """From now on the device's rows are others, and so is what the upper layers say behind them."""
        self.kernel += b"'"
        self.last_row = rows_of(self.text, self.kernel)[-1]

    # ---- what the world looks at

    def written(self, finals: list[Final], ledger: Ledger) -> None:
        """The journal gets tokens before anybody else."""
        crcs = [ledger.crcs[f.index] if f.index < len(ledger.crcs) else 0 for f in finals]
        self.journal.append([f.index for f in finals], [f.id for f in finals], crcs)

    def told(self, f: Final) -> None:
        """The user gets a token: in order, once, and the oracle's unless the device may decide."""
        if self.will_die:
            raise Killed
        if f.index < len(self.text):  # lost with the power, and decided again
            if self.text[f.index] != f.id or not self.counts["power loss"]:
                raise Unsound(f"position {f.index} is told again, as {f.id} and not {self.text[f.index]}")
            return
        if f.index != len(self.text):
            raise Unsound(f"position {f.index} is told after {len(self.text) - 1}")
        if f.source == "exit":
            if self.s.mode != Mode.LOSSY and not self.s.finishes:
                raise Unsound(f"position {f.index} was decided by the device")
        elif f.id != token_of(self.last_row, self.s.n_vocab):
            raise Unsound(f"position {f.index} is {f.id} ({f.source}), not what the oracle says")
        if (f.draft is None) != (f.source == "upper"):
            raise Unsound(f"position {f.index}: {f.source} of {f.draft}")
        self.tell([f.id])

    def tell(self, ids: list[int]) -> None:
        self.text += ids
        self.last_row = [self.last_row, *rows_of(ids, self.last_row)][-1]

    def check_rows(self) -> None:
        """In one generation both sides hold the same rows, as far as both have them."""
        d, u = self.device, self.server
        if d.cached != d.ledger.ids[: len(d.cached)]:
            raise Unsound("the device's cache holds rows of another text")
        if not self.s.by_ids and d.cache != rows_of(d.cached, self.kernel):
            raise Unsound("the device's cache holds rows of two kernels")
        if not self.s.by_ids and d.ledger.n_rows != len(d.ledger.crcs):
            raise Unsound(f"{len(d.ledger.crcs)} checksums of {d.ledger.dropped} dropped rows and {len(d.ledger.rows)}")
        if u.session is None or u.session.gen != d.ledger.gen or d.ledger.is_resumed:
            return
        ours = [crc_of_id(i) for i in d.ledger.ids] if self.s.by_ids else d.ledger.crcs
        theirs = [crc_of_id(i) for i in u.ids] if self.s.by_ids else [crc32(row) for row in u.rows]
        n = min(len(ours), len(theirs))
        if ours[:n] != theirs[:n]:
            raise Unsound(f"generation {d.ledger.gen}: the upper side holds other rows than the device")

    def check_end(self) -> None:
        """The whole text, and what it took."""
        n = len(self.oracle)
        if self.s.mode != Mode.LOSSY and not self.s.finishes and not self.kernel and self.text[:n] != self.oracle:
            raise Unsound("the text is not the oracle's")
        state = self.journal.state()
        if state.text[: len(self.text)] != self.text[: len(state.text)]:
            raise Unsound("the journal holds another text than the user saw")
        if any(b.gen < a.gen for a, b in pairwise(self.device.ledger.cuts)):
            raise Unsound("generations go back")
        n_away = self.s.n_asks * (self.n_retracts + self.n_faults + 1)
        if self.s.mode == Mode.LOSSLESS and not self.s.finishes and self.n_asks > len(self.text) + n_away:
            raise Unsound(f"{self.n_asks} asks for {len(self.text)} tokens")
        self.server.on(Close())
        if self.server.session is not None or self.server.rows or self.server.todo:
            raise Unsound("something is left after the end")
