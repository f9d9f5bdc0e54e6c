"""An upper side beyond the network: the same tokens as without one, whatever happens to the link."""

from __future__ import annotations

import gc
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from nearfar import remote_link
from nearfar.chaos.profiles import PROFILES
from nearfar.chaos.proxy import running
from nearfar.chaos.schedule import Fault
from nearfar.errors import EgressDenied, MismatchError, UpperError, UsageError, WireError
from nearfar.lower import Lower, open_lower
from nearfar.remote_link import RemoteLink
from nearfar.sampling import Sampling
from nearfar.upper import Lost, News
from nearfar.upper_remote import RemoteUpper
from nearfar.weights import Weights
from nearfar.wire import dialler
from nearfar.wire.egress import Policy
from nearfar.wire.hashes import settings_hash
from nearfar.wire.messages import Ask, ClientHello, Close, Code, CodecSpec, Err, Ids, Open, Opened, Ping, Verdict
from nearfar.wire.tls import Credentials
from tests.sdk.small_device import BY_IDS, BY_ROWS, Device, opening, oracle
from tests.sdk.wire_server import LIMITS, MODEL_FP, Door, WireServer, wait_for
from tests.tiny import write_tiny

HELLO = ClientHello(MODEL_FP, {"upper": b"u" * 32}, (BY_ROWS, BY_IDS))
N = 24


@pytest.fixture(scope="module")
def lower(tmp_path_factory: pytest.TempPathFactory) -> Lower:
    path = tmp_path_factory.mktemp("remote") / "m.gguf"
    return open_lower(Weights.open(write_tiny(path, d_model=64, d_ff=64, n_layers=3, seed=3)), "numpy")


@pytest.fixture
def server(lower: Lower) -> Iterator[WireServer]:
    with WireServer(Door(lower)) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine that is busy with others no connection is pinged or given up for its silence."""
    monkeypatch.setattr(remote_link, "PING_AFTER_S", 60.0)
    monkeypatch.setattr(remote_link, "SILENT_S", 60.0)


@pytest.fixture(scope="module", params=[BY_IDS, BY_ROWS], ids=["ids", "rows"])
def codec(request: pytest.FixtureRequest) -> CodecSpec:
    return request.param


class OneByOne:
    """The news of a link."""

    def __init__(self, link: RemoteLink) -> None:
        self.link, self.kept = link, list[News]()

    def next(self) -> News:
        until = time.monotonic() + 60
        while not self.kept:
            assert time.monotonic() < until, "no news"
            self.kept += self.link.receive(1.0)
        return self.kept.pop(0)


def first_news(link: RemoteLink) -> News:
    return OneByOne(link).next()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """Nobody listens there, and nobody else gets it."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        yield int(mute.getsockname()[1])


def test_an_answer_over_the_network_is_the_answer_without_one(
    lower: Lower, server: WireServer, codec: CodecSpec
) -> None:
    upper = RemoteUpper(server.url, hello=HELLO)
    truth = oracle(lower, codec, N)
    device = Device(upper.open(opening(codec)), lower, codec, truth)
    assert device.answer(N) == truth
    upper.close()


def test_a_server_that_dies_again_and_again_costs_time_and_no_token(
    lower: Lower, server: WireServer, codec: CodecSpec
) -> None:
    def hurt(n: int) -> None:
        if n % 5 == 0:
            server.stop()
            server.start()

    truth = oracle(lower, codec, N)
    upper = RemoteUpper(server.url, hello=HELLO)
    device = Device(upper.open(opening(codec)), lower, codec, truth, on_final=hurt)
    assert device.answer(N) == truth
    assert [f.index for f in device.finals] == list(range(5, 5 + len(device.finals)))
    assert device.n_lost >= 3
    upper.close()


@pytest.mark.parametrize("kind", ["reset", "cut"])
def test_a_connection_that_breaks_anywhere_costs_no_token(
    lower: Lower, server: WireServer, codec: CodecSpec, kind: str
) -> None:
    truth = oracle(lower, codec, N)
    with running(("127.0.0.1", server.port), PROFILES["lan"]) as link:

        def hurt(n: int) -> None:
            if n % 4 == 0:
                link.inject(Fault(0.0, kind, way="up", n_bytes=50 * n) if kind == "cut" else Fault(0.0, kind))

        upper = RemoteUpper(f"grpc://127.0.0.1:{link.address[1]}", hello=HELLO)
        device = Device(upper.open(opening(codec)), lower, codec, truth, on_final=hurt)
        assert device.answer(N) == truth
        assert device.n_lost >= 1
        upper.close()


