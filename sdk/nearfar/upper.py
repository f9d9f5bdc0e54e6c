"""Whoever runs layers [k, L) of an answer, seen from the device: a way to open a link, and the link.

    Upper.open(opening) -> Link      LocalUpper here, RemoteUpper (upper_remote.py) over the network
    link.send(Rows | Ids | Ask | Cut | Commit | Close)       never waits
    link.receive(timeout) -> [Opened | Verdict | Need | Lost | ...]

`LocalUpper` is the whole other side in one process and the oracle of the tests: the session machine, and a `Decider`
that runs the layers when a decision is wanted.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nearfar.cancel import Cancel
from nearfar.errors import UsageError
from nearfar.lower import KV, Lower
from nearfar.sampling import sample
from nearfar.wire.codec import Codec
from nearfar.wire.messages import CodecId, Down, Open, Up
from nearfar.wire.session import Append, Decide, Effect, End, Forget, Reply, UpperSession

Array = NDArray[np.float32]

FRAME = 5  # bytes of gRPC around a message


@dataclass(frozen=True, slots=True)
class Lost:
    """The link is down.  `final`: nobody tries to bring it back; otherwise `Opened` tells when it is there again."""

    reason: str
    final: bool = False


News: TypeAlias = Down | Lost


@dataclass(slots=True)
class Traffic:
    """Bytes on the link of one answer, framing included as far as it is known; none within a process."""

    up: int = 0
    down: int = 0


class Link(Protocol):
    """One answer's way to the upper side."""

    traffic: Traffic
    max_run: int  # tokens that one ask may bring
    max_context: int  # positions that the other side holds

    @property
    def model_fp(self) -> bytes:
        """By ids, of the model that answers; empty where nobody says, or where files that belong together say it."""

    def send(self, message: Up) -> None:
        """Queue a message; lost with the connection, as the ledger sends again what is missing after `Opened`."""

    def receive(self, timeout_s: float) -> list[News]:
        """What has come, in order; waits so long for the first of it."""

    def deadline_s(self) -> float:
        """After so long an ask without a verdict is late: max(3 median replies, 0.4 s)."""

    def wants_ids(self) -> bool:
        """Whether rows are more than the link carries, and ids may be sent instead."""

    def close(self) -> None: ...


class Upper(Protocol):
    """Opens links.  Raises UpperError, MismatchError where the two sides do not belong together."""

    @property
    def where(self) -> str:
        """One of: device, edge, cloud."""

    def open(self, opening: Open, cancel: Cancel | None = None) -> Link: ...
    def close(self) -> None: ...


def check_sampling(opening: Open) -> None:
    """UsageError: what the upper side cannot apply is refused, not ignored."""
    if opening.row_layer and opening.sampling.repetition_penalty != 1:
        raise UsageError("a repetition penalty needs the ids of the text: rows do not tell them; send ids instead")


@dataclass(frozen=True, slots=True)
class Decision:
    """How many drafts hold, the token behind them, the gap between its logit and the next one; the last row."""

    n_accept: int
    token: int
    margin: float
    hidden: Array  # f32 [D]


class Decider:
    """Runs the upper layers of one session on a `Lower`; the readable counterpart of the cloud's batched engine."""

    def __init__(self, lower: Lower, opening: Open, max_len: int) -> None:
        self.lower, self.first, self.sampling = lower, opening.row_layer, opening.sampling
        self.kv: KV = lower.new_kv(max_len)
        self.codec = None if opening.codec.id == CodecId.IDS else Codec.of(opening.codec, lower.config.d_model)
        self.rows: list[bytes] = []
        self.ids: list[int] = []

    def append(self, rows: tuple[bytes, ...], ids: tuple[int, ...]) -> None:
        self.rows += rows
        self.ids += ids

    def forget(self, keep: int) -> None:
        del self.rows[keep:], self.ids[keep:]
        self.kv.truncate(min(keep, self.kv.length(self.first)))

    def decide(self, pos: int, verify_from: int, draft: tuple[int, ...]) -> Decision:
        """Run the new rows up to `pos`; choose behind each from `verify_from` on, as long as drafts hold."""
        self.kv.truncate(min(self.kv.length(self.first), verify_from))
        start = self.kv.length(self.first)
        h = self.lower.forward(self._inputs(start, pos + 1), self.kv, self.first, self.lower.config.n_layers)
        logits = self.lower.logits(h[verify_from - start :])  # [pos - verify_from + 1, V]
        for i, row in enumerate(logits):
            at = verify_from + 1 + i
            token = sample(row, self.sampling, position=at, recent=self.ids[:at])
            if i == len(draft) or token != draft[i]:
                break
        return Decision(i, token, margin(row), h[verify_from - start + i])

    def _inputs(self, first: int, end: int) -> Array:
        """f32 [end - first, D]"""
        if self.codec is None:
            return self.lower.embed(np.asarray(self.ids[first:end], np.int32))
        return self.codec.decode(self.rows[first:end])


