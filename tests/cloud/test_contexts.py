"""What the upper side holds for devices: taken up, replaced, given up; and nothing is left of what is over."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from random import Random
from typing import Any
from zlib import crc32

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("grpc", reason="grpcio is not installed (extra [cloud])")
pytest.importorskip("nearfar_native", reason="the compiled extension is not built")

from nearfar.sampling import Sampling
from nearfar.upper import LocalUpper
from nearfar.wire.codec import Codec
from nearfar.wire.messages import (
    Ask,
    Close,
    Code,
    CodecId,
    CodecSpec,
    Commit,
    Credit,
    Cut,
    Err,
    Ids,
    Mode,
    Need,
    Opened,
    Ping,
    Pong,
    Rows,
    Up,
    Verdict,
)
from nearfar.wire.rpc import Refused
from nearfar.wire.session import UpperSession
from nearfar_cloud.gateway.contexts import Connection
from nearfar_cloud.gateway.endpoint import Budget
from nearfar_cloud.gateway.limits import Key
from tests.cloud.collab import EVERYBODY, MAX_LEN, Line, World, in_world, new_lower, truth
from tests.sdk.small_device import BY_IDS, BY_ROWS, PROMPT

TOKENS = truth(BY_IDS)


def ids(*more: int) -> Ids:
    return Ids(0, 0, (*PROMPT, *more))


ASK = Ask(1, 0, len(PROMPT) - 1, len(PROMPT) - 1)


@in_world()
async def test_an_answer_is_asked_told_and_closed(world: World) -> None:
    connection, line, opened = await world.opened()
    assert (opened.gen, opened.rows, opened.absorbed, opened.epoch) == (0, 0, 0, world.contexts.epoch)
    connection.on(ids())
    connection.on(ASK)
    verdict = await line.next(Verdict)
    assert (verdict.req, verdict.pos0, verdict.n_accept, verdict.ids) == (1, len(PROMPT), 0, (TOKENS[0],))
    connection.on(Ping(7))
    assert await line.next(Pong) == Pong(7)
    connection.on(Close())
    connection.left()
    await world.quiet()


@in_world()
async def test_a_repeated_ask_is_answered_from_what_was_kept(world: World) -> None:
    connection, line, _ = await world.opened()
    connection.on(ids())
    connection.on(ASK)
    first = await line.next(Verdict)
    connection.on(ASK)
    assert await line.next(Verdict) == first
    assert (world.contexts.counts.asks, world.contexts.counts.repeated) == (1, 1)


@in_world()
async def test_a_verdict_on_what_was_cut_is_never_told(world: World) -> None:
    """The same number asks again in the next generation: the first question's answer is not its answer."""
    connection, line, _ = await world.opened()
    connection.on(ids(TOKENS[0], 1, 2, 3))
    connection.on(Ask(1, 0, len(PROMPT) + 3, len(PROMPT) - 1))
    connection.on(Cut(1, len(PROMPT)))
    connection.on(Ids(1, len(PROMPT), (TOKENS[0], TOKENS[1])))
    connection.on(Ask(1, 1, len(PROMPT) + 1, len(PROMPT) - 1))
    verdict = await line.next(Verdict)
    assert (verdict.gen, verdict.n_accept, verdict.ids) == (1, 2, (TOKENS[2],))
    await line.silence()


@in_world()
async def test_asks_of_one_answer_wait_for_each_other(world: World) -> None:
    connection, line, _ = await world.opened()
    connection.on(ids(*TOKENS[:3]))
    for i in range(3):
        connection.on(Ask(i, 0, len(PROMPT) - 1 + i, len(PROMPT) - 1 + i))
    assert [(await line.next(Verdict)).ids[0] for _ in range(3)] == TOKENS[:3]


@in_world()
async def test_a_run_tells_each_token_and_the_answer_goes_on_from_there(world: World) -> None:
    connection, line, _ = await world.opened(mode=Mode.CLOUD_ONLY)
    connection.on(ids())
    connection.on(Ask(1, 0, len(PROMPT) - 1, len(PROMPT) - 1, run=4))
    assert [(await line.next(Verdict)).ids[0] for _ in range(4)] == TOKENS[:4]
    connection.on(Ids(0, len(PROMPT) + 3, (TOKENS[3],)))
    connection.on(Ask(2, 0, len(PROMPT) + 3, len(PROMPT) + 3, run=2))
    assert [(await line.next(Verdict)).ids[0] for _ in range(2)] == TOKENS[4:6]
    connection.on(Close())
    await world.quiet()


@in_world()
async def test_a_run_ends_with_a_stop_id(world: World) -> None:
    connection, line, _ = await world.opened(mode=Mode.CLOUD_ONLY, stop_ids=(TOKENS[2],))
    at = TOKENS.index(TOKENS[2])
    connection.on(ids())
    connection.on(Ask(1, 0, len(PROMPT) - 1, len(PROMPT) - 1, run=10))
    assert [(await line.next(Verdict)).ids[0] for _ in range(at + 1)] == TOKENS[: at + 1]
    await line.silence()