def test_what_was_sent_for_one_connection_never_reaches_the_next(server: WireServer) -> None:
    upper = RemoteUpper(server.url, hello=HELLO)
    link = upper.open(opening(BY_IDS))
    news = OneByOne(link)
    assert isinstance(news.next(), Opened)
    server.stop()
    link.send(Ids(0, 0, (1, 2)))  # the connection is gone, and the engine does not know it yet
    server.start()
    wait_for(lambda: server.door.n_opened == 2)
    link.send(Ids(0, 0, (1, 2)))  # there is another one, and the engine does not know that either
    assert isinstance(news.next(), Lost)
    link.send(Ids(0, 0, (1, 2)))
    assert isinstance(news.next(), Opened)
    link.send(Ids(0, 0, (7, 8)))
    wait_for(lambda: len(server.door.seen) == 3)
    assert [m for m in server.door.seen if not isinstance(m, Open)] == [Ids(0, 0, (7, 8))]
    upper.close()


def test_nothing_of_the_old_connection_is_told_together_with_the_next_opened(server: WireServer) -> None:
    upper = RemoteUpper(server.url, hello=HELLO)
    link = upper.open(opening(BY_IDS))
    wait_for(lambda: server.door.n_opened == 1)
    server.stop()
    server.start()
    wait_for(lambda: server.door.n_opened == 2)
    time.sleep(0.1)
    assert [type(n) for n in link.receive(60.0)] == [Opened, Lost]
    assert [type(n) for n in link.receive(60.0)] == [Opened]
    upper.close()


def test_a_session_is_taken_up_with_what_the_other_side_still_has(lower: Lower, server: WireServer) -> None:
    with running(("127.0.0.1", server.port), PROFILES["lan"]) as proxy:
        upper = RemoteUpper(f"grpc://127.0.0.1:{proxy.address[1]}", hello=HELLO)
        link = upper.open(opening(BY_IDS))
        news = OneByOne(link)
        assert news.next() == Opened(0, 0, 0, 1, b"of epoch 1", settings_hash(opening(BY_IDS)))
        link.send(Ids(0, 0, (1, 2, 3)))
        wait_for(lambda: len(server.door.seen) == 2)
        proxy.inject(Fault(0.0, "reset"))
        assert isinstance(news.next(), Lost)
        again = news.next()
        assert isinstance(again, Opened)
        assert again.rows == 3
        assert server.door.seen[-1] == replace(opening(BY_IDS), resume_token=b"of epoch 1")
        upper.close()


def test_a_server_that_ends_what_it_has_just_opened_is_not_dialled_like_mad(
    server: WireServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_link, "BRIEF_S", 10.0)
    monkeypatch.setattr(remote_link, "LEAST_PAUSE_S", 60.0)
    monkeypatch.setattr(remote_link, "MOST_PAUSE_S", 60.0)
    server.door.is_brief = True
    upper = RemoteUpper(server.url, hello=HELLO)
    news = OneByOne(upper.open(opening(BY_IDS)))
    assert isinstance(news.next(), Opened)
    assert isinstance(news.next(), Lost)
    assert news.link.receive(0.5) == []
    assert server.door.n_opened == 1
    upper.close()


def test_a_server_that_floods_the_device_is_refused(server: WireServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_link, "MAX_NEWS", 100)
    server.door.n_copies = 150
    upper = RemoteUpper(server.url, hello=HELLO)
    link = upper.open(opening(BY_IDS))
    assert isinstance(first_news(link), Opened)
    link.send(Ids(0, 0, (1, 2, 3)))
    link.send(Ask(1, 0, 2, 2))
    wait_for(lambda: link.is_over)
    assert [type(n) for n in link.receive(0.0)] == [Verdict] * 100 + [Lost]
    with pytest.raises(WireError, match="more than it was asked"):
        link.receive(0.0)
    upper.close()


# ------------------------------------------------------------ several addresses


