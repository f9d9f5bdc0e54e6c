"""Blocks of two groups: rows that enter at layer k take no memory of the layers below it."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("nearfar_native._core", reason="the extension is not built")

import torch

from nearfar.errors import ContextError, UsageError
from nearfar.sampling import Sampling
from nearfar_cloud.engine import Engine
from nearfar_cloud.executors.base import Uppers
from nearfar_cloud.executors.local import LocalExecutor
from nearfar_cloud.gateway.served import open_served
from nearfar_cloud.model.attention import NO_RESERVE, zeros
from nearfar_cloud.outside import ArrayRows, Question
from nearfar_cloud.scheduling.budget import Arrival
from nearfar_cloud.scheduling.compose import Composer, Preemption
from nearfar_cloud.types import Output, Request
from tests.cloud import serving
from tests.cloud.outside import N_VOCAB, Reference, file, packed, upper_half
from tests.cloud.serving import check_empty, request

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = ("llama", "F32")
K, L = 2, 4
A_LAYER = 2 * 2 * 64 * 64 * 2  # bytes of a block in one layer of this model: keys and values, 2 heads of 64, f16


def two_groups(n_whole: int, n_upper: int, preemption: Preemption = "recompute", **options: object) -> Engine:
    executor = LocalExecutor(packed(*MODEL), n_whole + n_upper, uppers=Uppers(n_upper, K))
    return Engine(executor, Composer((Arrival(),), preemption), **options)  # type: ignore[arg-type]


def text(seed: int, n: int) -> list[int]:
    rng = random.Random(f"text {seed}")
    return [rng.randrange(N_VOCAB) for _ in range(n)]


class Session:
    """A device that has sent the rows of a text; knows what it must be told."""

    def __init__(self, e: Engine, seed: int, n: int, entry: int = K) -> None:
        self.e, self.n = e, n
        self.reference = Reference(file(*MODEL), Sampling(), entry)
        self.reference.read(text(seed, n))
        self.seq = e.submit(Request(entry=entry, outside=True, rows=ArrayRows(self.reference.rows)))

    def ask(self) -> None:
        self.e.ask(self.seq, Question(1, self.n - 1, self.n - 1))

    def check(self, outputs: list[Output]) -> None:
        (out,) = [out for out in outputs if out.seq == self.seq]
        assert out.answer is not None
        assert (out.ids, out.answer.margin) == (
            (self.reference.decides(self.n - 1),),
            self.reference.margin(self.n - 1),
        )


def rest(e: Engine) -> list[Output]:
    outputs = []
    while e.has_work:
        outputs += e.step()
        e.pool.check([s.blocks for s in e.seqs.values()])
    return outputs


def n_that_fit(e: Engine, n_positions: int = 100) -> int:
    """Sessions of rows whose keys and values are there at once, before one of them has to give way."""
    sessions = []
    while not e.counts.preempted:
        sessions.append(Session(e, len(sessions), n_positions))
        sessions[-1].ask()
        sessions[-1].check(rest(e))
    for session in sessions:
        e.abort(session.seq)
    e.step()
    check_empty(e)
    return len(sessions) - 1


def bytes_of(e: Engine) -> int:
    assert isinstance(e.executor, LocalExecutor)
    n_upper = e.executor.uppers.n
    assert e.executor.store.block_bytes == L * A_LAYER
    return (e.pool.n_blocks - n_upper) * L * A_LAYER + n_upper * (L - K) * A_LAYER


def test_more_sessions_of_rows_fit_into_the_same_bytes() -> None:
    """A session of 100 positions takes two blocks: 256 KiB in all layers, 128 KiB in the upper half of them."""
    one, two = two_groups(12, 0, prefix_cache=False), two_groups(4, 16, prefix_cache=False)
    assert bytes_of(one) == bytes_of(two) == 12 * L * A_LAYER == 1536 << 10
    assert (n_that_fit(one), n_that_fit(two)) == (6, 10)


def test_upper_blocks_come_first_and_whole_ones_after_them() -> None:
    e = two_groups(4, 2, prefix_cache=False)
    sessions = [Session(e, i, 100) for i in range(2)]
    for session, room in zip(sessions, ((4, 0), (2, 0)), strict=True):
        session.ask()
        session.check(rest(e))
        assert e.pool.room == room
    low = Session(e, 2, 100, entry=1)  # below the layer of the upper blocks: it needs whole ones
    low.ask()
    low.check(rest(e))
    assert e.pool.room == (0, 0)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_request_takes_memory_only_from_who_has_what_it_needs(preemption: Preemption) -> None:
    e = two_groups(4, 4, preemption, prefix_cache=False)
    first, second, third = (Session(e, i, n) for i, n in ((0, 180), (1, 60), (2, 120)))  # 3 + 1 upper ones, 2 whole
    for session in (first, second, third):
        session.ask()
        session.check(rest(e))
    assert e.pool.room == (2, 0)
    wanted = serving.run(two_groups(40, 0), [request(7, prompt=200, max_tokens=20)])
    assert serving.run_all(e, [request(7, prompt=200, max_tokens=20)]) == wanted
    assert e.counts.preempted == 1
    assert [bool(e.seqs[s.seq].blocks) for s in (first, second, third)] == [True, True, False]
    for session in (third, first, second):
        session.ask()
        session.check(rest(e))
    for session in (first, second, third):
        e.abort(session.seq)
    e.step()
    check_empty(e)


def test_an_upper_block_that_one_finds_and_another_was_to_take_counts_once() -> None:
    """One plan: the first one gets blocks that only the cache holds, the second one finds just these computed."""
    e = two_groups(4, 2, clock=lambda: 0.0)  # all come at once
    before = Session(e, 1, 130)
    before.ask()
    before.check(rest(e))
    assert e.pool.rooms(e.seqs[before.seq].blocks[:2]) == (0, 2)
    e.abort(before.seq)
    e.step()
    sessions = [Session(e, 2, 100), Session(e, 1, 130)]
    for session in sessions:
        session.ask()
    check_all(e, sessions, request(7, prompt=130, max_tokens=2))


def test_a_whole_block_that_one_finds_and_another_was_to_take_counts_once() -> None:
    e = two_groups(4, 4, clock=lambda: 0.0)
    before = [Session(e, 0, 200), Session(e, 1, 130)]
    for session in before:
        session.ask()
        session.check(rest(e))
    assert e.pool.rooms(e.seqs[before[1].seq].blocks[:2]) == (2, 0)
    for session in before:
        e.abort(session.seq)
    e.step()
    taker = request(7, prompt=200, max_tokens=2)
    seq = e.submit(taker)
    session = Session(e, 1, 130)
    session.ask()
    check_all(e, [session], taker, seq)


def check_all(e: Engine, sessions: list[Session], req: Request, seq: int | None = None) -> None:
    """All are answered, `req` as alone, and leave nothing behind."""
    seq = e.submit(req) if seq is None else seq
    outputs = rest(e)
    for session in sessions:
        session.check(outputs)
        e.abort(session.seq)
    (wanted,) = serving.run(two_groups(40, 0), [req])
    assert tuple(i for out in outputs if out.seq == seq for i in out.ids) == wanted
    e.step()
    check_empty(e)


def test_rows_wait_for_no_request_that_waits_for_whole_blocks() -> None:
    """Upper blocks are of no use to it; of whole ones nobody takes any before it."""
    e = two_groups(4, 3, prefix_cache=False)
    running = e.submit(request(7, prompt=150, max_tokens=20))
    e.step()
    waiting = e.submit(request(8, prompt=200, max_tokens=4))
    sessions = [Session(e, 0, 100), Session(e, 1, 60), Session(e, 2, 60)]  # 2 + 1 upper ones; for the third none
    for session in sessions:
        session.ask()
    outputs = e.step()
    for session in sessions[:2]:
        session.check(outputs)
    assert e.pool.room == (1, 0)
    while running in e.seqs:
        assert not e.seqs[sessions[2].seq].blocks
        outputs = e.step()
    while waiting in e.seqs:
        outputs += e.step()
    sessions[2].check(outputs + rest(e))
    assert e.counts.preempted == 1  # somebody idle, for the third


@pytest.mark.parametrize("from_upper", [False, True])
def test_what_was_swapped_comes_back_into_the_other_group(from_upper: bool) -> None:
    e = two_groups(4, 2, "swap", prefix_cache=False)
    other = Session(e, 1, 120)
    moved = Session(e, 2, 120)
    for session in (moved, other) if from_upper else (other, moved):
        session.ask()
        session.check(rest(e))
    s = e.seqs[moved.seq]
    assert e.pool.rooms(s.blocks) == ((0, 2) if from_upper else (2, 0))
    assert isinstance(e.executor, LocalExecutor)
    e.executor.swap_out(s.id, np.asarray(s.blocks, np.int32))
    e.pool.release(s.blocks)
    if not from_upper:
        e.abort(other.seq)
        e.step()
    s.blocks = e.pool.alloc(2, is_upper=not from_upper)
    assert e.pool.rooms(s.blocks) == ((2, 0) if from_upper else (0, 2))
    e.executor.swap_in(s.id, np.asarray(s.blocks, np.int32))
    before = e.counts.rows
    moved.ask()
    moved.check(rest(e))
    assert e.counts.rows - before == 1


def test_one_sequence_has_as_many_positions_as_whole_blocks_hold() -> None:
    e = two_groups(4, 9)
    assert e.n_blocks == 4
    with pytest.raises(ContextError, match="its cache hold 256"):
        e.submit(request(1, prompt=250, max_tokens=20))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_upper_blocks_take_no_memory_in_the_lower_layers() -> None:
    """As the system counts it: 64 MiB of upper blocks written from end to end."""
    n_upper = (64 << 20) // ((L - K) * A_LAYER)
    executor = LocalExecutor(packed(*MODEL), 4 + n_upper, uppers=Uppers(n_upper, K))
    before = resident()
    store = executor.store
    for tensor in (*store.k[K:], *store.v[K:]):
        tensor[4:] = 1
    assert resident() - before == pytest.approx(64 << 20, rel=0.2)
    for tensor in (*store.k[:K], *store.v[:K]):
        tensor[4:] = 1
    assert resident() - before == pytest.approx(128 << 20, rel=0.2)  # what they would take


@pytest.mark.skipif(not NO_RESERVE, reason="a system that counts what nobody writes")
def test_blocks_may_have_more_addresses_than_the_machine_has_memory() -> None:
    """As upper blocks of a model of many layers do, of which they use a few."""
    n = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    (tensor,) = zeros(1, (n,), torch.uint8, is_sparse=True)
    tensor[-1] = 1
    assert tensor[-2:].tolist() == [0, 1]


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize(
    ("share", "message"),
    [((4, 50), r"expected a layer inside of the model, 1\.\.3"), ((2, 99), "needs at least")],
)
def test_a_share_that_makes_no_sense_is_refused(share: tuple[int, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_served(str(file(*MODEL)), kv_bytes=20 * L * A_LAYER, hidden_share=share)
    with pytest.raises(UsageError, match="blocks for layers from 2 on"):
        LocalExecutor(upper_half(*MODEL), 9, uppers=Uppers(3, K))


def test_a_share_of_the_memory_is_for_rows_and_nothing_is_unless_asked_for() -> None:
    for share, sizes in ((None, (40, 0)), ((2, 50), (20, 40)), ((3, 25), (30, 40))):
        served = open_served(str(file(*MODEL)), kv_bytes=40 * L * A_LAYER, hidden_share=share)
        assert isinstance(served.engine, Engine)
        assert served.engine.pool.room == sizes
