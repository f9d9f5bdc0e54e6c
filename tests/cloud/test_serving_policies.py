"""Policies keep their promises: shares, deadlines, intervals, drafts that pay.  In virtual time, by the cost model."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from nearfar.errors import FileError, UsageError
from nearfar_cloud.engine import Engine
from nearfar_cloud.scheduling import fair
from nearfar_cloud.scheduling.budget import Arrival, ChunkedPrefill, Priority, SplitFuse, generates
from nearfar_cloud.scheduling.compose import Composer
from nearfar_cloud.scheduling.cost import CostModel, Experts, features
from nearfar_cloud.scheduling.fair import FairShare
from nearfar_cloud.scheduling.layered import LayeredPrefill
from nearfar_cloud.scheduling.policy import Policy
from nearfar_cloud.scheduling.queue import WINDOW, Waiting
from nearfar_cloud.scheduling.spec import Speculation
from nearfar_cloud.scheduling.standard import standard
from nearfar_cloud.scheduling.urgency import Urgency
from nearfar_cloud.scheduling.view import EngineView
from nearfar_cloud.types import LayerRange, Objective, Request, Seq, Status, Work
from tests.cloud.virtual import N_LAYERS, Virtual, engine, finish_times, kneed, linear, request, taught, token, work

# ---------------------------------------------------------------- fairness

PROMPT, TOKENS, AT_ONCE = 60, 32, 8  # eight sequences of two blocks fit
BOUND = 2 * max(fair.INPUT * PROMPT, fair.OUTPUT * AT_ONCE * TOKENS)  # theorem 4.4 of the paper


def service(e: Engine, served: Counter[str]) -> bool:
    """One step; what it did for whom is added.  Whether both tenants have something waiting."""
    tenants = {s.id: s.req.objective.tenant for s in e.seqs.values()}
    before = {s.id: s.n_begun for s in e.seqs.values()}
    outputs = e.step()
    seqs = {s.id: s for s in e.seqs.values()}
    for seq, s in seqs.items():
        served[s.req.objective.tenant] += fair.INPUT * (s.n_begun - before.get(seq, 0))
    for out in outputs:
        served[tenants[out.seq]] += fair.OUTPUT * len(out.ids)
    waiting = {s.req.objective.tenant for s in e.seqs.values() if s.status is Status.WAITING}
    return waiting >= {"a", "b"}


def flood(e: Engine, tenant: str, n: int) -> list[int]:
    return [e.submit(request(PROMPT, TOKENS, tenant=tenant)) for _ in range(n)]


def largest_difference(policies: Sequence[Policy]) -> float:
    """Of the service of two tenants while both have something waiting; a has sent all before b."""
    e = engine(*policies, n_blocks=2 * AT_ONCE)
    flood(e, "a", 40)
    flood(e, "b", 40)
    served: Counter[str] = Counter()
    e.step()
    most = 0.0
    while service(e, served):
        most = max(most, abs(served["a"] - served["b"]))
    return most


def test_a_tenant_that_floods_gets_no_more_than_one_that_does_not() -> None:
    assert largest_difference(standard()) <= BOUND
    assert largest_difference((Arrival(), ChunkedPrefill())) > BOUND


def saved_up() -> float:
    """How far a tenant that was away gets ahead of one that was not, from its return on."""
    e = engine(*standard(), n_blocks=2 * AT_ONCE)
    flood(e, "b", 1)
    flood(e, "a", 100)
    while e.counts.generated_tokens < 60 * TOKENS:
        e.step()
    flood(e, "b", 40)
    served: Counter[str] = Counter()
    e.step()
    most = 0.0
    while service(e, served):
        most = max(most, served["b"] - served["a"])
    return most


def test_nobody_saves_up_while_away() -> None:
    assert saved_up() <= BOUND


def test_a_counter_that_is_not_lifted_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above is worth something."""
    monkeypatch.setattr(FairShare, "_counter", lambda self, tenant: self.counters.get(tenant, 0.0))
    assert saved_up() > BOUND


def test_one_request_does_not_wait_for_a_flood_of_somebody_else() -> None:
    e = engine(*standard(), n_blocks=2 * AT_ONCE)
    flood(e, "a", 300)
    for _ in range(10):
        e.step()
    one = flood(e, "b", 1)[0]
    done = finish_times(e)
    earlier = sum(moment < done[one] for moment in done.values())
    assert earlier <= 2 * AT_ONCE