@in_world()
async def test_a_run_ends_where_the_context_ends(world: World) -> None:
    connection, line, _ = await world.opened(mode=Mode.CLOUD_ONLY)
    for i in range(0, 510, 10):
        connection.on(Ids(0, i, tuple(range(10))))
    connection.on(Ask(1, 0, 509, 509, run=50))
    verdicts = [await line.next(Verdict) for _ in range(3)]
    assert [v.pos0 for v in verdicts] == [510, 511, 512]
    await line.silence()
    connection.on(Close())
    await world.quiet()


@in_world()
async def test_ids_that_come_while_the_engine_goes_on_by_itself_end_the_session(world: World) -> None:
    connection, line, _ = await world.opened(mode=Mode.CLOUD_ONLY)
    connection.on(ids())
    connection.on(Ask(1, 0, len(PROMPT) - 1, len(PROMPT) - 1, run=100))
    connection.on(Ids(0, len(PROMPT), (1,)))
    while isinstance(message := await line.any(), Verdict):
        pass
    assert isinstance(message, Err)
    assert message.code == Code.BAD_FRAME
    await world.quiet()


@in_world()
async def test_the_last_row_is_told_to_who_wants_it(world: World) -> None:
    connection, line, _ = await world.opened(want_hidden=True)
    connection.on(ids())
    connection.on(ASK)
    link = LocalUpper(new_lower(), MAX_LEN).open(replace(world.opening(), want_hidden=True))
    link.send(ids())
    link.send(ASK)
    assert isinstance(link.receive(0)[0], Opened)
    (expected,) = link.receive(0)
    assert isinstance(expected, Verdict)
    verdict = await line.next(Verdict)
    assert len(verdict.hidden) == 2 * 256
    assert (verdict.hidden, verdict.margin, verdict.state_hash) == (
        expected.hidden,
        expected.margin,
        expected.state_hash,
    )


# ---------------------------------------------------------------- connections


@in_world()
async def test_with_its_token_a_session_goes_on_and_the_old_connection_ends(world: World) -> None:
    first, line, opened = await world.opened()
    first.on(ids())
    first.on(ASK)
    await line.next(Verdict)
    second, other, again = await world.opened(resume_token=opened.resume_token)
    assert (again.rows, again.absorbed) == (len(PROMPT), len(PROMPT))
    assert (await line.next(Err)).code == Code.DENIED
    first.on(Cut(1, 0))  # what still comes of the old connection does not count
    first.left()
    second.on(ASK)
    assert (await other.next(Verdict)).ids == (TOKENS[0],)
    assert world.contexts.counts.resumed == 1
    second.on(Close())
    await world.quiet()


@in_world()
async def test_a_verdict_for_a_device_that_is_away_waits_for_it(world: World) -> None:
    first, _line, opened = await world.opened()
    first.on(ids())
    first.on(ASK)
    first.left()
    while not world.contexts.counts.tokens:  # the event loop has heard of it
        await asyncio.sleep(0.001)
    second, line, again = await world.opened(resume_token=opened.resume_token)
    assert again.absorbed == len(PROMPT)
    second.on(ASK)
    assert (await line.next(Verdict)).ids == (TOKENS[0],)
    assert world.contexts.counts.asks == 1


@pytest.mark.parametrize("token", [b"", b"x" * 16], ids=["none", "wrong"])
def test_without_its_token_nothing_of_a_session_is_told(token: bytes) -> None:
    @in_world()
    async def check(world: World) -> None:
        first, line, _ = await world.opened()
        first.on(ids())
        _second, _other, again = await world.opened(resume_token=token)
        assert (again.gen, again.rows) == (0, 0)
        assert (await line.next(Err)).code == Code.DENIED
        assert (world.contexts.counts.replaced, len(world.contexts)) == (1, 1)

    check()


@in_world()
async def test_the_same_session_of_another_key_is_another_session(world: World) -> None:
    first, line, opened = await world.opened(key=Key("alice"))
    first.on(ids())
    _second, _other, again = await world.opened(key=Key("bob"), resume_token=opened.resume_token)
    assert again.rows == 0
    assert again.resume_token != opened.resume_token
    await line.silence()
    assert len(world.contexts) == 2


