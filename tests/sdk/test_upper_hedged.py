"""Two upper sides: the same tokens as from one, whichever is late, lost, wrong or in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from nearfar.cancel import Cancel
from nearfar.errors import UpperError, UsageError
from nearfar.lower import Lower, open_lower
from nearfar.upper import LocalLink, LocalUpper, Lost, News
from nearfar.upper_hedged import HedgedUpper
from nearfar.upper_remote import RemoteUpper
from nearfar.weights import Weights
from nearfar.wire.messages import (
    Ask,
    ClientHello,
    CodecSpec,
    Cut,
    Err,
    Ids,
    Mode,
    Open,
    Opened,
    Rows,
    Up,
    Verdict,
)
from nearfar.wire.transcript import Transcript
from tests.sdk.small_device import BY_IDS, BY_ROWS, Device, opening, oracle
from tests.sdk.wire_server import MODEL_FP, Door, WireServer
from tests.tiny import write_tiny

HELLO = ClientHello(MODEL_FP, {}, (BY_ROWS, BY_IDS))
N = 20


@pytest.fixture(scope="module")
def lower(tmp_path_factory: pytest.TempPathFactory) -> Lower:
    path = tmp_path_factory.mktemp("hedged") / "m.gguf"
    return open_lower(Weights.open(write_tiny(path, d_model=64, d_ff=64, n_layers=3, seed=3)), "numpy")


@pytest.fixture(scope="module", params=[BY_IDS, BY_ROWS], ids=["ids", "rows"])
def codec(request: pytest.FixtureRequest) -> CodecSpec:
    return request.param


@contextmanager
def two(lower: Lower) -> Iterator[tuple[WireServer, WireServer, HedgedUpper]]:
    with WireServer(Door(lower)) as a, WireServer(Door(lower)) as b:
        upper = HedgedUpper(RemoteUpper(a.url, hello=HELLO), RemoteUpper(b.url, hello=HELLO))
        yield a, b, upper
        upper.close()


def test_a_late_side_is_overtaken_and_both_agree(lower: Lower, codec: CodecSpec) -> None:
    with two(lower) as (a, b, upper):
        truth = oracle(lower, codec, N)

        def slow_down(n: int) -> None:
            a.door.delay_s = 0.6 if n > 4 else 0.0

        device = Device(upper.open(opening(codec)), lower, codec, truth, slow_down)
        assert device.answer(N) == truth
        assert b.door.n_opened == 1
        assert upper.counts.won > 0
        assert upper.counts.differed == 0
        device.window = 1  # until the late ones have come
        deadline = time.monotonic() + 6
        while not upper.counts.agreed and time.monotonic() < deadline:
            for news in device.link.receive(0.1):
                device.on(news)
        assert upper.counts.agreed > 0


def test_a_side_that_dies_is_not_even_noticed(lower: Lower, codec: CodecSpec) -> None:
    with two(lower) as (a, b, upper):
        truth = oracle(lower, codec, N)

        def hurt(n: int) -> None:
            a.door.delay_s = 0.6 if n > 4 else 0.0  # the second one is called ...
            if any(isinstance(message, Ask) for message in b.door.seen):
                a.stop()  # ... and has been asked

        device = Device(upper.open(opening(codec)), lower, codec, truth, hurt)
        assert device.answer(N) == truth
        assert device.n_lost == 0
        assert a.door.epoch > 1


def test_sides_that_die_in_turn_cost_no_token(lower: Lower, codec: CodecSpec) -> None:
    with two(lower) as (a, b, upper):
        truth = oracle(lower, codec, N)

        def hurt(n: int) -> None:
            if n % 4 == 0:
                (a, b)[n // 4 % 2].stop()
            elif n % 4 == 2 and n > 4:
                (a, b)[n // 4 % 2].start()

        device = Device(upper.open(opening(codec)), lower, codec, truth, hurt)
        assert device.answer(N) == truth
        assert b.door.n_opened >= 1


def test_cloud_only_takes_one_side(lower: Lower) -> None:
    with two(lower) as (_, _, upper), pytest.raises(UsageError, match="cannot both generate"):
        upper.open(replace(opening(BY_IDS), mode=Mode.CLOUD_ONLY))


# ------------------------------------------------------------ sides in this process


class Scripted(LocalUpper):
    """In this process, with news that may be held back or falsified."""

    def __init__(self, lower: Lower, change: object = None, deadline_s: float = 0.0) -> None:
        super().__init__(lower, 512)
        self.change, self.late_s = change, deadline_s
        self.links: list[ScriptedLink] = []

    def open(self, opening: Open, cancel: Cancel | None = None) -> ScriptedLink:
        self.links.append(ScriptedLink(super().open(opening, cancel), self))
        return self.links[-1]


class ScriptedLink:
    def __init__(self, link: LocalLink, upper: Scripted) -> None:
        self.link, self.upper = link, upper
        self.traffic, self.max_run, self.max_context = link.traffic, link.max_run, link.max_context
        self.heard: list[Up] = []
        self.is_closed = False

    def send(self, message: Up) -> None:
        self.heard.append(message)
        self.link.send(message)

    def receive(self, timeout_s: float) -> list[News]:
        news = self.link.receive(timeout_s)
        changed = [n if self.upper.change is None else self.upper.change(n) for n in news]  # type: ignore[operator]
        found = [n for n in changed if n is not None]
        if not found:
            time.sleep(min(timeout_s, 0.01))
        return found

    def deadline_s(self) -> float:
        return self.upper.late_s

    def close(self) -> None:
        self.is_closed = True


def without_verdicts(news: News) -> News | None:
    return None if isinstance(news, Verdict) else news


def false_hash(news: News) -> News:
    return replace(news, state_hash=b"8 bytes?") if isinstance(news, Verdict) else news


def other_token(news: News) -> News:
    return replace(news, ids=(1,), n_accept=0) if isinstance(news, Verdict) else news


def test_while_the_first_side_is_in_time_the_second_is_not_called(lower: Lower, codec: CodecSpec) -> None:
    truth, second = oracle(lower, codec, N), Scripted(lower)
    upper = HedgedUpper(Scripted(lower, deadline_s=60.0), second)
    assert Device(upper.open(opening(codec)), lower, codec, truth).answer(N) == truth
    assert second.links == []
    assert upper.counts.called == 0
    upper.close()


def test_a_side_that_never_answers_is_replaced(lower: Lower, codec: CodecSpec) -> None:
    truth = oracle(lower, codec, N)
    upper = HedgedUpper(Scripted(lower, without_verdicts), Scripted(lower))
    assert Device(upper.open(opening(codec)), lower, codec, truth).answer(N) == truth
    assert upper.counts.won > 0
    upper.close()


def test_an_impossible_verdict_is_not_told_while_another_side_is_there(lower: Lower, codec: CodecSpec) -> None:
    """The second side is called at once, for the first one is always late; then the first one lies."""
    truth = oracle(lower, codec, N)
    first = Scripted(lower, without_verdicts)

    def lie(n: int) -> None:
        first.change = false_hash

    upper = HedgedUpper(first, Scripted(lower))
    assert Device(upper.open(opening(codec)), lower, codec, truth, lie).answer(N) == truth
    assert first.links[0].is_closed
    upper.close()


def test_verdicts_that_differ_are_counted(lower: Lower) -> None:
    """Another token, which can be right as far as a device knows: the first one to say something is believed."""
    first, second = Scripted(lower), Scripted(lower, other_token)
    upper = HedgedUpper(first, second)
    device = Device(upper.open(opening(BY_IDS)), lower, BY_IDS)
    device.answer(6)
    deadline = time.monotonic() + 6
    while not upper.counts.differed and time.monotonic() < deadline:
        device.work()
        for news in device.link.receive(0.01):
            device.on(news)
    assert upper.counts.differed > 0
    upper.close()


def test_a_refusal_of_one_side_is_not_the_end(lower: Lower) -> None:
    truth = oracle(lower, BY_IDS, N)
    first = Scripted(lower)

    def refuse(n: int) -> None:
        first.change = lambda news: Lost("gone", final=True) if isinstance(news, Verdict) else news

    upper = HedgedUpper(first, Scripted(lower))
    device = Device(upper.open(opening(BY_IDS)), lower, BY_IDS, truth, refuse)
    assert device.answer(N) == truth
    upper.close()


def test_when_both_are_gone_for_good_the_driver_hears_it(lower: Lower) -> None:
    gone = lambda news: Lost("gone", final=True) if isinstance(news, Verdict) else news  # noqa: E731
    upper = HedgedUpper(Scripted(lower, gone), Scripted(lower, gone))
    device = Device(upper.open(opening(BY_IDS)), lower, BY_IDS)
    with pytest.raises(AssertionError, match="gone"):
        device.answer(N)
    upper.close()


class Absent(LocalUpper):
    """Nobody takes the connection, which is noticed after a while."""

    def open(self, opening: Open, cancel: Cancel | None = None) -> LocalLink:
        time.sleep(0.05)
        raise UpperError("nobody is there")


def test_a_second_side_that_cannot_be_had_is_said_once(lower: Lower, caplog: pytest.LogCaptureFixture) -> None:
    upper = HedgedUpper(Scripted(lower), Absent(lower, 512))
    truth = oracle(lower, BY_IDS, N)
    assert Device(upper.open(opening(BY_IDS)), lower, BY_IDS, truth).answer(N) == truth
    assert [record.message for record in caplog.records] == ["no second upper side: nobody is there"]
    upper.close()


def test_where_the_second_side_cannot_be_had_the_end_of_the_first_is_the_end(lower: Lower) -> None:
    upper = HedgedUpper(Scripted(lower, lambda news: Lost("gone", final=True)), Absent(lower, 512))
    link, told, deadline = upper.open(opening(BY_IDS)), list[News](), time.monotonic() + 6
    while time.monotonic() < deadline and not told:
        told += link.receive(0.01)
    assert told == [Lost("no second upper side: nobody is there", final=True)]
    upper.close()


# ------------------------------------------------------------ the transcript


def test_a_transcript_tells_what_counts_and_nothing_that_was_cut() -> None:
    t = Transcript(by_ids=False)
    row = [bytes([i]) * 4 for i in range(9)]
    for message in (
        Rows(0, 0, (row[0], row[1], row[2]), (0, 1, 2)),
        Ask(1, 0, 2, 0, (5, 6)),
        Cut(1, 2),
        Rows(1, 2, (row[7],), (7,)),
        Rows(1, 1, (row[1], row[7], row[8]), (1, 7, 8)),
        Ask(2, 1, 3, 2, (9,)),
    ):
        t.hear(message)
    assert t.said(1) == [Rows(1, 1, (row[1], row[7], row[8]), (1, 7, 8)), Ask(2, 1, 3, 2, (9,))]
    assert t.catch_up(Opened(0, 3, 0, 1)) == ([Cut(1, 2)], 2)
    assert t.catch_up(Opened(1, 3, 0, 1)) == ([], 3)


def test_a_side_that_missed_two_cuts_is_cut_at_the_deeper_one() -> None:
    t = Transcript(by_ids=True)
    for message in (Ids(0, 0, tuple(range(10))), Cut(1, 3), Ids(1, 3, (7,) * 6), Cut(2, 8), Ids(2, 8, (9,))):
        t.hear(message)
    assert t.catch_up(Opened(0, 10, 0, 1)) == ([Cut(2, 3)], 3)
    assert t.said(3) == [Ids(2, 3, (7, 7, 7, 7, 7, 9))]


def test_long_transcripts_are_told_in_messages_of_sixteen_kibibytes() -> None:
    t = Transcript(by_ids=False)
    rows = tuple(bytes([i]) * 5000 for i in range(10))
    t.hear(Rows(0, 0, rows, tuple(range(10))))
    said = t.said(0)
    assert [len(m.data) for m in said if isinstance(m, Rows)] == [3, 3, 3, 1]
    assert b"".join(b"".join(m.data) for m in said if isinstance(m, Rows)) == b"".join(rows)
    assert Err not in map(type, said)
