"""When bytes arrive, to the microsecond: a clock that is moved by hand instead of the wall's."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Iterator
from random import Random

import pytest

from nearfar.chaos.counters import Traffic
from nearfar.chaos.pipe import End, Lane, Pipe
from nearfar.chaos.profiles import Profile

EXACT = Profile("exact", 8e6, 100)  # a byte takes 1 µs, a way 50 ms


class JumpingSelector(selectors.SelectSelector):
    """Nobody waits: time jumps to the next timer."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += timeout or 0.0
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.jumping = JumpingSelector()
        super().__init__(self.jumping)

    def time(self) -> float:
        return self.jumping.now


class Recorder(asyncio.Transport):
    """A socket that writes down what happens to it, and when."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[tuple[float, bytes]] = []
        self.ended_at: float | None = None
        self.is_read = True
        self.on_write: Callable[[], None] = lambda: None

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written.append((asyncio.get_running_loop().time(), bytes(data)))
        self.on_write()

    def write_eof(self) -> None:
        self.ended_at = asyncio.get_running_loop().time()

    def can_write_eof(self) -> bool:
        return True

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self.is_read = False

    def resume_reading(self) -> None:
        self.is_read = True

    @property
    def arrivals(self) -> list[float]:
        return [round(at, 6) for at, _ in self.written]

    @property
    def data(self) -> bytes:
        return b"".join(data for _, data in self.written)


class Bench:
    """A pipe between two recorders."""

    def __init__(self, profile: Profile = EXACT, seed: int = 1, lane: Lane | None = None) -> None:
        self.lane = lane or Lane(profile, Traffic())
        self.source, self.sink = Recorder(), Recorder()
        self.resets: list[float] = []
        self.pipe = Pipe(self.lane, Random(seed), self._reset, lambda: None, source=self.source)
        self.pipe.connect(self.sink)

    def _reset(self) -> None:
        self.resets.append(round(asyncio.get_running_loop().time(), 6))
        self.pipe.swallow()


def run(scene: Callable[[], Awaitable[None]]) -> None:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:

        async def whole() -> None:
            await scene()

        runner.run(whole())


def test_a_message_takes_its_bytes_at_the_rate_and_half_a_round_trip() -> None:
    async def scene() -> None:
        b = Bench()
        b.pipe.push(b"x" * 1000)
        await asyncio.sleep(1)
        assert b.sink.arrivals == [0.051]
        assert b.sink.data == b"x" * 1000
        assert b.lane.traffic == Traffic(n_bytes=1000, pieces=1)

    run(scene)


def test_small_messages_are_not_gathered() -> None:
    async def scene() -> None:
        b = Bench()
        for _ in range(3):
            b.pipe.push(b"x")
            await asyncio.sleep(0.01)
        await asyncio.sleep(1)
        assert b.sink.arrivals == [0.050001, 0.060001, 0.070001]

    run(scene)


def test_a_long_message_arrives_piece_by_piece() -> None:
    async def scene() -> None:
        b = Bench()
        b.pipe.push(bytes(5 * 1448))
        await asyncio.sleep(1)
        assert b.sink.arrivals == pytest.approx([0.05 + i * 1448e-6 for i in range(1, 6)], abs=2e-6)

    run(scene)


def test_connections_share_the_rate_first_come_first_served() -> None:
    async def scene() -> None:
        lane = Lane(EXACT, Traffic())
        a, b = Bench(lane=lane), Bench(lane=lane)
        a.pipe.push(bytes(1000))
        b.pipe.push(bytes(1000))
        await asyncio.sleep(1)
        assert (a.sink.arrivals, b.sink.arrivals) == ([0.051], [0.052])

    run(scene)


def test_jitter_keeps_the_order_and_the_bounds() -> None:
    jittery = Profile("jittery", 8e9, 100, jitter_ms=80)

    async def scene() -> None:
        b = Bench(jittery)
        sent = []
        for i in range(200):
            sent.append(asyncio.get_running_loop().time())
            b.pipe.push(bytes([i]))
            await asyncio.sleep(0.02)
        await asyncio.sleep(1)
        assert b.sink.data == bytes(range(200))
        delays = [at - t for at, t in zip(b.sink.arrivals, sent, strict=True)]
        assert min(delays) >= 0.01 - 1e-6
        assert max(delays) <= 0.09 + 1e-6
        assert max(delays) - min(delays) > 0.07

    run(scene)


def test_the_same_seed_gives_the_same_arrivals_and_another_seed_others() -> None:
    seen: list[list[float]] = []

    async def scene(seed: int) -> None:
        b = Bench(Profile("bad", 2e6, 120, jitter_ms=40, loss=0.2), seed)
        for _ in range(50):
            b.pipe.push(bytes(100))
            await asyncio.sleep(0.05)
        await asyncio.sleep(100)
        seen.append(b.sink.arrivals)
        assert b.lane.traffic.lost > 0

    for seed in (7, 7, 8):
        run(lambda seed=seed: scene(seed))  # type: ignore[misc]
    assert seen[0] == seen[1] != seen[2]


def test_a_lost_piece_holds_up_those_behind_it_and_nothing_is_missing() -> None:
    async def scene() -> None:
        b = Bench(Profile("lossy", 8e6, 100, loss=0.3))
        for i in range(100):
            b.pipe.push(bytes([i]))
            await asyncio.sleep(0.001)
        await asyncio.sleep(1000)
        assert b.sink.data == bytes(range(100))
        assert 10 < b.lane.traffic.lost < 60
        assert b.sink.arrivals[-1] > 0.05 + 0.3  # the timer of a loss: round trip + 200 ms

    run(scene)


def test_in_a_stall_nothing_moves_and_then_all_of_it() -> None:
    async def scene() -> None:
        b = Bench()
        b.pipe.push(b"before")
        b.lane.still_until = 0.5
        await asyncio.sleep(0.2)
        b.pipe.push(b"within")
        await asyncio.sleep(1)
        assert b.sink.arrivals == [0.5, 0.5]
        assert b.sink.data == b"beforewithin"

    run(scene)


def test_after_a_blackout_a_sender_waits_for_its_timer_and_others_do_not() -> None:
    async def scene() -> None:
        lane = Lane(EXACT, Traffic())
        old, new = Bench(lane=lane), Bench(lane=lane)
        lane.dark_until = 1.0
        old.pipe.push(b"x")  # timer 0.3 s: tries at 0.3, 0.9, 2.1
        await asyncio.sleep(1.0)
        new.pipe.push(b"x")
        await asyncio.sleep(5)
        assert old.sink.arrivals == [2.150001]
        assert new.sink.arrivals == [1.050001]

    run(scene)


@pytest.mark.parametrize("n", [0, 1, 99, 100, 101, 250])
def test_a_cut_lets_exactly_n_bytes_through(n: int) -> None:
    async def scene() -> None:
        b = Bench()
        b.lane.cut_after = n
        for _ in range(3):
            b.pipe.push(bytes(100))
        await asyncio.sleep(1)
        assert len(b.sink.data) == n
        assert len(b.resets) == 1
        assert b.lane.cut_after is None
        assert b.lane.traffic.n_bytes + b.lane.traffic.swallowed == 300

    run(scene)


def test_a_cut_waits_until_a_slow_receiver_has_taken_its_bytes() -> None:
    async def scene() -> None:
        b = Bench()
        b.sink.on_write = b.pipe.hold  # its buffers are full at once
        b.lane.cut_after = 10
        b.pipe.push(bytes(20))
        await asyncio.sleep(1)
        assert (len(b.sink.data), b.resets) == (10, [])
        b.pipe.go_on()
        assert (len(b.sink.data), b.resets) == (10, [1.0])

    run(scene)


def test_a_sender_is_held_up_when_the_link_is_full_and_goes_on_when_there_is_room() -> None:
    async def scene() -> None:
        b = Bench()
        b.pipe.push(bytes(EXACT.window))
        assert not b.source.is_read
        await asyncio.sleep(0.05 + EXACT.window * 1e-6 / 4)
        assert not b.source.is_read
        await asyncio.sleep(1)
        assert b.source.is_read
        assert len(b.sink.data) == EXACT.window

    run(scene)


def test_a_receiver_that_does_not_read_holds_up_the_pipe() -> None:
    async def scene() -> None:
        b = Bench()
        b.pipe.hold()
        b.pipe.push(b"x")
        await asyncio.sleep(5)
        assert b.sink.arrivals == []
        b.pipe.go_on()
        await asyncio.sleep(1)
        assert b.sink.arrivals == [5.0]

    run(scene)


def test_an_end_travels_behind_the_bytes() -> None:
    async def scene() -> None:
        b = Bench()
        b.pipe.push(b"last")
        b.pipe.end(End.FIN)
        assert b.sink.ended_at is None
        await asyncio.sleep(1)
        assert b.sink.arrivals == [0.050004]
        assert b.sink.ended_at == pytest.approx(0.050004)

    run(scene)


def test_a_reset_travels_behind_the_bytes_too() -> None:
    async def scene() -> None:
        b = Bench()
        b.pipe.push(b"last")
        b.pipe.end(End.RST)
        await asyncio.sleep(1)
        assert b.sink.data == b"last"
        assert b.resets == [0.050004]

    run(scene)


def test_a_pipe_that_swallows_delivers_nothing_and_keeps_reading() -> None:
    async def scene() -> None:
        b = Bench()
        b.pipe.push(bytes(EXACT.window))
        b.pipe.swallow()
        assert b.source.is_read
        b.pipe.push(b"more")
        b.pipe.end(End.FIN)
        await asyncio.sleep(1)
        assert b.sink.written == []
        assert b.sink.ended_at is None
        assert b.lane.traffic.swallowed == EXACT.window + 4

    run(scene)


@pytest.fixture(autouse=True)
def no_task_fails_unseen(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """asyncio logs what a timer raised instead of raising it."""
    yield
    assert [r.message for r in caplog.records if r.name == "asyncio"] == []
