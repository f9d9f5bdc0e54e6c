"""The loop over a device's stream: what is wrong ends that stream with a reason, and no other one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace

import grpc
import pytest

from nearfar.errors import WireError
from nearfar.wire import nearfar_pb2 as pb
from nearfar.wire import pack, rpc, unpack
from nearfar.wire.codec import Codec
from nearfar.wire.messages import (
    Ask,
    ClientHello,
    Close,
    Code,
    CodecId,
    CodecSpec,
    Commit,
    Cut,
    Down,
    Err,
    Limits,
    Load,
    Mode,
    Open,
    Opened,
    Ping,
    Pong,
    Rows,
    ServerHello,
    Up,
    Verdict,
)

OPEN = Open(b"s" * 16, 0, Mode.LOSSY, CodecSpec(CodecId.FP16), 2)
HELLO = ClientHello(b"f" * 32, {}, ())


@dataclass
class Echo:
    """A door that repeats pings, fails at a commit and refuses whoever has no key, if it has one itself."""

    key: str = ""
    left: int = 0
    heard: list[Up] = field(default_factory=list)

    async def hello(self, hello: ClientHello, caller: rpc.Caller) -> ServerHello:
        self._check(caller)
        return ServerHello(True, hello.model_fp, "", None, 7, Limits(1, 1, 1, 1, 1))

    async def open(self, opening: Open, caller: rpc.Caller, stream: rpc.Stream) -> EchoSession:
        self._check(caller)
        if opening.codec.outliers:
            Codec.of(opening.codec, 64)
        if opening.want_hidden:
            raise rpc.Refused(Err(Code.MISMATCH, "say hello first", True), hangs_up=True)
        stream.say(Opened(0, 0, 0, 7))
        return EchoSession(self, stream)

    def load(self, caller: rpc.Caller) -> Load:
        self._check(caller)
        return Load(1.0, 2, False)

    def _check(self, caller: rpc.Caller) -> None:
        if self.key and caller.authorization != f"Bearer {self.key}":
            raise rpc.Refused(Err(Code.DENIED, "who is there?"))


@dataclass
class EchoSession:
    door: Echo
    stream: rpc.Stream

    def on(self, message: Up) -> None:
        self.door.heard.append(message)
        if isinstance(message, Ping):
            self.stream.say(Pong(message.n))
        elif isinstance(message, Commit):
            raise RuntimeError("a bug")
        elif isinstance(message, Ask):
            raise WireError("nobody asks an echo")
        elif isinstance(message, Cut):
            self.stream.end(Err(Code.OVERLOADED, "e" * 9999, True))

    def left(self) -> None:
        self.door.left += 1


@dataclass
class Wire:
    """Speaks bytes to a door."""

    channel: grpc.aio.Channel
    door: Echo
    address: str

    async def say(self, *frames: bytes, end: bool = True) -> list[tuple[int, Down | None]]:
        """Everything that comes back until the stream ends."""
        call = self.channel.stream_stream(rpc.SESSION)()
        for frame in frames:
            try:
                await call.write(frame)
            except asyncio.InvalidStateError:  # ended meanwhile
                break
        if end:
            await call.done_writing()
        found = []
        while (data := await call.read()) is not grpc.aio.EOF:
            found.append(unpack.unpack_down(data))
        return found


def run(test: Callable[[Wire], Awaitable[None]], door: Echo | None = None) -> Echo:
    """A server and a channel for one test, on a loop of its own."""
    door = door or Echo()

    async def main() -> None:
        server = rpc.serve(door)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        address = f"127.0.0.1:{port}"
        async with grpc.aio.insecure_channel(address, rpc.CHANNEL_OPTIONS) as channel:
            async with asyncio.timeout(30):
                await test(Wire(channel, door, address))
        await server.stop(None)

    asyncio.run(main())
    return door


def frames(*messages: Up) -> Iterator[bytes]:
    return (pack.pack_up(i, message) for i, message in enumerate(messages, 1))


def test_a_device_is_opened_heard_and_answered() -> None:
    async def test(wire: Wire) -> None:
        said = await wire.say(*frames(OPEN, Ping(5), Ping(6), Close()))
        assert said[0] == (1, Opened(0, 0, 0, 7))
        assert [message for _, message in said[1:]] == [Pong(5), Pong(6)]

    door = run(test)
    assert door.heard == [Ping(5), Ping(6), Close()]
    assert door.left == 1


def test_programs_with_generated_stubs_are_understood() -> None:
    """Other languages have the protocol file only."""

    async def test(wire: Wire) -> None:
        hello = wire.channel.unary_unary(rpc.HELLO, pb.ClientHello.SerializeToString, pb.ServerHello.FromString)
        assert (await hello(pb.ClientHello(model_fp=b"f" * 32))).match
        call = wire.channel.stream_stream(rpc.SESSION, pb.Up.SerializeToString, pb.Down.FromString)()
        await call.write(pb.Up.FromString(pack.pack_up(1, OPEN)))
        assert (await call.read()).opened.epoch == 7
        await call.write(pb.Up(seq=2, ping=9))
        assert (await call.read()).pong == 9
        call.cancel()
        health = wire.channel.unary_stream(rpc.HEALTH, pb.Empty.SerializeToString, pb.Load.FromString)(pb.Empty())
        assert (await health.read()).kv_free_bytes == 2
        health.cancel()

    run(test)


BAD = {
    "garbage": [*frames(OPEN), b"\xff\xff\xff"],
    "garbage first": [b"\0"],
    "nothing opened": [*frames(Ping(1))],
    "opened twice": [*frames(OPEN, OPEN)],
    "a message left out": [*frames(OPEN), pack.pack_up(3, Ping(1))],
    "a message twice": [*frames(OPEN), pack.pack_up(1, Ping(1))],
    "what a session cannot take": [*frames(OPEN, Ask(1, 0, 1, 1))],
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_wrong_ends_its_stream_with_a_reason_and_disturbs_nobody(what: str) -> None:
    async def test(wire: Wire) -> None:
        other = wire.channel.stream_stream(rpc.SESSION)()
        await other.write(pack.pack_up(1, OPEN))
        await other.read()
        said = await wire.say(*BAD[what], *frames(Ping(1)), end=False)
        _, last = said[-1]
        assert isinstance(last, Err)
        assert (last.code, last.retryable) == (Code.BAD_FRAME, False)
        await other.write(pack.pack_up(2, Ping(3)))
        assert unpack.unpack_down(await other.read()) == (2, Pong(3))
        other.cancel()

    run(test)


FOREIGN = {
    "channels beyond the width": (Code.MISMATCH, {"id": "INT8_OS", "group": 64, "outlier": [3, 64]}),
    "groups of none": (Code.BAD_FRAME, {"id": "INT8_OS", "group": 0}),
    "groups of another codec": (Code.BAD_FRAME, {"id": "INT4_OS", "group": 64}),
    "a channel twice": (Code.BAD_FRAME, {"id": "INT8_OS", "group": 64, "outlier": [3, 3]}),
    "channels that fall": (Code.BAD_FRAME, {"id": "INT8_OS", "group": 64, "outlier": [5, 3]}),
    "channels of fp16": (Code.BAD_FRAME, {"id": "FP16", "outlier": [3]}),
    "too many channels": (Code.BAD_FRAME, {"id": "INT8_OS", "group": 64, "outlier": list(range(17))}),
    "no codec": (Code.BAD_FRAME, {}),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_codec_is_refused_for_good_and_is_no_fault_of_ours(what: str) -> None:
    code, spec = FOREIGN[what]

    async def test(wire: Wire) -> None:
        opening = pb.Up.FromString(next(frames(OPEN)))
        opening.open.codec.CopyFrom(pb.CodecSpec(**spec))
        ((_, last),) = await wire.say(opening.SerializeToString())
        assert isinstance(last, Err)
        assert (last.code, last.retryable) == (code, False)

    run(test)


@pytest.mark.parametrize("what", [w for w, (code, _) in FOREIGN.items() if code == Code.BAD_FRAME])
def test_a_device_believes_no_foreign_codec_of_a_server(what: str) -> None:
    hello = pb.ServerHello(match=True, model_fp=b"f" * 32, codec=pb.CodecSpec(**FOREIGN[what][1]))
    with pytest.raises(WireError):
        unpack.unpack_server_hello(hello.SerializeToString())


def test_nothing_is_heard_on_a_stream_that_was_ended_and_its_reason_is_never_too_long() -> None:
    async def test(wire: Wire) -> None:
        said = await wire.say(*frames(OPEN, Cut(1, 0), Ping(1), Ping(2)), end=False)
        assert [type(message) for _, message in said] == [Opened, Err]
        assert isinstance(said[1][1], Err)
        assert said[1][1].text == "e" * unpack.MAX_TEXT

    assert run(test).heard == [Cut(1, 0)]


def test_a_connection_may_be_told_to_begin_again() -> None:
    """A stream that ends in order leaves the connection as it was; this one does not."""

    async def test(wire: Wire) -> None:
        call = wire.channel.stream_stream(rpc.SESSION)()
        await call.write(next(frames(replace(OPEN, want_hidden=True))))
        assert unpack.unpack_down(await call.read())[1] == Err(Code.MISMATCH, "say hello first", True)
        with pytest.raises(grpc.aio.AioRpcError) as info:
            await call.read()
        assert info.value.code() == grpc.StatusCode.UNAVAILABLE

    run(test)


def test_a_message_above_the_limit_is_refused_by_the_connection() -> None:
    async def test(wire: Wire) -> None:
        huge = grpc.aio.insecure_channel(wire.address, [("grpc.max_send_message_length", -1)])
        call = huge.stream_stream(rpc.SESSION)()
        await call.write(bytes(unpack.MAX_MESSAGE + 1))
        with pytest.raises(grpc.aio.AioRpcError) as info:
            await call.read()
        assert info.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        await huge.close()
        assert (await wire.say(*frames(OPEN, Close())))[0][1] == Opened(0, 0, 0, 7)

    run(test)


def test_a_bug_ends_its_own_stream_only_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def test(wire: Wire) -> None:
        _, last = (await wire.say(*frames(OPEN, Commit(1)), end=False))[-1]
        assert isinstance(last, Err)
        assert (last.code, last.retryable) == (Code.INTERNAL, True)
        assert (await wire.say(*frames(OPEN, Close())))[0][1] == Opened(0, 0, 0, 7)

    with caplog.at_level(logging.ERROR):
        assert run(test).left == 2
    assert "a bug" in caplog.text


def test_who_has_no_key_is_told_so_and_gets_no_session() -> None:
    async def test(wire: Wire) -> None:
        assert await wire.say(*frames(OPEN), end=False) == [(1, Err(Code.DENIED, "who is there?"))]
        with pytest.raises(grpc.aio.AioRpcError) as info:
            await wire.channel.unary_unary(rpc.HELLO)(pack.pack_client_hello(HELLO))
        assert info.value.code() == grpc.StatusCode.PERMISSION_DENIED
        with pytest.raises(grpc.aio.AioRpcError) as info:
            await wire.channel.unary_stream(rpc.HEALTH)(b"").read()
        assert info.value.code() == grpc.StatusCode.PERMISSION_DENIED
        key = (("authorization", "Bearer sesame"),)
        answer = await wire.channel.unary_unary(rpc.HELLO)(pack.pack_client_hello(HELLO), metadata=key)
        assert unpack.unpack_server_hello(answer).match

    assert run(test, Echo(key="sesame")).left == 0


def test_a_hello_that_makes_no_sense_is_refused() -> None:
    async def test(wire: Wire) -> None:
        with pytest.raises(grpc.aio.AioRpcError) as info:
            await wire.channel.unary_unary(rpc.HELLO)(b"\xff")
        assert info.value.code() == grpc.StatusCode.INVALID_ARGUMENT

    run(test)


def test_a_device_that_vanishes_is_noticed() -> None:
    async def test(wire: Wire) -> None:
        call = wire.channel.stream_stream(rpc.SESSION)()
        await call.write(pack.pack_up(1, OPEN))
        await call.read()
        call.cancel()
        while not wire.door.left:
            await asyncio.sleep(0.01)

    run(test)


def test_a_connection_without_calls_is_closed_also_where_nobody_is_at_its_other_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = [(rpc.IDLE_MS[0], 300) if option == rpc.IDLE_MS else option for option in rpc.SERVER_OPTIONS]
    monkeypatch.setattr(rpc, "SERVER_OPTIONS", options)

    async def test(wire: Wire) -> None:
        call = wire.channel.stream_stream(rpc.SESSION)()
        await call.write(pack.pack_up(1, OPEN))
        await call.read()
        # HTTP/2's preface and empty settings; whatever comes is not answered any more.
        reader, writer = await asyncio.open_connection(*wire.address.split(":"))
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        while await reader.read(1024):
            pass
        writer.close()
        # An answer that waits for its next token is a call.
        await call.write(pack.pack_up(2, Ping(5)))
        _, pong = unpack.unpack_down(await call.read())
        assert pong == Pong(5)
        await call.done_writing()
        while wire.channel.get_state() == grpc.ChannelConnectivity.READY:
            await asyncio.sleep(0.01)

    run(test)


def test_a_stream_that_never_opens_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "OPEN_WITHIN_S", 0.05)

    async def test(wire: Wire) -> None:
        _, last = (await wire.say(end=False))[-1]
        assert isinstance(last, Err)
        assert "no Open" in last.text

    run(test)


def test_rows_are_acknowledged_even_if_there_is_nothing_to_say() -> None:
    async def test(wire: Wire) -> None:
        row = bytes(10 << 10)
        said = await wire.say(*frames(OPEN, *(Rows(0, i, (row,), (0,)) for i in range(4))))
        acks = [ack for ack, message in said if message is None]
        assert acks
        assert set(acks) <= {3, 4, 5}

    run(test)


def test_a_device_that_does_not_read_is_given_up() -> None:
    async def test() -> None:
        stream = rpc.Stream()
        for i in range(rpc.MAX_QUEUED + 10):
            stream.say(Pong(i))
        left = [unpack.unpack_down(data)[1] async for data in stream.outgoing()]
        assert len(left) == 1
        assert isinstance(left[0], Err)
        assert left[0].code == Code.QUOTA

    asyncio.run(test())


def test_what_was_said_before_the_end_still_leaves() -> None:
    async def test() -> None:
        stream = rpc.Stream()
        verdict = Verdict(1, 0, 1, 0, (5,))
        stream.say(verdict)
        stream.end(Err(Code.OVERLOADED, "later", True, 100))
        stream.say(Pong(1))
        left = [unpack.unpack_down(data)[1] async for data in stream.outgoing()]
        assert left == [verdict, Err(Code.OVERLOADED, "later", True, 100)]

    asyncio.run(test())


def test_a_port_has_one_server() -> None:
    async def test(wire: Wire) -> None:
        with pytest.raises(RuntimeError, match="bind"):
            rpc.serve(Echo()).add_insecure_port(wire.address)

    run(test)