@in_world()
async def test_settings_that_changed_end_the_session(world: World) -> None:
    first, _, opened = await world.opened()
    first.on(ids())
    first.left()
    _connection, line = world.connect(resume_token=opened.resume_token, sampling=Sampling(temperature=0.5))
    assert (await line.next(Err)).code == Code.MISMATCH
    await world.quiet()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"row_layer": 2}, "ids at layer 0"),
        ({"codec": BY_ROWS, "row_layer": 0}, "rows above it"),
        ({"codec": BY_ROWS, "row_layer": 4}, "expected 1..3"),
        ({"codec": BY_ROWS, "mode": Mode.CLOUD_ONLY}, "CLOUD_ONLY"),
        ({"codec": BY_ROWS, "sampling": Sampling(repetition_penalty=1.5)}, "repetition penalty"),
        ({"codec": CodecSpec(CodecId.INT8_OS, outliers=(256,))}, "outlier channels"),
        ({"version": 99}, "sampler version"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(fields: dict[str, Any], message: str) -> None:
    @in_world()
    async def check(world: World) -> None:
        rest = dict(fields)
        opening = replace(world.opening(codec=rest.pop("codec", BY_IDS)), **rest)
        with pytest.raises(Refused, match=message) as refused:
            world.contexts.open(EVERYBODY, opening, Line().stream)
        assert (refused.value.err.code, refused.value.err.retryable) == (Code.MISMATCH, False)
        await world.quiet()

    check()


def some_rows(n: int) -> Rows:
    """The rows of a text of `n` ids."""
    lower = new_lower()
    text = np.asarray([i * 37 % 300 for i in range(n)], np.int32)
    rows = Codec.of(BY_ROWS, 256).encode(lower.forward(lower.embed(text), lower.new_kv(n), 0, 2))
    return Rows(0, 0, tuple(rows), tuple(map(crc32, rows)))


@in_world()
async def test_rows_that_a_session_of_the_same_key_brought_are_not_computed_again(world: World) -> None:
    told = []
    for name, key in (("first", Key("alice")), ("second", Key("alice")), ("other", Key("bob"))):
        connection, line, _ = await world.opened(name, codec=BY_ROWS, key=key)
        connection.on(some_rows(70))
        connection.on(Ask(1, 0, 69, 69))
        verdict = await line.next(Verdict)
        told.append((verdict.ids, verdict.margin, verdict.state_hash))
        connection.on(Close())
    assert len(set(told)) == 1
    assert (world.engine.counts.row_hits, world.engine.counts.cached_tokens) == (1, 64)
    await world.quiet()


# ---------------------------------------------------------------- before anybody asks


async def settled(world: World) -> None:
    """The engine has nothing to do, and what it said has been heard."""
    world.service.wake()  # nobody does for rows that wait
    async with asyncio.timeout(10):
        while world.engine.has_work:
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)


EAGER = Budget(eager_absorb=True)


@pytest.mark.parametrize("codec", [BY_IDS, BY_ROWS], ids=["ids", "rows"])
@pytest.mark.parametrize("eager", [False, True], ids=["asked", "eager"])
def test_rows_run_before_anybody_asks_where_the_server_was_told_to(codec: CodecSpec, eager: bool) -> None:
    @in_world(budget=Budget(eager_absorb=eager))
    async def check(world: World) -> None:
        connection, line, opened = await world.opened(codec=codec)
        connection.on(some_rows(70) if codec == BY_ROWS else Ids(0, 0, tuple(range(70))))
        await settled(world)
        assert world.contexts.counts.early == (69 if eager else 0)
        connection, line, opened = await world.opened(codec=codec, resume_token=opened.resume_token)
        assert (opened.rows, opened.absorbed) == (70, 69 if eager else 0)
        before = world.engine.counts.rows
        connection.on(Ask(1, 0, 69, 69))
        await line.next(Verdict)
        whole = 70 if codec == BY_IDS else 35  # rows at the middle of the model pass half of it
        assert world.engine.counts.rows - before == (1 if eager else whole)
        connection.on(Close())
        await world.quiet()

    check()


@in_world(budget=EAGER)
async def test_of_a_lossless_answer_what_comes_before_the_first_ask_alone_runs_early(world: World) -> None:
    for mode, n_early in ((Mode.LOSSLESS, 4), (Mode.LOSSY, 4 + 3)):
        before = world.contexts.counts.early
        connection, line, opened = await world.opened(mode.name, mode=mode)
        connection.on(ids())
        await settled(world)
        connection.on(ASK)
        connection.on(Ids(0, len(PROMPT), (*TOKENS[:2],)))  # drafts, while the verdict is under way
        await line.next(Verdict)
        connection.on(Ids(0, len(PROMPT) + 2, (*TOKENS[2:4],)))
        await settled(world)
        assert world.contexts.counts.early - before == n_early
        # The next turn has a prompt again.
        connection.on(Close(keep_s=100))
        connection.left()
        connection, line, _ = await world.opened(mode.name, mode=mode, resume_token=opened.resume_token)
        connection.on(Ids(0, len(PROMPT) + 4, (1, 2, 3, 4, 5)))
        await settled(world)
        assert world.contexts.counts.early - before > n_early
        connection.on(Close())
    await world.quiet()


