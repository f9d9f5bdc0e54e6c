"""A bad link between two programs on one machine: a TCP proxy that delays, limits, stalls, cuts and resets.

    device ── near ──[ up:   rate, delay, loss ]── far ── upper
                   ──[ down: rate, delay, loss ]──

`LinkProxy` lives on an asyncio loop; `running` gives it a loop and a thread of its own, for programs that block.  No
root is needed.  What TCP does about a loss is told as a wait (tcp.py).  The kernel of this machine answers a connect at
once, so the round trip that a connect takes is added to the first byte instead.
"""

from __future__ import annotations

import asyncio
import select
import selectors
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from random import Random

from nearfar.chaos import tcp
from nearfar.chaos.counters import Counters
from nearfar.chaos.pipe import End, Lane, Pipe
from nearfar.chaos.priority import ahead_of_others
from nearfar.chaos.profiles import Profile
from nearfar.chaos.schedule import LINK_FAULTS, Fault, Schedule
from nearfar.errors import NearfarError, UsageError

Address = tuple[str, int]
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER: on, 0 s


class LinkProxy:
    """Listens, dials `to` for every connection, and carries the bytes as `profile` says.  Belongs to one loop."""

    def __init__(self, to: Address, profile: Profile, seed: int = 0, schedule: Schedule | None = None) -> None:
        """`schedule` is played from the moment at which the link comes up.  Raises UsageError if it cannot be."""
        self.to, self.profile, self.seed = to, profile, seed
        self.schedule = schedule or Schedule(seed)
        check_playable(self.schedule)
        self.counters = Counters()
        self.up, self.down = Lane(profile, self.counters.up), Lane(profile, self.counters.down)
        self.connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None
        self._player: asyncio.Task[None] | None = None

    async def start(self, listen: Address = ("127.0.0.1", 0)) -> Address:
        """Take connections; the address that was given (port 0 takes a free one).  Raises NearfarError."""
        loop = asyncio.get_running_loop()
        try:
            self._server = await loop.create_server(lambda: _End(_Connection(self), is_near=True), *listen)
        except OSError as error:
            raise NearfarError(
                f"cannot listen on {listen[0]}:{listen[1]}: {error.strerror}; take another port"
            ) from None
        self._player = loop.create_task(self._play())
        host, port = self._server.sockets[0].getsockname()[:2]
        return host, port

    async def stop(self) -> None:
        """Reset what is open and take nothing more."""
        assert self._server is not None
        assert self._player is not None
        self._server.close()
        self._player.cancel()
        for connection in list(self.connections):
            connection.reset()
        with suppress(asyncio.CancelledError):
            await self._player
        await self._server.wait_closed()

    def inject(self, fault: Fault) -> None:
        """Do it now, whatever its time says.  On the loop's thread."""
        now = asyncio.get_running_loop().time()
        self.counters.faults[fault.kind] += 1
        if fault.kind == "reset":
            for connection in list(self.connections):
                connection.reset()
        elif fault.kind == "half-open":
            for connection in self.connections:
                connection.swallow()
        elif fault.kind == "cut":
            (self.up if fault.way == "up" else self.down).cut_after = fault.n_bytes
        elif fault.kind == "stall":
            for lane in (self.up, self.down):
                lane.still_until = max(lane.still_until, now + fault.seconds)
        elif fault.kind == "blackout":
            for lane in (self.up, self.down):
                lane.dark_until = max(lane.dark_until, now + fault.seconds)
        else:
            raise UsageError(f"a link cannot do {fault.kind!r}; expected one of {', '.join(LINK_FAULTS)}")

    async def _play(self) -> None:
        clock = asyncio.get_running_loop().time
        began = clock()
        for fault in self.schedule.faults:
            await asyncio.sleep(began + fault.at - clock())
            self.inject(fault)


def check_playable(schedule: Schedule) -> None:
    """Raises UsageError where a link by itself cannot do what is asked."""
    if schedule.faults and schedule.unit != "s":
        raise UsageError(f"a schedule in {schedule.unit!r}: a link counts seconds; expected the unit 's'")
    for fault in schedule.faults:
        if fault.kind not in LINK_FAULTS:
            raise UsageError(f"a link cannot do {fault.kind!r}; expected one of {', '.join(LINK_FAULTS)}")


