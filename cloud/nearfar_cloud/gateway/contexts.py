"""All answers of devices that the upper side holds, by whose they are, and how much of it there may be.

    Open ─> room for one more? ─> Context ─> Connection ─> rows: room for them? ─> Context.hear
                 the oldest that nobody uses makes room ──────────────┘

Everything here is soft: a device can send all of it again, so what is idle is given up when time or memory runs out.
All calls come on the event loop.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from hmac import compare_digest

from nearfar.errors import NearfarError, UsageError
from nearfar.wire.codec import Codec
from nearfar.wire.messages import (
    SAMPLER_VERSION,
    Ask,
    Close,
    Code,
    CodecId,
    Commit,
    Credit,
    Err,
    Mode,
    Open,
    Ping,
    Up,
)
from nearfar.wire.rpc import Refused, Stream
from nearfar.wire.session import UpperSession
from nearfar_cloud.executors.base import ModelFacts
from nearfar_cloud.gateway.context import Context, Counts
from nearfar_cloud.gateway.endpoint import Budget
from nearfar_cloud.gateway.limits import Key, Limits
from nearfar_cloud.gateway.refusal import Refusal
from nearfar_cloud.gateway.service import Service
from nearfar_cloud.types import Objective, Request

FRESH_S = 1.0  # what was used so lately makes no room: two that need the same memory would push each other out for ever
PAUSE_MS = 500  # for a device whose rows find no room
RETRY_MS = 1000
MOST_RETRY_MS = (1 << 32) - 1  # that its field holds


@dataclass(slots=True)
class Usage:
    """What contexts hold."""

    n_sessions: int = 0
    n_positions: int = 0
    n_bytes: int = 0


class Contexts:
    """Owns every context.  `epoch`: of this process, random."""

    def __init__(
        self,
        service: Service,
        facts: ModelFacts,
        limits: Limits,
        budget: Budget | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_wait: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.service, self.facts, self.limits = service, facts, limits
        self.max_positions = facts.limit(service.engine.n_blocks)
        self.budget, self.now, self.on_wait = budget or Budget(), clock, on_wait
        self.epoch = secrets.randbits(63)
        self.is_draining = False
        self.counts = Counts()
        self.total = Usage()
        self.of: dict[str, Usage] = {}  # by subject, those who hold something
        self._secret = secrets.token_bytes(32)
        self._contexts: dict[tuple[str, bytes], Context] = {}
        self._n_void = 0  # bytes that were cut lately, which the engine may not have dropped yet
        self._wait_s, self._waited_at = 0.0, float("-inf")

    def __iter__(self) -> Iterator[Context]:
        return iter(self._contexts.values())

    def __len__(self) -> int:
        return len(self._contexts)

    @property
    def n_connected(self) -> int:
        return sum(c.stream is not None for c in self)

    @property
    def queue_s(self) -> float:
        """How long asks have waited for the engine lately."""
        return self._wait_s if self.now() - self._waited_at < 10 else 0.0

    # ------------------------------------------------------------ a device comes

    def open(self, key: Key, opening: Open, stream: Stream) -> Connection:
        """Begin an answer, or take one up: with its token what is there goes on, without it nothing of it does.

        The connection that had it is ended.  Raises Refused.
        """
        place = key.tenant, opening.session
        context = self._contexts.get(place)
        if context is not None and not compare_digest(opening.resume_token, context.machine.resume_token):
            self.counts.replaced += 1
            self._drop(context, Err(Code.DENIED, "this session was begun anew by another connection"))
            context = None
        if context is None:
            context = self._new(key, opening)
            self.counts.opened += 1
        else:
            self.counts.resumed += 1
        if context.stream is not None:
            context.stream.end(Err(Code.DENIED, "another connection goes on with this session"))
        context.stream = stream
        connection = Connection(self, context, stream)
        connection.on(opening)
        return connection

    def _new(self, key: Key, opening: Open) -> Context:
        """Raises Refused."""
        if self.is_draining:
            raise Refused(Err(Code.OVERLOADED, "this server is about to stop", True, RETRY_MS))
        try:
            request, codec = self._request(key, opening)
            self.limits.count_request(key)
        except NearfarError as error:
            raise Refused(Err(Code.MISMATCH, str(error))) from None
        except Refusal as refusal:
            raise refused(refusal) from None
        mine = [c for c in self if c.key.tenant == key.tenant]
        self._place(mine, key.sessions, Code.QUOTA)
        self._place(list(self), self.budget.max_sessions, Code.OVERLOADED)
        machine = UpperSession(
            opening,
            row_bytes=0 if codec is None else codec.row_bytes,
            max_positions=self.max_positions,
            n_vocab=self.facts.n_vocab,
            max_run=self.budget.max_run,
            max_bytes=self.budget.max_bytes,
            epoch=self.epoch,
            resume_token=self._token(key.tenant, opening.session),
        )
        context = Context(self, self.service, key, machine, request, codec)
        self._contexts[key.tenant, opening.session] = context
        self._account(context)
        return context

    def _request(self, key: Key, opening: Open) -> tuple[Request, Codec | None]:
        """What the engine will be asked to serve, and how its rows travel.  Raises UsageError for what it cannot."""
        by_ids = opening.codec.id == CodecId.IDS
        if by_ids != (opening.row_layer == 0) or (opening.mode == Mode.CLOUD_ONLY and not by_ids):
            raise UsageError(
                f"{opening.mode.name} with {opening.codec.id.name} at layer {opening.row_layer}: "
                "expected ids at layer 0, or rows above it in a mode in which the device drafts"
            )
        if opening.version != SAMPLER_VERSION:
            raise UsageError(f"sampler version {opening.version}: this server has {SAMPLER_VERSION}")
        codec = None if by_ids else Codec.of(opening.codec, self.facts.d_model)
        request = Request(
            outside=True,
            entry=opening.row_layer,
            sampling=opening.sampling,
            stop_ids=frozenset(opening.stop_ids),
            objective=Objective(tenant=key.tenant, priority=min(0, key.priority)),
        )
        self.facts.check(request, self.service.engine.n_blocks)
        return request, codec

    def _token(self, subject: str, session: bytes) -> bytes:
        """What takes a session up again: a MAC of this process."""
        text = b"%s\0%s%d" % (session, subject.encode(), self.epoch)
        return blake2b(text, key=self._secret, digest_size=16).digest()

    def _place(self, contexts: list[Context], most: int | None, code: Code) -> None:
        """Room for one more among so many; one whose device is away makes it.  Raises Refused."""
        if most is None or len(contexts) < most:
            return
        away = [c for c in contexts if c.stream is None]
        if not away:
            raise Refused(Err(code, f"{len(contexts)} sessions are open, allowed are {most}", True, RETRY_MS))
        self.counts.evicted += 1
        self._drop(min(away, key=lambda c: c.last_used))

    # ------------------------------------------------------------ a device speaks

    def hear(self, context: Context, message: Up) -> None:
        """Raises Refused where a quota or the engine says no."""
        context.last_heard = self.now()
        if not isinstance(message, Ping | Commit | Close):
            context.last_used = context.last_heard
        try:
            if isinstance(message, Ask):
                self.limits.check_debt(context.key)
            self._hear(context, message)
        except Refusal as refusal:
            raise refused(refusal) from None

    def _hear(self, context: Context, message: Up) -> None:
        """Raises Refused, Refusal."""
        n_new = context.machine.n_new(message)
        if n_new and not self._has_room(context, n_new):
            self.counts.paused += 1
            if isinstance(message, Ask):
                raise Refused(Err(Code.OVERLOADED, f"no room for a run of {message.run} tokens", True, PAUSE_MS))
            assert context.stream is not None
            context.stream.say(Credit(0, PAUSE_MS))
            context.machine.passed_over()
            return
        before = context.machine.n_bytes
        context.hear(message)
        self._n_void += max(0, before - context.machine.n_bytes)
        self._account(context)

    def _has_room(self, context: Context, n_new: int) -> bool:
        """Whether new positions fit, after the oldest that nobody uses has gone.  Raises Refused: its own quota."""
        key, n_bytes = context.key, n_new * (context.machine.row_bytes or 4)
        mine = self.of[key.tenant]
        while _over(mine.n_positions + n_new, key.session_positions) or _over(
            mine.n_bytes + n_bytes, key.session_bytes
        ):
            if not self._evict(c for c in self if c.key.tenant == key.tenant and c is not context):
                text = f"this key has {key.session_positions} positions and {key.session_bytes} bytes of rows at a time"
                raise Refused(Err(Code.QUOTA, text, mine.n_sessions > 1, RETRY_MS))
        while self.total.n_bytes + self._n_void + n_bytes > self.budget.max_bytes:
            if not self._evict(c for c in self if c is not context):
                return False
        return True

    def _evict(self, contexts: Iterable[Context]) -> bool:
        """Take what one of them holds, the one that was used last the longest ago; False: all are in use."""
        fresh = self.now() - FRESH_S
        idle = [c for c in contexts if c.machine.n_bytes and not c.is_asking and c.last_used < fresh]
        if not idle:
            return False
        victim = min(idle, key=lambda c: c.last_used)
        self.counts.evicted += 1
        if victim.stream is None:
            self._drop(victim)
        else:
            victim.evict()
            self._account(victim)
        return True

    def _account(self, context: Context) -> None:
        """What it holds counts."""
        if not context.is_over:
            self._book(context, (1, context.machine.n_reserved, context.machine.n_bytes))

    def _book(self, context: Context, holds: tuple[int, int, int]) -> None:
        """Sessions, positions, bytes: in place of what was booked before."""
        for usage in (self.total, self.of.setdefault(context.key.tenant, Usage())):
            usage.n_sessions += holds[0] - context.booked[0]
            usage.n_positions += holds[1] - context.booked[1]
            usage.n_bytes += holds[2] - context.booked[2]
        context.booked = holds

    # ------------------------------------------------------------ a device goes

    def left(self, context: Context, stream: Stream) -> None:
        """A connection is over; its device may come back."""
        if context.stream is stream:
            context.stream = None
            context.until = self.now() + self.budget.idle_s

    def ended(self, context: Context, keep_s: int) -> None:
        """The device is done; `keep_s`: with this turn of a chat."""
        if keep_s > 0 and not self.is_draining:
            context.stream = None
            context.rest()
            context.until = self.now() + min(keep_s, self.budget.most_keep_s)
        else:
            self._drop(context)

    def refused(self, context: Context, err: Err) -> None:
        """The machine or the engine says no; for good, or until the device comes again."""
        if err.retryable:
            if context.stream is not None:
                context.stream.end(err)
        else:
            self._drop(context, err)

    def _drop(self, context: Context, err: Err | None = None) -> None:
        if context.is_over:
            return
        context.is_over = True
        if context.stream is not None:
            context.stream.end(err)
            context.stream = None
        context.release()
        tenant = context.key.tenant
        del self._contexts[tenant, context.machine.opening.session]
        self._book(context, (0, 0, 0))
        if not self.of[tenant].n_sessions:
            del self.of[tenant]

    # ------------------------------------------------------------ time

    def used(self, context: Context, n_computed: int, waited_s: float) -> None:
        context.last_used = self._waited_at = self.now()
        self._wait_s += 0.2 * (waited_s - self._wait_s)
        self.limits.charge(context.key, n_computed)
        self.on_wait(waited_s)
        self._account(context)

    def may_run_early(self, context: Context) -> bool:
        """Where a device decides about sure tokens itself, rows behind the newest one are needed once: always.

        Where all its drafts are checked, rows of drafts decide, and would have to run again for that: what comes
        before its first ask alone.
        """
        if not self.budget.eager_absorb or self.limits.is_in_debt(context.key):
            return False
        return context.machine.opening.mode == Mode.LOSSY or not context.has_asked

    def ran_early(self, context: Context, n: int) -> None:
        self.counts.early += n
        self.limits.charge(context.key, n)

    def stopped(self, context: Context, n_computed: int) -> None:
        self.limits.charge(context.key, n_computed)

    def sweep(self) -> None:
        """Every second or so: give up what nobody has come back for, and devices that have fallen silent."""
        now = self.now()
        for context in list(self):
            if context.stream is None and now >= context.until:
                self.counts.expired += 1
                self._drop(context)
            elif context.stream is not None and now - context.last_heard >= self.budget.idle_s:
                self.counts.expired += 1
                self._drop(context, Err(Code.QUOTA, f"silent for {self.budget.idle_s:g} s", True, RETRY_MS))
        self._n_void = 0

    def close(self) -> None:
        """The server stops: every device is told, and may go on elsewhere."""
        self.is_draining = True
        for context in list(self):
            self._drop(context, Err(Code.OVERLOADED, "this server stops", True, RETRY_MS))


@dataclass(slots=True)
class Connection:
    """One stream of one device: `Session` of the wire."""

    contexts: Contexts
    context: Context
    stream: Stream

    def on(self, message: Up) -> None:
        """Nothing of a connection counts from which another one has taken the session."""
        if self.context.stream is self.stream:
            self.contexts.hear(self.context, message)

    def left(self) -> None:
        self.contexts.left(self.context, self.stream)


def refused(refusal: Refusal) -> Refused:
    """How a device hears what the gateway says."""
    code = {401: Code.DENIED, 429: Code.QUOTA, 503: Code.OVERLOADED}.get(refusal.status, Code.INTERNAL)
    again = 1.0 if refusal.status == 503 else refusal.retry_after_s  # 503: another server may do better
    return Refused(Err(code, refusal.message, again is not None, min(int(1000 * (again or 0)), MOST_RETRY_MS)))


def _over(n: int, most: int | None) -> bool:
    return most is not None and n > most