def test_a_share_of_two_gets_twice_as_much() -> None:
    e = engine(*standard(shares={"b": 2.0}), n_blocks=2 * AT_ONCE)
    flood(e, "a", 60)
    flood(e, "b", 60)
    served: Counter[str] = Counter()
    e.step()
    while service(e, served):
        pass
    assert served["b"] / served["a"] == pytest.approx(2, rel=0.25)
    with pytest.raises(UsageError, match="expected more than 0"):
        FairShare({"b": 0.0})


def test_who_has_gone_is_forgotten_unless_it_is_ahead() -> None:
    e = engine(*standard(), n_blocks=2 * AT_ONCE)
    for i in range(20):
        flood(e, f"tenant {i}", 1)
    finish_times(e)
    policy = next(p for p in e.composer.policies if isinstance(p, FairShare))
    assert len(policy.counters) <= 20
    flood(e, "later", 20)
    finish_times(e)
    assert set(policy.counters) <= {"later"}


# ---------------------------------------------------------------- deadlines

PATIENT = (Arrival(), ChunkedPrefill())


def lateness(policies: Sequence[Policy], coming: Sequence[tuple[float, Request]]) -> list[float]:
    """Seconds behind its deadline for each request."""
    done = finish_times(engine(*policies), coming)
    return [done[i + 1] - at - (r.objective.deadline_s or 0) for i, (at, r) in enumerate(coming)]


def test_order_by_slack_meets_deadlines_that_order_by_arrival_does_not() -> None:
    coming = [(0.0, request(2000, deadline_s=4.0)), (0.01, request(100, deadline_s=0.9))]
    coming += [(0.02, request(300, deadline_s=1.5))]
    assert max(lateness((Arrival(), Urgency(), ChunkedPrefill()), coming)) <= 0
    assert max(lateness(standard(), coming)) <= 0
    assert max(lateness(PATIENT, coming)) > 0


def test_time_to_the_first_token_is_a_deadline_too() -> None:
    for chain, kept in ((standard(), True), (PATIENT, False)):
        e = engine(*chain)
        long, short = e.submit(request(2000, 4)), e.submit(request(50, 200, ttft_s=0.6))
        first: dict[int, float] = {}
        while len(first) < 2:
            for out in e.step():
                first.setdefault(out.seq, e.clock())
        assert (first[short] <= 0.6) is kept
        assert first[long] < 3


def test_who_is_late_already_takes_no_time_from_who_is_not_and_is_served_all_the_same() -> None:
    coming = [(0.0, request(2000, deadline_s=0.1)), (0.01, request(600, deadline_s=1.2))]
    late, kept = lateness(standard(), coming)
    assert kept <= 0 < late


def test_a_stream_of_urgent_requests_does_not_keep_others_waiting_for_ever() -> None:
    stream = [(0.3 * i, request(300, deadline_s=5.0)) for i in range(60)]  # more than there is time for
    coming = sorted([*stream, (0.05, request(400))], key=lambda x: x[0])
    place = next(i for i, (_, r) in enumerate(coming) if r.objective.deadline_s is None)
    patient = finish_times(engine(Arrival(), Urgency(patience_s=3.0), ChunkedPrefill()), coming)
    assert patient[place + 1] < 5
    assert finish_times(engine(Arrival(), Urgency(patience_s=1e9), ChunkedPrefill()), coming)[place + 1] > 15


def test_answers_that_end_early_are_expected_to() -> None:
    policy = Urgency()
    e = engine(Arrival(), policy, ChunkedPrefill())
    for _ in range(40):
        e.submit(Request(ids=(1,), max_tokens=100, stop_ids=frozenset({token(11)})))
    finish_times(e)
    assert policy.used == pytest.approx(0.1, abs=0.15)


def test_higher_priorities_get_their_rows_first_but_next_tokens_do_not_wait() -> None:
    e = engine(*standard())
    low = e.submit(request(10, 50))
    e.step()
    prompts = [e.submit(request(500, 1)), e.submit(request(500, 1, priority=1))]
    order = []
    while e.has_work:
        outputs = e.step()
        assert not e.seqs or low not in e.seqs or low in [out.seq for out in outputs]
        order += [out.seq for out in outputs if out.finish]
    assert [seq for seq in order if seq in prompts] == prompts[::-1]


