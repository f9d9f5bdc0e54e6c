"""Devices in front of the cloud's gateway: a tiny model, what any upper side must answer, contexts without sockets."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from queue import SimpleQueue
from tempfile import mkdtemp
from typing import Any, NamedTuple, TypeVar

import grpc

from nearfar.halves import Halves, split
from nearfar.lower import Lower, open_lower
from nearfar.options import EngineOptions
from nearfar.sampling import Sampling
from nearfar.upper import LocalUpper
from nearfar.upper_remote import RemoteUpper
from nearfar.weights import Weights
from nearfar.wire import fingerprint, rpc
from nearfar.wire.messages import ClientHello, Close, CodecSpec, Down, Open, Opened, Up
from nearfar.wire.pack import pack_client_hello, pack_up
from nearfar.wire.rpc import Stream
from nearfar.wire.tls import Credentials
from nearfar.wire.unpack import unpack_down
from nearfar_cloud.engine import Engine
from nearfar_cloud.gateway.app import Gateway
from nearfar_cloud.gateway.contexts import Connection, Contexts
from nearfar_cloud.gateway.endpoint import Budget, Endpoint
from nearfar_cloud.gateway.limits import Key, Limits
from nearfar_cloud.gateway.served import Served, open_served
from nearfar_cloud.gateway.service import Service
from tests.cloud.gateway import TINY, Client, check_quiet, serving, wait_until
from tests.sdk.small_device import BY_IDS, BY_ROWS, ROW_LAYER, Device, opening
from tests.tiny import write_tiny

A_BLOCK = 2 * 4 * 2 * 64 * 64 * 2  # bytes of a block of this model, as f16
MAX_LEN = 512
T = TypeVar("T", bound=Down)
EVERYBODY, GREEDY = Key(), Sampling()


@cache
def whole() -> Path:
    """A random model of four layers."""
    return write_tiny(Path(mkdtemp()) / f"{TINY}.gguf", n_ctx=MAX_LEN, seed=3)


def new_lower() -> Lower:
    """The same on a device, for one thread."""
    return open_lower(Weights.open(whole()), "native", EngineOptions(threads=1))


def served(n_blocks: int = 128) -> Served:
    return open_served(str(whole()), kv_bytes=n_blocks * A_BLOCK)


@cache
def truth(codec: CodecSpec, sampling: Sampling = GREEDY, n: int = 24) -> list[int]:
    """What any upper side must answer to the prompt of the small device."""
    lower = new_lower()
    link = LocalUpper(lower, MAX_LEN).open(replace(opening(codec), sampling=sampling))
    return Device(link, lower, codec).answer(n)


@cache
def halves() -> Halves:
    """The model cut below the layer that rows enter."""
    return split(Weights.open(whole()), ROW_LAYER, Path(mkdtemp()), make_exit=True)


def hello(path: Path | None = None, codecs: tuple[CodecSpec, ...] = (BY_ROWS, BY_IDS)) -> ClientHello:
    """What a device with that file says first; by default the lower half."""
    parts = fingerprint.parts(Weights.open(path or halves().device))
    return ClientHello(fingerprint.model_fp(parts), parts, codecs)


@contextmanager
def asking(model: Served | None = None, **options: Any) -> Iterator[Asked]:
    """A gateway with a port for devices; at the end nothing may be left of them."""
    with serving(model or served(), **{"endpoint": Endpoint()} | options) as (client, gateway, _):
        assert gateway.collab is not None
        url = gateway.collab.url.replace("127.0.0.1", "localhost")
        with ExitStack() as stack:
            found = Asked(client, gateway, gateway.collab.contexts, url, stack)
            yield found
        found.check_quiet()


class Asked(NamedTuple):
    """What devices ask."""

    client: Client
    gateway: Gateway
    contexts: Contexts
    url: str
    stack: ExitStack  # what ends before the server does

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def dial(self, files: ClientHello | None = None, credentials: Credentials | None = None) -> RemoteUpper:
        """An upper side for devices, closed before the server is."""
        upper = RemoteUpper(self.url, hello=files or hello(), credentials=credentials)
        return self.stack.enter_context(closing(upper))

    def device(self, codec: CodecSpec, name: str = "s", *, upper: RemoteUpper | None = None, **fields: Any) -> Device:
        """A device that knows the truth for half of its drafts, on a link of its own."""
        link = (upper or self.dial()).open(replace(opening(codec, name.encode().ljust(16, b".")), **fields))
        return Device(link, new_lower(), codec, truth(codec, fields.get("sampling", GREEDY)))

    def answer(self, codec: CodecSpec, name: str = "s", n: int = 24, **fields: Any) -> list[int]:
        """The answer of such a device, which closes at its end."""
        device = self.device(codec, name, **fields)
        try:
            return device.answer(n)
        finally:
            finish(device)

    def check_quiet(self) -> None:
        """As before anybody asked."""
        wait_until(lambda: not len(self.contexts))
        total = self.contexts.total
        assert (total.n_sessions, total.n_positions, total.n_bytes, self.contexts.of) == (0, 0, 0, {})
        check_quiet(self.gateway)


def finish(device: Device) -> None:
    """Its answer is over: the server is told, if it can be."""
    device.link.send(Close())
    device.link.close()


class RawStream:
    """A device's stream behind its hello (`greets`), message by message or byte by byte."""

    def __init__(self, port: int, key: str = "", *, greets: bool = True) -> None:
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self._out: SimpleQueue[bytes | None] = SimpleQueue()
        metadata = (("authorization", f"Bearer {key}"),) if key else ()
        if greets:
            said = pack_client_hello(hello())
            self._channel.unary_unary(rpc.HELLO)(said, metadata=metadata, timeout=60, wait_for_ready=True)
        self._call = self._channel.stream_stream(rpc.SESSION)(iter(self._out.get, None), metadata=metadata)
        self._n = 0

    def say(self, *messages: Up) -> None:
        for message in messages:
            self._n += 1
            self.say_bytes(pack_up(self._n, message))

    def say_bytes(self, data: bytes) -> None:
        self._out.put(data)

    def next(self, kind: type[T]) -> T:
        """The next message, which must be of that kind."""
        while True:
            _, message = unpack_down(next(self._call))
            if message is not None:
                assert isinstance(message, kind), message
                return message

    @property
    def is_over(self) -> bool:
        return next(self._call, None) is None

    def leave(self) -> None:
        self._out.put(None)
        self._call.cancel()
        self._channel.close()


