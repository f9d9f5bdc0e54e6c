"""One answer's way to an upper side beyond the network; made by `RemoteUpper.open`.

    engine's thread                      |  network thread
    send ───────────────────────────────>|  Outbox ─> Egress ─> pack ─> stream
    receive <─────────── queue of news <─|  unpack <─ stream; connect, hello, open, ping, connect again ...

A link outlives its connections.  Each begins with `Open`, and `Opened` tells what the other side still has; then the
ledger sends what is missing.  What was sent with one connection in mind never reaches the next one: a message carries
the number of the connection whose `Opened` the engine had seen, and nothing else of a batch comes before an `Opened`.
"""

from __future__ import annotations

import asyncio
import random
import sys
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import TypeAlias

from nearfar import env
from nearfar.cancel import Cancel
from nearfar.errors import EgressDenied, MismatchError, NearfarError, UpperError, WireError
from nearfar.upper import FRAME, Lost, News, Traffic
from nearfar.wire import pack
from nearfar.wire.describe import describe
from nearfar.wire.dial import Call, Silent, StreamEnded, Unreachable
from nearfar.wire.dialler import Dialler, Greeted, check_same_model
from nearfar.wire.egress import Egress
from nearfar.wire.loop_thread import LoopThread
from nearfar.wire.messages import (
    Ask,
    Close,
    CodecId,
    Credit,
    Down,
    Err,
    Open,
    Opened,
    Ping,
    Pong,
    ServerHello,
    Up,
    Verdict,
)
from nearfar.wire.outbox import Outbox
from nearfar.wire.rpc import CREDIT

POLL_S = 0.02  # how often who waits for the first hello looks at the stop button
PING_AFTER_S = 1.0  # of silence
SILENT_S = 5.0  # without a sign of life: lost
FLUSH_S = 1.0  # a Close may take so long to leave
LEAST_PAUSE_S, MOST_PAUSE_S = 0.05, 5.0  # between attempts to connect
BRIEF_S = 0.2  # a connection that was open for less than that is not followed by the next one at once
MAX_NEWS = 1024  # that wait for the engine: more is not an answer to anything
LEAST_BACKLOG_S = 0.25  # of rows; a shorter one is over before anything else could be done
MOST_WAIT_S = 60.0  # whatever the other side asks for

Tokens: TypeAlias = dict[str, bytes]  # by address: what takes a session up again
Item: TypeAlias = tuple[int, News] | NearfarError  # number of its connection; an error is the last item


