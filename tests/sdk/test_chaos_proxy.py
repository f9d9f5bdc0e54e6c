"""The proxy between real sockets: what goes wrong on request, and that nothing else does."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

import pytest

from nearfar.chaos.profiles import Profile, profile
from nearfar.chaos.proxy import Address, RunningLink, running
from nearfar.chaos.schedule import Fault, Schedule
from nearfar.errors import NearfarError, UsageError

FAST = Profile("fast", 1e10, 0)  # nothing but the faults
SOON = 60.0  # seconds after which a test gives up


class Echo:
    """Sends back what it gets, and remembers how its connections ended."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address: Address = self.listener.getsockname()
        self.got = bytearray()
        self.ends: list[str] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._serve, args=(self.listener.accept()[0],), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        with sock:
            try:
                while data := sock.recv(1 << 16):
                    self.got += data
                    sock.sendall(data)
                self.ends.append("end")
            except OSError as error:
                self.ends.append(type(error).__name__)


@pytest.fixture
def echo() -> Iterator[Echo]:
    server = Echo()
    yield server
    server.listener.close()


@pytest.fixture
def link(echo: Echo) -> Iterator[RunningLink]:
    with running(echo.address, FAST) as link:
        yield link


def dial(address: Address) -> socket.socket:
    sock = socket.create_connection(address, timeout=SOON)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def ask(sock: socket.socket, data: bytes) -> bytes:
    """Send and read as many bytes back."""
    sock.sendall(data)
    return read(sock, len(data))


def read(sock: socket.socket, n: int) -> bytes:
    got = bytearray()
    while len(got) < n and (data := sock.recv(n - len(got))):
        got += data
    return bytes(got)


def until_reset(sock: socket.socket) -> bytes:
    """Everything that comes before the connection is reset."""
    got = bytearray()
    try:
        while data := sock.recv(1 << 16):
            got += data
    except ConnectionResetError:
        return bytes(got)
    raise AssertionError("the connection ended in order; expected a reset")


def wait_for(what: str, condition: Callable[[], object]) -> None:
    """Until `condition()` holds."""
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def test_bytes_come_back_as_they_went_and_are_counted(link: RunningLink) -> None:
    data = bytes(range(256)) * 4096
    with closing(dial(link.address)) as sock:
        sender = threading.Thread(target=sock.sendall, args=(data,))
        sender.start()
        assert read(sock, len(data)) == data
        sender.join()
        counters = link.counters()
    assert counters.up.n_bytes == counters.down.n_bytes == len(data)
    assert counters.connections == counters.open == 1
    assert counters.up.swallowed == counters.up.lost == 0


def test_an_answer_is_never_earlier_than_the_round_trip(echo: Echo) -> None:
    with running(echo.address, Profile("slow", 1e9, 40)) as link, closing(dial(link.address)) as sock:
        ask(sock, b"first")  # its handshake is behind us
        began = time.monotonic()
        ask(sock, b"second")
        assert time.monotonic() - began >= 0.04


def test_the_end_of_one_direction_leaves_the_other_open(link: RunningLink, echo: Echo) -> None:
    with closing(dial(link.address)) as sock:
        sock.sendall(b"all I have")
        sock.shutdown(socket.SHUT_WR)
        assert read(sock, 100) == b"all I have"
    wait_for("the connection is forgotten", lambda: link.counters().open == 0)
    assert echo.ends == ["end"]


def test_a_reset_reaches_both_ends_and_the_next_connection_works(link: RunningLink, echo: Echo) -> None:
    with closing(dial(link.address)) as sock:
        ask(sock, b"hello")
        link.inject(Fault(0, "reset"))
        assert until_reset(sock) == b""
    wait_for("the upper sees it", lambda: echo.ends == ["ConnectionResetError"])
    with closing(dial(link.address)) as sock:
        assert ask(sock, b"again") == b"again"
    assert link.counters().faults == {"reset": 1}


def test_a_reset_of_one_end_reaches_the_other(link: RunningLink, echo: Echo) -> None:
    sock = dial(link.address)
    ask(sock, b"hello")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()
    wait_for("the upper sees it", lambda: echo.ends == ["ConnectionResetError"])
    wait_for("it is forgotten", lambda: link.counters().open == 0)


@pytest.mark.parametrize("n", [0, 1, 1000])
def test_a_cut_on_the_way_down_delivers_exactly_n_bytes(link: RunningLink, n: int) -> None:
    with closing(dial(link.address)) as sock:
        ask(sock, b"hello")
        link.inject(Fault(0, "cut", way="down", n_bytes=n))
        sock.sendall(bytes(1500))
        assert until_reset(sock) == bytes(n)


