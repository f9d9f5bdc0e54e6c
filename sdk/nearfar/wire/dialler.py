"""Which upper side is spoken to: addresses in the order of preference, one connection for all links.  On an event loop.

    take ─> | current connection, or the standby, or a new one to the address that is up next | ─> release, with or
    without a grudge;   prepare ─> standby: the next address, connected and greeted while the current one works

Each new connection says hello, and nothing else is said to an address before one of its hellos has fitted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from nearfar.errors import MismatchError, NearfarError
from nearfar.wire import pack
from nearfar.wire.address import Address
from nearfar.wire.connect import connect
from nearfar.wire.dial import Connection, Silent, StreamEnded, Unreachable
from nearfar.wire.egress import Account, Egress, Policy
from nearfar.wire.messages import ClientHello, CodecId, ServerHello
from nearfar.wire.rtt import RoundTrips
from nearfar.wire.tls import Credentials

CONNECT_S, ATTEMPT_S = 5.0, 1.0  # to connect, where nothing is known of the way; until another attempt begins beside it
LEAST_CONNECT_S, LEAST_ATTEMPT_S = 2.0, 0.25  # ... and where something is
REPLY_S = 60.0  # to the first hello: a server that has just been started reads its whole file before it can answer
FRESH_S = 30.0  # a connection that nobody has used for longer may be dead without a sign: routers forget it
GREET_S, RETRY_S = 10.0, 2.0  # until a standby is greeted again; until another attempt where there is none


@dataclass(slots=True, eq=False)
class Greeted:
    """A connection and its hello, which may still be under way; shared by links."""

    connection: Connection
    server: asyncio.Task[ServerHello]
    was_met: bool  # the address has said a fitting hello before: then nobody waits for it before `Open`
    n_links: int = 0
    left_at: float = 0.0  # when the last link went, or it was greeted to stand by

    @property
    def name(self) -> str:
        return str(self.connection.address)

    @property
    def is_fresh(self) -> bool:
        return time.monotonic() - self.left_at <= FRESH_S


@dataclass(slots=True)
class Dialler:
    addresses: Sequence[Address]
    credentials: Credentials
    policy: Policy
    account: Account
    hello: ClientHello
    round_trips: RoundTrips
    _at: int = 0  # the address that is up
    _current: Greeted | None = None
    _standby: Greeted | None = None
    _connecting: asyncio.Task[Greeted] | None = None
    _preparing: asyncio.Task[None] | None = None
    _prepare_at: float = 0.0  # when something is to be done for the standby
    _met: set[Address] = field(default_factory=set)
    _refused: dict[int, Exception] = field(default_factory=dict)  # addresses that are out for good

    @property
    def offers_ids(self) -> bool:
        return any(codec.id == CodecId.IDS for codec in self.hello.codecs)

    async def take(self) -> Greeted:
        """The connection in use, the standby, or a new one.

        Raises Unreachable where nobody takes the connection, what the last address said once all are out for good.
        """
        old = self._current
        # gRPC would make a lost connection anew by itself, without the hello that the other side waits for.
        if old is not None and not old.n_links and not (old.is_fresh and old.connection.stands):
            self._current = None
            await _hang_up(old)
        greeted = self._current or self._take_standby()
        if greeted is None:
            if self._connecting is None or self._connecting.done():
                self._connecting = asyncio.create_task(self._connect())
                self._connecting.add_done_callback(_heard)
            greeted = await asyncio.shield(self._connecting)
        greeted.n_links += 1
        return greeted

    async def release(self, greeted: Greeted, fault: Exception | None = None, *, was_open: bool = False) -> None:
        """A link does not use it any more, because of `fault` if there is one; `was_open`: it had said `Opened`.

        A connection that was good is tried again at the same address, which knows the session, unless another one
        stands by; after silence, or where nobody ever opened, the next address is up.
        """
        greeted.n_links -= 1
        greeted.left_at = time.monotonic()
        if fault is not None and not isinstance(fault, Unreachable):
            self._refused[self._index(greeted)] = fault
        goes_on = not was_open or isinstance(fault, Silent)
        stands = fault is None or (isinstance(fault, StreamEnded) and (was_open or len(self.addresses) == 1))
        if greeted is self._current and not stands:
            self._current = None
            self._at = (self._at + goes_on) % len(self.addresses)
        if greeted is not self._current and not greeted.n_links:
            await _hang_up(greeted)

    def prepare(self) -> None:
        """Have another address stand by, while an answer is open; called again and again, it does little."""
        now = time.monotonic()
        if len(self.addresses) > 1 and now >= self._prepare_at and (self._preparing is None or self._preparing.done()):
            self._prepare_at = now + RETRY_S
            self._preparing = asyncio.create_task(self._prepare())
            self._preparing.add_done_callback(_heard)

    def forgive(self) -> None:
        """A new answer tries every address again: the other side may have been put right meanwhile.

        And where one that is preferred stands by, it is up again.
        """
        self._refused.clear()
        current, standby = self._current, self._standby
        if current is None or current.n_links or standby is None or self._index(standby) > self._at:
            return
        if (back := self._take_standby()) is not None:
            self._current, self._standby = back, current

    async def close(self) -> None:
        for task in (self._connecting, self._preparing):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        kept, self._current, self._standby = (self._current, self._standby), None, None
        for greeted in kept:
            if greeted is not None:
                await _hang_up(greeted)

    def _index(self, greeted: Greeted) -> int:
        return self.addresses.index(greeted.connection.address)

    def _take_standby(self) -> Greeted | None:
        """Make it the current connection, if it can be relied on."""
        standby = self._standby
        if standby is None or not (standby.is_fresh and standby.connection.stands):
            return None
        self._current, self._standby, self._at, self._prepare_at = standby, None, self._index(standby), 0.0
        return standby

    async def _connect(self) -> Greeted:
        """A new connection to the address that is up; where there is none, the next one is.  Raises as `take` does."""
        if len(self._refused) == len(self.addresses):
            raise next(reversed(self._refused.values()))
        while self._at in self._refused:
            self._at = (self._at + 1) % len(self.addresses)
        try:
            connection = await self._dial(self.addresses[self._at])
        except Unreachable:
            self._at = (self._at + 1) % len(self.addresses)
            raise
        hello = asyncio.create_task(self._say_hello(connection))
        self._current = Greeted(connection, hello, connection.address in self._met)
        return self._current

    async def _prepare(self) -> None:
        """Greet the standby: the one that is there, or the next address that is not out."""
        standby = self._standby
        if standby is not None and self._index(standby) == self._at:
            self._standby = None
            await _hang_up(standby)
            standby = None
        try:
            if standby is None:
                others = [(self._at + i) % len(self.addresses) for i in range(1, len(self.addresses))]
                others = [i for i in others if i not in self._refused]
                if not others:
                    return
                connection = await self._dial(self.addresses[others[0]])
                standby = Greeted(connection, asyncio.create_task(self._say_hello(connection)), True)
            else:
                standby.server = asyncio.create_task(self._say_hello(standby.connection))
            await standby.server
            standby.left_at = time.monotonic()
            self._prepare_at = standby.left_at + GREET_S
            if standby is not self._current:
                self._standby = standby
        except (Unreachable, NearfarError, asyncio.CancelledError) as error:
            if standby is not None and standby is not self._current:
                self._standby = None if self._standby is standby else self._standby
                await _hang_up(standby)
            if isinstance(error, asyncio.CancelledError):
                raise  # of the others, whoever needs this address will hear again

    async def _dial(self, address: Address) -> Connection:
        """Raises Unreachable, EgressDenied."""
        Egress(self.policy, self.account).dial(address.host)
        known = self.round_trips.p50_s
        pause_s = max(LEAST_ATTEMPT_S, 2 * known) if known else ATTEMPT_S
        return await connect(address, self.credentials, self._within_s, pause_s)

    @property
    def _within_s(self) -> float:
        """To connect, and for a side that was met to answer."""
        known = self.round_trips.p50_s
        return max(LEAST_CONNECT_S, 8 * known) if known else CONNECT_S

    async def _say_hello(self, connection: Connection) -> ServerHello:
        data = pack.pack_client_hello(self.hello)
        egress = Egress(self.policy, self.account)
        egress.out(str(connection.address), self.hello, len(data))
        server = await connection.hello(data, self._within_s if connection.address in self._met else REPLY_S)
        check_hello(self.hello, server, str(connection.address))
        egress.settle(server.region)
        self._met.add(connection.address)
        return server


def check_hello(ours: ClientHello, theirs: ServerHello, name: str) -> None:
    """Raises MismatchError."""
    if theirs.proto not in ours.proto:
        raise MismatchError(f"{name} speaks version {theirs.proto} of the protocol; this device {list(ours.proto)}")
    if not theirs.match:
        raise MismatchError(
            f"{name} does not serve the upper layers of this device's model: {theirs.why or 'it does not say why'} "
            f"(ours {_shown(ours.model_fp)}, theirs {_shown(theirs.model_fp)})"
        )


def check_same_model(name: str, ours: bytes, theirs: bytes) -> None:
    """Whether an answer by ids goes on with the model that it began with.  Raises MismatchError."""
    if theirs != ours:
        raise MismatchError(
            f"{name} serves another model than the one that this answer began with "
            f"(ours {_shown(ours)}, theirs {_shown(theirs)})"
        )


def _shown(fingerprint: bytes) -> str:
    return f"{fingerprint[:6].hex()}…" if fingerprint else "unknown"


async def _hang_up(greeted: Greeted) -> None:
    greeted.server.cancel()
    with suppress(asyncio.CancelledError, Exception):  # whoever waited for it has heard of it
        await greeted.server
    await greeted.connection.close()


def _heard(task: asyncio.Task[Greeted] | asyncio.Task[None]) -> None:
    """Whoever waited for it may be gone; then its error is nobody's."""
    if not task.cancelled():
        task.exception()
