"""One direction of one connection: bytes come in, wait as long as the link takes, and go out in the same order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from random import Random

from nearfar.chaos import tcp
from nearfar.chaos.counters import Traffic
from nearfar.chaos.profiles import Profile


class End(Enum):
    """How a sender stops; it travels behind the bytes as they do."""

    FIN = "will write nothing more"
    RST = "has reset the connection"


@dataclass(slots=True)
class Lane:
    """What the connections of one direction share: the link's rate, its spells, and a cut that is due."""

    profile: Profile
    traffic: Traffic
    free_at: float = 0.0  # when the last bit that was taken in has left
    dark_until: float = 0.0  # blackout
    still_until: float = 0.0  # stall
    cut_after: int | None = None  # bytes that still go through before the connection of the last one is reset

    def leaves(self, now: float, n_bytes: int) -> float:
        """When the last of these bytes is on the link.  First come, first served: one queue for all connections."""
        serial = self.profile.serial_s(n_bytes)
        if now < self.dark_until:  # sent again after the blackout; whoever comes in the meantime must not wait for it
            timer = tcp.rto_s(self.profile)
            return now + tcp.wait_for_link_s(self.dark_until - now, timer) + serial
        self.free_at = max(now, self.free_at) + serial
        return self.free_at

    @property
    def piece(self) -> int:
        """Bytes that travel as one: a packet, or a millisecond of a fast link."""
        return max(tcp.SEGMENT, int(self.profile.rate_bit_s / 8e3))


@dataclass(slots=True)
class Pipe:
    """Bytes on their way from `source` to `sink`, the transports of one connection.  Owned by the loop's thread."""

    lane: Lane
    draws: Random
    reset: Callable[[], None]  # of the whole connection: a cut is reached, or the sender's reset arrives
    ended: Callable[[], None]  # the sender's end has been handed on
    source: asyncio.Transport | None = None
    sink: asyncio.Transport | None = None  # None until that end has answered
    swallows: bool = False
    _is_full: bool = False  # the receiver does not read
    _is_cut: bool = False  # ... and the connection is reset as soon as it has
    _queue: deque[tuple[float, bytes | End]] = field(default_factory=deque)  # when it arrives, what
    _on_way: int = 0  # bytes in the queue
    _last: float = 0.0  # arrival of the last of them
    _timer: asyncio.TimerHandle | None = None

    def push(self, data: bytes) -> None:
        """The sender has written."""
        if self.swallows:
            self.lane.traffic.swallowed += len(data)
            return
        for start in range(0, len(data), self.lane.piece):
            piece = data[start : start + self.lane.piece]
            late = tcp.recovery_s(self.lane.profile, self.draws, len(piece), len(data) - start - len(piece))
            self.lane.traffic.pieces += 1
            self.lane.traffic.lost += late > 0
            self._send(piece, len(piece), late)
        self._on_way += len(data)
        if self._on_way >= self.lane.profile.window and self.source is not None:
            self.source.pause_reading()

    def end(self, how: End) -> None:
        """The sender stops."""
        if not self.swallows:
            self._send(how, 0, 0.0)

    def connect(self, sink: asyncio.Transport) -> None:
        """The receiver is there."""
        self.sink = sink
        self._wait()

    def hold(self) -> None:
        """The receiver's buffers are full."""
        self._is_full = True

    def go_on(self) -> None:
        """The receiver has taken everything that was written to it."""
        self._is_full = False
        if self._is_cut:
            self.reset()
        else:
            self._wait()

    def swallow(self) -> None:
        """From now on nothing arrives, and the sender does not notice."""
        self.swallows = True
        self.lane.traffic.swallowed += self._on_way
        self._queue.clear()
        self._on_way = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._read_on()

    def _send(self, what: bytes | End, n_bytes: int, late: float) -> None:
        now = asyncio.get_running_loop().time()
        arrives = self.lane.leaves(now, n_bytes) + self.lane.profile.one_way_s(self.draws) + late
        self._last = max(self._last, arrives)  # TCP hands nothing on behind a gap
        self._queue.append((self._last, what))
        self._wait()

    def _wait(self) -> None:
        """For the first in the queue, unless a timer does so already."""
        if self._timer is None and self._queue and self.sink is not None and not self._is_full:
            at = max(self._queue[0][0], self.lane.still_until)
            self._timer = asyncio.get_running_loop().call_at(at, self._deliver)

    def _deliver(self) -> None:
        """Hand on what has arrived."""
        self._timer = None
        now = asyncio.get_running_loop().time()
        while self._queue and max(self._queue[0][0], self.lane.still_until) <= now and not self._is_full:
            what = self._queue.popleft()[1]
            if isinstance(what, bytes):
                self._write(what)
            elif what is End.RST:
                self.reset()
            else:
                self._finish()
        self._wait()

    def _write(self, piece: bytes) -> None:
        assert self.sink is not None  # nothing is delivered before
        n = len(piece) if self.lane.cut_after is None else min(len(piece), self.lane.cut_after)
        self._on_way -= len(piece)
        self.lane.traffic.n_bytes += n
        self.lane.traffic.swallowed += len(piece) - n
        if n and not self.sink.is_closing():
            self.sink.write(piece[:n])
        if self.lane.cut_after is not None:
            self.lane.cut_after -= n
            if self.lane.cut_after == 0:
                self._cut()
        if self._on_way < self.lane.profile.window // 2:
            self._read_on()

    def _cut(self) -> None:
        self.lane.cut_after = None
        if self._is_full:  # a reset now would take back bytes that have been handed on
            self._is_cut = True
        else:
            self.reset()

    def _finish(self) -> None:
        assert self.sink is not None
        if not self.sink.is_closing() and self.sink.can_write_eof():
            with suppress(OSError):  # its other end is gone already
                self.sink.write_eof()
        self.ended()

    def _read_on(self) -> None:
        if self.source is not None and not self.source.is_closing():
            self.source.resume_reading()
