"""When a packet arrives, and whether: the forwarder's arithmetic, with times that the test names."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from itertools import pairwise
from random import Random

import pytest

from nearfar.chaos.forward import Forwarder, Way, check_playable
from nearfar.chaos.profiles import Profile
from nearfar.chaos.schedule import Fault, Schedule
from nearfar.errors import UsageError

EXACT = Profile("exact", 8e6, 100)  # a byte takes 1 µs, a way 50 ms
FOREVER = 1e9


class Wire:
    """A way whose sink can be read."""

    def __init__(self, profile: Profile, seed: int = 1, reorder: float = 0.0) -> None:
        self.reading, writing = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.reading.setblocking(False)
        self._writing = writing
        self.way = Way(-1, writing.fileno(), profile, Random(seed), reorder)

    def arrived(self, now: float = FOREVER) -> list[bytes]:
        """What has arrived by then, in its order."""
        found = []
        while (at := self.way.next_at) is not None and at <= now:
            self.way.hand_on(at)
            try:
                while True:
                    found.append(self.reading.recv(1 << 16))
            except BlockingIOError:
                pass
        return found


def test_a_packet_takes_its_bytes_at_the_rate_and_half_a_round_trip() -> None:
    wire = Wire(EXACT)
    wire.way.send(bytes(1000), now=5.0)
    wire.way.send(bytes(1000), now=5.0)
    assert wire.way.next_at == pytest.approx(5.051)
    assert wire.arrived(5.0505) == []
    assert len(wire.arrived(5.0511)) == 1
    assert wire.way.next_at == pytest.approx(5.052)


def test_jitter_alone_keeps_the_order() -> None:
    wire = Wire(Profile("jittery", 8e9, 100, jitter_ms=80))
    for i in range(100):
        wire.way.send(bytes([i]), now=i * 1e-3)
    assert wire.arrived() == [bytes([i]) for i in range(100)]


def test_a_share_of_packets_is_overtaken() -> None:
    wire = Wire(Profile("mixed", 8e9, 100), reorder=0.1)
    for i in range(200):
        wire.way.send(bytes([i]), now=i * 1e-4)
    found = [packet[0] for packet in wire.arrived()]
    assert sorted(found) == list(range(200))
    late = sum(a > b for a, b in pairwise(found))
    assert 8 <= late <= 35


def test_packets_are_lost_as_often_as_the_profile_says_and_the_same_for_the_same_seed() -> None:
    seen = []
    for seed in (7, 7, 8):
        wire = Wire(Profile("lossy", 8e9, 1, loss=0.1), seed)
        for i in range(1000):
            wire.way.send(i.to_bytes(2, "big"), now=i * 1e-3)
        seen.append(wire.arrived())
        assert 70 <= wire.way.traffic.lost <= 130
        assert wire.way.traffic.pieces == 1000
        assert wire.way.traffic.n_bytes == 2 * (1000 - wire.way.traffic.lost)
    assert seen[0] == seen[1] != seen[2]


def test_a_full_queue_drops_what_comes_last() -> None:
    wire = Wire(EXACT)
    n = EXACT.window // 1000
    for _ in range(n + 50):
        wire.way.send(bytes(1000), now=0.0)
    assert wire.way.traffic.swallowed == pytest.approx(50_000, abs=2000)
    wire.way.send(b"later", now=1.0)
    assert wire.arrived()[-1] == b"later"


@pytest.fixture
def forwarder() -> Iterator[tuple[Forwarder, socket.socket, list[int]]]:
    """Between two pipes: what is written into the first end comes out of the second."""
    (device_in, device), (upper, upper_out) = os.pipe(), os.pipe()
    silent, never = os.pipe()
    for end in (device_in, silent):
        os.set_blocking(end, False)
    ours, theirs = socket.socketpair()
    up, down = (
        Way(source, sink, Profile("fast", 1e10, 0), Random(1), 0.0)
        for source, sink in ((device_in, upper_out), (silent, never))
    )
    schedule = Schedule(1, "s", (Fault(0.0, "stall", 0.2),))
    with ours, theirs:
        yield Forwarder(up, down, schedule, theirs), ours, [device, upper]
    for end in (device_in, device, upper, upper_out, silent, never):
        os.close(end)


def test_the_forwarder_plays_its_schedule_answers_and_ends(
    forwarder: tuple[Forwarder, socket.socket, list[int]],
) -> None:
    machine, control, (device, upper) = forwarder
    machine.step()
    os.write(device, b"held")
    while machine.up.traffic.n_bytes == 0:
        assert machine.step()
    assert os.read(upper, 100) == b"held"
    control.sendall(b'{"fault": {"at": 0.0, "kind": "blackout", "seconds": 1e9}}\n{')
    assert machine.step()
    assert b'"faults": {"stall": 1, "blackout": 1}' in control.recv(1000)
    os.write(device, b"gone")
    while machine.up.traffic.lost == 0:
        assert machine.step()
    control.sendall(b"}\n")
    assert machine.step()
    assert b'"lost": 1' in control.recv(1000)
    control.shutdown(socket.SHUT_WR)
    assert not machine.step()


def test_what_packets_cannot_do_is_refused() -> None:
    for schedule in (Schedule(1, "s", (Fault(1, "reset"),)), Schedule(1, "token", (Fault(1, "stall", 1),))):
        with pytest.raises(UsageError, match="expected"):
            check_playable(schedule)