@in_world(budget=EAGER)
async def test_what_ran_early_and_was_cut_is_not_there(world: World) -> None:
    """The engine says that it has run rows that the device has taken back meanwhile."""
    run, is_heard = world.engine.executor.run, threading.Event()

    def held(batch: object) -> object:
        assert is_heard.wait(10)
        return run(batch)  # type: ignore[arg-type]

    world.engine.executor.run = held  # type: ignore[assignment,method-assign]
    connection, _, opened = await world.opened(codec=BY_ROWS)
    connection.on(some_rows(70))
    await asyncio.sleep(0.05)
    connection.on(Cut(1, 20))
    is_heard.set()
    await settled(world)
    assert world.contexts.counts.early == 69  # they cost what they cost
    connection, line, opened = await world.opened(codec=BY_ROWS, resume_token=opened.resume_token)
    assert (opened.rows, opened.absorbed) == (20, 0)
    assert world.engine.counts.early_lost == 49
    connection.on(Ask(1, 1, 19, 19))
    await line.next(Verdict)
    connection.on(Close())
    await world.quiet()


@in_world(budget=EAGER)
async def test_rows_that_run_early_count_as_tokens_of_the_key_and_none_run_on_credit(world: World) -> None:
    key = Key("alice", tokens_per_minute=10)
    connection, line, _ = await world.opened(key=key)
    connection.on(Ids(0, 0, tuple(range(30))))
    await settled(world)
    assert world.contexts.counts.early == 29
    connection.on(Ids(0, 30, tuple(range(30))))
    await settled(world)
    assert world.contexts.counts.early == 30  # the newest one of before
    with pytest.raises(Refused) as refused:
        connection.on(Ask(1, 0, 59, 59))
    assert refused.value.err.code == Code.QUOTA
    world.now += 180
    connection.on(Ask(1, 0, 59, 59))
    await line.next(Verdict)
    tokens = world.limits._tenant(key).tokens
    assert tokens is not None
    assert tokens.wait_s(1, world.now) == pytest.approx(6 * 22)  # 10 were there; the other 30 positions, and a token


@in_world()
async def test_what_was_computed_for_an_ask_that_is_taken_back_counts_as_tokens(world: World) -> None:
    run, n_runs, is_cut = world.engine.executor.run, 0, threading.Event()

    def held(batch: object) -> object:
        nonlocal n_runs
        n_runs += 1
        assert n_runs < 2 or is_cut.wait(10)
        return run(batch)  # type: ignore[arg-type]

    world.engine.executor.run = held  # type: ignore[assignment,method-assign]
    key = Key("alice", tokens_per_minute=1000)
    connection, line, opened = await world.opened(key=key)
    connection.on(Ids(0, 0, tuple(range(300))))
    connection.on(Ids(0, 300, tuple(range(100))))
    connection.on(Ask(1, 0, 399, 399))
    async with asyncio.timeout(10):
        while n_runs < 2:
            await asyncio.sleep(0.001)
    connection.on(Cut(1, 100))
    is_cut.set()
    tokens = world.limits._tenant(key).tokens
    assert tokens is not None
    n_first = 256  # rows of the one step that had ended
    assert tokens.size - tokens.level == n_first
    connection, line, opened = await world.opened(key=key, resume_token=opened.resume_token)
    assert (opened.rows, opened.absorbed) == (100, 100)
    connection.on(Ask(2, 1, 99, 99))
    await line.next(Verdict)
    assert tokens.size - tokens.level == n_first + 1
    connection.on(Ask(3, 1, 99, 90))
    connection.on(Close())
    assert tokens.size - tokens.level == n_first + 1 + 9
    await world.quiet()


# ---------------------------------------------------------------- time


@in_world()
async def test_a_device_that_does_not_come_back_is_forgotten(world: World) -> None:
    connection, _, opened = await world.opened()
    connection.on(ids())
    connection.left()
    world.now += 59
    world.contexts.sweep()
    assert len(world.contexts) == 1
    world.now += 2
    world.contexts.sweep()
    await world.quiet()
    assert world.contexts.counts.expired == 1
    _, _, again = await world.opened(resume_token=opened.resume_token)
    assert again.rows == 0


@in_world()
async def test_a_device_that_falls_silent_is_let_go(world: World) -> None:
    loud, line, _ = await world.opened("loud")
    silent, other, _ = await world.opened("silent")
    loud.on(ids())
    silent.on(ids())
    for i in range(7):
        world.now += 10
        loud.on(Ping(i))
        world.contexts.sweep()
    err = await other.next(Err)
    assert (err.code, err.retryable) == (Code.QUOTA, True)
    assert [c.machine.opening.session[:4] for c in world.contexts] == [b"loud"]
    assert len(line.heard) == 7
    loud.on(Close())
    await world.quiet()