class RemoteLink:
    """`Link` over the network."""

    def __init__(self, network: LoopThread, dialler: Dialler, opening: Open, tokens: Tokens) -> None:
        self.opening, self.traffic, self.max_run, self.max_context = opening, Traffic(), 1, 1 << 31
        self._network, self._dialler = network, dialler
        self._egress = Egress(dialler.policy, dialler.account)
        self._news: SimpleQueue[Item] = SimpleQueue()
        self._held: Item | None = None  # taken from the queue, and not told yet
        self._seen = 0  # number of the connection whose Opened was told last
        self._first: Future[None] = Future()  # the first hello
        self._shows = env.debug_level() >= 3
        # network thread
        self._number = 0  # of connections so far
        self._outbox: Outbox | None = None  # of the connection that is open
        self._tokens = tokens
        self._model_fp = b""  # by ids: of the model that the answer began with
        self._asked: dict[int, float] = {}
        self._wake = asyncio.Event()
        self._heard = 0.0
        self._pinged = 0.0  # 0: nobody waits for a pong
        self._retry_after_s = 0.0
        self._is_open = False  # Opened has come on this connection ...
        self._opened_at = 0.0  # ... or on the last one
        self._is_closing = False
        self._task: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ engine's thread

    def start(self, cancel: Cancel | None = None) -> None:
        """Returns when the first hello is over.  Raises UpperError, WireError, EgressDenied, Cancelled."""
        self._network.call(self._begin)
        while True:
            try:
                return self._first.result(timeout=POLL_S)
            except TimeoutError:
                if cancel is not None and cancel.is_set():
                    self.close()
                    cancel.check()

    def send(self, message: Up) -> None:
        """Never waits; nothing happens while there is no connection."""
        self._network.call(self._put, self._seen, message)

    def receive(self, timeout_s: float) -> list[News]:
        """What has come.  Raises EgressDenied, MismatchError, WireError when the link has ended with one."""
        batch: list[News] = []
        while True:
            item, self._held = self._held or self._next(0.0 if batch else timeout_s), None
            if item is None:
                return batch
            if batch and (isinstance(item, NearfarError) or isinstance(item[1], Opened)):
                self._held = item
                return batch
            if isinstance(item, NearfarError):
                self._held = item
                raise item
            number, news = item
            if isinstance(news, Opened):
                self._seen = number
            batch.append(news)

    @property
    def model_fp(self) -> bytes:
        return self._model_fp  # of the first hello, which `start` waits for

    def deadline_s(self) -> float:
        return self._dialler.round_trips.deadline_s

    def wants_ids(self) -> bool:
        """Rows wait longer than a reply takes, so more of them than the link carries in that time."""
        outbox, policy = self._outbox, self._dialler.policy
        since = None if outbox is None else outbox.since
        # Another link has an account of its own, which must not begin anew.
        is_allowed = policy.ids_ok and policy.max_bytes is None and self._dialler.offers_ids
        if since is None or not is_allowed:
            return False
        return time.monotonic() - since > max(self._dialler.round_trips.p50_s, LEAST_BACKLOG_S)

    def close(self) -> None:
        """The rest happens by itself: a Close that was sent before still leaves."""
        self._network.call(self._finish)

    @property
    def is_over(self) -> bool:
        return self._task is not None and self._task.done()

    def _next(self, timeout_s: float) -> Item | None:
        try:
            return self._news.get(timeout_s > 0, timeout_s)
        except Empty:
            return None

    # ------------------------------------------------------------ network thread: one connection after the other

    def _begin(self) -> None:
        self._dialler.forgive()
        self._task = asyncio.create_task(self._run())

    def _put(self, seen: int, message: Up) -> None:
        if self._outbox is not None and seen == self._number:
            self._outbox.push(message)
            self._wake.set()
            self._is_closing = self._is_closing or isinstance(message, Close)

    def _finish(self) -> None:
        assert self._task is not None
        if self._outbox is not None and self._is_closing:
            asyncio.get_running_loop().call_later(FLUSH_S, self._task.cancel)
        else:
            self._task.cancel()

    async def finished(self) -> None:
        if self._task is not None:
            self._finish()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        """Until the answer is over, or no other attempt makes sense."""
        try:
            await self._connections()
        except (EgressDenied, MismatchError, WireError) as error:
            self._fail(error)
        except UpperError as error:
            self._fail(error) if not self._first.done() else self._tell(Lost(str(error), final=True))
        except asyncio.CancelledError:
            if not self._first.done():
                self._fail(UpperError("the link was closed before anybody answered"))
            raise
        except Exception as error:  # a bug of ours must not leave the engine waiting
            self._fail(UpperError(f"the link has failed: {type(error).__name__}: {error}"))
            raise

    async def _connections(self) -> None:
        """One after the other."""
        lost_at, n_failed = time.monotonic(), 0
        while True:
            fault, was_open = await self._connection()
            if fault is None or self._is_closing:
                return
            if was_open:
                lost_at, n_failed = time.monotonic(), 0
                self._tell(Lost(str(fault)))
            n_failed += 1
            if not self._first.done() and n_failed >= len(self._dialler.addresses):
                if not isinstance(fault, Unreachable):
                    raise fault
                raise UpperError(f"no upper side could be reached: {fault}") from None
            is_in_vain = n_failed > len(self._dialler.addresses)
            await asyncio.sleep(
                self._pause_s(lost_at, is_in_vain or (was_open and lost_at - self._opened_at < BRIEF_S))
            )

    async def _connection(self) -> tuple[Exception | None, bool]:
        """One, from its beginning to its end: what ended it, and whether it had opened."""
        fault: Exception | None = None
        try:
            greeted = await self._dialler.take()
        except Unreachable as error:
            return error.with_traceback(None), False
        try:
            await self._talk(greeted)
        except (Unreachable, UpperError, WireError) as error:
            fault = error.with_traceback(None)  # its frames know the call, and with it the socket
        finally:
            was_open, self._is_open, self._outbox = self._is_open, False, None
            await self._dialler.release(greeted, fault, was_open=was_open)
        return fault, was_open

    def _pause_s(self, lost_at: float, is_in_vain: bool) -> float:
        """Before the next attempt: none until every address was tried, then a twentieth of the outage so far."""
        asked_for, self._retry_after_s = self._retry_after_s, 0.0
        pause, lost_for_s = 0.0, time.monotonic() - lost_at
        if is_in_vain:
            pause = min(max(lost_for_s / 20, LEAST_PAUSE_S), MOST_PAUSE_S)
        return max(pause, asked_for) * random.uniform(0.75, 1.25)

    async def _talk(self, greeted: Greeted) -> None:
        """One connection, from `Open` to its end.  Raises Unreachable, UpperError, WireError, EgressDenied."""
        self._heard = time.monotonic()
        if not greeted.was_met:
            self._greet(await asyncio.shield(greeted.server), greeted.name)
        call, self._outbox = greeted.connection.session(), Outbox(CREDIT)
        self._number += 1
        self._asked.clear()
        self._outbox.push(replace(self.opening, resume_token=self._tokens.get(greeted.name, b"")))
        parts = (self._read(greeted, call, self._outbox), self._write(greeted, call, self._outbox), self._watch())
        work = [asyncio.create_task(part) for part in parts]
        try:
            await asyncio.wait(work, return_when=asyncio.FIRST_EXCEPTION)
            for task in work:  # the reader first: it knows why
                if task.done():
                    task.result()
        except _Over:
            return
        finally:
            for task in work:
                task.cancel()
            call.cancel()
            await asyncio.gather(*work, return_exceptions=True)
            # A task has the error, the error this frame, the frame the task: in such a circle a socket would stay open.
            work.clear()
            del task

    def _greet(self, server: ServerHello, name: str) -> None:
        if self.opening.codec.id == CodecId.IDS:  # any model with our tokenizer may answer, but one all of it
            self._model_fp = self._model_fp or server.model_fp
            check_same_model(name, self._model_fp, server.model_fp)
        self.max_run, self.max_context = server.limits.max_run, server.limits.max_context or self.max_context
        if not self._first.done():
            self._first.set_result(None)

    async def _write(self, greeted: Greeted, call: Call, outbox: Outbox) -> None:
        """Everything that leaves, through the door of the policy."""
        while True:
            now = time.monotonic()
            message = outbox.pop(now)
            if message is None:
                self._wake.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(outbox.pause_s(now)):
                        await self._wake.wait()
                continue
            data = pack.pack_up(outbox.n_sent, message)
            self._show("->", message, greeted)
            self._egress.out(greeted.name, message, len(data))
            self.traffic.up += len(data) + FRAME
            if isinstance(message, Ask):
                self._asked.setdefault(message.req, now)
            try:
                await call.write(data)
            except Unreachable:
                return  # the reader hears why
            if isinstance(message, Close):
                await call.done_writing()
                return

    async def _read(self, greeted: Greeted, call: Call, outbox: Outbox) -> None:
        """Everything that comes; hello first."""
        server = await asyncio.shield(greeted.server)
        self._greet(server, greeted.name)
        outbox.credit = server.limits.credit_bytes or CREDIT
        while True:
            try:
                ack, message, n_bytes = await call.read()
            except StreamEnded:
                if self._is_closing:
                    raise _Over from None
                raise
            self._heard = time.monotonic()
            self.traffic.down += n_bytes + FRAME
            outbox.acked(ack)
            if message is not None:
                self._show("<-", message, greeted)
                self._on(message, greeted, outbox)
            self._wake.set()

    def _on(self, message: Down, greeted: Greeted, outbox: Outbox) -> None:
        match message:
            case Pong():
                if self._pinged:
                    self._dialler.round_trips.pings.append(self._heard - self._pinged)
                self._pinged = 0.0
                return
            case Credit():
                asked_ms = min(message.retry_after_ms, 1000 * MOST_WAIT_S)
                pause_ms = int(asked_ms * random.uniform(1, 1.25))  # not all devices at once
                outbox.on_credit(replace(message, retry_after_ms=pause_ms), self._heard)
                if message.n_bytes or not self._is_open:
                    return
            case Opened(resume_token=token):
                if self._is_open:
                    raise WireError(f"{greeted.name} says Opened a second time on one stream")
                self._is_open, self._opened_at, self._tokens[greeted.name] = True, self._heard, token
            case Err(_, text, retryable, retry_after_ms):
                self._retry_after_s = min(retry_after_ms / 1000, MOST_WAIT_S)
                if not retryable:
                    self._tell(message)
                    self._tell(Lost(text, final=True))
                    raise _Over
            case _ if not self._is_open:
                raise WireError(f"{greeted.name} says {type(message).__name__} before Opened")
            case Verdict(req=req):
                if (asked := self._asked.pop(req, None)) is not None:
                    self._dialler.round_trips.asks.append(self._heard - asked)
        if self._news.qsize() >= MAX_NEWS:
            raise WireError(f"{greeted.name} says more than it was asked: {MAX_NEWS} messages wait")
        self._tell(message)

    async def _watch(self) -> None:
        """Ask for a sign of life where none comes.  Raises Silent."""
        self._pinged = 0.0
        while True:
            await asyncio.sleep(PING_AFTER_S / 2)
            now = time.monotonic()
            if now - self._heard > SILENT_S:
                raise Silent(f"nothing came for {SILENT_S:g} s")
            if not self._is_open or self._outbox is None:
                continue
            self._dialler.prepare()
            if not self._pinged and now - self._heard > PING_AFTER_S:
                self._pinged = now
                self._outbox.push(Ping(1))
                self._wake.set()

    # ------------------------------------------------------------ network thread: news

    def _show(self, way: str, message: Up | Down, greeted: Greeted) -> None:
        if self._shows:
            print(f"nearfar: {1e3 * time.monotonic():.1f} ms {way} {greeted.name} {describe(message)}", file=sys.stderr)

    def _tell(self, news: News) -> None:
        self._news.put((self._number, news))

    def _fail(self, error: NearfarError) -> None:
        """It is over, and the engine must hear of it."""
        if not self._first.done():
            self._first.set_exception(error)
        self._news.put(error)


class _Over(Exception):
    """The answer has come to its end."""
