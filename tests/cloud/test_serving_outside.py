"""Sequences of devices in the one batched engine: every token is what the device's engine says alone."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="torch is not installed (extra [train])")
pytest.importorskip("nearfar_native._core", reason="the extension is not built")

import nearfar
from nearfar.errors import UsageError
from nearfar.sampling import Sampling
from nearfar_cloud.asks import Asks
from nearfar_cloud.engine import Engine
from nearfar_cloud.executors.base import Uppers
from nearfar_cloud.executors.local import LocalExecutor
from nearfar_cloud.kv.prefix import Chain
from nearfar_cloud.outside import ArrayRows, Question, RowPieces
from nearfar_cloud.scheduling.budget import Arrival, ChunkedPrefill
from nearfar_cloud.scheduling.policy import Policy
from nearfar_cloud.scheduling.standard import standard
from nearfar_cloud.scheduling.view import EngineView
from nearfar_cloud.types import Output, Request, Seq, Served
from tests.cloud import serving
from tests.cloud.outside import Device, Reference, file, packed, upper_half
from tests.cloud.serving import check_empty, engine, request
from tests.cloud.test_serving_engine import Shaken, some_policies

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS = [("llama", "F32"), ("qwen3", "Q4_0")]


@cache
def alone(model: tuple[str, str], n: int) -> tuple[int, ...]:
    """The tokens of request `n` in the device's engine."""
    req = request(n)
    with nearfar.LLM.open(file(*model), backend="native", threads=1) as llm:
        sequence = llm.stepper.new_sequence(req.sampling, use_exits=False)
        sequence.continue_with(list(req.ids))
        return tuple(llm.stepper.step(sequence).id for _ in range(req.max_tokens))


def shaken_up(seed: int) -> None:
    """Devices and requests under a schedule of chance; AssertionError if a token or a block is not as it should be."""
    rng = random.Random(seed)
    model, is_half = rng.choice(MODELS), rng.random() < 0.2
    uppers = Uppers() if is_half else Uppers(rng.choice((0, 0, 2, 6)), rng.choice((1, 2, 3)))
    n_blocks = rng.choice((6, 8, 12, 40)) + uppers.n
    e = Engine(
        LocalExecutor((upper_half if is_half else packed)(*model), n_blocks, uppers=uppers),
        Shaken(rng, some_policies(rng)),
        prefix_cache=rng.random() < 0.7,
        parked_rows=rng.choice((30, 1 << 14)),
        clock=functools.partial(next, itertools.count()),  # moves at every look: no schedule depends on the machine
    )
    devices = {}
    for _ in range(rng.randint(1, 4)):
        entry = 2 if is_half else rng.choice((0, 0, 1, 2, 3))
        device = Device(rng, e, file(*model), entry=entry, n_asks=rng.randint(1, 6), tenant=rng.choice("ab"))
        devices[device.seq] = device
    numbers = [] if is_half else [rng.randrange(12) for _ in range(rng.randint(0, 3))]
    wanted, seqs = [alone(model, n) for n in numbers], [e.submit(request(n)) for n in numbers]
    found: dict[int, tuple[int, ...]] = {}
    for _ in range(20_000):
        for device in devices.values():
            device.act()
        for out in e.step():
            if out.seq in devices:
                devices[out.seq].hear(out)
            else:
                serving.collect(found, out)
        e.pool.check([s.blocks for s in e.seqs.values()])
        if not e.has_work and not any(d.left or d.asked for d in devices.values()):
            break
    assert not any(d.left for d in devices.values())
    assert [found[s] for s in seqs] == wanted
    for seq in devices:
        e.abort(seq)
    assert [out.finish for out in e.step()] == ["abort"] * len(devices)
    check_empty(e)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6))
def test_devices_get_the_tokens_of_their_own_engine_under_any_schedule(seed: int) -> None:
    shaken_up(seed)


def submit(e: Engine, **options: object) -> int:
    return e.submit(Request(outside=True, **options))  # type: ignore[arg-type]