# ---------------------------------------------------------------- rows of a step


def longest_gap(policies: Sequence[Policy], tbt: float | None) -> float:
    """Seconds between two tokens of four who generate, while a prompt of 2,000 rows comes."""
    e = engine(*policies)
    first = [e.submit(request(20, 60, tbt_s=tbt)) for _ in range(4)]
    for _ in range(3):
        e.step()
    e.submit(request(2000))
    told = {seq: e.clock() for seq in first}
    most = 0.0
    while any(seq in e.seqs for seq in first):
        for out in e.step():
            if out.seq in told:
                most = max(most, e.clock() - told[out.seq])
                told[out.seq] = e.clock()
    return most


def test_a_promised_interval_is_kept_while_a_long_prompt_comes() -> None:
    assert longest_gap(standard(), 0.12) <= 0.12
    assert longest_gap((Arrival(), LayeredPrefill()), 0.12) <= 0.12
    assert longest_gap(standard(), None) > 0.2
    assert longest_gap((Arrival(), SplitFuse()), 0.12) > 0.2


def test_next_tokens_do_not_wait_for_a_prompt_that_came_first() -> None:
    e = engine(Arrival(), ChunkedPrefill(100))
    e.submit(request(2000))
    e.step()
    short = e.submit(request(5, 8))
    while not any(out.seq == short for out in e.step()):
        pass
    for _ in range(5):
        assert [out.seq for out in e.step()] == [short]


@pytest.mark.parametrize("n_rows", [100, 256])
def test_splitfuse_fills_every_step_while_prompts_wait(n_rows: int) -> None:
    e = engine(Arrival(), SplitFuse(n_rows))
    rng = random.Random(3)
    for _ in range(30):
        e.submit(request(rng.randint(1, 300), rng.randint(1, 20)))
    finish_times(e)
    assert isinstance(e.executor, Virtual)
    rows = [sum(w.n for w in step) for step in e.executor.steps]
    full = sum(r.n for step in e.executor.steps for r in step if r.n > 1) // n_rows
    assert rows[:full] == [n_rows] * full


def test_layered_prefill_runs_every_layer_once_over_a_whole_prompt_beside_next_tokens() -> None:
    e = engine(Arrival(), LayeredPrefill(128))
    short = e.submit(request(10, 30))
    e.step()
    long = e.submit(request(400, 1))
    outputs = []
    while long in e.seqs or not e.seqs or e._inbox.qsize():
        outputs.append([out.seq for out in e.step()])
    assert isinstance(e.executor, Virtual)
    assert all(short in told for told in outputs)
    works = [w for step in e.executor.steps for w in step if w.seq == long]
    assert [w.n for w in works] == [400] * len(works)
    assert [w.layers for w in works] == [LayerRange(i, i + 1) for i in range(N_LAYERS)]
    assert all(w.layers == LayerRange(0, N_LAYERS) for step in e.executor.steps for w in step if w.seq == short)


def test_rows_that_wait_between_layers_are_counted() -> None:
    e = engine(Arrival(), LayeredPrefill(128), parked_rows=300)
    for _ in range(4):
        e.submit(request(500, 2))
    while e.has_work:
        e.step()
        assert sum(s.n_parked for s in e.seqs.values()) <= 300
    assert e.counts.generated_tokens == 8


# ---------------------------------------------------------------- drafts


class Knows:
    """Proposes what will be decided, each draft right with a probability."""

    def __init__(self, right: float) -> None:
        self.right, self.rng = right, random.Random(5)

    def propose(self, ids: Sequence[int], n: int) -> list[int]:
        return [token(len(ids) + j) if self.rng.random() < self.right else 255 for j in range(n)]


def speculate(n_seqs: int, right: float, speculation: bool = True) -> tuple[float, float]:
    """Drafts checked for each token, and seconds until half of them are there, of `n_seqs` answers of 200 tokens."""
    spec = Speculation(lambda: Knows(right)) if speculation else None
    e = engine(Arrival(), ChunkedPrefill(), seconds=kneed, speculation=spec)
    for _ in range(n_seqs):
        e.submit(request(10, 200))
    while e.counts.generated_tokens < 100 * n_seqs:
        e.step()
    seconds = e.clock()
    finish_times(e)
    assert e.counts.generated_tokens == 200 * n_seqs
    return e.counts.drafted / e.counts.generated_tokens, seconds