@in_world()
async def test_the_next_turn_of_a_chat_finds_what_was_kept(world: World) -> None:
    connection, _, opened = await world.opened()
    connection.on(ids(*TOKENS[:2]))
    connection.on(Ask(1, 0, len(PROMPT) + 1, len(PROMPT) + 1, run=8))  # nobody waits for it any more
    connection.on(Close(keep_s=120))
    connection.left()
    world.now += 100
    world.contexts.sweep()
    second, line, again = await world.opened(resume_token=opened.resume_token)
    assert again.rows >= len(PROMPT) + 2
    second.on(Cut(1, len(PROMPT) + 2))
    second.on(Ask(2, 1, len(PROMPT) + 1, len(PROMPT) + 1))
    assert (await line.next(Verdict)).ids == (TOKENS[2],)
    second.on(Close(keep_s=10_000))
    world.now += 601
    world.contexts.sweep()
    await world.quiet()


# ---------------------------------------------------------------- memory


@in_world(budget=Budget(max_bytes=4 * 40))
async def test_the_oldest_idle_answer_makes_room_and_needs_its_rows_again(world: World) -> None:
    old, line, _ = await world.opened("old")
    old.on(Ids(0, 0, tuple(PROMPT * 4)))
    world.now += 2
    young, other, _ = await world.opened("young")
    young.on(Ids(0, 0, tuple(PROMPT * 4)))
    world.now += 2
    third, more, _ = await world.opened("third")
    third.on(ids())
    third.on(ASK)
    assert (await more.next(Verdict)).ids == (TOKENS[0],)
    assert world.contexts.counts.evicted == 1
    assert world.contexts.total.n_bytes == 4 * 25
    old.on(Ask(1, 0, 4, 4))
    assert await line.next(Need) == Need(0, 0, "gap")
    third.on(Close())
    old.on(ids())
    old.on(ASK)
    assert (await line.next(Verdict)).ids == (TOKENS[0],)
    await other.silence()
    for connection in (old, young):
        connection.on(Close())
    await world.quiet()


@in_world(budget=Budget(max_bytes=4 * 40))
async def test_while_everybody_is_busy_rows_have_to_wait(world: World) -> None:
    """No error, and nobody else is disturbed: the device pauses, and what was dropped is wanted again."""
    first, _, _ = await world.opened("first")
    first.on(Ids(0, 0, tuple(PROMPT * 7)))
    second, line, _ = await world.opened("second")
    second.on(ids())
    second.on(Ids(0, 5, (1, 2, 3)))
    credit = await line.next(Credit)
    assert (credit.n_bytes, credit.retry_after_ms) == (0, 500)
    second.on(Ids(0, 8, (4,)))
    assert await line.next(Need) == Need(0, 5, "gap")
    first.on(Close())
    second.on(Ids(0, 5, (1, 2, 3, 4)))
    assert world.contexts.total.n_positions == 9


@in_world(budget=Budget(max_bytes=4 * 40))
async def test_rows_that_were_cut_need_their_memory_until_the_engine_has_dropped_them(world: World) -> None:
    connection, line, _ = await world.opened()
    connection.on(Ids(0, 0, tuple(PROMPT * 7)))
    connection.on(Cut(1, 0))
    connection.on(Ids(1, 0, tuple(PROMPT * 7)))
    await line.next(Credit)
    world.contexts.sweep()
    connection.on(Ids(1, 0, tuple(PROMPT * 7)))
    assert world.contexts.total.n_bytes == 4 * 35
    connection.on(Close())
    await world.quiet()


@in_world()
async def test_rows_that_come_again_are_no_more_than_they_were(world: World) -> None:
    """A device that was started again sends everything in a new generation: its key's bounds are as before."""
    key = Key("alice", session_positions=40, session_bytes=4 * 40)
    connection, line, _ = await world.opened(key=key)
    for gen in range(5):
        connection.on(Ids(gen, 0, (*PROMPT, *[1] * 30)))
        connection.on(Cut(gen + 1, 0))
    connection.on(Ids(5, 0, tuple(PROMPT)))
    connection.on(replace(ASK, gen=5))
    assert (await line.next(Verdict)).ids == (TOKENS[0],)


@in_world(budget=Budget(max_bytes=4 * 40))
async def test_rows_that_find_no_room_twice_are_wanted_twice(world: World) -> None:
    """Who waits for room is never left without an answer to its ask."""
    first, _, _ = await world.opened("first")
    first.on(Ids(0, 0, tuple(PROMPT * 7)))
    second, line, _ = await world.opened("second")
    for _ in range(3):
        second.on(ids(1, 2, 3))
        await line.next(Credit)
        second.on(ASK)
        assert await line.next(Need) == Need(0, 0, "gap")
        await line.silence()
    first.on(Close())
    second.on(ids())
    second.on(ASK)
    assert (await line.next(Verdict)).ids == (TOKENS[0],)


@in_world()
async def test_what_is_cut_is_dropped_though_nobody_asks(world: World) -> None:
    """Rows wait in the engine's inbox until it steps: a device that only sends and cuts must not fill it."""
    connection, _, _ = await world.opened()
    connection.on(ids())
    for gen in range(300):
        connection.on(Ids(gen, len(PROMPT), (1, 2, 3)))
        connection.on(Cut(gen + 1, len(PROMPT)))
    async with asyncio.timeout(10):
        while world.engine.has_work:
            await asyncio.sleep(0.001)
    connection.on(Close())
    await world.quiet()