def answer(e: Engine, seq: int, question: Question) -> Output:
    """Ask, and step until the answer is there."""
    e.ask(seq, question)
    for _ in range(1_000):
        for out in e.step():
            if out.seq == seq:
                return out
    raise AssertionError("no answer")


def some_ids(seed: int, n: int) -> tuple[int, ...]:
    rng = random.Random(f"ids {seed}")
    return tuple(rng.randrange(320) for _ in range(n))


def reads_what_was_cut() -> None:
    """A text is cut within a block that the prefix cache knows, and goes on otherwise; others begin like either."""
    e = engine(model=packed(*MODELS[0]))
    old, new = some_ids(1, 131), (*some_ids(1, 40), *some_ids(2, 91))
    wanted = [serving.run(engine(model=packed(*MODELS[0])), [Request(ids=ids, max_tokens=4)])[0] for ids in (old, new)]
    seq = submit(e, ids=old)
    assert answer(e, seq, Question(1, 130, 130)).ids == wanted[0][:1]
    e.cut(seq, 40)
    e.append(seq, ids=new[40:])
    assert answer(e, seq, Question(2, 130, 130)).ids == wanted[1][:1]
    before = e.counts.cached_tokens
    for ids, tokens in zip((old, new), wanted, strict=True):
        assert serving.run_all(e, [Request(ids=ids, max_tokens=4)]) == [tokens]
    assert e.counts.cached_tokens - before == 2 * 128
    e.abort(seq)
    e.step()
    check_empty(e)


def test_a_cut_leaves_blocks_alone_that_others_may_read() -> None:
    reads_what_was_cut()


def finds_rows_of_others() -> None:
    """Texts that part in the middle of a block: only what is before it is found, and each is answered as alone."""
    e = engine(model=packed(*MODELS[0]))
    for text in (some_ids(1, 140), (*some_ids(1, 100), *some_ids(2, 40))):
        reference = Reference(file(*MODELS[0]), Sampling(), 2)
        reference.read(text)
        seq = submit(e, rows=ArrayRows(reference.rows), entry=2)
        out = answer(e, seq, Question(1, 139, 139))
        assert (out.ids, out.answer.margin) == ((reference.decides(139),), reference.margin(139))  # type: ignore[union-attr]
        e.abort(seq)
    e.step()
    assert e.counts.row_hits == 1
    check_empty(e)


def test_rows_that_another_session_has_computed_are_found_up_to_where_texts_part() -> None:
    finds_rows_of_others()


def test_positions_wait_until_somebody_asks_and_all_who_ask_are_one_pass() -> None:
    e = engine(model=packed(*MODELS[0]), n_blocks=64)
    references, seqs = [], []
    for i in range(12):
        entry = i % 4
        reference = Reference(file(*MODELS[0]), Sampling(temperature=0.5, seed=i), entry)
        reference.read(some_ids(i, 5 + i))
        rows = ArrayRows(reference.rows) if entry else None
        seqs.append(submit(e, entry=entry, sampling=reference.sampling))
        e.append(seqs[-1], ids=() if entry else reference.text, rows=rows)
        references.append(reference)
    assert e.step() == []
    assert not e.has_work
    assert e.counts.steps == 0
    for i, seq in enumerate(seqs):
        e.ask(seq, Question(100 + i, 4 + i, 4 + i))
    told = {out.seq: out for out in e.step()}
    assert e.counts.steps == 1
    assert [told[seq].ids for seq in seqs] == [(r.decides(4 + i),) for i, r in enumerate(references)]
    assert [told[seq].answer.req for seq in seqs] == [100 + i for i in range(12)]  # type: ignore[union-attr]
    assert not e.has_work


class Charged(Policy):
    """Sums up what sequences are charged."""

    n_prompt = n_decided = 0

    def observe(self, served: Sequence[Served], view: EngineView) -> None:
        self.n_prompt += sum(x.n_prompt for x in served)
        self.n_decided += sum(x.n_decided for x in served)