class _Connection:
    """Two ends and a pipe each way."""

    def __init__(self, link: LinkProxy) -> None:
        self.link = link
        link.counters.connections += 1
        number = link.counters.connections
        self._draws = Random(f"{link.seed} {number}")
        self.up = Pipe(link.up, Random(f"{link.seed} {number} up"), self.reset, self._ended)
        self.down = Pipe(link.down, Random(f"{link.seed} {number} down"), self.reset, self._ended)
        self._n_ended = 0
        self._dial: asyncio.Task[None] | None = None  # kept: a loop holds tasks weakly

    def accepted(self, near: asyncio.Transport) -> None:
        """The device's end.  It may send when its handshake is over; half a round trip later the upper is dialled."""
        self.link.connections.add(self)
        self.link.counters.open += 1
        self.up.source, self.down.sink = near, near
        near.pause_reading()
        self._dial = asyncio.get_running_loop().create_task(self._open(near))

    async def _open(self, near: asyncio.Transport) -> None:
        loop, profile = asyncio.get_running_loop(), self.link.profile
        await asyncio.sleep(tcp.handshake_s(profile, self._draws, self.link.up.dark_until - loop.time()))
        if not near.is_closing():
            near.resume_reading()
        await asyncio.sleep(profile.one_way_s(self._draws))
        try:
            await loop.create_connection(lambda: _End(self, is_near=False), *self.link.to)
        except OSError:
            self.link.counters.refused += 1
            self.reset()

    def answered(self, far: asyncio.Transport) -> None:
        """The upper's end."""
        if self not in self.link.connections:  # reset meanwhile
            _reset(far)
            return
        self.down.source = far
        self.up.connect(far)

    def reset(self) -> None:
        """RST to both ends; what is on its way is gone."""
        for pipe in (self.up, self.down):
            pipe.swallow()
        for transport in (self.up.source, self.up.sink):
            if transport is not None:
                _reset(transport)
        if self._dial is not None:
            self._dial.cancel()
        self._forget()

    def swallow(self) -> None:
        """Half-open: both ends stay as they are and nothing arrives any more."""
        self.up.swallow()
        self.down.swallow()

    def stopped(self, end: _End, how: End) -> None:
        """An end will not send any more."""
        outgoing = self.up if end.is_near else self.down
        if outgoing.swallows and end.transport is not None:
            end.transport.close()  # whoever is at the other end does not hear of it
        else:
            outgoing.end(how)

    def lost(self, end: _End, error: Exception | None) -> None:
        """An end is gone."""
        incoming = self.down if end.is_near else self.up
        incoming.swallow()
        if error is not None:
            self.stopped(end, End.RST)
        if all(t is None or t.is_closing() for t in (self.up.source, self.up.sink)):
            self._forget()

    def _ended(self) -> None:
        self._n_ended += 1
        if self._n_ended == 2:
            for transport in (self.up.source, self.up.sink):
                if transport is not None:
                    transport.close()

    def _forget(self) -> None:
        if self in self.link.connections:
            self.link.connections.remove(self)
            self.link.counters.open -= 1


class _End(asyncio.Protocol):
    """One socket of a connection; asyncio has set TCP_NODELAY, so small messages wait for nobody."""

    def __init__(self, connection: _Connection, *, is_near: bool) -> None:
        self.connection, self.is_near = connection, is_near
        self.transport: asyncio.Transport | None = None
        self._outgoing = connection.up if is_near else connection.down
        self._incoming = connection.down if is_near else connection.up

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=0)  # full as soon as the kernel takes no more
        (self.connection.accepted if self.is_near else self.connection.answered)(transport)

    def data_received(self, data: bytes) -> None:
        self._outgoing.push(data)

    def eof_received(self) -> bool:
        self.connection.stopped(self, End.FIN)
        return True  # the other direction stays open

    def connection_lost(self, exc: Exception | None) -> None:
        self.connection.lost(self, exc)

    def pause_writing(self) -> None:
        self._incoming.hold()

    def resume_writing(self) -> None:
        self._incoming.go_on()


def _reset(transport: asyncio.Transport) -> None:
    sock = transport.get_extra_info("socket")
    with suppress(OSError):  # it is closed already
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    transport.abort()


def new_loop() -> asyncio.AbstractEventLoop:
    """A loop whose timers are exact to some ten µs."""
    return asyncio.SelectorEventLoop(_ExactSelector())


class _ExactSelector(selectors.DefaultSelector):
    """Linux' epoll counts whole milliseconds; select() on its descriptor counts µs, with any number of sockets."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0 or not hasattr(self, "fileno"):
            return super().select(timeout)
        select.select([self.fileno()], [], [], timeout)
        return super().select(0)


class RunningLink:
    """A proxy on a thread of its own, for those who block."""

    def __init__(self, proxy: LinkProxy, loop: asyncio.AbstractEventLoop, address: Address) -> None:
        self.address, self._proxy, self._loop = address, proxy, loop

    def inject(self, fault: Fault) -> None:
        """Do it now; returns when it is done."""

        async def on_loop() -> None:
            self._proxy.inject(fault)

        asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result()

    def counters(self) -> Counters:
        """As they are now."""

        async def on_loop() -> Counters:
            now = self._proxy.counters
            return replace(now, up=replace(now.up), down=replace(now.down), faults=now.faults.copy())

        return asyncio.run_coroutine_threadsafe(on_loop(), self._loop).result()


@contextmanager
def running(
    to: Address, profile: Profile, seed: int = 0, schedule: Schedule | None = None, listen: Address = ("127.0.0.1", 0)
) -> Iterator[RunningLink]:
    """A link to `to` for as long as the block lasts."""
    proxy, loop = LinkProxy(to, profile, seed, schedule), new_loop()

    def carry() -> None:
        ahead_of_others()
        loop.run_forever()

    thread = threading.Thread(target=carry, name="nearfar-chaos", daemon=True)
    thread.start()
    try:
        address = asyncio.run_coroutine_threadsafe(proxy.start(listen), loop).result()
        try:
            yield RunningLink(proxy, loop, address)
        finally:
            asyncio.run_coroutine_threadsafe(proxy.stop(), loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
