"""Positions from outside that run before anybody asks, with what is left of steps: the same answers, sooner."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("nearfar_native._core", reason="the extension is not built")

from nearfar.sampling import Sampling
from nearfar_cloud.engine import Engine
from nearfar_cloud.outside import ArrayRows, Question
from nearfar_cloud.scheduling.budget import Arrival, ChunkedPrefill
from nearfar_cloud.types import Output, Request
from tests.cloud import serving
from tests.cloud.outside import N_VOCAB, Reference, file, packed
from tests.cloud.serving import check_empty, engine, request

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = ("llama", "F32")
RNG = random.Random("a text")
TEXT = [RNG.randrange(N_VOCAB) for _ in range(300)]


def truth(entry: int = 0) -> Reference:
    reference = Reference(file(*MODEL), Sampling(), entry)
    reference.read(TEXT)
    return reference


def send(e: Engine, seq: int, start: int, end: int, entry: int = 0, *, early: bool = True) -> None:
    if entry:
        e.append(seq, rows=ArrayRows(truth(entry).rows[start:end]), early=early)
    else:
        e.append(seq, ids=TEXT[start:end], early=early)


def rest(e: Engine) -> list[Output]:
    """Step until nothing more happens."""
    outputs = []
    while e.has_work:
        outputs += e.step()
    return outputs


def check(e: Engine, seq: int, pos: int, verify_from: int | None = None) -> int:
    """Ask, and compare with the device's engine; how many rows that took."""
    n = e.counts.rows
    first = pos if verify_from is None else verify_from
    e.ask(seq, Question(1, pos, first, draft=() if verify_from is None else tuple(TEXT[first + 1 : pos + 1])))
    (out,) = rest(e)
    reference = truth()
    assert out.answer is not None
    assert out.ids[out.answer.n_accept] == reference.decides(first + out.answer.n_accept)
    assert out.answer.margin == reference.margin(first + out.answer.n_accept)
    return e.counts.rows - n


@pytest.mark.parametrize("entry", [0, 2])
def test_rows_that_may_run_early_do_and_the_ask_finds_them(entry: int) -> None:
    e = engine(model=packed(*MODEL))
    seq = e.submit(Request(entry=entry, outside=True))
    send(e, seq, 0, 150, entry)
    first = e.step()
    assert [(out.early.n, out.early.upto) for out in first if out.early] == [(149, 149)]  # the newest one waits
    send(e, seq, 150, 200, entry)
    assert [(out.early.n, out.early.upto) for out in rest(e) if out.early] == [(50, 199)]
    assert check(e, seq, 199) == 1
    assert (e.counts.early_rows, e.counts.early_lost) == (199, 0)
    e.abort(seq)
    e.step()
    check_empty(e)


def test_what_is_asked_about_again_ran_in_vain_and_so_did_what_is_cut() -> None:
    e = engine(model=packed(*MODEL))
    seq = e.submit(Request(outside=True))
    send(e, seq, 0, 150)
    rest(e)
    assert check(e, seq, 149, 139) == 11
    assert e.counts.early_lost == 10
    e.cut(seq, 140)
    send(e, seq, 140, 250)
    rest(e)
    e.cut(seq, 200)
    rest(e)
    assert e.counts.early_lost == 10 + 49
    assert check(e, seq, 199) == 1
    assert e.counts.early_lost == 10 + 49 + 1  # row 199 was not the newest one
    send(e, seq, 200, 220)
    rest(e)
    e.abort(seq)
    e.step()
    assert e.counts.early_lost == 10 + 49 + 1 + 19
    check_empty(e)


