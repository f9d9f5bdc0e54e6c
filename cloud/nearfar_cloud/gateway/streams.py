"""Streams that can be read on: the events of an answer, numbered, and kept a while for whoever lost the connection.

    id: chatcmpl-5f0c...e1.17.9c01d2.77aa...      with each event: answer, events so far, seed, digest of the request
    Last-Event-ID: chatcmpl-5f0c...e1.17.9c...    what the client comes back with: a cursor

What is kept is told again, and what was not finished goes on from its tokens.  Where nothing is kept any longer
(another process, too long ago) the answer is computed again and its first events are left out: tokens are a function of
request and seed, events a function of tokens.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from hashlib import blake2b
from typing import NamedTuple

from nearfar_cloud.gateway.answers import Answer
from nearfar_cloud.gateway.events import as_json
from nearfar_cloud.gateway.refusal import Refusal, invalid
from nearfar_cloud.gateway.replies import Event, Reply

HEADER = "Last-Event-ID"
KEPT_S = 60.0  # after the reader left
TAPE_BYTES = 256 << 10  # of one stream: more than a connection holds of what was sent and not read
TENANT_BYTES, ALL_BYTES = 8 << 20, 64 << 20  # of streams that nobody reads
A_TAPE, AN_ID = 4 << 10, 40  # about the bytes beside its events, and for each token id of an unfinished one
RESUMABLE = ("slow_reader", "shutting_down")  # ends of a stream that are not the answer's


class Cursor(NamedTuple):
    """A place in the stream of an answer, and what it takes to come there again."""

    answer: str
    n: int  # events before it
    seed: int
    digest: str  # of the request and the model

    def __str__(self) -> str:
        return f"{self.answer}.{self.n}.{self.seed:x}.{self.digest}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Raises Refusal (400)."""
        found = re.fullmatch(r"([a-z]{1,10}[-_][0-9a-f]{24})\.([0-9]{1,9})\.([0-9a-f]{1,16})\.([0-9a-f]{16})", text)
        if found is None:
            raise invalid(HEADER, f"{HEADER}: expected the id of an event of this server")
        answer, n, seed, digest = found.groups()
        return cls(answer, int(n), int(seed, 16), digest)


def digest(body: bytes, *parts: str) -> str:
    """Of a request, byte by byte, and whatever else its answer depends on."""
    h = blake2b(digest_size=8)
    for part in (*(p.encode() for p in parts), body):
        h.update(len(part).to_bytes(8, "little") + part)
    return h.hexdigest()


class Reader:
    """Who reads a stream: told to go by `cut`, gone with `left`."""

    def __init__(self) -> None:
        self.cut, self.left = asyncio.Event(), asyncio.Event()


class Tape:
    """The events of one answer, the last `TAPE_BYTES` of them kept.  Once all are there, answer and reply are let go.

    One reader at a time draws them, so nothing is made that nobody takes.
    """

    def __init__(self, tenant: str, start: Cursor, answer: Answer, reply: Reply, *, done_mark: bool) -> None:
        self.tenant, self.start, self.reader = tenant, start, Reader()
        self.answer: Answer | None = answer
        self.n = 0  # events so far
        self.is_over = False  # the answer has failed: nothing can come any more
        self._reply: Reply | None = reply
        self._begun, self._done_mark = False, done_mark
        self._kept: deque[bytes] = deque()
        self._n_bytes = 0

    @property
    def n_bytes(self) -> int:
        """About what it takes while nobody reads it."""
        if self.answer is None or self._reply is None:
            return A_TAPE + self._n_bytes
        return A_TAPE + self._n_bytes + AN_ID * self.answer.left.n_known + self._reply.n_bytes

    def has(self, n: int) -> bool:
        """Whether what follows the first `n` events is there, or can still come."""
        return self.n - len(self._kept) <= n <= self.n

    async def read(self, after: int, on_refusal: Callable[[Refusal], None]) -> AsyncIterator[bytes]:
        """What follows the first `after` events, until all has been told; an answer that fails says so and ends."""
        at = after
        try:
            while True:
                for frame in list(self._kept)[at - self.n :] if at < self.n else []:
                    yield frame
                    at += 1
                if self.answer is None or self._reply is None:
                    return
                self._trim()
                await self._more(self.answer, self._reply)
        except Refusal as refusal:  # the status has been sent: the stream says it, with the cursor as it stands
            assert self._reply is not None  # the answer has not been complete
            on_refusal(refusal)
            self.is_over = refusal.code not in RESUMABLE
            yield self._framed(self._reply.failed(refusal), at)

    async def _more(self, answer: Answer, reply: Reply) -> None:
        """The events of the beginning, or of what was decided next: nothing is taken and not put here at once."""
        if not self._begun:
            self._begun = True
            for event in reply.begin():
                self._put(event)
            return
        for i, piece in await answer.more():
            for event in reply.piece(i, piece):
                self._put(event)
        if answer.is_done:
            for event in reply.end():
                self._put(event)
            if self._done_mark:
                self._put(None)
            answer.stop()
            self.answer = self._reply = None

    def _put(self, event: Event | None) -> None:
        self.n += 1
        frame = self._framed(event, self.n)
        self._kept.append(frame)
        self._n_bytes += len(frame)

    def _trim(self) -> None:
        while self._n_bytes > TAPE_BYTES:
            self._n_bytes -= len(self._kept.popleft())

    def _framed(self, event: Event | None, n: int) -> bytes:
        """None: the mark of the end, as OpenAI's."""
        name = f"event: {event.name}\n" if event is not None and event.name else ""
        data = b"[DONE]" if event is None else as_json(event.data)
        return f"{name}id: {self.start._replace(n=n)}\ndata: ".encode() + data + b"\n\n"