def margin(logits: Array) -> float:
    """[V] -> between the two largest."""
    low, high = np.partition(logits, -2)[-2:]
    return float(high - low)


class NoLink:
    """A link that is down and stays so."""

    max_run, max_context, model_fp = 1, 1 << 31, b""

    def __init__(self, reason: str) -> None:
        self.traffic = Traffic()
        self._news: list[News] = [Lost(reason, final=True)]

    def send(self, message: Up) -> None:
        """Goes nowhere."""

    def receive(self, timeout_s: float) -> list[News]:
        news, self._news = self._news, []
        if not news:
            time.sleep(timeout_s)
        return news

    def deadline_s(self) -> float:
        return 0.0

    def wants_ids(self) -> bool:
        return False

    def close(self) -> None:
        """There is nothing to close."""


class LocalUpper:
    """The upper layers in this process: of a full model, or of an upper file."""

    where = "device"

    def __init__(self, lower: Lower, max_len: int, max_run: int = 256) -> None:
        self.lower, self.max_len, self.max_run = lower, max_len, max_run

    def open(self, opening: Open, cancel: Cancel | None = None) -> LocalLink:
        check_sampling(opening)
        return LocalLink(new_session(opening, self.lower, self.max_len, self.max_run), self)

    def close(self) -> None:
        """Nothing to give back."""


def new_session(opening: Open, lower: Lower, max_len: int, max_run: int = 256) -> UpperSession:
    c, by_ids = lower.config, opening.codec.id == CodecId.IDS
    row_bytes = 0 if by_ids else Codec.of(opening.codec, c.d_model).row_bytes
    return UpperSession(opening, row_bytes, max_len, c.n_vocab, max_run)


class LocalLink:
    """Messages are taken at once; decisions are computed when somebody waits for them."""

    model_fp = b""

    def __init__(self, session: UpperSession, upper: LocalUpper) -> None:
        self.session = session
        self.decider = Decider(upper.lower, session.opening, upper.max_len)
        self.traffic, self.max_run, self.max_context = Traffic(), upper.max_run, upper.max_len
        self._news: deque[News] = deque()
        self._todo: deque[Decide] = deque()
        self.send(session.opening)

    def send(self, message: Up) -> None:
        self._do(self.session.on(message))

    def deadline_s(self) -> float:
        return 10.0  # it computes while one waits

    def wants_ids(self) -> bool:
        return False

    def receive(self, timeout_s: float) -> list[News]:
        while self._todo and not self._news:
            self._decide(self._todo.popleft())
        news, self._news = list(self._news), deque()
        return news

    def close(self) -> None:
        self._todo.clear()

    def _do(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Reply(message):
                    self._news.append(message)
                case Append(_, rows, ids):
                    self.decider.append(rows, ids)
                case Forget(keep):
                    self.decider.forget(keep)
                    self._todo.clear()
                case Decide():
                    self._todo.append(effect)
                case End():
                    self.close()

    def _decide(self, todo: Decide) -> None:
        """One decision; an ask that runs on goes on with its own tokens, each told as it comes."""
        ask, draft = todo.ask, todo.draft
        for i in range(ask.run):
            started = time.perf_counter()
            first = ask.verify_from if i == 0 else ask.pos + i
            d = self.decider.decide(ask.pos + i, first, draft if i == 0 else ())
            us = int(1e6 * (time.perf_counter() - started))
            hidden = d.hidden.astype(np.float16).tobytes() if self.session.opening.want_hidden else b""
            self._do(self.session.decided(ask.req, d.n_accept, d.token, margin=d.margin, upper_us=us, hidden=hidden))
            if not self.session.queue or self.session.queue[0].req != ask.req:
                break  # a stop id, or no room
            self.decider.append((), (d.token,))
