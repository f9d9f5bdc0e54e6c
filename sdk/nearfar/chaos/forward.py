"""The process between two network namespaces: takes packets from one and hands them to the other, late or never.

    python -m nearfar.chaos.forward DEVICE_END UPPER_END CONTROL SETTINGS

The first three are descriptors; netns.py starts it.  On CONTROL it answers each line of JSON, a fault to play or {},
with its counters, and ends with it.  A process of its own, so that no program that is tested keeps it waiting.
"""

from __future__ import annotations

import heapq
import json
import os
import select
import socket
import sys
from random import Random
from time import monotonic
from typing import Any

from nearfar.chaos.counters import Counters, Traffic
from nearfar.chaos.priority import ahead_of_others
from nearfar.chaos.profiles import Blackouts, Profile
from nearfar.chaos.schedule import Fault, Schedule
from nearfar.errors import UsageError

KINDS = ("blackout", "stall")
MAX_PACKET = 1 << 16


def check_playable(schedule: Schedule) -> None:
    """Raises UsageError where a link of packets cannot do what is asked."""
    if schedule.faults and schedule.unit != "s":
        raise UsageError(f"a schedule in {schedule.unit!r}: a link counts seconds; expected the unit 's'")
    for fault in schedule.faults:
        if fault.kind not in KINDS:
            raise UsageError(f"a link of packets cannot do {fault.kind!r}; expected one of {', '.join(KINDS)}")


class Way:
    """One direction: packets wait in the order in which they arrive."""

    def __init__(self, source: int, sink: int, profile: Profile, draws: Random, reorder: float) -> None:
        self.source, self.sink = source, sink
        self.traffic = Traffic()
        self.dark_until = self.still_until = 0.0
        self._profile, self._draws, self._reorder = profile, draws, reorder
        self._free_at = 0.0  # when the last bit that was taken in has left
        self._last = 0.0  # arrival of the last packet that is in order
        self._waiting: list[tuple[float, int, bytes]] = []  # when it arrives, its number, the packet

    def take(self) -> None:
        """Everything that the interface has sent."""
        while True:
            try:
                packet = os.read(self.source, MAX_PACKET)
            except BlockingIOError:
                return
            self.send(packet, monotonic())

    def send(self, packet: bytes, now: float) -> None:
        """Put it on its way, or lose it.  A full queue drops what comes last, as a modem does."""
        is_lost = self._draws.random() < self._profile.loss
        way, overtaken = self._profile.one_way_s(self._draws), self._draws.random() < self._reorder
        queued = max(0.0, self._free_at - now)
        self.traffic.pieces += 1
        if now < self.dark_until or is_lost:
            self.traffic.lost += 1
        elif queued > self._profile.serial_s(self._profile.window):
            self.traffic.swallowed += len(packet)
        else:
            self._free_at = now + queued + self._profile.serial_s(len(packet))
            arrives = max(self._last, self._free_at + way)
            if overtaken:
                arrives += self.held_back_s
            else:
                self._last = arrives
            heapq.heappush(self._waiting, (arrives, self.traffic.pieces, packet))

    @property
    def held_back_s(self) -> float:
        """How long a packet out of order waits for others to overtake it: a few packets, or the jitter."""
        return max(1e-3, self._profile.serial_s(5 * 1500), self._profile.jitter_ms / 1e3)

    @property
    def next_at(self) -> float | None:
        """When the next packet arrives."""
        return max(self._waiting[0][0], self.still_until) if self._waiting else None

    def hand_on(self, now: float) -> None:
        """Everything that has arrived."""
        while self._waiting and max(self._waiting[0][0], self.still_until) <= now:
            packet = heapq.heappop(self._waiting)[2]
            try:
                os.write(self.sink, packet)
            except OSError:  # the interface is down, or takes no more
                self.traffic.swallowed += len(packet)
            else:
                self.traffic.n_bytes += len(packet)


class Forwarder:
    """Both directions, the faults to come, and whoever asks for counters."""

    def __init__(self, up: Way, down: Way, schedule: Schedule, control: socket.socket) -> None:
        self.up, self.down, self.control = up, down, control
        self.counters = Counters(up.traffic, down.traffic)
        self._began = monotonic()
        self._faults = list(reversed(schedule.faults))
        self._asked = b""

    def step(self) -> bool:
        """Wait for what comes next and do it; False at the end of control."""
        sources = [self.up.source, self.down.source, self.control.fileno()]
        readable, _, _ = select.select(sources, [], [], self._wait_s())
        for way in (self.up, self.down):
            if way.source in readable:
                way.take()
        now = monotonic()
        while self._faults and self._began + self._faults[-1].at <= now:
            self.inject(self._faults.pop(), now)
        for way in (self.up, self.down):
            way.hand_on(now)
        return self.control.fileno() not in readable or self.answer()

    def _wait_s(self) -> float | None:
        ways = [way.next_at for way in (self.up, self.down)]
        fault = self._began + self._faults[-1].at if self._faults else None
        times = [at for at in (*ways, fault) if at is not None]
        return max(0.0, min(times) - monotonic()) if times else None

    def inject(self, fault: Fault, now: float) -> None:
        self.counters.faults[fault.kind] += 1
        for way in (self.up, self.down):
            if fault.kind == "blackout":
                way.dark_until = max(way.dark_until, now + fault.seconds)
            else:
                way.still_until = max(way.still_until, now + fault.seconds)

    def answer(self) -> bool:
        """Every whole line that has come; False if there will be none any more."""
        data = self.control.recv(1 << 16)
        *lines, self._asked = (self._asked + data).split(b"\n")
        for line in lines:
            if "fault" in (asked := json.loads(line)):
                self.inject(Fault(**asked["fault"]), monotonic())
            self.control.sendall(json.dumps(self.counters.as_json()).encode() + b"\n")
        return bool(data)


def main(device_end: int, upper_end: int, control: int, settings: dict[str, Any]) -> None:
    facts = settings["profile"]
    spells = facts.pop("blackouts")
    profile = Profile(**facts, blackouts=Blackouts(**spells) if spells else None)
    seed, reorder = settings["seed"], settings["reorder"]
    up = Way(device_end, upper_end, profile, Random(f"{seed} up"), reorder)
    down = Way(upper_end, device_end, profile, Random(f"{seed} down"), reorder)
    ahead_of_others()
    with socket.socket(fileno=control) as line:
        forwarder = Forwarder(up, down, Schedule.from_json(settings["schedule"]), line)
        while forwarder.step():
            pass


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]))