def test_a_run_tells_what_a_request_gets_one_token_at_a_time_until_a_stop_id() -> None:
    model = packed(*MODELS[0])
    req = replace(request(7), max_tokens=20)
    wanted = serving.run(engine(model=model), [req])[0]
    stop = next(i for i in range(8, 20) if wanted[i] not in wanted[:i])
    charged = Charged()
    e = engine(*standard(), charged, model=model)
    seq = submit(e, ids=req.ids, sampling=req.sampling, stop_ids=frozenset({wanted[stop]}))
    n = len(req.ids)
    outputs = [answer(e, seq, Question(1, n - 1, n - 1, run=6))]
    while e.has_work:
        outputs += e.step()
    # The last token of a run is not in the text until it is sent.
    e.append(seq, ids=wanted[5:6])
    outputs.append(answer(e, seq, Question(2, n + 5, n + 5, run=100)))
    while e.has_work:
        outputs += e.step()
    assert [out.ids for out in outputs] == [(token,) for token in wanted[: stop + 1]]
    assert [out.answer.pos0 for out in outputs] == list(range(n, n + stop + 1))  # type: ignore[union-attr]
    assert {out.answer.req for out in outputs[6:]} == {2}  # type: ignore[union-attr]
    # What it decided by itself, and runs then, is no prompt.
    assert (charged.n_prompt, charged.n_decided) == (n + 1, stop + 1)


def test_whoever_is_idle_gives_its_memory_up_first_and_loses_nothing() -> None:
    model = packed(*MODELS[0])
    text = some_ids(1, 190)
    for preemption in ("recompute", "swap"):
        e = engine(model=model, n_blocks=6, preemption=preemption, prefix_cache=False)
        idle = submit(e, ids=text)
        first = answer(e, idle, Question(1, 189, 188))
        assert e.pool.n_used == 3
        requests = [Request(ids=some_ids(i, 150), max_tokens=12) for i in (2, 3)]
        assert serving.run_all(e, requests) == [serving.run(engine(model=model), [r])[0] for r in requests]
        assert e.counts.preempted == 1  # of the two requests none gave way
        before = e.counts.rows
        again = answer(e, idle, Question(2, 189, 188))
        assert (again.ids, again.answer.margin) == (first.ids, first.answer.margin)  # type: ignore[union-attr]
        assert e.counts.rows - before == (190 if preemption == "recompute" else 2)
        e.abort(idle)
        e.step()
        check_empty(e)


def test_nobody_gives_memory_up_to_a_request_that_it_is_not_enough_for() -> None:
    e = engine(model=packed(*MODELS[0]), n_blocks=6, prefix_cache=False)
    running = e.submit(request(1, prompt=250, max_tokens=40))
    e.step()
    device = submit(e, ids=some_ids(1, 30))
    answer(e, device, Question(1, 29, 29))
    waiting = e.submit(request(2, prompt=300, max_tokens=4))  # five blocks: the running one has more than one of six
    while e.seqs[running].n_out < 20:
        e.step()
    assert (e.counts.preempted, len(e.seqs[device].blocks)) == (0, 1)
    answer(e, device, Question(2, 29, 29))
    assert {running, waiting} <= e.seqs.keys()
    e.abort(running)
    while waiting in e.seqs:
        e.step()
    e.abort(device)
    e.step()
    check_empty(e)


def test_many_drafts_are_a_prompt_to_others_and_are_told_once() -> None:
    e = engine(Arrival(), ChunkedPrefill(96), model=packed(*MODELS[0]))
    for n in range(4):
        e.submit(request(n, prompt=5, max_tokens=60))
    for _ in range(3):
        e.step()
    reference = Reference(file(*MODELS[0]), Sampling(), 0)
    text = list(some_ids(1, 10))
    for _ in range(260):
        reference.read(text)
        text.append(reference.decides(len(text) - 1))
    seq = submit(e, ids=text)
    e.ask(seq, Question(1, len(text) - 2, 9))
    told: list[Output] = []
    while not told:
        before = e.counts.rows
        outputs = e.step()
        assert len([out for out in outputs if out.seq != seq]) == 4
        assert e.counts.rows - before <= 96
        told = [out for out in outputs if out.seq == seq]
    assert told[0].ids == tuple(text[10:])