def test_fewer_drafts_are_checked_the_more_sequences_there_are() -> None:
    lengths = [speculate(n, 0.8)[0] for n in (1, 8, 24, 64)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 0.8
    assert lengths[-1] < 0.1  # one now and then, and while the prompts come


def test_more_drafts_are_checked_the_better_they_are() -> None:
    lengths = [speculate(12, right)[0] for right in (0.0, 0.5, 0.95)]
    assert lengths[0] < 0.25
    assert lengths[0] < lengths[1]
    at_once = [speculate(1, right)[1] for right in (0.2, 0.6, 0.95)]
    assert at_once == sorted(at_once, reverse=True)


@pytest.mark.parametrize(("n_seqs", "right", "most"), [(1, 0.9, 0.5), (1, 0.0, 1.03), (64, 0.9, 1.03), (64, 0.0, 1.03)])
def test_speculation_pays_where_it_can_and_costs_little_where_it_cannot(n_seqs: int, right: float, most: float) -> None:
    assert speculate(n_seqs, right)[1] <= most * speculate(n_seqs, right, speculation=False)[1]


def test_drafts_leave_a_promised_interval_alone() -> None:
    e = engine(Arrival(), ChunkedPrefill(), seconds=linear, speculation=Speculation(lambda: Knows(1.0)))
    e.submit(request(10, 100, tbt_s=0.008))
    finish_times(e)
    assert isinstance(e.executor, Virtual)
    assert max(sum(w.n for w in step) for step in e.executor.steps[1:]) <= 2


# ---------------------------------------------------------------- ten thousand wait


class Counting(Policy):
    """Counts what it is shown."""

    def __init__(self) -> None:
        self.most = 0

    def order(self, seqs: Sequence[Seq], view: EngineView) -> Sequence[Seq]:
        self.most = max(self.most, len(seqs), len(view.seqs))
        return seqs


def test_a_plan_looks_at_a_window_of_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    counting, calls = Counting(), Counter[str]()
    e = engine(*standard(), counting, n_blocks=2 * 64)
    for _ in range(64):
        e.submit(request(60, 60))
    while sum(generates(s) for s in e.seqs.values()) < 64:
        e.step()
    for i in range(10_000):
        e.submit(request(60, 60, tenant=str(i % 7), priority=i % 3, deadline_s=1.0 if i % 2 else None))
    e._drain()
    for name in ("gap", "n_known", "computed", "n_reserved", "n_prompt"):
        real = getattr(Seq, name)

        def counted(self: Seq, name: str = name, real: object = real) -> object:
            calls[name] += 1
            return real.fget(self) if isinstance(real, property) else real(self)  # type: ignore[operator, misc]

        monkeypatch.setattr(Seq, name, property(counted) if isinstance(real, property) else counted)
    e.composer.plan(e.view())
    assert counting.most == 64 + WINDOW - WINDOW % 42
    assert max(calls.values()) < 30 * counting.most


def test_the_window_shows_everybodys_first_and_keeps_arrival() -> None:
    waiting, seqs = Waiting(), []
    for i in range(1000):
        tenant = "b" if i == 999 else "a"
        seqs.append(Seq.new(i + 1, Request(ids=(1,), objective=Objective(tenant=tenant)), 4, float(i)))
        waiting.add(seqs[-1])
    assert len(waiting) == 1000
    assert [s.id for s in waiting.window(10)] == [1, 2, 3, 4, 5, 1000]
    for s in seqs[:3]:
        waiting.discard(s)
        waiting.discard(s)
    waiting.add(seqs[1])
    assert [s.id for s in waiting.window(6)] == [1000, 2, 4, 5]
    assert [s.id for s in waiting.window(1)] == [1000]  # a lane that was served stands behind the others
    for s in seqs:
        waiting.discard(s)
    assert len(waiting) == 0
    assert waiting.window() == []


# ---------------------------------------------------------------- the cost model


def test_what_was_learned_outlives_the_server(tmp_path: Path) -> None:
    model, of = taught(kneed), {"model": "m", "threads": "2"}
    model.save(tmp_path / "cost.json", of)
    other = CostModel(N_LAYERS)
    assert other.load(tmp_path / "cost.json", of)
    works = [work(1, 100)] * 5
    assert other.predict(works) == model.predict(works) != CostModel(N_LAYERS).predict(works)
    fresh = CostModel(N_LAYERS)
    assert not fresh.load(tmp_path / "cost.json", of | {"threads": "4"})
    assert not CostModel(N_LAYERS + 1).load(tmp_path / "cost.json", of)
    assert not CostModel(N_LAYERS, experts=Experts(8, 2, 1000)).load(tmp_path / "cost.json", of)
    assert fresh.predict(works) == CostModel(N_LAYERS).predict(works)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "nearfar-cost-1", "of": {}}', '{"format": "2"}'])
