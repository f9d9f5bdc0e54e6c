"""Which upper side is spoken to: addresses in the order of preference, one connection for all links.  On an event loop.

    take ─> | current connection, or a new one to the address that is up next | ─> release, with or without a grudge

Each new connection says hello, and nothing else is said to an address before one of its hellos has fitted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from nearfar.errors import MismatchError
from nearfar.wire import pack
from nearfar.wire.address import Address
from nearfar.wire.dial import Connection, Silent, StreamEnded, Unreachable
from nearfar.wire.egress import Account, Egress, Policy
from nearfar.wire.messages import ClientHello, ServerHello
from nearfar.wire.rtt import RoundTrips
from nearfar.wire.tls import Credentials

CONNECT_S = 5.0  # to connect, where nothing is known of the way
REPLY_S = 60.0  # to the first hello: a server that has just been started reads its whole file before it can answer
LEAST_CONNECT_S = 2.0  # ... and where something is: a lost SYN is sent again after one second
FRESH_S = 30.0  # a connection that nobody has used for longer may be dead without a sign: routers forget it


@dataclass(slots=True, eq=False)
class Greeted:
    """A connection and its hello, which may still be under way; shared by links."""

    connection: Connection
    server: asyncio.Task[ServerHello]
    was_met: bool  # the address has said a fitting hello before: then nobody waits for it before `Open`
    n_links: int = 0
    left_at: float = 0.0  # when the last link went

    @property
    def name(self) -> str:
        return str(self.connection.address)


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
    _met: set[Address] = field(default_factory=set)
    _refused: dict[int, Exception] = field(default_factory=dict)  # addresses that are out for good

    async def take(self) -> Greeted:
        """The connection in use, or a new one.  Raises what the last address said once all of them are out for good."""
        old = self._current
        if old is not None and not old.n_links and time.monotonic() - old.left_at > FRESH_S:
            self._current = None
            await _hang_up(old)
        if self._current is None:
            if len(self._refused) == len(self.addresses):
                raise next(reversed(self._refused.values()))
            while self._at in self._refused:
                self._at = (self._at + 1) % len(self.addresses)
            connection = Connection.dial(self.addresses[self._at], self.credentials)
            hello = asyncio.create_task(self._say_hello(connection))
            self._current = Greeted(connection, hello, connection.address in self._met)
        self._current.n_links += 1
        return self._current

    async def release(self, greeted: Greeted, fault: Exception | None = None, *, was_open: bool = False) -> None:
        """A link does not use it any more, because of `fault` if there is one; `was_open`: it had said `Opened`.

        A connection that was good is tried again at the same address, which knows the session; after silence, or where
        nobody ever opened, the next address is up.
        """
        greeted.n_links -= 1
        greeted.left_at = time.monotonic()
        if fault is not None and not isinstance(fault, Unreachable):
            self._refused[self.addresses.index(greeted.connection.address)] = fault
        goes_on = not was_open or isinstance(fault, Silent)
        stands = fault is None or (isinstance(fault, StreamEnded) and (was_open or len(self.addresses) == 1))
        if greeted is self._current and not stands:
            self._current = None
            self._at = (self._at + goes_on) % len(self.addresses)
        if greeted is not self._current and not greeted.n_links:
            await _hang_up(greeted)

    def forgive(self) -> None:
        """A new answer tries every address again: the other side may have been put right meanwhile."""
        self._refused.clear()

    async def close(self) -> None:
        current, self._current = self._current, None
        if current is not None:
            await _hang_up(current)

    async def _say_hello(self, connection: Connection) -> ServerHello:
        data = pack.pack_client_hello(self.hello)
        egress = Egress(self.policy, self.account)
        egress.dial(connection.address.host)
        egress.out(str(connection.address), self.hello, len(data))
        known = self.round_trips.p50_s
        connect_s = max(LEAST_CONNECT_S, 8 * known) if known else CONNECT_S
        reply_s = connect_s if connection.address in self._met else REPLY_S
        server = await connection.hello(data, connect_s, reply_s)
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


def _shown(fingerprint: bytes) -> str:
    return f"{fingerprint[:6].hex()}…" if fingerprint else "unknown"


async def _hang_up(greeted: Greeted) -> None:
    greeted.server.cancel()
    with suppress(asyncio.CancelledError, Exception):  # whoever waited for it has heard of it
        await greeted.server
    await greeted.connection.close()