def test_the_few_rows_that_a_device_owes_wait_behind_no_prompt() -> None:
    e = engine(Arrival(), ChunkedPrefill(64), model=packed(*MODELS[0]))
    seq = submit(e, ids=some_ids(1, 10))
    answer(e, seq, Question(1, 9, 9))
    e.submit(request(9, prompt=600, max_tokens=2))
    e.step()
    e.append(seq, ids=some_ids(2, 24))
    e.ask(seq, Question(2, 33, 30))
    assert [out.seq for out in e.step()] == [seq]


class Unreadable(ArrayRows):
    """Packed rows that turn out to be none."""

    def take(self, first: int, n: int) -> np.ndarray:
        raise ValueError("no rows")


def a_store(n: int, width: int = 256) -> ArrayRows:
    return ArrayRows(np.ones((n, width), np.float32))


@pytest.mark.parametrize(
    ("entry", "tell", "message"),
    [
        (0, lambda e, s: e.append(s, rows=a_store(1)), "expected ids for a sequence of ids"),
        (2, lambda e, s: e.append(s, ids=[1]), "rows for one of rows"),
        (0, lambda e, s: e.append(s, ids=[1] * 1000), "1003 positions: the model and its cache hold 384"),
        (0, lambda e, s: e.ask(s, Question(7, 3, 3)), "question 7 about row 3 and 1 tokens: there are 3"),
        (0, lambda e, s: e.ask(s, Question(7, 2, 2, run=500)), "there are 3 of at most 384 rows"),
        (0, lambda e, s: e.ask(s, Question(7, 1, 1, run=2)), "about the last of them"),
        (2, lambda e, s: e.ask(s, Question(7, 2, 2, run=2)), "expected ids"),
        (2, lambda e, s: e.ask(s, Question(7, 2, 1)), "with 0 drafts: expected 1"),
        (0, lambda e, s: [e.ask(s, Question(i, 2, 2)) for i in range(2)], "the one before was answered or cut"),
        (0, lambda e, s: (e.ask(s, Question(7, 2, 2, run=9)), e.append(s, ids=[1])), "goes on by itself: cut it"),
        (2, lambda e, s: (e.append(s, rows=Unreadable(a_store(1).take(0, 1))), e.ask(s, Question(7, 3, 3))), "no rows"),
    ],
)
def test_what_makes_no_sense_ends_its_own_sequence(entry: int, tell: Callable[..., object], message: str) -> None:
    e = engine(model=packed(*MODELS[0]), n_blocks=6)
    other = e.submit(request(1))
    three = {"rows": a_store(3), "entry": entry} if entry else {"ids": (1, 2, 3)}
    seq = submit(e, **three)
    tell(e, seq)
    outputs = [out for _ in range(2) for out in e.step()]
    errors = [out for out in outputs if out.seq == seq]
    assert [out.finish for out in errors] == ["error"]
    assert message in errors[0].error
    tell(e, seq)  # it is gone
    found = {other: tuple(i for out in outputs if out.seq == other for i in out.ids)}
    for seq_, ids in serving.drain(e).items():
        found[seq_] = found.get(seq_, ()) + ids
    assert found == {other: alone(MODELS[0], 1)}
    check_empty(e)