@pytest.mark.parametrize("wrong", ["short rows", "ids", "beyond the context"])
def test_what_is_no_row_drives_nobody_out(wrong: str) -> None:
    """A message that is refused anyway asks for no room."""

    @in_world(budget=Budget(max_bytes=1 << 16))
    async def check(world: World) -> None:
        quiet, _, _ = await world.opened("quiet")
        quiet.on(ids())
        world.now += 2
        rude, line, _ = await world.opened("rude", codec=BY_ROWS)
        size = Codec.of(BY_ROWS, 256).row_bytes
        rude.on(
            {
                "short rows": Rows(0, 0, (b"r",) * 1000, (crc32(b"r"),) * 1000),
                "ids": Ids(0, 0, (1,) * 1000),
                "beyond the context": Rows(0, 0, (bytes(size),) * 513, (crc32(bytes(size)),) * 513),
            }[wrong]
        )
        await line.next(Err)
        assert world.contexts.counts.evicted == 0
        quiet.on(ASK)

    check()


@in_world(budget=Budget(max_sessions=2))
async def test_sessions_of_devices_that_are_away_make_room_for_others(world: World) -> None:
    away, _, _ = await world.opened("away")
    away.on(ids())
    away.left()
    await world.opened("here")
    await world.opened("new")
    assert {c.machine.opening.session[:4] for c in world.contexts} == {b"here", b"new."}
    with pytest.raises(Refused) as refused:
        world.connect("third")
    assert (refused.value.err.code, refused.value.err.retryable) == (Code.OVERLOADED, True)


@in_world()
async def test_a_key_has_its_own_bounds_and_others_do_not_feel_them(world: World) -> None:
    key = Key("alice", sessions=2, session_positions=10, session_bytes=100)
    first, _, _ = await world.opened("1", key=key)
    second, line, _ = await world.opened("2", key=key)
    with pytest.raises(Refused) as refused:
        world.connect("3", key=key)
    assert refused.value.err.code == Code.QUOTA
    other, words, _ = await world.opened("3", key=Key("bob"))
    first.on(ids())
    second.on(ids())
    with pytest.raises(Refused) as refused:
        second.on(Ids(0, 5, (1,)))
    assert (refused.value.err.code, refused.value.err.retryable) == (Code.QUOTA, True)
    world.now += 2
    second.on(Ids(0, 5, (1,)))  # the first one is idle by now
    assert world.contexts.of["alice"].n_positions == 6
    with pytest.raises(Refused, match="10 positions"):
        second.on(Ids(0, 6, tuple(range(5))))
    other.on(ids())
    other.on(ASK)
    assert (await words.next(Verdict)).ids == (TOKENS[0],)
    await line.silence()


@pytest.mark.parametrize("of", ["key", "server"])
def test_a_run_takes_no_more_than_there_is(of: str) -> None:
    """Tokens that the engine adds by itself are positions, too."""
    bounds = {"budget": Budget(max_bytes=4 * 12)} if of == "server" else {}

    @in_world(**bounds)
    async def check(world: World) -> None:
        key = Key("alice", session_positions=12) if of == "key" else EVERYBODY
        connection, line, _ = await world.opened(mode=Mode.CLOUD_ONLY, key=key)
        connection.on(ids())
        connection.on(Ask(1, 0, len(PROMPT) - 1, len(PROMPT) - 1, run=8))  # the last token is no position yet
        assert [(await line.next(Verdict)).ids[0] for _ in range(8)] == TOKENS[:8]
        with pytest.raises(Refused) as refused:
            connection.on(Ask(2, 0, len(PROMPT) + 6, len(PROMPT) + 6, run=2))
        assert refused.value.err.code == (Code.QUOTA if of == "key" else Code.OVERLOADED)
        assert world.contexts.total.n_positions == 12
        connection.on(Close())
        await world.quiet()

    check()


@in_world(budget=Budget(max_bytes=4 * 12))
async def test_who_is_in_debt_drives_nobody_out(world: World) -> None:
    quiet, _, _ = await world.opened("quiet")
    quiet.on(ids())
    world.now += 2
    key = Key("alice", tokens_per_minute=10)
    connection, _, _ = await world.opened("debtor", key=key, mode=Mode.CLOUD_ONLY)
    connection.on(ids())
    world.limits.charge(key, 100)
    with pytest.raises(Refused) as refused:
        connection.on(Ask(1, 0, len(PROMPT) - 1, len(PROMPT) - 1, run=8))
    assert refused.value.err.code == Code.QUOTA
    assert world.contexts.counts.evicted == 0