class Tapes:
    """The streams of all tenants: those that are read, and those that are kept for `kept_s` after that."""

    def __init__(self, kept_s: float = KEPT_S) -> None:
        self.kept_s = kept_s
        self._tapes: dict[tuple[str, str], Tape] = {}
        self._parked: dict[Tape, tuple[asyncio.TimerHandle, int]] = {}  # with its bytes; the longest ago first
        self._bytes: Counter[str] = Counter()  # of those, by tenant

    @property
    def n_parked(self) -> int:
        """Streams that nobody reads."""
        return len(self._parked)

    @property
    def n_bytes(self) -> int:
        """Of these."""
        return self._bytes.total()

    def add(self, tape: Tape) -> None:
        """One that is read from now on.  A kept one of the same answer goes."""
        if (old := self.find(tape.tenant, tape.start.answer)) is not None:
            self.drop(old)
        self._tapes[tape.tenant, tape.start.answer] = tape

    def find(self, tenant: str, answer: str) -> Tape | None:
        return self._tapes.get((tenant, answer))

    async def take(self, tape: Tape) -> bool:
        """Read a stream on; who still reads it is cut off.  False: it has gone meanwhile."""
        while tape not in self._parked:
            if self.find(tape.tenant, tape.start.answer) is not tape:
                return False
            tape.reader.cut.set()
            await tape.reader.left.wait()
        self._unpark(tape)
        tape.reader = Reader()
        return True

    def park(self, tape: Tape) -> None:
        """Its reader has left."""
        if tape.answer is not None:
            tape.answer.stop()
        tape.reader.left.set()
        if self._tapes.get((tape.tenant, tape.start.answer)) is not tape:
            return
        if tape.is_over or not self.kept_s:
            self.drop(tape)
            return
        timer = asyncio.get_running_loop().call_later(self.kept_s, self.drop, tape)
        self._parked[tape] = timer, (n := tape.n_bytes)
        self._bytes[tape.tenant] += n
        while self._bytes[tape.tenant] > TENANT_BYTES:
            self.drop(next(t for t in self._parked if t.tenant == tape.tenant))
        while self.n_bytes > ALL_BYTES:
            self.drop(next(iter(self._parked)))

    def _unpark(self, tape: Tape) -> None:
        timer, n = self._parked.pop(tape)
        timer.cancel()
        self._bytes[tape.tenant] -= n
        if not self._bytes[tape.tenant]:
            del self._bytes[tape.tenant]

    def drop(self, tape: Tape) -> None:
        """Forget it; one that is read goes on to its end."""
        if self.find(tape.tenant, tape.start.answer) is tape:
            del self._tapes[tape.tenant, tape.start.answer]
        if tape in self._parked:
            self._unpark(tape)