def test_what_can_be_refused_at_the_door_is() -> None:
    e = engine(model=packed(*MODELS[0]))
    seq = submit(e)
    for call, message in (
        (lambda: e.append(seq, ids=[320]), r"ids 320\.\.320"),
        (lambda: e.append(seq, rows=a_store(1, 255)), "rows of 255 numbers"),
        (lambda: e.cut(seq, -1), "keep=-1"),
        (lambda: Question(1, 2, 3), "expected 0 <= verify_from <= pos"),
        (lambda: Question(1, 3, 2, draft=(1, 2)), "2 drafts: expected 1"),
        (lambda: Question(1, 3, 2, run=0), "run=0"),
        (lambda: ArrayRows(np.zeros(3, np.float32)), "expected f32"),
        (lambda: e.submit_branches(Request(outside=True), 1), "Engine.submit"),
        (lambda: e.submit(Request(outside=True), hook=object()), "has no hook"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError, match=message):
            call()


def test_pieces_of_rows_are_one_store() -> None:
    rng = random.Random(1)
    rows = np.arange(60, dtype=np.float32).reshape(30, 2)
    for _ in range(50):
        cuts = sorted({0, 30, *(rng.randrange(30) for _ in range(4))})
        pieces = RowPieces(*(ArrayRows(rows[a:b]) for a, b in itertools.pairwise(cuts)))
        n = rng.randint(1, 30)
        pieces.truncate(n)
        pieces.append(ArrayRows(-rows[:3]))
        assert len(pieces) == n + 3
        whole = np.vstack([rows[:n], -rows[:3]])
        first = rng.randrange(n + 3)
        end = rng.randint(first + 1, n + 3)
        np.testing.assert_array_equal(pieces.take(first, end - first), whole[first:end])


def forgets_its_drafts(self: Engine, s: Seq, op: object, real: Callable[..., None] = Engine._preempt) -> None:
    real(self, s, op)
    s.drafts = []


def believes_what_is_unchecked(self: Asks, s: Seq, result: object, n_checked: int) -> Output | None:
    """The rest of the drafts holds as well, once those of a first piece have."""
    rest = s.drafts[n_checked + 1 :]
    out = decided(self, s, result, n_checked)  # type: ignore[arg-type]
    if out is None and s.outside is not None:
        s.outside.held += rest
        s.drafts = []
    return out


def writes_where_others_read(self: Asks, s: Seq, n: int) -> None:
    """A block that is known to the prefix cache is cut and written again."""
    s.n_published = min(s.n_published, n // 64)
    rewind(self, s, n)


def moved_rows(self: RowPieces, first: int, n: int) -> np.ndarray:
    """Rows behind the first piece are those before them."""
    return take(self, max(0, first - 1) if first + n <= len(self) else first, n)


def first_row_alone(self: RowPieces, first: int, n: int) -> Iterator[bytes]:
    return content(self, first, 1)


decided, rewind, take, content = Asks.decided, Asks._rewind, RowPieces.take, RowPieces.content
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "a preempted sequence forgets its drafts": (Engine, "_preempt", forgets_its_drafts),
    "a part of the drafts is checked": (Asks, "decided", believes_what_is_unchecked),
    "rows that were taken back stay computed": (Asks, "_rewind", lambda self, s, n: None),
    "rejected drafts stay computed": (Seq, "truncate", lambda self, n: None),
    "a block that others read is written again": (Asks, "_rewind", writes_where_others_read),
    "ids that were taken back are still hashed": (Chain, "cut", lambda self, n: None),
    "rows that were taken back are still there": (RowPieces, "truncate", lambda self, n: None),
    "blocks without lower layers serve ids": (Engine, "_is_upper", lambda self, s: self.executor.uppers.n > 0),
    "rows lie one off": (RowPieces, "take", moved_rows),
    "rows are told apart by those that blocks begin with": (RowPieces, "content", first_row_alone),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The properties above are worth something: without one line that matters they fail."""
    monkeypatch.setattr(*FAULTS[fault])
    assert (
        _fails(reads_what_was_cut)
        or _fails(finds_rows_of_others)
        or any(_fails(lambda seed=seed: shaken_up(seed)) for seed in range(100))
    )


def _fails(check: Callable[[], None]) -> bool:
    try:
        check()
    except (AssertionError, KeyError, IndexError):
        return True
    return False