def test_early_rows_take_what_nobody_else_wants() -> None:
    """A step full of requests has no early row; one that is half full has so many that it is full."""
    e = engine(Arrival(), ChunkedPrefill(64), model=packed(*MODEL))
    seq = e.submit(Request(outside=True))
    send(e, seq, 0, 200)
    other = e.submit(request(1, prompt=160, max_tokens=2))
    n_early, n_rows = [], []
    while other in e.seqs or e.has_work:
        before = e.counts.rows
        n_early.append(sum(out.early.n for out in e.step() if out.early))
        n_rows.append(e.counts.rows - before)
    assert n_early[:2] == [0, 0]
    assert n_early[2] == 64 - 160 % 64
    assert max(n_rows) <= 1 + 64  # a next token, and what ChunkedPrefill has beside it
    assert sum(n_early) == 199
    assert check(e, seq, 199) == 1


def test_nobody_gives_memory_up_for_early_rows_and_they_run_once() -> None:
    e = engine(model=packed(*MODEL), n_blocks=5, prefix_cache=False)
    seq = e.submit(Request(outside=True))
    send(e, seq, 0, 200)
    rest(e)
    assert e.pool.n_used == 4
    wanted = serving.run(engine(model=packed(*MODEL)), [request(2, prompt=150, max_tokens=12)])
    assert serving.run_all(e, [request(2, prompt=150, max_tokens=12)]) == wanted  # it takes theirs
    assert e.counts.preempted == 1
    assert e.counts.early_lost == 199
    assert rest(e) == []  # once is enough
    send(e, seq, 200, 210)
    assert rest(e) == []
    assert check(e, seq, 209) == 210
    e.abort(seq)
    e.step()
    check_empty(e)


def test_early_rows_fill_the_block_that_their_sequence_has_where_no_other_is_free() -> None:
    e = engine(model=packed(*MODEL), n_blocks=3, prefix_cache=False)
    seq, other = (e.submit(Request(outside=True)) for _ in range(2))
    send(e, seq, 0, 40)
    send(e, other, 0, 128)
    rest(e)
    assert e.pool.n_free == 0
    send(e, seq, 40, 90)
    for n_early in (64 - 39, 0):
        assert sum(out.early.n for out in e.step() if out.early) == n_early
    assert not e.has_work  # the rest waits for memory, and nobody steps in vain meanwhile


def test_early_rows_wait_while_a_request_waits_for_memory() -> None:
    e = engine(model=packed(*MODEL), n_blocks=5, prefix_cache=False)
    first = e.submit(request(3, prompt=150, max_tokens=24))
    second = e.submit(request(4, prompt=200, max_tokens=4))  # no room beside the first one
    seq = e.submit(Request(outside=True))
    send(e, seq, 0, 60)
    while second in e.seqs:
        early = [out for out in e.step() if out.early]
        assert not (early and first in e.seqs)
    rest(e)
    assert e.counts.early_rows == 59


def test_an_early_row_finds_what_others_have_computed_and_is_found_once_it_is_used() -> None:
    e = engine(model=packed(*MODEL))
    one, two, three = (e.submit(Request(entry=2, outside=True)) for _ in range(3))
    send(e, one, 0, 200, 2)
    rest(e)
    send(e, two, 0, 200, 2)
    rest(e)
    assert e.counts.row_hits == 0  # the first one's may still have to run again
    check(e, one, 199)
    send(e, three, 0, 200, 2)
    rest(e)
    assert e.counts.row_hits == 3
    assert check(e, two, 199) == check(e, three, 199) == 1


def test_rows_that_cannot_be_read_end_their_own_sequence() -> None:
    class Unreadable(ArrayRows):
        def take(self, first: int, n: int) -> object:  # type: ignore[override]
            raise ValueError("no rows")

    e = engine(model=packed(*MODEL))
    seq, other = (e.submit(Request(entry=2, outside=True)) for _ in range(2))
    e.append(seq, rows=Unreadable(truth(2).rows[:20]), early=True)
    send(e, other, 0, 20, 2)
    outputs = rest(e)
    assert [out.error for out in outputs if out.seq == seq] == ["ValueError: no rows"]
    assert [out.early.n for out in outputs if out.early] == [19]
    assert check(e, other, 19) == 1
