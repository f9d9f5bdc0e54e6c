"""The upper side of an answer, one message at a time: what it takes, what it refuses, what it forgets."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import pytest

from nearfar.sampling import Sampling
from nearfar.wire.hashes import START, chain, crc_of_id, settings_hash
from nearfar.wire.messages import (
    Ask,
    Close,
    Code,
    CodecId,
    CodecSpec,
    Commit,
    Cut,
    Err,
    Ids,
    Mode,
    Need,
    Open,
    Opened,
    Ping,
    Pong,
    Rows,
    Up,
    Verdict,
)
from nearfar.wire.session import MAX_OPEN_ASKS, Append, Decide, Effect, End, Forget, Reply, UpperSession

OPENING = Open(b"s" * 16, 0, Mode.LOSSLESS, CodecSpec(CodecId.FP16), 2, stop_ids=(0,))
BY_IDS = Open(b"s" * 16, 0, Mode.CLOUD_ONLY, CodecSpec(CodecId.IDS), 0, stop_ids=(0,))


def session(*messages: Up, opening: Open = OPENING, **limits: Any) -> UpperSession:
    s = UpperSession(
        opening, 0 if opening is BY_IDS else 4, **{"max_positions": 50, "n_vocab": 100, "max_run": 8} | limits
    )
    for message in messages:
        s.on(message)
    return s


def rows(first: int, n: int, gen: int = 0) -> Rows:
    data = tuple(bytes([i] * 4) for i in range(first, first + n))
    return Rows(gen, first, data, tuple(map(crc32, data)))


def refusal(effects: list[Effect]) -> Code | None:
    """The code of the one error that this was answered with."""
    match effects:
        case [Reply(Err(code))]:
            return code
    return None


# ------------------------------------------------------------ what comes in


def test_rows_wait_until_somebody_asks() -> None:
    s = session()
    assert s.on(rows(0, 3)) == [Append(0, rows(0, 3).data)]
    ask = Ask(1, 0, 2, 1, (7,))
    assert s.on(ask) == [Decide(ask, (7,))]
    assert s.absorbed == 0
    (reply,) = s.decided(1, 1, 9, margin=0.5)
    state = START
    for crc in rows(0, 3).crc32:
        state = chain(state, crc)
    assert reply == Reply(Verdict(1, 0, 2, 1, (9,), 0.5, state))
    assert s.absorbed == 3


def test_ids_are_their_own_drafts() -> None:
    s = session(Ids(0, 0, (5, 6, 7)), opening=BY_IDS)
    ask = Ask(1, 0, 2, 0)
    assert s.on(ask) == [Decide(ask, (6, 7))]
    (reply,) = s.decided(1, 2, 9)
    state = START
    for token in (5, 6, 7):
        state = chain(state, crc_of_id(token))
    assert reply == Reply(Verdict(1, 0, 1, 2, (9,), state_hash=state))


def test_what_comes_again_is_taken_once() -> None:
    s = session(rows(0, 3))
    assert s.on(rows(0, 3)) == []
    assert s.on(rows(1, 4)) == [Append(3, rows(3, 2).data)]
    assert s.n_rows == 5


def test_other_rows_in_the_same_place_are_loud() -> None:
    s = session(rows(0, 3))
    other = Rows(0, 2, (b"abcd",), (crc32(b"abcd"),))
    assert refusal(s.on(other)) == Code.DIVERGED
    assert s.n_rows == 3


def test_a_gap_is_told_once() -> None:
    s = session(rows(0, 3))
    assert s.on(rows(5, 2)) == [Reply(Need(0, 3, "gap"))]
    assert s.on(rows(7, 2)) == []
    assert s.on(Ask(1, 0, 8, 8)) == []
    assert s.on(rows(3, 6)) == [Append(3, rows(3, 6).data)]
    assert s.on(rows(20, 1)) == [Reply(Need(0, 9, "gap"))]


def test_messages_of_another_generation_are_dropped_and_counted() -> None:
    s = session(rows(0, 3), Cut(2, 1))
    for message in (rows(1, 2, gen=0), rows(1, 2, gen=3), Ask(1, 0, 0, 0), Cut(2, 0), Cut(1, 0)):
        assert s.on(message) == []
    assert (s.n_stale, s.n_rows, s.gen) == (5, 1, 2)


def test_a_connection_is_told_what_is_here() -> None:
    s = session(rows(0, 3), Ask(1, 0, 1, 0, (7,)), epoch=9, resume_token=b"again")
    s.decided(1, 0, 8)
    assert s.on(OPENING) == [Reply(Opened(0, 3, 2, 9, b"again", settings_hash(OPENING)))]


def test_a_ping_is_answered() -> None:
    assert session().on(Ping(7)) == [Reply(Pong(7))]


# ------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    "message",
    [
        Ids(0, 0, (1,)),
        Rows(0, 0, (), ()),
        Rows(0, 0, (b"abc",), (crc32(b"abc"),)),
        Rows(0, 0, (b"abcd", b"abcde"), (crc32(b"abcd"), crc32(b"abcde"))),
        Rows(0, 0, (b"abcd",), (1,)),
        Rows(0, 0, (b"abcd",), ()),
        Ask(1, 0, 1, 2),
        Ask(1, 0, 2, 0, (7,)),
        Ask(1, 0, 2, 1, (100,)),
        Ask(1, 0, 2, 1, (-1,)),
        Ask(1, 0, 2, 2, run=0),
        Ask(1, 0, 2, 2, run=2),
    ],
)
def test_messages_that_make_no_sense_are_refused_and_change_nothing(message: Up) -> None:
    s = session(rows(0, 3))
    assert refusal(s.on(message)) == Code.BAD_FRAME
    assert (s.n_rows, len(s.queue)) == (3, 0)


@pytest.mark.parametrize(
    "message",
    [
        rows(0, 1),
        Ids(0, 0, ()),
        Ids(0, 0, (100,)),
        Ids(0, 0, (5, -1)),
        Ask(1, 0, 2, 1, (7,)),
        Ask(1, 0, 2, 2, run=9),
        Ask(1, 0, 2, 1, run=2),  # drafts, and then on by itself
    ],
)
def test_with_ids_other_messages_make_no_sense(message: Up) -> None:
    s = session(Ids(0, 0, (5, 6, 7)), opening=BY_IDS)
    assert refusal(s.on(message)) == Code.BAD_FRAME
    assert (s.ids, len(s.queue)) == ([5, 6, 7], 0)


def test_other_settings_are_another_answer() -> None:
    other = Open(b"s" * 16, 0, Mode.LOSSLESS, CodecSpec(CodecId.FP16), 2, Sampling(seed=1), stop_ids=(0,))
    assert refusal(session().on(other)) == Code.MISMATCH


def test_more_than_the_model_or_the_quota_takes_is_refused() -> None:
    assert refusal(session(rows(0, 3), max_positions=4).on(rows(3, 2))) == Code.QUOTA
    assert refusal(session(rows(0, 3), max_bytes=16).on(rows(3, 2))) == Code.QUOTA
    assert session(rows(0, 3), max_positions=4, max_bytes=16).on(rows(3, 1)) == [Append(3, rows(3, 1).data)]


def test_only_so_many_asks_may_be_open() -> None:
    s = session(rows(0, 50))
    for req in range(MAX_OPEN_ASKS):
        s.on(Ask(req, 0, 0, 0))
    (reply,) = s.on(Ask(99, 0, 0, 0))
    assert isinstance(reply, Reply)
    assert isinstance(reply.message, Err)
    assert (reply.message.code, reply.message.retryable) == (Code.QUOTA, True)


# ------------------------------------------------------------ asks, one at a time


def asked_thrice() -> UpperSession:
    """Rows 0..5, asked up to 1, 3, 5."""
    return session(rows(0, 6), Ask(1, 0, 1, 0, (7,)), Ask(2, 0, 3, 2, (7,)), Ask(3, 0, 5, 4, (7,)))


def test_asks_are_decided_in_turn() -> None:
    s = asked_thrice()
    for req in (1, 2, 3):
        effects = s.decided(req, 1, 8)
        assert isinstance(effects[0], Reply)
        assert [e.ask.req for e in effects if isinstance(e, Decide)] == [req + 1][: 3 - req]
    assert not s.queue


def test_what_rests_on_a_refused_draft_is_not_decided() -> None:
    s = asked_thrice()
    assert [type(e) for e in s.decided(1, 0, 8)] == [Reply]
    assert s.on(Ask(4, 0, 5, 5)) == []
    assert s.on(Cut(1, 1)) == [Forget(1)]
    s.on(rows(1, 5, gen=1))
    assert s.on(Ask(4, 1, 5, 5)) == [Decide(Ask(4, 1, 5, 5), ())]


def test_asks_before_a_refused_draft_stay() -> None:
    """Streams that break can turn asks round."""
    s = session(rows(0, 6), Ask(3, 0, 5, 4, (7,)), Ask(2, 0, 3, 2, (7,)))
    effects = s.decided(3, 0, 8)
    assert [e.ask.req for e in effects if isinstance(e, Decide)] == [2]


def test_an_ask_that_comes_again_is_answered_from_memory() -> None:
    s = asked_thrice()
    first = s.decided(1, 1, 8)[0]
    assert s.on(Ask(1, 0, 1, 0, (7,))) == [first]
    assert s.on(Ask(2, 0, 3, 2, (7,))) == []  # at work
    assert s.on(Ask(3, 0, 5, 4, (7,))) == []  # in the queue
    assert s.n_repeated == 1


def test_a_commit_forgets_what_the_device_has() -> None:
    s = asked_thrice()
    s.decided(1, 1, 8)  # decides position 2
    s.decided(2, 0, 8)  # decides position 3
    s.on(Commit(3))
    assert list(s.verdicts) == [(2, 3)]
    s.on(Commit(4))
    assert not s.verdicts


def test_a_decision_of_what_was_cut_is_dropped() -> None:
    s = asked_thrice()
    s.on(Cut(1, 1))
    assert s.decided(1, 1, 8) == []
    assert s.failed(1, "too late") == []


def test_a_failure_can_be_asked_again() -> None:
    s = asked_thrice()
    (reply,) = s.failed(1, "no luck")
    assert reply == Reply(Err(Code.INTERNAL, "no luck", retryable=True, retry_after_ms=100))
    ask = Ask(1, 0, 1, 0, (7,))
    assert s.on(ask) == [Decide(ask, (7,))]


def test_it_goes_on_by_itself_for_as_long_as_it_was_asked() -> None:
    s = session(Ids(0, 0, (5, 6)), opening=BY_IDS)
    s.on(Ask(1, 0, 1, 1, run=3))
    said = [s.decided(1, 0, token) for token in (7, 8, 9)]
    assert [(e.message.pos0, e.message.ids) for (e,) in said if isinstance(e, Reply)] == [
        (2, (7,)),
        (3, (8,)),
        (4, (9,)),
    ]
    assert s.ids == [5, 6, 7, 8]  # the last one comes from the device
    assert not s.queue
    assert s.on(Ask(1, 0, 2, 2, run=2)) == said[1]
    assert s.on(Ask(2, 0, 1, 1, run=3)) == []  # an old one


@pytest.mark.parametrize(("token", "limits"), [(0, {}), (7, {"max_positions": 2})])
def test_it_goes_on_until_the_text_ends_or_the_model_is_full(token: int, limits: dict[str, int]) -> None:
    s = session(Ids(0, 0, (5, 6)), opening=BY_IDS, **limits)
    s.on(Ask(1, 0, 1, 1, run=3))
    s.decided(1, 0, token)
    assert (s.ids, len(s.queue)) == ([5, 6], 0)


# ------------------------------------------------------------ the end, and before it


def test_an_eviction_is_told_to_a_device_that_waits() -> None:
    assert asked_thrice().evict() == [Forget(0), Reply(Need(0, 0, "gap"))]
    s = session(rows(0, 6))
    assert s.evict() == [Forget(0)]
    assert (s.n_rows, s.n_bytes, s.absorbed, s.hashes) == (0, 0, 0, [])
    assert s.on(Ask(1, 0, 5, 5)) == [Reply(Need(0, 0, "gap"))]


def test_a_gap_before_an_eviction_is_another_gap_after_it() -> None:
    s = session(rows(0, 3), rows(5, 1))
    s.evict()
    assert s.on(rows(3, 3)) == [Reply(Need(0, 0, "gap"))]


def test_the_end_is_told_with_the_time_that_its_rows_may_serve() -> None:
    s = asked_thrice()
    assert s.on(Close(keep_s=30)) == [End(30)]
    assert s.decided(1, 1, 8) == []
