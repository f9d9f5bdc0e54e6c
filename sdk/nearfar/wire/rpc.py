"""gRPC as both sides use it: names of calls, how connections are kept, and the loop over a device's stream.

    a device's stream ─> unpack ─> Session.on ─> (sessions, engine: the door's) ─> Stream.say ─> pack ─> the device

`serve` is what the cloud's gateway and every other upper side stand behind: it turns bytes into checked messages and
knows no model.  Whoever answers is a `Door`.  gRPC passes bytes through as they are; what is wrong with them is found
by `unpack.py`, told to that device as BAD_FRAME, and ends that stream only.  `upper_remote.py` is the other end.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

# The first keeps gRPC from writing into the terminal whenever a connection is lost.  The second is the way to TLS 1.3
# only, for which gRPC has no option in Python: a list of suites speaks of TLS 1.2 alone, and this one needs a secret
# that nobody has.  A process whose other gRPC needs TLS 1.2 sets the variable itself.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", "ECDHE-PSK-CHACHA20-POLY1305")

import grpc
from grpc._cython import cygrpc

from nearfar.errors import UsageError, WireError
from nearfar.wire import pack, unpack
from nearfar.wire.messages import ClientHello, Close, Code, Down, Err, Ids, Load, Open, Rows, ServerHello, Up

if hasattr(cygrpc, "reset_grpc_config_vars"):  # somebody may have imported gRPC before, which reads them once
    cygrpc.reset_grpc_config_vars()

HELLO, HEALTH, SESSION = "/nearfar.v1.Hub/Hello", "/nearfar.v1.Hub/Health", "/nearfar.v1.Collab/Session"
LOAD_EVERY_S = 1.0
OPEN_WITHIN_S = 10.0  # a stream begins with Open; whoever does not say it is no device
MAX_QUEUED = 1024  # messages to a device that does not read them
CREDIT = 64 << 10  # bytes of rows under way, where a door does not say how many
ACK_EVERY = 16 << 10  # bytes of rows after which a device hears that they came, even if there is nothing else to say

_MESSAGES = [
    ("grpc.max_send_message_length", unpack.MAX_MESSAGE),
    ("grpc.max_receive_message_length", unpack.MAX_MESSAGE),
]
# A connection without any sign of life for 15 s is dead; the other side must permit to be asked that often.
_ALIVE = [
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
]
# One without calls is not asked: it is closed.  Devices do not use one again that has rested for half as long.
IDLE_MS = ("grpc.max_connection_idle_ms", 60_000)
SERVER_OPTIONS = [
    *_MESSAGES,
    *_ALIVE,
    IDLE_MS,
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.max_concurrent_streams", 1024),
    ("grpc.so_reuseport", 0),  # a second server on the same port is an error, not a lottery
]
CHANNEL_OPTIONS = [
    *_MESSAGES,
    *_ALIVE,
    ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection
    ("grpc.enable_retries", 0),  # the ledger repeats what has to be repeated
]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is at the other end, as far as gRPC knows.  `names`: of a client certificate that TLS has checked."""

    peer: str
    authorization: str = ""  # the header, "Bearer KEY"
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, context: grpc.aio.ServicerContext[Any, Any]) -> Caller:
        metadata = dict(context.invocation_metadata() or ())
        names = context.peer_identities() or ()
        return cls(
            context.peer(), str(metadata.get("authorization", "")), tuple(n.decode("utf-8", "replace") for n in names)
        )


class Refused(Exception):
    """A door lets somebody not in; the device is told why.

    `hangs_up`: the stream ends as if the connection were lost, so that the device dials again and says hello.
    """

    def __init__(self, err: Err, *, hangs_up: bool = False) -> None:
        super().__init__(err.text)
        self.err, self.hangs_up = err, hangs_up


class Session(Protocol):
    """One device's stream, seen from behind the door.  All calls come on the event loop and must not wait."""

    def on(self, message: Up) -> None:
        """Any message but Open.  Raises WireError for one that cannot be meant: it ends the stream."""

    def left(self) -> None:
        """The stream is over, for whatever reason; without `Close` before it the device may come back."""


class Door(Protocol):
    """What answers devices: knows the model, the sessions and who may use them.  Raises Refused."""

    async def hello(self, hello: ClientHello, caller: Caller) -> ServerHello: ...

    async def open(self, opening: Open, caller: Caller, stream: Stream) -> Session:
        """Begin a session, or take one up; the session says `Opened` by itself.  UsageError: it can never be served."""

    def load(self, caller: Caller) -> Load: ...