def test_another_upper_side_goes_on_where_one_has_died(lower: Lower, server: WireServer, codec: CodecSpec) -> None:
    truth = oracle(lower, codec, N)
    with WireServer(Door(lower)) as other:
        upper = RemoteUpper([server.url, other.url], hello=HELLO)
        device = Device(upper.open(opening(codec)), lower, codec, truth, lambda n: server.stop() if n == 9 else None)
        assert device.answer(N) == truth
        assert server.door.n_opened == 1
        assert other.door.n_opened == 1
        upper.close()


def test_an_upper_side_that_falls_silent_is_left(
    lower: Lower, server: WireServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_link, "PING_AFTER_S", 0.1)
    monkeypatch.setattr(remote_link, "SILENT_S", 1.0)
    truth = oracle(lower, BY_IDS, N)

    def hurt(n: int) -> None:
        server.door.is_mute = server.door.is_mute or n > 8

    with WireServer(Door(lower)) as other:
        upper = RemoteUpper([server.url, other.url], hello=HELLO)
        device = Device(upper.open(opening(BY_IDS)), lower, BY_IDS, truth, hurt)
        assert device.answer(N) == truth
        assert other.door.n_opened >= 1
        assert any(isinstance(m, Ping) for m in server.door.seen)
        upper.close()


def test_the_next_upper_side_stands_by_and_takes_over_without_another_hello(
    lower: Lower, server: WireServer, codec: CodecSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_link, "PING_AFTER_S", 0.02)
    truth = oracle(lower, codec, N)
    with WireServer(Door(lower)) as other:

        def hurt(n: int) -> None:
            if n == 8:
                wait_for(lambda: other.door.hellos)
                assert other.door.n_opened == 0
                server.stop()

        upper = RemoteUpper([server.url, other.url], hello=HELLO)
        device = Device(upper.open(opening(codec)), lower, codec, truth, hurt)
        assert device.answer(N) == truth
        assert (len(other.door.hellos), other.door.n_opened) == (1, 1)
        upper.close()


def test_a_standby_with_other_weights_is_not_used(
    lower: Lower, server: WireServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_link, "PING_AFTER_S", 0.02)
    with WireServer(Door(lower, fingerprint=b"g" * 32)) as other:
        upper = RemoteUpper([server.url, other.url], hello=HELLO)
        news = OneByOne(upper.open(opening(BY_IDS)))
        assert isinstance(news.next(), Opened)
        wait_for(lambda: other.door.hellos)
        server.stop()
        server.start()
        assert isinstance(news.next(), Lost)
        assert isinstance(news.next(), Opened)
        assert (server.door.n_opened, other.door.n_opened) == (2, 0)
        upper.close()


def test_the_preferred_upper_side_is_up_again_with_the_next_answer(
    lower: Lower, server: WireServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_link, "PING_AFTER_S", 0.02)
    monkeypatch.setattr(dialler, "GREET_S", 0.05)
    monkeypatch.setattr(dialler, "RETRY_S", 0.05)
    with WireServer(Door(lower)) as other:
        upper = RemoteUpper([server.url, other.url], hello=HELLO)
        link = upper.open(opening(BY_IDS))
        news = OneByOne(link)
        assert isinstance(news.next(), Opened)
        wait_for(lambda: other.door.hellos)
        n_hellos = len(server.door.hellos)
        server.stop()
        server.start()
        while not isinstance(news.next(), Opened):
            pass
        assert other.door.n_opened == 1
        wait_for(lambda: len(server.door.hellos) > n_hellos + 1)  # the second one follows the first's reply
        link.send(Close())
        link.close()
        wait_for(lambda: link.is_over)
        assert isinstance(first_news(upper.open(opening(BY_IDS, session=b"2" * 16))), Opened)
        assert (server.door.n_opened, other.door.n_opened) == (2, 1)
        upper.close()


def test_a_connection_that_hangs_does_not_hold_up_the_next_attempt(
    server: WireServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialler, "ATTEMPT_S", 0.1)
    monkeypatch.setattr(dialler, "CONNECT_S", 20.0)
    with FirstHangs(server.port) as way:
        upper = RemoteUpper(f"grpc://127.0.0.1:{way.port}", hello=HELLO)
        assert isinstance(first_news(upper.open(opening(BY_IDS))), Opened)
        assert way.n_taken >= 2
        upper.close()