@in_world()
async def test_rows_that_are_computed_again_count_again(world: World) -> None:
    key = Key("alice", tokens_per_minute=100)
    connection, line, _ = await world.opened(key=key)
    connection.on(ids(*TOKENS[:20]))
    for req in range(4):  # 20 + 1 each, and the prompt
        connection.on(Ask(req, 0, len(PROMPT) + 19, len(PROMPT) - 1))
        assert (await line.next(Verdict)).n_accept == 20
    connection.on(Ask(9, 0, len(PROMPT) + 19, len(PROMPT) - 1))
    await line.next(Verdict)
    with pytest.raises(Refused) as refused:
        connection.on(Ask(10, 0, len(PROMPT) + 19, len(PROMPT) - 1))
    assert refused.value.err.code == Code.QUOTA


@in_world()
async def test_the_longest_wait_fits_its_field(world: World) -> None:
    key = Key("alice", tokens_per_minute=1)
    connection, line, _ = await world.opened(key=key)
    connection.on(ids())
    world.limits.charge(key, 1 << 20)  # two years
    with pytest.raises(Refused) as refused:
        connection.on(ASK)
    line.stream.end(refused.value.err)
    assert (await line.next(Err)).retry_after_ms == (1 << 32) - 1


@in_world()
async def test_the_time_of_a_run_is_no_wait_for_the_engine(world: World) -> None:
    waited: list[float] = []
    world.contexts.on_wait = waited.append
    run = world.engine.executor.run

    def slow(batch: object) -> object:
        world.now += 1.0
        return run(batch)  # type: ignore[arg-type]

    world.engine.executor.run = slow  # type: ignore[assignment,method-assign]
    connection, line, _ = await world.opened(mode=Mode.CLOUD_ONLY)
    connection.on(ids())
    connection.on(Ask(1, 0, len(PROMPT) - 1, len(PROMPT) - 1, run=10))
    for _ in range(10):
        await line.next(Verdict)
    assert max(waited) < 5


@in_world()
async def test_positions_count_as_tokens_of_the_key(world: World) -> None:
    key = Key("alice", tokens_per_minute=10, requests_per_minute=2)
    connection, line, _ = await world.opened(key=key)
    connection.on(ids(*TOKENS[:8]))
    connection.on(Ask(1, 0, len(PROMPT) + 7, len(PROMPT) - 1))
    assert (await line.next(Verdict)).n_accept == 8  # 14 tokens: four more than there were
    with pytest.raises(Refused) as refused:
        connection.on(Ask(2, 0, len(PROMPT) + 7, len(PROMPT) + 7))
    assert refused.value.err.code == Code.QUOTA
    assert refused.value.err.retry_after_ms == 30_000
    world.now += 31
    connection.on(Ask(2, 0, len(PROMPT) + 7, len(PROMPT) + 7))
    assert (await line.next(Verdict)).ids == (TOKENS[8],)
    world.now += 60
    await world.opened("2", key=key)
    await world.opened("3", key=key)
    with pytest.raises(Refused, match="2 requests a minute"):
        world.connect("4", key=key)


@in_world()
async def test_more_positions_than_the_context_end_that_answer_alone(world: World) -> None:
    connection, line, _ = await world.opened("long")
    other, words, _ = await world.opened("short")
    for i in range(5):
        connection.on(Ids(0, 100 * i, (1,) * 100))
    connection.on(Ids(0, 500, (1,) * 13))
    assert (await line.next(Err)).code == Code.QUOTA
    other.on(ids())
    other.on(ASK)
    assert (await words.next(Verdict)).ids == (TOKENS[0],)
    other.on(Close())
    await world.quiet()


# ---------------------------------------------------------------- faults


@in_world()
async def test_a_sequence_that_fails_is_tried_again_and_not_for_ever(world: World) -> None:
    run, failing = world.engine.executor.run, True

    def faulty(batch: object) -> object:
        if failing:
            raise RuntimeError("a fault of the machine")
        return run(batch)  # type: ignore[arg-type]

    world.engine.executor.run = faulty  # type: ignore[assignment,method-assign]
    token = b""
    for attempt in range(4):
        connection, line, opened = await world.opened(resume_token=token)
        token = opened.resume_token
        assert opened.rows == 0
        failing = attempt == 0
        connection.on(ids())
        connection.on(ASK)
        if not failing:
            assert (await line.next(Verdict)).ids == (TOKENS[0],)
            connection.on(Close())
            break
        err = await line.next(Err)
        assert (err.code, err.retryable) == (Code.INTERNAL, True)
        connection.left()
    failing = True
    for left in (True, True, False):
        connection, line, opened = await world.opened("other", resume_token=token)
        token = opened.resume_token
        connection.on(ids())
        connection.on(ASK)
        assert (await line.next(Err)).retryable is left
        connection.left()
    await world.quiet()