@dataclass(slots=True)
class Stream:
    """The way to one device; `say` and `end` never wait.  For the event loop's thread."""

    ack_every: int = ACK_EVERY
    taken: int = 0  # number of the last message of the device that was taken in
    is_over: bool = False
    hangs_up: bool = False  # at its end
    _queue: deque[Down | None] = field(default_factory=deque)  # None: an acknowledgement by itself
    _unacked: int = 0  # bytes of rows
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def say(self, message: Down) -> None:
        """Nothing is said on a stream that is over, nor to a device that reads none of it."""
        if self.is_over:
            return
        self._queue.append(message)
        self._wake.set()
        if len(self._queue) > MAX_QUEUED:
            self._queue.clear()
            self.end(Err(Code.QUOTA, f"{MAX_QUEUED} messages to this device wait to be read"))

    def end(self, err: Err | None = None) -> None:
        """The last word; then the stream is closed."""
        if not self.is_over:
            self._queue += [err] if err is not None else []
            self.is_over = True
            self._wake.set()

    def take(self, seq: int, message: Up) -> None:
        """A message has come.  Raises WireError if others before it have not."""
        if seq != self.taken + 1:
            raise WireError(f"message {seq} after message {self.taken}: expected one after the other")
        self.taken = seq
        if isinstance(message, Rows | Ids):
            self._unacked += message.n_bytes if isinstance(message, Rows) else 4 * len(message.ids)

    def ack(self) -> None:
        """Say that rows were taken in, once enough of them were."""
        if self._unacked >= self.ack_every and not self._queue and not self.is_over:
            self._queue.append(None)
            self._wake.set()

    async def outgoing(self) -> AsyncIterator[bytes]:
        """What there is to send, until the end."""
        while True:
            while self._queue:
                self._unacked = 0
                yield pack.pack_down(self.taken, self._queue.popleft())
            if self.is_over:
                return
            self._wake.clear()
            await self._wake.wait()


def serve(door: Door, credit_bytes: int = CREDIT) -> grpc.aio.Server:
    """A server with both services; the caller gives it ports, starts and stops it.  On the running event loop.

    `credit_bytes`: as the hello of the door says, or less; a device must hear of its rows before that is used up.
    """
    server = grpc.aio.server(options=SERVER_OPTIONS)
    service = _Service(door, min(ACK_EVERY, credit_bytes // 4))
    unary, streaming = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
    hub = {"Hello": unary(service.hello), "Health": streaming(service.health)}
    collab = {"Session": grpc.stream_stream_rpc_method_handler(service.session)}
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler("nearfar.v1.Hub", hub),
            grpc.method_handlers_generic_handler("nearfar.v1.Collab", collab),
        )
    )
    return server


class _Service:
    """The calls, as gRPC makes them: bytes in, bytes out."""

    def __init__(self, door: Door, ack_every: int) -> None:
        self.door, self.ack_every = door, ack_every

    async def hello(self, data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        try:
            return pack.pack_server_hello(await self.door.hello(unpack.unpack_client_hello(data), Caller.of(context)))
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except Refused as refused:
            await context.abort(STATUS.get(refused.err.code, grpc.StatusCode.UNAVAILABLE), refused.err.text)
        raise AssertionError("abort raises")

    async def health(self, data: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[bytes]:
        try:
            while True:
                yield pack.pack_load(self.door.load(Caller.of(context)))
                await asyncio.sleep(LOAD_EVERY_S)
        except Refused as refused:
            await context.abort(STATUS.get(refused.err.code, grpc.StatusCode.UNAVAILABLE), refused.err.text)

    async def session(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[bytes]:
        stream = Stream(self.ack_every)
        reader = asyncio.create_task(self._read(requests, Caller.of(context), stream))
        try:
            async for data in stream.outgoing():
                yield data
            if stream.hangs_up:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "refused; its last message says why")
        finally:
            stream.is_over = True
            reader.cancel()

    async def _read(self, requests: AsyncIterator[bytes], caller: Caller, stream: Stream) -> None:
        """Everything that the device says, until it has said all or something is wrong."""
        session: Session | None = None
        try:
            arriving = aiter(requests)
            opening = await _opening(stream, arriving)
            if opening is None:
                return
            session = await self._open(opening, caller, stream)
            async for data in arriving:
                seq, message = unpack.unpack_up(data)
                stream.take(seq, message)
                if isinstance(message, Open):
                    raise WireError("a second Open on one stream: expected another stream for another answer")
                session.on(message)
                if isinstance(message, Close) or stream.is_over:
                    return
                stream.ack()
        except WireError as error:
            stream.end(Err(Code.BAD_FRAME, str(error)))
        except Refused as refused:
            stream.hangs_up = refused.hangs_up
            stream.end(refused.err)
        except asyncio.CancelledError:
            raise
        except Exception:  # ours: whatever it is, the other devices go on
            log.exception("a session has failed")
            stream.end(Err(Code.INTERNAL, "the upper side has failed; its log says how", True, 100))
        finally:
            if session is not None:
                session.left()
            stream.end()

    async def _open(self, opening: Open, caller: Caller, stream: Stream) -> Session:
        try:
            return await self.door.open(opening, caller, stream)
        except UsageError as error:  # such as a codec with channels that rows of this model do not have
            raise Refused(Err(Code.MISMATCH, str(error))) from None


async def _opening(stream: Stream, arriving: AsyncIterator[bytes]) -> Open | None:
    """How a stream must begin; None: it ends before."""
    try:
        async with asyncio.timeout(OPEN_WITHIN_S):
            data = await anext(arriving, None)
    except TimeoutError:
        raise WireError(f"no Open within {OPEN_WITHIN_S:g} s") from None
    if data is None:
        return None
    seq, message = unpack.unpack_up(data)
    stream.take(seq, message)
    if not isinstance(message, Open):
        raise WireError(f"a stream that begins with {type(message).__name__}: expected Open")
    return message


STATUS = {
    Code.DENIED: grpc.StatusCode.PERMISSION_DENIED,
    Code.QUOTA: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Code.OVERLOADED: grpc.StatusCode.UNAVAILABLE,
    Code.MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    Code.BAD_FRAME: grpc.StatusCode.INVALID_ARGUMENT,
    Code.INTERNAL: grpc.StatusCode.INTERNAL,
}
