"""Devices that ask the cloud over real sockets: the tokens of one device alone, whatever the others and the link do."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("fastapi", reason="fastapi is not installed (extra [cloud])")
pytest.importorskip("grpc", reason="grpcio is not installed (extra [cloud])")
pytest.importorskip("nearfar_native", reason="the compiled extension is not built")

import grpc

from nearfar.errors import EgressDenied, MismatchError, UpperError
from nearfar.halves import split
from nearfar.llm import LLM
from nearfar.sampling import Sampling
from nearfar.share import how_of
from nearfar.upper_remote import RemoteUpper
from nearfar.weights import Weights
from nearfar.wire import rpc
from nearfar.wire.codec import Codec
from nearfar.wire.egress import Policy
from nearfar.wire.messages import (
    Ask,
    ClientHello,
    Close,
    Code,
    CodecSpec,
    Err,
    Ids,
    Need,
    Opened,
    Ping,
    Pong,
    Rows,
    Verdict,
)
from nearfar.wire.pack import pack_client_hello
from nearfar.wire.tls import Credentials
from nearfar.wire.unpack import unpack_load, unpack_server_hello
from nearfar_cloud.gateway.certificates import make_authority, make_client, make_folder, pem, read_authority
from nearfar_cloud.gateway.endpoint import Budget, Endpoint
from nearfar_cloud.gateway.limits import Keys
from nearfar_cloud.gateway.served import open_served
from tests.cloud.collab import A_BLOCK, Asked, RawStream, asking, finish, halves, hello, new_lower, served, truth, whole
from tests.cloud.gateway import wait_until
from tests.sdk.small_device import BY_IDS, BY_ROWS, PROMPT, Device, opening
from tests.tiny import write_tiny

N = 24
BOTH = pytest.mark.parametrize("codec", [BY_IDS, BY_ROWS], ids=["ids", "rows"])


def neighbour(found: Asked) -> None:
    """Another device is served as if nothing had happened."""
    assert found.answer(BY_IDS, "neighbour", 8) == truth(BY_IDS)[:8]


# ---------------------------------------------------------------- tokens


def test_many_devices_of_both_kinds_get_what_each_would_get_alone() -> None:
    hot = Sampling(temperature=0.9, top_k=40, seed=5)
    wanted = [(BY_IDS, Sampling()), (BY_ROWS, Sampling()), (BY_IDS, hot), (BY_ROWS, hot)] * 2
    expected = [truth(codec, sampling) for codec, sampling in wanted]
    with asking() as found, ThreadPoolExecutor(len(wanted)) as threads:
        answers = [
            threads.submit(found.answer, codec, f"device {i}", N, sampling=sampling)
            for i, (codec, sampling) in enumerate(wanted)
        ]
        meanwhile = found.client.ok("completions", prompt="the cat", max_tokens=20, temperature=0)["choices"]
        assert [a.result() for a in answers] == expected
        assert meanwhile == found.client.ok("completions", prompt="the cat", max_tokens=20, temperature=0)["choices"]
        assert found.contexts.counts.opened == len(wanted)
        assert found.client.metric('nearfar_cloud_device_events_total{what="asks"}') > 0
        wait_until(lambda: found.client.metric('nearfar_cloud_device_sessions{state="connected"}') == 0)


@BOTH
def test_answers_that_do_not_fit_together_take_turns_and_stay_the_same(codec: CodecSpec) -> None:
    """Memory for the keys and values of two or three: others are computed again when their turn comes."""
    expected = truth(codec, n=60)
    with asking(served(n_blocks=3)) as found, ThreadPoolExecutor(5) as threads:
        answers = [threads.submit(found.answer, codec, f"device {i}", 60) for i in range(5)]
        assert [a.result() for a in answers] == [expected] * 5
        assert found.gateway.served.engine.counts.preempted > 0


@BOTH
def test_whatever_the_server_gives_up_the_answer_is_the_same(codec: CodecSpec) -> None:
    """Rows, streams, whole sessions, steps of the engine: something is lost every few tokens."""
    chance = Random(7)
    with asking(budget=Budget(idle_s=2)) as found:
        device, contexts, engine = found.device(codec), found.contexts, found.gateway.served.engine
        run, later = engine.executor.run, Err(Code.OVERLOADED, "come again", retryable=True, retry_after_ms=10)

        def faulty(batch: Any) -> Any:
            engine.executor.run = run
            raise RuntimeError("a fault of the machine")

        def lose() -> None:
            for context in list(contexts):
                match chance.randrange(4):
                    case 0:
                        context.evict()
                    case 1:
                        contexts.refused(context, later)
                    case 2:
                        contexts._drop(context, later)
                    case 3:
                        engine.executor.run = faulty

        for n in range(3, 61, 3):
            device.answer(n)
            on_loop(found, lose)
        assert device.answer(60) == truth(codec, n=60)
        finish(device)
        counts = contexts.counts
        assert min(counts.failed, counts.resumed, counts.needs) > 0
        assert counts.opened > 1


def test_upper_layers_alone_serve_devices_and_no_text() -> None:
    with asking(open_served(str(halves().upper), kv_bytes=64 * A_BLOCK)) as found:
        assert found.answer(BY_ROWS) == truth(BY_ROWS)
        refused = found.client.post("completions", prompt="the cat")
        assert (refused.status, refused.code) == (501, "no_text")
        assert found.client.get("/v1/models").status == 200
        assert found.client.get("/metrics").status == 200
        with pytest.raises(MismatchError, match="upper layers alone"):
            found.dial(hello(codecs=(BY_IDS,))).open(opening(BY_IDS))


# ---------------------------------------------------------------- hello


@pytest.mark.parametrize("at", ["whole", "upper"])
def test_the_half_of_another_model_is_refused_with_both_fingerprints(at: str, tmp_path: Path) -> None:
    other = split(Weights.open(write_tiny(tmp_path / "other.gguf", n_ctx=512, seed=4)), 2, tmp_path, make_exit=True)
    model = open_served(str(whole() if at == "whole" else halves().upper), kv_bytes=64 * A_BLOCK)
    with asking(model) as found:
        with pytest.raises(MismatchError, match=r"upper \(theirs [0-9a-f]{12}…, ours [0-9a-f]{12}…\)"):
            found.dial(hello(other.device, (BY_ROWS,))).open(opening(BY_ROWS))
        assert found.answer(BY_ROWS) == truth(BY_ROWS)


def test_any_model_with_the_same_tokenizer_may_draft_by_ids(tmp_path: Path) -> None:
    small = write_tiny(tmp_path / "small.gguf", n_layers=2, n_ctx=512, seed=9)
    with asking() as found:
        server = say_hello(found, hello(small, (BY_ROWS, BY_IDS)))
        assert (server.match, server.codec, server.epoch) == (True, BY_IDS, found.contexts.epoch)
        assert (server.limits.max_context, server.limits.max_sessions) == (512, 256)
        other = write_tiny(tmp_path / "words.gguf", n_layers=2, n_ctx=512, n_vocab=321)
        server = say_hello(found, hello(other, (BY_ROWS, BY_IDS)))
        assert not server.match
        assert "IDS: tokenizer (theirs" in server.why
        server = say_hello(found, ClientHello(b"f" * 32, {}, (BY_IDS,), proto=(7,)))
        assert not server.match
        assert "protocol" in server.why
        server = say_hello(found, ClientHello(b"f" * 32, {}, ()))
        assert "no codec" in server.why


def say_hello(found: Asked, what: ClientHello) -> object:
    with grpc.insecure_channel(f"127.0.0.1:{found.port}") as channel:
        return unpack_server_hello(channel.unary_unary(rpc.HELLO)(pack_client_hello(what), timeout=30))


def test_a_server_says_where_it_is() -> None:
    with asking(endpoint=Endpoint(region="eu")) as found:
        for region, is_let_in in (("eu", True), ("us", False)):
            upper = RemoteUpper(found.url, hello=hello(), policy=Policy(region=region))
            if is_let_in:
                device = Device(upper.open(opening(BY_IDS)), new_lower(), BY_IDS)
                device.answer(1)
                finish(device)
            else:
                with pytest.raises(EgressDenied, match="in 'eu'"):
                    upper.open(opening(BY_IDS))
            upper.close()


def test_a_codec_that_nobody_knows_ends_one_call() -> None:
    with asking() as found:
        with grpc.insecure_channel(f"127.0.0.1:{found.port}") as channel:
            with pytest.raises(grpc.RpcError) as refused:
                channel.unary_unary(rpc.HELLO)(b"\x12\x10" + b"f" * 16 + b"\x22\x02\x08\x63", timeout=30)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        raw = RawStream(found.port, greets=False)
        raw.say_bytes(b"\x08\x01\x12\x1a\x0a\x10" + b"s" * 16 + b"\x18\x02\x22\x04\x08\x63\x10\x40")
        assert raw.next(Err).code == Code.BAD_FRAME
        raw.leave()
        neighbour(found)


# ---------------------------------------------------------------- who may


def key_file(tmp_path: Path, **limits: int) -> Keys:
    entries = [
        {"tenant": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **limits} for name in ("alice", "bob")
    ]
    path = tmp_path / "keys.json"
    path.write_text(json.dumps({"keys": entries}))
    return Keys.read(path)


def test_a_key_of_this_server_lets_in_and_another_one_does_not(tmp_path: Path) -> None:
    with asking(keys=key_file(tmp_path)) as found:
        for token in ("", "mallory"):
            upper = found.dial(credentials=Credentials(token=token))
            with pytest.raises(UpperError, match="PERMISSION_DENIED"):
                upper.open(opening(BY_IDS))
            raw = RawStream(found.port, token, greets=False)
            raw.say(opening(BY_IDS))
            assert raw.next(Err).code == Code.DENIED
            raw.leave()
            with grpc.insecure_channel(f"127.0.0.1:{found.port}") as channel, pytest.raises(grpc.RpcError):
                next(channel.unary_stream(rpc.HEALTH)(b"", timeout=30))
        upper = found.dial(credentials=Credentials(token="alice"))
        assert found.answer(BY_IDS, upper=upper) == truth(BY_IDS)


def test_quotas_of_one_key_are_not_felt_by_another(tmp_path: Path) -> None:
    with asking(keys=key_file(tmp_path, sessions=1, session_positions=8)) as found:
        alice = RawStream(found.port, "alice")
        alice.say(opening(BY_IDS, b"1" * 16))
        alice.next(Opened)
        second = RawStream(found.port, "alice")
        second.say(opening(BY_IDS, b"2" * 16))
        assert second.next(Err).code == Code.QUOTA
        bob = RawStream(found.port, "bob")
        bob.say(opening(BY_IDS, b"1" * 16), Ids(0, 0, tuple(PROMPT)), Ask(1, 0, 4, 4))
        bob.next(Opened)
        assert bob.next(Verdict).ids == (truth(BY_IDS)[0],)
        alice.say(Ids(0, 0, tuple(range(9))))
        assert alice.next(Err).code == Code.QUOTA
        bob.say(Close())
        for stream in (alice, second, bob):
            assert stream.is_over
            stream.leave()
        found.contexts.now = lambda now=found.contexts.now: now() + 100  # type: ignore[method-assign,misc]


def test_certificates_say_who_a_device_is_and_out_of_date_ones_say_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "lan"
    make_folder(folder, ["localhost", "127.0.0.1"], ["phone"], 30)
    strangers = {
        "expired": make_client(read_authority(folder), "phone", 0),
        "stranger": make_client(make_authority(30), "phone", 30),
    }
    for name, pair in strangers.items():
        certificate, key = pem(pair)
        (folder / f"{name}.pem").write_bytes(certificate)
        (folder / f"{name}-key.pem").write_bytes(key)
    endpoint = Endpoint(
        certificate=folder / "server.pem", private_key=folder / "server-key.pem", client_ca=folder / "ca.pem"
    )

    def dial(found: Asked, name: str) -> RemoteUpper:
        files = (folder / f"{name}.pem", folder / f"{name}-key.pem") if name else (None, None)
        return found.dial(credentials=Credentials.read(folder / "ca.pem", "", *files))

    with asking(endpoint=endpoint) as found:
        assert found.url.startswith("grpcs://localhost:")
        for name in ("", "expired", "stranger"):
            upper = dial(found, name)
            with pytest.raises(UpperError, match="could be reached"):
                upper.open(opening(BY_IDS))
        upper = dial(found, "phone")
        device = found.device(BY_IDS, upper=upper)
        assert device.answer(N) == truth(BY_IDS)
        assert [c.key.tenant for c in found.contexts] == ["phone"]
        finish(device)


def test_a_connection_without_a_hello_opens_nothing() -> None:
    with asking() as found:
        raw = RawStream(found.port, greets=False)
        raw.say(opening(BY_IDS))
        err = raw.next(Err)
        assert (err.code, err.retryable, "no hello has come" in err.text) == (Code.MISMATCH, True, True)
        with pytest.raises(grpc.RpcError) as hung_up:
            raw.next(Opened)
        assert hung_up.value.code() == grpc.StatusCode.UNAVAILABLE
        assert found.contexts.counts.opened == 0
        raw.leave()
        neighbour(found)


@pytest.mark.parametrize("secure", [True, False], ids=["tls", "plain"])
def test_other_weights_between_two_answers_get_no_row(tmp_path: Path, secure: bool) -> None:
    """gRPC makes the idle connection of a server that was started again anew, and says no hello on it."""
    folder = tmp_path / "lan"
    make_folder(folder, ["localhost"], [], 30)
    endpoint = Endpoint(certificate=folder / "server.pem", private_key=folder / "server-key.pem")
    if not secure:
        endpoint = Endpoint()
    other = open_served(str(write_tiny(tmp_path / "other.gguf", n_ctx=512, seed=4)), kv_bytes=64 * A_BLOCK)
    with ExitStack() as stack:
        with asking(endpoint=endpoint) as found:
            files = Credentials.read(folder / "ca.pem") if secure else None
            upper = stack.enter_context(
                closing(RemoteUpper(found.url, hello=hello(codecs=(BY_ROWS,)), credentials=files))
            )
            assert found.answer(BY_ROWS, n=4, upper=upper) == truth(BY_ROWS)[:4]
        with asking(endpoint=replace(endpoint, port=found.port)) as again:
            assert again.answer(BY_ROWS, "again", n=4, upper=upper) == truth(BY_ROWS)[:4]
        with asking(other, endpoint=replace(endpoint, port=found.port)) as wrong:
            with pytest.raises(MismatchError, match="upper"):
                wrong.answer(BY_ROWS, "wrong", n=4, upper=upper)
            assert wrong.contexts.counts.opened == 0


# ---------------------------------------------------------------- links and frames


class Recorder:
    """A TCP proxy that remembers what the client said."""

    def __init__(self, port: int) -> None:
        self.port, self.said = port, bytearray()
        self.listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        here, _ = self.listener.accept()
        there = socket.create_connection(("127.0.0.1", self.port))
        threading.Thread(target=self._back, args=(there, here), daemon=True).start()
        while data := here.recv(65536):
            self.said += data
            there.sendall(data)
        there.close()

    def _back(self, there: socket.socket, here: socket.socket) -> None:
        try:
            while data := there.recv(65536):
                here.sendall(data)
        except OSError:
            pass


def test_a_connection_cut_at_any_byte_harms_nobody_else() -> None:
    with asking() as found:
        recorder = Recorder(found.port)
        raw = RawStream(recorder.listener.getsockname()[1])
        raw.say(opening(BY_IDS, b"cut" + b"." * 13), Ids(0, 0, tuple(PROMPT)), Ask(1, 0, 4, 4))
        raw.next(Opened)
        raw.next(Verdict)
        raw.leave()
        said = bytes(recorder.said)
        recorder.listener.close()
        assert b"cut." in said
        for n in range(len(said) + 1):
            with socket.create_connection(("127.0.0.1", found.port)) as sock:
                sock.sendall(said[:n])
                if n % 2:  # some are reset, some end in order
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        neighbour(found)
        found.contexts.now = lambda now=found.contexts.now: now() + 100  # type: ignore[method-assign,misc]


def test_rows_out_of_order_are_wanted_again() -> None:
    with asking() as found:
        raw = RawStream(found.port)
        raw.say(opening(BY_IDS), Ids(0, 3, (99, 42)))
        raw.next(Opened)
        assert raw.next(Need) == Need(0, 0, "gap")
        raw.say(Ids(0, 0, (5, 17, 3)), Ids(0, 3, (99, 42)), Ask(1, 0, 4, 4))
        assert raw.next(Verdict).ids == (truth(BY_IDS)[0],)
        raw.say(Ids(0, 1, (18,)))
        assert raw.next(Err).code == Code.DIVERGED
        assert raw.is_over
        raw.leave()
        neighbour(found)


@pytest.mark.parametrize("wrong", ["short", "checksum", "kind"])
def test_rows_that_are_none_end_their_own_stream(wrong: str) -> None:
    row = bytes(Codec.of(BY_ROWS, 256).row_bytes)
    bad = {
        "short": Rows(0, 0, (row[:-1],), (crc32(row[:-1]),)),
        "checksum": Rows(0, 0, (row,), (crc32(row) ^ 1,)),
        "kind": Ids(0, 0, (1, 2)),
    }[wrong]
    with asking() as found:
        raw = RawStream(found.port)
        raw.say(opening(BY_ROWS), bad)
        raw.next(Opened)
        assert raw.next(Err).code == Code.BAD_FRAME
        assert raw.is_over
        raw.leave()
        neighbour(found)


def test_rows_whose_numbers_are_not_finite_fail_alone() -> None:
    codec = Codec.of(BY_ROWS, 256)
    row = np.full(codec.row_bytes // 2, np.inf, "<f2").tobytes().ljust(codec.row_bytes, b"\0")
    with asking() as found:
        raw = RawStream(found.port)
        raw.say(opening(BY_ROWS), Rows(0, 0, (row,), (crc32(row),)), Ask(1, 0, 0, 0))
        raw.next(Opened)
        err = raw.next(Err)
        assert (err.code, err.retryable) == (Code.INTERNAL, True)
        raw.leave()
        neighbour(found)
        found.contexts.now = lambda now=found.contexts.now: now() + 100  # type: ignore[method-assign,misc]


def test_a_device_that_never_closes_is_forgotten() -> None:
    with asking(budget=Budget(idle_s=0.3)) as found:
        gone, silent = RawStream(found.port), RawStream(found.port)
        for raw, name in ((gone, b"g" * 16), (silent, b"s" * 16)):
            raw.say(opening(BY_IDS, name), Ids(0, 0, tuple(PROMPT)))
            raw.next(Opened)
        gone.leave()
        assert silent.next(Err).retryable
        silent.leave()
        wait_until(lambda: not len(found.contexts))
        assert found.contexts.counts.expired == 2


@BOTH
def test_evicted_rows_are_sent_again_and_the_answer_is_the_same(codec: CodecSpec) -> None:
    with asking() as found:
        device = found.device(codec)
        device.answer(8)
        for context in list(found.contexts):
            found.client.ok("completions", prompt="a", max_tokens=1)  # nothing of it is under way any more
            on_loop(found, context.evict)
        assert device.answer(N) == truth(codec)
        assert found.contexts.counts.needs > 0
        finish(device)


@BOTH
def test_a_server_that_was_started_again_gets_everything_again(codec: CodecSpec) -> None:
    with ExitStack() as stack:
        with asking() as found:
            upper = stack.enter_context(closing(RemoteUpper(found.url, hello=hello())))
            device = found.device(codec, upper=upper)
            device.answer(6)
            on_loop(found, found.contexts.close)
        with asking(endpoint=Endpoint(port=found.port)) as again:
            assert device.answer(N) == truth(codec)
            assert again.contexts.epoch != found.contexts.epoch
            assert device.n_lost > 0
            finish(device)


@pytest.mark.parametrize("rows", ["ids", "hidden"])
def test_turns_of_a_chat_are_one_session_and_say_what_new_ones_would(rows: str) -> None:
    turns = [PROMPT, [*PROMPT, 9, 8, 7, 6, 5], [*PROMPT, 9, 8, 7, 3]]
    with asking() as found, Weights.open(halves().device) as weights:
        how = how_of(weights, "lossless", rows, "int8")
        answers = {}
        for keep_s in (0, 60):
            before = found.contexts.counts.opened
            with LLM.open(halves().device, upper=found.url, collab=replace(how, keep_s=keep_s)) as llm:
                stats = [llm.generate(turn, max_tokens=N) for turn in turns]
            answers[keep_s] = [a.ids for a in stats]
            assert found.contexts.counts.opened - before == (1 if keep_s else len(turns))
            assert all(a.stats.shared is not None and not a.stats.shared.replayed for a in stats)
        assert answers[0] == answers[60]
        assert found.contexts.counts.resumed == 2
        found.contexts.now = lambda now=found.contexts.now: now() + 100  # type: ignore[method-assign,misc]


def test_two_connections_for_one_session_are_one_device() -> None:
    with asking() as found:
        first = RawStream(found.port)
        first.say(opening(BY_IDS), Ids(0, 0, tuple(PROMPT)), Ping(1))
        opened = first.next(Opened)
        first.next(Pong)  # the ids are there
        second = RawStream(found.port)
        second.say(opening(BY_IDS, resume_token=opened.resume_token), Ask(1, 0, 4, 4))
        assert second.next(Opened).rows == len(PROMPT)
        assert first.next(Err).code == Code.DENIED
        assert first.is_over
        assert second.next(Verdict).ids == (truth(BY_IDS)[0],)
        second.say(Close())
        assert second.is_over
        first.leave()
        second.leave()


def test_draining_finishes_what_is_under_way_and_takes_nothing_new() -> None:
    with asking(grace_s=30) as found:
        device = found.device(BY_IDS)
        device.answer(4)
        with grpc.insecure_channel(f"127.0.0.1:{found.port}") as channel:
            health = channel.unary_stream(rpc.HEALTH)(b"", timeout=60)
            load = unpack_load(next(health))
            assert (load.draining, load.kv_free_bytes > 0) == (False, True)
            on_loop(found, lambda: setattr(found.contexts, "is_draining", True))
            assert any(unpack_load(data).draining for data in health)  # one may have been on its way
            health.cancel()
        raw = RawStream(found.port)
        raw.say(opening(BY_IDS, b"new" * 5 + b"."))
        err = raw.next(Err)
        assert (err.code, err.retryable) == (Code.OVERLOADED, True)
        raw.leave()
        assert device.answer(N) == truth(BY_IDS)
        finish(device)


def on_loop(found: Asked, call: object) -> None:
    """On the gateway's event loop, and wait for it."""
    done = threading.Event()

    def run() -> None:
        call()  # type: ignore[operator]
        done.set()

    assert found.gateway.service._loop is not None
    found.gateway.service._loop.call_soon_threadsafe(run)
    assert done.wait(30)