class Line:
    """One stream of a device, read as it comes."""

    def __init__(self) -> None:
        self.stream = Stream()
        self.heard: list[Down] = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for data in self.stream.outgoing():
            _, message = unpack_down(data)
            if message is not None:
                self.heard.append(message)

    async def next(self, kind: type[T]) -> T:
        """The next message, which must be of that kind."""
        message = await self.any()
        assert isinstance(message, kind), message
        return message

    async def any(self) -> Down:
        async with asyncio.timeout(30):
            while not self.heard:
                await asyncio.sleep(0.001)
        return self.heard.pop(0)

    async def end(self) -> None:
        self.stream.end()
        await self._reader

    async def silence(self) -> None:
        """Nothing comes while everything that is under way settles."""
        await asyncio.sleep(0.05)
        assert self.heard == []


class World:
    """Contexts over an engine that runs, without gRPC; the clock is moved by hand."""

    def __init__(self, budget: Budget | None = None, n_blocks: int = 128) -> None:
        self.now = 1000.0
        self.served = served(n_blocks)
        assert isinstance(self.served.engine, Engine)
        self.engine = self.served.engine
        self.service = Service(self.engine)
        self.limits = Limits(clock=lambda: self.now)
        self.contexts = Contexts(self.service, self.engine.facts, self.limits, budget, clock=lambda: self.now)
        self.lines: list[Line] = []

    def connect(
        self, name: str = "s", codec: CodecSpec = BY_IDS, key: Key = EVERYBODY, **fields: Any
    ) -> tuple[Connection, Line]:
        """A connection of the session of that name, whose Opened is still to be read."""
        line = Line()
        self.lines.append(line)
        return self.contexts.open(key, self.opening(name, codec, **fields), line.stream), line

    def opening(self, name: str = "s", codec: CodecSpec = BY_IDS, **fields: Any) -> Open:
        return replace(opening(codec, name.encode().ljust(16, b".")), **fields)

    async def opened(self, name: str = "s", **options: Any) -> tuple[Connection, Line, Opened]:
        connection, line = self.connect(name, **options)
        return connection, line, await line.next(Opened)

    async def quiet(self) -> None:
        """Nothing is left: no context, sequence, block, mailbox, and nothing that is accounted for."""
        async with asyncio.timeout(30):
            while self.engine.seqs or self.engine.has_work or self.service.n_open:
                await asyncio.sleep(0.001)
        self.engine.pool.check([])
        self.contexts.sweep()
        total = self.contexts.total
        assert (len(self.contexts), total.n_sessions, total.n_positions, total.n_bytes) == (0, 0, 0, 0)
        assert self.contexts.of == {}


def in_world(**options: Any) -> Callable[[Callable[[World], Awaitable[None]]], Callable[[], None]]:
    """A test that is a coroutine of a world."""

    def decorate(test: Callable[[World], Awaitable[None]]) -> Callable[[], None]:
        async def run() -> None:
            world = World(**options)
            world.service.start()
            try:
                await test(world)
            finally:
                world.contexts.close()
                world.service.stop()
                for line in world.lines:
                    await line.end()

        def wrapped() -> None:
            asyncio.run(run())

        functools.update_wrapper(wrapped, test)
        del wrapped.__wrapped__  # type: ignore[attr-defined]  # pytest reads the arguments of what is wrapped
        return wrapped

    return decorate