def test_a_damaged_file_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "cost.json").write_text(text)
    with pytest.raises(FileError, match=r"cost\.json: not a cost model"):
        CostModel(4).load(tmp_path / "cost.json", {})


@pytest.mark.parametrize("bad", ["NaN", "[1, 2]"])
def test_numbers_that_cannot_be_are_refused(tmp_path: Path, bad: str) -> None:
    path = tmp_path / "cost.json"
    taught(linear).save(path, {})
    text = path.read_text()
    at = text.index("[", text.index("coefficients")) + 1
    path.write_text(text[:at] + bad + text[text.index(",", at) :])
    with pytest.raises(FileError, match="delete it"):
        CostModel(N_LAYERS).load(path, {})


def test_an_expert_is_read_once_for_all_rows_that_meet_in_its_layer() -> None:
    experts = Experts(8, 2, 1000)
    whole = features([work(100)], N_LAYERS, experts)[4]
    assert whole == pytest.approx(N_LAYERS * 8 * 1000, rel=1e-3)  # a hundred rows meet all of them
    assert features([work(50), work(50)], N_LAYERS, experts)[4] == pytest.approx(whole)
    halves = [Work(1, 0, 100, LayerRange(a, a + 2), 0) for a in (0, 2)]
    assert sum(features([w], N_LAYERS, experts)[4] for w in halves) == pytest.approx(whole)
    assert features([work(1)], N_LAYERS, experts)[4] == pytest.approx(N_LAYERS * 2 * 1000)
    assert len(features([work(100)], N_LAYERS)) == 4


def test_bytes_of_experts_are_learned() -> None:
    experts = Experts(8, 2, 10_000_000)
    model, rng = CostModel(N_LAYERS, experts=experts), random.Random(2)
    true = np.array([1e-3, 1e-4, 0.0, 0.0, 1e-10])
    for _ in range(500):
        works = [work(rng.randint(1, 30), rng.randint(0, 100))]
        model.observe(works, float(true @ features(works, N_LAYERS, experts)))
    for n in (1, 3, 25):
        assert model.predict([work(n)]) == pytest.approx(float(true @ features([work(n)], N_LAYERS, experts)), rel=0.1)


def test_priorities_stand_above_promises_and_promises_above_shares() -> None:
    chain = standard()
    assert [type(p) for p in chain] == [Arrival, FairShare, Urgency, Priority, ChunkedPrefill]
    e = engine(*chain, n_blocks=2)
    plain, urgent = e.submit(request(100)), e.submit(request(100, deadline_s=2.0))
    first = e.submit(request(100, priority=1))
    done = finish_times(e)
    assert sorted(done, key=done.__getitem__) == [first, urgent, plain]


@pytest.mark.parametrize(("copy_s", "how"), [(1e-9, "swap"), (10.0, "recompute")])
def test_memory_is_taken_by_whichever_is_expected_to_take_less_time(copy_s: float, how: str) -> None:
    executor = Virtual(linear, n_blocks=4)
    chain = Composer((Arrival(),), "cheaper")
    e = Engine(executor, chain, cost=taught(linear), clock=lambda: executor.now, prefix_cache=False)
    e.copy_s = copy_s
    for _ in range(3):
        e.submit(request(60, 100))
    while e.has_work:
        e.step()
    assert e.counts.preempted > 0
    assert (e.counts.swapped > 0) == (how == "swap")
