"""A connection to an upper side, seen from the device: the other end of `rpc.serve`.  On an event loop.

gRPC's own errors do not leave this file: `Unreachable` may pass by itself, everything else will not.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc

from nearfar.errors import MismatchError, UpperError, WireError
from nearfar.wire import rpc, unpack
from nearfar.wire.address import Address
from nearfar.wire.messages import Down, ServerHello
from nearfar.wire.tls import Credentials

_FOR_GOOD: dict[grpc.StatusCode, type[UpperError]] = {
    grpc.StatusCode.UNAUTHENTICATED: UpperError,
    grpc.StatusCode.PERMISSION_DENIED: UpperError,
    grpc.StatusCode.INVALID_ARGUMENT: UpperError,
    grpc.StatusCode.UNIMPLEMENTED: UpperError,
    grpc.StatusCode.FAILED_PRECONDITION: MismatchError,
}


class Unreachable(Exception):
    """No connection, or one that was lost: another attempt may do better."""


class StreamEnded(Unreachable):
    """The other side has ended this stream and nothing else; the connection stands."""


class Silent(Unreachable):
    """The connection stands, and nothing comes."""


@dataclass(slots=True)
class Connection:
    """One channel, which is one TCP connection; made by `dial`."""

    address: Address
    channel: grpc.aio.Channel
    metadata: tuple[tuple[str, str], ...]

    @classmethod
    def dial(cls, address: Address, credentials: Credentials) -> Connection:
        """Nothing happens yet: the first call connects."""
        metadata = (("authorization", f"Bearer {credentials.token}"),) if credentials.token else ()
        if not address.is_secure:
            return cls(address, grpc.aio.insecure_channel(address.authority, rpc.CHANNEL_OPTIONS), metadata)
        tls = grpc.ssl_channel_credentials(credentials.ca, credentials.key, credentials.certificate)
        return cls(address, grpc.aio.secure_channel(address.authority, tls, rpc.CHANNEL_OPTIONS), metadata)

    @property
    def stands(self) -> bool:
        return bool(self.channel.get_state() == grpc.ChannelConnectivity.READY)

    async def settled(self) -> None:
        """Connect; returns when it stands or was refused."""
        state = self.channel.get_state(try_to_connect=True)
        while state in (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING):
            await self.channel.wait_for_state_change(state)
            state = self.channel.get_state(try_to_connect=True)

    async def hello(self, hello: bytes, reply_s: float) -> ServerHello:
        """Raises Unreachable; UpperError where the other side refuses, WireError where it makes no sense."""
        call = self.channel.unary_unary(rpc.HELLO)(hello, timeout=reply_s, metadata=self.metadata)
        try:
            answer = await call
        except grpc.aio.AioRpcError as error:
            _raise(self.address, error)
        finally:
            call.cancel()
        return unpack.unpack_server_hello(answer)

    def session(self) -> Call:
        """The stream of one answer."""
        return Call(self.address, self.channel.stream_stream(rpc.SESSION)(metadata=self.metadata))

    async def close(self) -> None:
        await self.channel.close()


@dataclass(slots=True)
class Call:
    """A stream, message by message; made by `Connection.session`."""

    address: Address
    call: Any  # grpc.aio.StreamStreamCall

    async def write(self, data: bytes) -> None:
        """Waits until the connection takes it.  Raises StreamEnded; `read` knows why."""
        try:
            await self.call.write(data)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            raise StreamEnded(f"{self.address} has ended the stream") from None
        except asyncio.CancelledError:
            self._unless_cancelled()

    async def read(self) -> tuple[int, Down | None, int]:
        """The number of the last message taken in, what is said, bytes.  Raises Unreachable, UpperError, WireError."""
        try:
            data = await self.call.read()
        except grpc.aio.AioRpcError as error:
            _raise(self.address, error)
        except asyncio.CancelledError:
            self._unless_cancelled()
        if data is grpc.aio.EOF:
            raise StreamEnded(f"{self.address} has ended the stream")
        ack, message = unpack.unpack_down(data)
        return ack, message, len(data)

    async def done_writing(self) -> None:
        """Nothing more comes from here."""
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # `read` knows
            await self.call.done_writing()

    def cancel(self) -> None:
        self.call.cancel()

    def _unless_cancelled(self) -> NoReturn:
        """gRPC says CancelledError for a stream that the other side has reset: then nobody has cancelled the task."""
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError from None
        raise Unreachable(f"{self.address} has reset the stream") from None


def _raise(address: Address, error: grpc.aio.AioRpcError) -> NoReturn:
    code, details = error.code(), error.details() or "no details"
    kind = _FOR_GOOD.get(code)
    if kind is not None:
        raise kind(f"{address} refuses ({code.name}): {details}") from None
    if "Received message larger than max" in details:
        raise WireError(f"{address}: {details}") from None
    raise Unreachable(f"{address}: {details}") from None