@in_world()
async def test_when_the_engine_has_stopped_devices_are_sent_elsewhere(world: World) -> None:
    connection, line, opened = await world.opened()
    connection.on(ids())

    def step() -> None:
        raise RuntimeError("a fault of ours")

    world.engine.step = step  # type: ignore[assignment,method-assign]
    connection.on(ASK)
    err = await line.next(Err)
    assert (err.code, err.retryable) == (Code.INTERNAL, True)
    connection.left()
    again, _, _ = await world.opened("other", resume_token=opened.resume_token)
    with pytest.raises(Refused) as refused:
        again.on(ids())
    assert (refused.value.err.code, refused.value.err.retryable) == (Code.OVERLOADED, True)


@in_world()
async def test_a_server_that_stops_tells_everybody_and_keeps_nothing(world: World) -> None:
    connection, line, _ = await world.opened()
    connection.on(ids())
    world.contexts.is_draining = True
    with pytest.raises(Refused) as refused:
        world.connect("new")
    assert (refused.value.err.code, refused.value.err.retryable) == (Code.OVERLOADED, True)
    connection.on(ASK)
    assert (await line.next(Verdict)).ids == (TOKENS[0],)
    world.contexts.close()
    assert (await line.next(Err)).retryable
    await world.quiet()


@pytest.mark.parametrize("seed", range(8))
def test_any_words_in_any_order_harm_nobody_and_leave_nothing(seed: int) -> None:
    """Sessions of two keys that come, go, fill the memory and talk nonsense."""

    @in_world(budget=Budget(max_sessions=6, max_bytes=2500), n_blocks=6)
    async def check(world: World) -> None:
        chance, lines, tokens = Random(seed), list[tuple[Connection, Line]](), [b""]
        for _ in range(800):
            await asyncio.sleep(0 if chance.random() < 0.7 else 0.002)
            world.now += chance.choice((0, 0, 0.5, 2))
            lines = [pair for pair in lines if not pair[1].stream.is_over]
            if not lines or chance.random() < 0.05:
                codec, name = chance.choice((BY_IDS, BY_ROWS)), chance.choice("abcd")
                try:
                    connection, line = world.connect(
                        name, codec, Key(chance.choice("xy"), session_positions=60), resume_token=chance.choice(tokens)
                    )
                except Refused:
                    continue
                tokens.append(connection.context.machine.resume_token)
                lines.append((connection, line))
            connection, line = chance.choice(lines)
            try:
                connection.on(words(chance, connection.context.machine))
            except Refused as refused:
                line.stream.end(refused.err)
                connection.left()
            if chance.random() < 0.02:
                line.stream.end()
                connection.left()
            world.contexts.sweep()
        held = [c.machine for c in world.contexts]
        assert world.contexts.total.n_positions == sum(machine.n_reserved for machine in held)
        assert world.contexts.total.n_bytes == sum(machine.n_bytes for machine in held) <= 2500
        counts = world.contexts.counts
        assert min(counts.asks, counts.opened, counts.needs) > 5  # it was no idle talk
        assert counts.tokens > 0
        world.now += 1000
        world.contexts.sweep()
        await world.quiet()
        connection, line, _ = await world.opened("neighbour")
        connection.on(ids())
        connection.on(ASK)
        assert (await line.next(Verdict)).ids == (TOKENS[0],)

    check()


def words(chance: Random, machine: UpperSession) -> Up:
    """What a device could say now; one time in thirty it could not."""
    gen, n, by_ids = machine.gen, machine.n_rows, machine.by_ids
    if chance.random() < 0.03:
        gen, n, by_ids = gen + chance.choice((-1, 0, 1)), n + chance.choice((-1, 0, 1, 9)), chance.random() < 0.5
    n = max(0, n)
    match chance.randrange(10):
        case 0 | 1 | 2 if by_ids:
            return Ids(max(0, gen), n, tuple(chance.choices(range(320), k=chance.choice((1, 4, 8)))))
        case 0 | 1 | 2:
            rows = tuple(bytes(Codec.of(BY_ROWS, 256).row_bytes) for _ in range(chance.choice((1, 4))))
            return Rows(max(0, gen), n, rows, tuple(crc32(row) for row in rows))
        case 3 | 4 | 5 | 6:
            pos = max(0, n - 1)
            verify = max(0, pos - chance.choice((0, 0, 1, 3)))
            draft = () if by_ids else tuple(chance.choices(range(320), k=pos - verify))
            run = chance.choice((1, 1, 4)) if by_ids and verify == pos else 1
            return Ask(chance.randrange(1000), max(0, gen), pos, verify, draft, run)
        case 7:
            return Cut(gen + 1, chance.randrange(n + 1))
        case _:
            return chance.choice((Commit(n), Ping(n), Ping(n), Commit(n), Close(), Close(keep_s=5)))


def test_another_process_has_another_epoch() -> None:
    assert len({World().contexts.epoch for _ in range(3)}) == 3
    assert isinstance(Opened(0, 0, 0, 1), Opened)
