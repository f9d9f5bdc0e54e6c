"""An upper side on a real socket, for tests: `rpc.serve` before a tiny model; the cloud's own is batched and counts.

Sessions outlive their streams until `forget` or `restart`, as they do in the cloud.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc

from nearfar.lower import Lower
from nearfar.upper import LocalLink, LocalUpper, Lost
from nearfar.wire import rpc
from nearfar.wire.loop_thread import LoopThread
from nearfar.wire.messages import (
    ClientHello,
    Close,
    Code,
    CodecSpec,
    Err,
    Limits,
    Load,
    Open,
    Opened,
    Ping,
    Pong,
    ServerHello,
    Up,
    Verdict,
)

LIMITS = Limits(max_context=512, max_sessions=8, idle_ttl_s=60, max_run=16, credit_bytes=32 << 10)
MODEL_FP = b"f" * 32


def wait_for(condition: Callable[[], object]) -> None:
    """Of what another thread brings about; a minute at most."""
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


@dataclass(slots=True)
class Door:
    """Sessions of one model.  The fields may be changed while it serves."""

    lower: Lower
    fingerprint: bytes = MODEL_FP
    limits: Limits = LIMITS
    region: str = ""
    token: str = ""  # that devices must show
    delay_s: float = 0.0  # before a decision
    hello_s: float = 0.0  # before a hello is answered
    takes_all: bool = False  # whoever says hello fits, as with ids
    is_mute: bool = False  # takes everything in and says nothing
    is_brief: bool = False  # ends every stream as soon as it is open
    n_copies: int = 1  # of whatever it says
    refuses: list[Err] = field(default_factory=list)  # for the next Opens
    epoch: int = 1
    sessions: dict[bytes, LocalLink] = field(default_factory=dict)
    streams: list[Stream] = field(default_factory=list)  # that are open
    seen: list[Up] = field(default_factory=list)
    hellos: list[ClientHello] = field(default_factory=list)
    callers: list[rpc.Caller] = field(default_factory=list)
    n_opened: int = 0

    async def hello(self, hello: ClientHello, caller: rpc.Caller) -> ServerHello:
        self._check(caller)
        self.hellos.append(hello)
        self.callers.append(caller)
        await asyncio.sleep(self.hello_s)
        fits = self.takes_all or hello.model_fp == self.fingerprint
        why = "" if fits else "upper (theirs 00…, ours 01…)"
        codec: CodecSpec | None = hello.codecs[0] if hello.codecs else None
        return ServerHello(fits, self.fingerprint, why, codec, self.epoch, self.limits, region=self.region)

    async def open(self, opening: Open, caller: rpc.Caller, stream: rpc.Stream) -> Stream:
        self._check(caller)
        if self.refuses:
            raise rpc.Refused(self.refuses.pop(0))
        known = self.sessions.get(opening.session)
        for other in [s for s in self.streams if s.link is known]:  # the device has come back another way
            other.stream.end()
            other.stop()
        if known is None:
            known = LocalUpper(self.lower, self.limits.max_context, self.limits.max_run).open(opening)
            known.session.epoch, known.session.resume_token = self.epoch, b"of epoch %d" % self.epoch
            known.receive(0)
            self.sessions[opening.session] = known
        session = Stream(self, stream, known, opening)
        if self.is_brief:
            stream.say(Opened(0, 0, 0, self.epoch))
            stream.end()
        return session

    def load(self, caller: rpc.Caller) -> Load:
        self._check(caller)
        return Load(0.0, 1 << 20, False)

    def _check(self, caller: rpc.Caller) -> None:
        if self.token and caller.authorization != f"Bearer {self.token}":
            raise rpc.Refused(Err(Code.DENIED, "expected a key of this server"))


class Stream:
    """One connection of a session."""

    def __init__(self, door: Door, stream: rpc.Stream, link: LocalLink, opening: Open) -> None:
        self.door, self.stream, self.link = door, stream, link
        door.streams.append(self)
        door.n_opened += 1
        self._todo: asyncio.Task[None] | None = None
        self.on(opening)

    def on(self, message: Up) -> None:
        self.door.seen.append(message)
        if self.door.is_mute or self.door.is_brief:
            return
        if isinstance(message, Ping):
            self.stream.say(Pong(message.n))
            return
        self.link.send(message)
        if isinstance(message, Close) and not message.keep_s:
            self.door.sessions.pop(self.link.session.opening.session, None)
        elif self._todo is None or self._todo.done():
            self._todo = asyncio.create_task(self._answer())

    def left(self) -> None:
        self.door.streams.remove(self)
        self.stop()

    def stop(self) -> None:
        if self._todo is not None:
            self._todo.cancel()

    async def _answer(self) -> None:
        """What there is to say; each decision after the delay."""
        while news := self.link.receive(0.0):
            for message in news:
                assert not isinstance(message, Lost)
                if isinstance(message, Verdict):
                    await asyncio.sleep(self.door.delay_s)
                for _ in range(self.door.n_copies if isinstance(message, Verdict) else 1):
                    self.stream.say(message)


class WireServer:
    """The door behind a port of this machine, on a thread of its own.

    `start` again after `stop` is another process as far as devices can tell: the sessions are gone.
    """

    def __init__(self, door: Door, credentials: grpc.ServerCredentials | None = None) -> None:
        self.door, self.credentials = door, credentials
        self.port = 0
        self._thread = LoopThread("test-server")
        self._server: grpc.aio.Server | None = None

    @property
    def url(self) -> str:
        return f"{'grpc' if self.credentials is None else 'grpcs'}://localhost:{self.port}"

    def __enter__(self) -> WireServer:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._thread.close()

    def start(self) -> None:
        self._thread.submit(self._start()).result()

    def stop(self) -> None:
        """All at once, as a process that is killed."""
        self._thread.submit(self._stop()).result()

    def do(self, action: Callable[[], object]) -> None:
        """On the server's thread."""

        async def act() -> None:
            action()

        self._thread.submit(act()).result()

    async def _start(self) -> None:
        self._server = rpc.serve(self.door, self.door.limits.credit_bytes)
        address = f"127.0.0.1:{self.port}"
        if self.credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, self.credentials)
        await self._server.start()

    async def _stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            await server.stop(None)
            self.door.sessions.clear()
            self.door.epoch += 1