class FirstHangs:
    """A way to a server on which nothing happens with the first connection, as when a packet of it is lost."""

    def __init__(self, to: int) -> None:
        self.to, self.n_taken, self._sockets = to, 0, list[socket.socket]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._take, daemon=True).start()

    def __enter__(self) -> FirstHangs:
        return self

    def __exit__(self, *_: object) -> None:
        for s in [self._listener, *self._sockets]:
            with suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)
            s.close()

    def _take(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.n_taken += 1
            self._sockets.append(near)
            if self.n_taken > 1:
                far = socket.create_connection(("127.0.0.1", self.to))
                self._sockets.append(far)
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=carry, args=(source, sink), daemon=True).start()


def carry(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def test_the_first_address_that_answers_is_taken(server: WireServer, closed_port: int) -> None:
    upper = RemoteUpper([f"grpc://127.0.0.1:{closed_port}", server.url], hello=HELLO)
    assert isinstance(first_news(upper.open(opening(BY_IDS))), Opened)
    upper.close()


def test_an_upper_side_with_other_weights_is_passed_over(lower: Lower, server: WireServer) -> None:
    server.door.fingerprint = b"g" * 32
    with WireServer(Door(lower)) as other:
        upper = RemoteUpper([server.url, other.url], hello=HELLO)
        assert isinstance(first_news(upper.open(opening(BY_IDS))), Opened)
        assert other.door.n_opened == 1
        upper.close()


# ------------------------------------------------------------ refusals


def test_other_weights_are_refused_by_name_before_any_row(server: WireServer) -> None:
    server.door.fingerprint = b"g" * 32
    upper = RemoteUpper(server.url, hello=HELLO)
    with pytest.raises(MismatchError, match=r"upper \(theirs.*ours 666666666666…, theirs 676767676767…"):
        upper.open(opening(BY_ROWS))
    assert server.door.seen == []
    server.door.fingerprint = MODEL_FP  # put right: the next answer finds it
    assert isinstance(first_news(upper.open(opening(BY_IDS))), Opened)
    upper.close()


def test_a_server_that_comes_back_with_other_weights_ends_the_answer(server: WireServer) -> None:
    upper = RemoteUpper(server.url, hello=HELLO)
    link = upper.open(opening(BY_IDS))
    news = OneByOne(link)
    assert isinstance(news.next(), Opened)
    server.stop()
    server.door.fingerprint = b"g" * 32
    server.start()
    with pytest.raises(MismatchError, match="does not serve"):
        wait_for(lambda: isinstance(news.next(), Opened))
    upper.close()


def restart_with(server: WireServer, fingerprint: bytes) -> None:
    """Another process at the same port: what it has seen so far is forgotten here too."""
    server.stop()
    server.door.fingerprint = fingerprint
    server.door.seen.clear()
    server.start()


def test_nothing_but_an_open_reaches_a_server_that_has_other_weights_now(
    lower: Lower, server: WireServer, codec: CodecSpec
) -> None:
    upper = RemoteUpper(server.url, hello=HELLO)
    device = Device(upper.open(opening(codec)), lower, codec, oracle(lower, codec, N))
    told = device.answer(6)
    restart_with(server, b"g" * 32)
    with pytest.raises(MismatchError, match=r"ours 666666666666…, theirs 676767676767…"):
        device.answer(N)
    assert told == oracle(lower, codec, 6)
    assert {type(m) for m in server.door.seen} <= {Open}
    upper.close()


def test_the_second_address_goes_on_where_the_first_one_has_other_weights_now(
    lower: Lower, server: WireServer, codec: CodecSpec
) -> None:
    truth = oracle(lower, codec, N)
    with WireServer(Door(lower)) as other:
        upper = RemoteUpper([server.url, other.url], hello=HELLO)
        link = upper.open(opening(codec))
        device = Device(link, lower, codec, truth, lambda n: restart_with(server, b"g" * 32) if n == 9 else None)
        assert device.answer(N) == truth
        assert {type(m) for m in server.door.seen} <= {Open}
        assert other.door.n_opened == 1
        upper.close()


def test_the_next_answer_tries_a_server_that_was_refused_again(lower: Lower, server: WireServer) -> None:
    upper = RemoteUpper(server.url, hello=HELLO)
    device = Device(upper.open(opening(BY_ROWS)), lower, BY_ROWS)
    device.answer(2)
    restart_with(server, b"g" * 32)
    with pytest.raises(MismatchError):
        device.answer(N)
    restart_with(server, MODEL_FP)
    again = Device(upper.open(opening(BY_ROWS, b"t" * 16)), lower, BY_ROWS)
    assert again.answer(N) == oracle(lower, BY_ROWS, N)
    upper.close()


def test_a_connection_that_was_lost_between_two_answers_begins_with_a_hello_again(
    lower: Lower, server: WireServer
) -> None:
    """gRPC would connect again by itself, and say none."""
    upper = RemoteUpper(server.url, hello=HELLO)
    first = Device(upper.open(opening(BY_IDS)), lower, BY_IDS)
    first.answer(2)
    first.link.close()
    server.stop()
    greeted, until = upper._dialler._current, time.monotonic() + 30
    assert greeted is not None
    while greeted.connection.stands or greeted.n_links:
        assert time.monotonic() < until
        time.sleep(0.01)
    server.door.hellos.clear()
    server.start()
    again = Device(upper.open(opening(BY_IDS, b"t" * 16)), lower, BY_IDS)
    assert again.answer(2) == oracle(lower, BY_IDS, 2)
    assert len(server.door.hellos) == 1
    upper.close()


def test_an_answer_by_ids_does_not_go_on_with_another_model_that_would_answer_too(
    lower: Lower, server: WireServer
) -> None:
    """Any model with the device's tokenizer fits ids, but the beginning of an answer is of one of them."""
    server.door.takes_all = True
    upper = RemoteUpper(server.url, hello=HELLO)
    device = Device(upper.open(opening(BY_IDS)), lower, BY_IDS)
    device.answer(6)
    restart_with(server, b"g" * 32)
    with pytest.raises(MismatchError, match=r"began with \(ours 666666666666…, theirs 676767676767…\)"):
        device.answer(N)
    assert {type(m) for m in server.door.seen} <= {Open}
    new = Device(upper.open(opening(BY_IDS, b"t" * 16)), lower, BY_IDS)  # an answer of its own
    assert new.answer(N) == oracle(lower, BY_IDS, N)
    upper.close()


def test_a_wrong_key_is_refused(server: WireServer) -> None:
    server.door.token = "sesame"
    upper = RemoteUpper(server.url, hello=HELLO, credentials=Credentials(token="wrong"))
    with pytest.raises(UpperError, match=r"PERMISSION_DENIED.*expected a key"):
        upper.open(opening(BY_IDS))
    upper.close()
    upper = RemoteUpper(server.url, hello=HELLO, credentials=Credentials(token="sesame"))
    assert isinstance(first_news(upper.open(opening(BY_IDS))), Opened)
    upper.close()


def test_where_nobody_listens_that_is_said(closed_port: int) -> None:
    upper = RemoteUpper(f"grpc://127.0.0.1:{closed_port}", hello=HELLO)
    with pytest.raises(UpperError, match=r"no upper side could be reached: .*refused"):
        upper.open(opening(BY_IDS))
    upper.close()


def test_a_server_that_has_to_read_its_file_first_is_waited_for(
    server: WireServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialler, "CONNECT_S", 2.0)
    server.door.hello_s = 2.5
    upper = RemoteUpper(server.url, hello=HELLO)
    assert isinstance(first_news(upper.open(opening(BY_IDS))), Opened)
    upper.close()


def test_who_takes_a_connection_and_says_nothing_is_not_waited_for(
    server: WireServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialler, "CONNECT_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        upper = RemoteUpper([f"grpc://127.0.0.1:{silent.getsockname()[1]}", server.url], hello=HELLO)
        assert isinstance(first_news(upper.open(opening(BY_IDS))), Opened)
        upper.close()
        upper = RemoteUpper(f"grpc://127.0.0.1:{silent.getsockname()[1]}", hello=HELLO)
        with pytest.raises(UpperError, match="no connection within"):
            upper.open(opening(BY_IDS))
        upper.close()


def test_a_busy_upper_side_is_asked_again_when_it_wants_to_be(server: WireServer) -> None:
    server.door.refuses = [Err(Code.OVERLOADED, "come back", True, 300)]
    upper = RemoteUpper(server.url, hello=HELLO)
    started = time.monotonic()
    link = upper.open(opening(BY_IDS))
    news = OneByOne(link)
    assert news.next() == Err(Code.OVERLOADED, "come back", True, 300)
    assert isinstance(news.next(), Opened)
    assert time.monotonic() - started > 0.2
    upper.close()


def test_a_refusal_for_good_ends_the_link(server: WireServer) -> None:
    server.door.refuses = [Err(Code.QUOTA, "no more today")]
    upper = RemoteUpper(server.url, hello=HELLO)
    link = upper.open(opening(BY_IDS))
    news = OneByOne(link)
    assert news.next() == Err(Code.QUOTA, "no more today")
    assert news.next() == Lost("no more today", final=True)
    assert server.door.n_opened == 0
    upper.close()


def test_a_penalty_that_rows_cannot_follow_is_refused_here(server: WireServer) -> None:
    upper = RemoteUpper(server.url, hello=HELLO)
    with pytest.raises(UsageError, match="repetition penalty"):
        upper.open(opening(BY_ROWS, sampling=Sampling(repetition_penalty=1.1)))
    upper.close()


# ------------------------------------------------------------ the door out


@pytest.mark.parametrize(("policy", "codec"), [(Policy(ids_ok=False), BY_IDS), (Policy(hidden_ok=False), BY_ROWS)])
def test_a_forbidden_kind_of_answer_is_not_even_opened(server: WireServer, policy: Policy, codec: CodecSpec) -> None:
    upper = RemoteUpper(server.url, hello=HELLO, policy=policy)
    with pytest.raises(EgressDenied):
        upper.open(opening(codec)).receive(5.0)
    assert server.door.seen == []
    upper.close()


def test_bytes_above_the_policy_end_the_answer_and_go_nowhere_else(lower: Lower, server: WireServer) -> None:
    with WireServer(Door(lower)) as other:
        upper = RemoteUpper([server.url, other.url], hello=HELLO, policy=Policy(max_bytes=2000))
        device = Device(upper.open(opening(BY_ROWS)), lower, BY_ROWS)
        with pytest.raises(EgressDenied, match="allows 2000"):
            device.answer(N)
        with pytest.raises(EgressDenied):
            device.link.receive(0.0)
        sent = sum(n for _, kind, _, n in upper.account.rows() if kind != "ClientHello")
        assert 0 < sent <= 2000
        assert other.door.n_opened == 0
        upper.close()


@pytest.mark.parametrize("region", ["", "us"])
def test_an_upper_side_outside_the_region_of_the_policy_gets_no_answer(server: WireServer, region: str) -> None:
    server.door.region = region
    upper = RemoteUpper(server.url, hello=HELLO, policy=Policy(region="eu"))
    with pytest.raises(EgressDenied, match="region 'eu' only"):
        upper.open(opening(BY_IDS))
    assert server.door.seen == []
    upper.close()


def test_an_upper_side_in_the_region_of_the_policy_is_taken(server: WireServer) -> None:
    server.door.region = "eu"
    upper = RemoteUpper(server.url, hello=HELLO, policy=Policy(region="eu"))
    assert isinstance(first_news(upper.open(opening(BY_IDS))), Opened)
    assert server.door.hellos[0].region == "eu"
    upper.close()


# ------------------------------------------------------------ time, credit, the end


def test_rows_beyond_the_credit_still_arrive(lower: Lower) -> None:
    truth = oracle(lower, BY_ROWS, 8)
    with WireServer(Door(lower, limits=replace(LIMITS, credit_bytes=100))) as server:  # a row and a half
        upper = RemoteUpper(server.url, hello=HELLO)
        device = Device(upper.open(opening(BY_ROWS)), lower, BY_ROWS, truth)
        assert device.answer(8) == truth
        upper.close()


def test_a_deadline_is_learned_from_replies(lower: Lower, server: WireServer) -> None:
    server.door.delay_s = 0.3
    upper = RemoteUpper(server.url, hello=HELLO)
    device = Device(upper.open(opening(BY_IDS)), lower, BY_IDS, oracle(lower, BY_IDS, 6))
    assert device.link.deadline_s() == 0.4
    device.answer(6)
    assert device.link.deadline_s() > 0.9
    upper.close()


def test_an_answer_that_ends_leaves_nothing_behind(lower: Lower, server: WireServer) -> None:
    before = set(threading.enumerate())
    upper = RemoteUpper(server.url, hello=HELLO)
    for _ in range(3):
        device = Device(upper.open(opening(BY_IDS)), lower, BY_IDS)
        device.answer(4)
        device.link.send(Close())
        device.link.close()
    wait_for(lambda: not server.door.sessions and not server.door.streams)
    assert sum(isinstance(m, Close) for m in server.door.seen) == 3
    upper.close()
    assert not [t for t in threading.enumerate() if t.name == "nearfar-upper" and t not in before]


def test_a_device_that_only_hangs_up_may_come_back(lower: Lower, server: WireServer) -> None:
    upper = RemoteUpper(server.url, hello=HELLO)
    link = upper.open(opening(BY_IDS))
    first_news(link)
    link.close()
    wait_for(lambda: not server.door.streams)
    assert list(server.door.sessions) == [b"s" * 16]
    upper.close()


def test_links_share_a_connection(server: WireServer) -> None:
    upper = RemoteUpper(server.url, hello=HELLO)
    links = [upper.open(opening(BY_IDS, session=bytes([i]) * 16)) for i in range(3)]
    assert all(isinstance(first_news(link), Opened) for link in links)
    assert len(server.door.hellos) == 1
    upper.close()


def test_a_connection_that_nobody_used_for_long_is_not_trusted(
    server: WireServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    upper = RemoteUpper(server.url, hello=HELLO)
    for n_hellos, fresh_s in ((1, 30.0), (1, 30.0), (2, 0.0)):
        monkeypatch.setattr(dialler, "FRESH_S", fresh_s)
        link = upper.open(opening(BY_IDS))
        assert isinstance(first_news(link), Opened)
        assert len(server.door.hellos) == n_hellos
        link.send(Close())
        link.close()
        wait_for(lambda link=link: link.is_over)
    upper.close()


def test_messages_are_shown_to_who_looks_for_a_fault_without_what_they_hold(
    lower: Lower, server: WireServer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NEARFAR_DEBUG", "3")
    upper = RemoteUpper(server.url, hello=HELLO)
    link = upper.open(opening(BY_IDS))
    assert isinstance(first_news(link), Opened)
    link.send(Ids(0, 0, (170, 171, 172)))
    link.send(Ask(1, 0, 2, 2))
    assert isinstance(first_news(link), Verdict)
    upper.close()
    shown = capfd.readouterr().err
    assert "-> grpc://localhost" in shown
    assert "Ids gen 0, 0..2" in shown
    assert "Ask 1 gen 0, rows 2..2, 0 drafts, run 1" in shown
    assert "Verdict 1 gen 0, from 3, 0 accepted" in shown
    assert not re.search(r"\b17[012]\b", shown.replace(server.url, ""))


def test_closing_one_upper_does_not_disturb_another(
    lower: Lower, server: WireServer, caplog: pytest.LogCaptureFixture
) -> None:
    truth = oracle(lower, BY_IDS, N)
    busy = RemoteUpper(server.url, hello=HELLO)

    def come_and_go(n: int) -> None:
        brief = RemoteUpper(server.url, hello=HELLO)
        link = brief.open(opening(BY_IDS, session=n.to_bytes(16, "big")))
        if n % 2:
            link.send(Close())
            link.close()
        brief.close()

    device = Device(busy.open(opening(BY_IDS)), lower, BY_IDS, truth, come_and_go)
    assert device.answer(N) == truth
    busy.close()
    assert [r.getMessage() for r in caplog.records if r.name in ("asyncio", "grpc._cython.cygrpc")] == []


def n_connections(port: int) -> int:
    """Ends of TCP connections to that port of this machine that are established."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    return sum(fields[2].endswith(f":{port:04X}") and fields[3] == "01" for fields in lines)


@pytest.mark.skipif(not Path("/proc/net/tcp6").exists(), reason="needs /proc/net")
def test_an_upper_side_that_is_closed_leaves_no_connection_to_the_garbage_collector(server: WireServer) -> None:
    gc.collect()
    gc.disable()
    try:
        upper = RemoteUpper(server.url, hello=HELLO)
        link = upper.open(opening(BY_IDS))
        assert isinstance(first_news(link), Opened)
        wait_for(lambda: n_connections(server.port) == 1)  # of attempts side by side one is left
        link.send(Close())
        wait_for(lambda: link.is_over)  # the server has ended the stream
        upper.close()
        wait_for(lambda: n_connections(server.port) == 0)
    finally:
        gc.enable()