def test_a_cut_on_the_way_up_lets_the_upper_see_exactly_n_bytes(link: RunningLink, echo: Echo) -> None:
    link.inject(Fault(0, "cut", way="up", n_bytes=700))
    with closing(dial(link.address)) as sock:
        sock.sendall(bytes(1500))
        until_reset(sock)
    wait_for("the upper sees it", lambda: echo.ends)
    assert len(echo.got) == 700


def test_half_open_swallows_everything_and_nobody_is_told(link: RunningLink, echo: Echo) -> None:
    with closing(dial(link.address)) as old:
        ask(old, b"hello")
        link.inject(Fault(0, "half-open"))
        old.sendall(b"anybody there")
        old.settimeout(0.2)
        with pytest.raises(TimeoutError):
            old.recv(1)
        with closing(dial(link.address)) as new:
            assert ask(new, b"works") == b"works"
    assert bytes(echo.got) == b"helloworks"
    assert echo.ends in ([], ["end"])  # of the new one
    wait_for("it is swallowed", lambda: link.counters().up.swallowed == len(b"anybody there"))


def test_a_stall_delays_and_loses_nothing(link: RunningLink) -> None:
    with closing(dial(link.address)) as sock:
        ask(sock, b"hello")
        began = time.monotonic()
        link.inject(Fault(0, "stall", 0.3))
        assert ask(sock, b"still here") == b"still here"
        assert time.monotonic() - began >= 0.3


def test_a_blackout_is_outlived_by_a_connection_that_waits(link: RunningLink) -> None:
    with closing(dial(link.address)) as sock:
        ask(sock, b"hello")
        began = time.monotonic()
        link.inject(Fault(0, "blackout", 0.3))
        assert ask(sock, b"still here") == b"still here"
        assert time.monotonic() - began >= 0.3


def test_an_upper_that_is_not_there_resets_the_connection() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))  # and does not listen: nobody else gets this port
        with running(mute.getsockname(), FAST) as link:
            with suppress(ConnectionResetError), closing(dial(link.address)) as sock:  # it may come that early
                until_reset(sock)
            wait_for("it is counted", lambda: link.counters().refused == 1)
            wait_for("it is forgotten", lambda: link.counters().open == 0)


def test_a_schedule_is_played_by_itself(echo: Echo) -> None:
    schedule = Schedule(1, "s", (Fault(0.1, "reset"), Fault(0.2, "cut", way="down", n_bytes=3)))
    with running(echo.address, FAST, schedule=schedule) as link:
        wait_for("both have come", lambda: link.counters().faults == {"reset": 1, "cut": 1})
        with closing(dial(link.address)) as sock:
            sock.sendall(b"hello")
            assert until_reset(sock) == b"hel"


def test_stopping_resets_what_is_open_and_frees_the_port(echo: Echo) -> None:
    with running(echo.address, FAST) as link:
        sock = dial(link.address)
        ask(sock, b"hello")
    with closing(sock):
        until_reset(sock)
    with pytest.raises(ConnectionRefusedError):
        dial(link.address)
    with running(echo.address, FAST, listen=link.address) as again:
        assert again.address == link.address


def test_many_connections_at_once_keep_their_bytes_apart(echo: Echo) -> None:
    with running(echo.address, profile("wifi"), seed=3) as link:
        socks = [dial(link.address) for _ in range(20)]
        for i, sock in enumerate(socks):
            sock.sendall(bytes([i]) * 5000)
        for i, sock in enumerate(socks):
            assert read(sock, 5000) == bytes([i]) * 5000
            sock.close()
        wait_for("all are forgotten", lambda: link.counters().open == 0)


def test_a_port_in_use_and_a_schedule_that_no_link_can_play_are_refused(echo: Echo) -> None:
    with pytest.raises(NearfarError, match="take another port"), running(echo.address, FAST, listen=echo.address):
        pass
    for schedule in (Schedule(1, "s", (Fault(1, "kill"),)), Schedule(1, "token", (Fault(1, "reset"),))):
        with pytest.raises(UsageError, match="expected"), running(echo.address, FAST, schedule=schedule):
            pass
    with running(echo.address, FAST) as link, pytest.raises(UsageError, match="'evict'"):
        link.inject(Fault(0, "evict"))


@pytest.fixture(autouse=True)
def no_callback_fails_unseen(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """asyncio logs what a callback raised instead of raising it."""
    yield
    assert [r.message for r in caplog.records if r.name == "asyncio"] == []
