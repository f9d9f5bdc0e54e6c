"""A simulation makes the decisions of the real engine; a replay keeps arrivals; reports say what happened."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from nearfar.errors import MissingExtraError, NearfarError, UsageError
from nearfar_cloud.clock import VirtualClock, WallClock
from nearfar_cloud.counts import Counts
from nearfar_cloud.engine import Engine
from nearfar_cloud.executors.base import BatchWork, Ids, ModelFacts, Result
from nearfar_cloud.executors.sim import SimExecutor, facts_of, seeded
from nearfar_cloud.planning import report
from nearfar_cloud.planning.generate import Zipf, generate, injection
from nearfar_cloud.planning.replay import Replay, Served, capacity, replay
from nearfar_cloud.planning.report import Slo, spread, summarise
from nearfar_cloud.planning.roofline import HARDWARE, MODELS, cost_model
from nearfar_cloud.planning.simulate import POLICIES, simulated
from nearfar_cloud.planning.workload import Workload
from nearfar_cloud.scheduling.budget import Arrival, ChunkedPrefill
from nearfar_cloud.scheduling.compose import Composer, Preemption
from nearfar_cloud.scheduling.cost import CostModel
from nearfar_cloud.scheduling.policy import Policy
from nearfar_cloud.scheduling.propose import NGram
from nearfar_cloud.scheduling.spec import Speculation
from nearfar_cloud.scheduling.view import EngineView
from nearfar_cloud.types import Objective, Request, Seq, StepPlan, Work

ANCHOR = MODELS["llama-100m"]
COST = partial(cost_model, ANCHOR, HARDWARE["zen5-core"])
FACTS = ModelFacts("made", 4, 64, 320, 1024)


def made_cost(n_layers: int = 4) -> CostModel:
    """A row takes a millisecond, a step two more; a key costs a little."""
    cost = CostModel(n_layers)
    for regime in cost.regimes:
        regime.coefficients = np.array([2e-3, 0.1, 1e-3, 1e-3])
    return cost


class Noted(Composer):
    """Keeps what was planned and when, and when the engine says that each request came."""

    def __init__(self, policies: Sequence[Policy], preemption: Preemption = "recompute") -> None:
        super().__init__(policies, preemption)
        self.plans: list[tuple[float, StepPlan]] = []
        self.arrivals: dict[int, float] = {}

    def plan(self, view: EngineView) -> StepPlan:
        self.arrivals.update({s.id: s.arrival for s in view.seqs})
        plan = super().plan(view)
        self.plans.append((view.now, plan))
        return plan


@dataclass
class Timed:
    """A real executor whose steps take the time that a cost model expects; keeps the tokens it has decided."""

    real: object
    cost: CostModel
    clock: VirtualClock
    told: dict[tuple[int, int], int] = field(default_factory=dict)

    def __getattr__(self, name: str) -> object:
        return getattr(self.real, name)

    def run(self, batch: Sequence[BatchWork]) -> list[Result]:
        results: list[Result] = self.real.run(batch)  # type: ignore[attr-defined]
        self.clock.advance(self.cost.predict([Work(w.seq, w.start, w.n, w.layers, 0) for w in batch]))
        for w, result in zip(batch, results, strict=True):
            for j, token in enumerate(result.ids):
                assert w.ask is not None
                self.told[w.seq, w.ask.position + j] = token
        return results


def shared_prompts() -> Workload:
    """Ten requests in two bursts; some begin alike."""
    n_prompt = np.array([60, 20, 190, 64, 130, 1, 200, 130, 70, 150])
    n_output = np.array([150, 140, 3, 12, 1, 150, 20, 6, 5, 30])
    hashes = tuple(((i % 3), 10 + i, 20 + i, 30 + i) for i in range(10))
    arrival = np.array([0, 0.01, 0.01, 0.05, 0.2, 0.2, 0.2, 1.0, 1.3, 1.31])
    return Workload("shared", arrival, n_prompt, n_output, hashes, 64)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("policies", "preemption", "drafts", "n_blocks"),
    [("chunked", "recompute", False, 7), ("chunked", "swap", True, 8), ("prefill-first", "recompute", False, 40)],
)
def test_a_simulation_plans_the_steps_of_the_real_engine(
    policies: str, preemption: Preemption, drafts: bool, n_blocks: int
) -> None:
    """The real engine on a clock that goes by the cost model, and the simulated one: plans, times, tokens are equal."""
    pytest.importorskip("torch", reason="torch is not installed (extra [train])")
    from nearfar_cloud.executors.local import LocalExecutor
    from tests.cloud.serving import loaded

    clock, workload = VirtualClock(), shared_prompts()
    timed = Timed(LocalExecutor(loaded(), n_blocks), made_cost(), clock)
    real = Noted(POLICIES[policies](96), preemption)
    a = Engine(timed, real, clock=clock, speculation=Speculation(NGram) if drafts else None)  # type: ignore[arg-type]
    wanted = replay(a, workload, seed=1)

    clock = VirtualClock()
    executor = SimExecutor(
        timed.real.facts,  # type: ignore[attr-defined]
        n_blocks,
        made_cost(),
        clock,
        tokens=lambda seq, position: timed.told[seq, position],
        swap_blocks=10_000,
    )
    simulation = Noted(POLICIES[policies](96), preemption)
    b = Engine(executor, simulation, clock=clock, speculation=Speculation(NGram) if drafts else None)
    found = replay(b, workload, seed=1)

    assert simulation.plans == real.plans
    assert found.served == wanted.served
    assert all(s.finished and len(s.token_s) == s.n_output for s in found.served)
    assert b.counts.cached_tokens == a.counts.cached_tokens > 0
    if n_blocks < 40:
        assert b.counts.preempted == a.counts.preempted > 0
        assert b.counts.swapped == a.counts.swapped
        assert (b.counts.swapped > 0) == (preemption == "swap")
    if drafts:
        assert b.counts.drafted == a.counts.drafted > 0
        assert b.counts.accepted == a.counts.accepted


def engine(*policies: Policy, n_blocks: int = 64, composer: Composer | None = None, **options: object) -> Engine:
    clock = VirtualClock()
    executor = SimExecutor(FACTS, n_blocks, made_cost(), clock)
    return Engine(executor, composer or Composer(policies or (Arrival(), ChunkedPrefill())), clock=clock, **options)  # type: ignore[arg-type]


def bursts(n: int = 40, *, rate: float = 5.0, seed: int = 0) -> Workload:
    return generate(n, rate=rate, cv=3, prompt=Zipf(8, 256), output=Zipf(2, 32), seed=seed)


def test_a_replay_keeps_arrivals_and_serves_every_token() -> None:
    workload = bursts()
    noted = Noted((Arrival(), ChunkedPrefill()))
    done = replay(engine(composer=noted), workload)
    assert [noted.arrivals[i + 1] for i in range(len(workload))] == pytest.approx(workload.arrival_s.tolist())
    assert [s.arrival_s for s in done.served] == workload.arrival_s.tolist()
    assert [len(s.token_s) for s in done.served] == workload.n_output.tolist()
    for s in done.served:
        assert s.finished
        assert s.arrival_s < s.token_s[0]
        assert s.token_s == sorted(s.token_s)
        assert s.end_s == s.token_s[-1]
    assert done.seconds == max(s.token_s[-1] for s in done.served)
    assert done.counts["generated_tokens"] == workload.n_output.sum()


def test_nobody_is_known_before_he_comes() -> None:
    """The first plan that has a request is made after its arrival."""
    noted = Noted((Arrival(), ChunkedPrefill()))
    workload = bursts()
    replay(engine(composer=noted), workload)
    for now, plan in noted.plans:
        assert all(workload.arrival_s[w.seq - 1] <= now for w in plan.works)


def test_a_simulation_can_be_repeated_exactly() -> None:
    one, two = (replay(engine(), bursts()) for _ in range(2))
    assert one == two


def test_the_time_of_a_step_is_what_the_cost_model_says() -> None:
    done = replay(engine(), Workload("one", np.zeros(1), np.array([10]), np.array([3])))
    # A step, ten rows, ten keys, 50 pairs of query and key; then one row that reads eleven keys.
    assert done.served[0].token_s[0] == pytest.approx(2e-3 + 10e-3 + 10e-7 + 50e-8)
    assert done.served[0].tbt_s[0] == pytest.approx(2e-3 + 1e-3 + 11e-7 + 10.5e-8)


def test_a_request_that_can_never_be_served_has_the_reason_in_its_record() -> None:
    w = Workload("long", np.array([0.0, 0.1]), np.array([2000, 5]), np.array([3, 3]))
    done = replay(engine(), w)
    assert "positions" in done.served[0].error
    assert not done.served[0].finished
    assert done.served[1].finished


class Never(Policy):
    def admit(self, s: Seq, view: EngineView) -> bool:
        return False


def test_a_replay_in_which_nothing_runs_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nearfar_cloud.planning.replay.PATIENCE_S", 0.5)
    with pytest.raises(NearfarError, match=r"nothing has run for 0.5 s, and 4 requests wait"):
        replay(engine(Never()), bursts(4))


def test_a_replay_needs_a_clock_and_an_engine_of_its_own() -> None:
    e = engine()
    e.submit(Request(ids=(1, 2)))
    e.step()
    with pytest.raises(UsageError, match="already serves 1 sequences"):
        replay(e, bursts())
    e = engine()
    e.clock = lambda: 0.0
    with pytest.raises(UsageError, match="WallClock"):
        replay(e, bursts())


@pytest.mark.usefixtures("one_thread")
def test_a_replay_on_the_wall_clock_takes_its_time() -> None:
    pytest.importorskip("torch", reason="torch is not installed (extra [train])")
    from tests.cloud.serving import engine as real_engine

    w = Workload("three", np.array([0.0, 0.05, 0.2]), np.array([5, 70, 3]), np.array([2, 3, 1]))
    done = replay(real_engine(clock=WallClock()), w)
    assert [len(s.token_s) for s in done.served] == [2, 3, 1]
    assert done.seconds >= 0.2
    assert all(s.ttft_s is not None and s.ttft_s > 0 for s in done.served)


def test_capacity_is_what_is_served_when_all_is_there() -> None:
    w = Workload("ten", np.linspace(0, 90, 10), np.full(10, 64), np.full(10, 1))
    a_step = 2e-3 + 256e-3  # four prompts, but for what keys cost
    assert capacity(engine(), w) == pytest.approx(10 / (2.5 * a_step), rel=0.05)
    with pytest.raises(NearfarError, match="no request could be served"):
        capacity(engine(), Workload("long", np.zeros(1), np.array([2000]), np.array([3])))


def test_the_seeded_tokens_depend_on_seed_sequence_and_position_alone() -> None:
    token = seeded(0, 320)
    drawn = [token(s, p) for s in range(40) for p in range(50)]
    assert drawn == [seeded(0, 320)(s, p) for s in range(40) for p in range(50)]
    assert drawn != [seeded(1, 320)(s, p) for s in range(40) for p in range(50)]
    assert set(drawn) <= set(range(320))
    assert len(set(drawn)) > 300


def test_a_simulation_can_swap_as_much_as_its_tier_holds_and_takes_the_time() -> None:
    clock = VirtualClock()
    e = SimExecutor(FACTS, 8, made_cost(), clock, swap_blocks=3, seconds_a_block=0.5)
    blocks: Ids = np.arange(2, dtype=np.int32)
    assert e.can_swap(3)
    e.swap_out(1, blocks)
    assert (e.can_swap(1), e.can_swap(2)) == (True, False)
    e.swap_in(1, blocks)
    assert clock.now == 2.0
    assert e.can_swap(3)
    e.swap_out(2, blocks)
    e.drop(2)
    assert e.can_swap(3)


def test_a_cost_model_of_another_model_is_refused() -> None:
    with pytest.raises(UsageError, match="5 layers for a model of 4"):
        SimExecutor(FACTS, 8, CostModel(5), VirtualClock())


# ------------------------------------------------------------ what policies promise, in virtual time


def anchor(policy: str, n_blocks: int = 256) -> Engine:
    return simulated(facts_of(ANCHOR), COST, POLICIES[policy](256), n_blocks=n_blocks)


def longest_tbt(done: Replay) -> float:
    return max(t for s in done.served for t in s.tbt_s)


def test_chunks_keep_answers_flowing_while_a_long_prompt_comes() -> None:
    """16 answers are being written, a prompt of 2,048 tokens arrives: the longest interval between tokens."""
    workload = injection(1.0, n_running=16, n_output=300, long=2048)
    chunked, first = (replay(anchor(p), workload) for p in ("chunked", "prefill-first"))
    assert longest_tbt(chunked) <= longest_tbt(first) / 5
    # The price: the long prompt waits for those who generate.
    assert (chunked.served[-1].ttft_s or 0) > (first.served[-1].ttft_s or 0)


@pytest.mark.parametrize("cv", [1.0, 4.0])
def test_a_promised_interval_is_kept_in_bursts(cv: float) -> None:
    promise = Objective(tbt_s=0.05)
    workload = generate(60, rate=4, cv=cv, prompt=Zipf(16, 1024), output=Zipf(4, 64), seed=2)
    chunked, first = (replay(anchor(p), workload, objective=promise) for p in ("chunked", "prefill-first"))
    assert longest_tbt(chunked) <= 0.05 * 1.01
    assert longest_tbt(first) > 0.05


@pytest.mark.parametrize("policy", list(POLICIES))
def test_nobody_who_waits_takes_the_memory_of_those_who_run(policy: str) -> None:
    """Far more requests than memory: only growing answers take blocks from the last, and work is hardly done twice."""
    workload = generate(60, rate=500, cv=1, prompt=Zipf(64, 512), output=Zipf(16, 64), seed=4)
    done = replay(engine(*POLICIES[policy](256), n_blocks=24), workload)
    assert all(s.finished for s in done.served)
    assert done.counts["rows"] < 1.5 * (workload.n_prompt.sum() + workload.n_output.sum())


# ------------------------------------------------------------ reports


def by_hand() -> Replay:
    """Four requests: in time, late, with a gap, refused."""
    served = [
        Served(0.0, 10, 3, [0.5, 0.6, 0.7], 0.7),
        Served(1.0, 10, 2, [3.0, 3.1], 3.1),
        Served(2.0, 20, 3, [2.5, 3.5, 4.0], 4.0),
        Served(2.0, 9999, 2, [], None, "too long"),
    ]
    counts = dict.fromkeys(Counts.__dataclass_fields__, 0) | {"steps": 4, "rows": 40, "generated_tokens": 8}
    counts |= {"prompt_tokens": 40, "cached_tokens": 10, "plan_s": 0.1, "commit_s": 0.1, "run_s": 1.8}
    return Replay(served, 4.0, counts)


def test_figures_of_a_replay_by_hand() -> None:
    s = summarise(by_hand(), Slo(ttft_s=1.0, tbt_s=0.3))
    assert (s["requests"], s["finished"], s["failed"]) == (4, 3, 1)
    assert s["ttft_s"]["p50"] == 0.5  # of 0.5, 2.0, 0.5
    assert s["ttft_s"]["max"] == 2.0
    assert s["tbt_s"]["max"] == 1.0
    assert s["tbt_s"]["mean"] == pytest.approx((0.1 + 0.1 + 0.1 + 1.0 + 0.5) / 5)
    assert s["e2e_s"]["max"] == pytest.approx(2.1)
    assert s["goodput"] == 1 / 4.0  # the first one alone kept both limits
    assert s["attained"] == 0.25
    assert (s["requests_s"], s["tokens_s"], s["prompt_tokens_s"]) == (0.75, 2.0, 10.0)
    assert (s["rows_a_step"], s["cached_share"]) == (10, 0.25)
    assert s["host_share"] == pytest.approx(0.1)
    assert summarise(by_hand(), Slo(ttft_s=2.0, tbt_s=1.0))["goodput"] == 0.75
    json.dumps(s, allow_nan=False)


def test_percentiles_are_those_of_linear_interpolation() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0]) == {
        "mean": 2.5,
        "p50": 2.5,
        "p95": pytest.approx(3.85),
        "p99": pytest.approx(3.97),
        "max": 4.0,
    }
    values = np.random.default_rng(0).exponential(size=1000)
    found = spread(values.tolist())
    ordered = np.sort(values)
    for p in (50, 95, 99):
        place = p / 100 * 999
        low = int(place)
        assert found[f"p{p}"] == pytest.approx(ordered[low] + (place - low) * (ordered[low + 1] - ordered[low]))
    assert spread([]) == dict.fromkeys(("mean", "p50", "p95", "p99", "max"))


def test_a_replay_in_which_nothing_was_served_has_figures_too() -> None:
    done = Replay([Served(0.0, 9999, 2, [], None, "too long")], 0.0, dict.fromkeys(Counts.__dataclass_fields__, 0))
    s = summarise(done, Slo(1, 1))
    assert (s["goodput"], s["ttft_s"]["p99"], s["host_share"]) == (None, None, None)
    json.dumps(s, allow_nan=False)
    assert " - " in report.table({"nothing": s})


def test_the_table_has_a_line_a_run_in_milliseconds() -> None:
    head, one, two = report.table({"one": (s := summarise(by_hand(), Slo(1, 0.3))), "another": s}).splitlines()
    assert head.split()[:3] == ["run", "TTFT", "p50"]
    assert one.split()[:2] == ["one", "500.0"]
    assert two.split()[0] == "another"
    assert "25%" in one


@pytest.mark.parametrize("limits", [(0, 1), (1, -1), (float("nan"), 1)])
def test_a_promise_is_positive(limits: tuple[float, float]) -> None:
    with pytest.raises(UsageError, match="expected positive"):
        Slo(*limits)


def test_the_plot_is_a_picture_or_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra [train])")
    with pytest.raises(UsageError, match="ends with"):
        report.plot({"one": by_hand()}, tmp_path / "plot.txt")
    report.plot({"one": by_hand()}, tmp_path / "plot.png", "by hand")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="matplotlib"):
        report.plot({"one": by_hand()}, tmp_path / "other.png")


# ------------------------------------------------------------ clocks


def test_a_dated_clock_shows_its_date_inside_the_block_only() -> None:
    clock = VirtualClock()
    clock.advance(5)
    with clock.dated(3):
        assert clock() == 3
        assert clock.now == 5
    assert clock() == 5
    with pytest.raises(ValueError), clock.dated(3):
        raise ValueError
    assert clock() == 5
    clock.wait_until(4)
    assert clock() == 5
    clock.wait_until(7)
    assert clock() == 7


def test_what_an_engine_learns_stays_finite_however_long_nothing_varies() -> None:
    """Forgetting raises the doubt about what no step shows; without a ceiling it overflowed after 140,000 steps."""
    cost = CostModel(1)
    regime = cost.regimes[0]
    x = np.array([1.0, 8.0, 800.0, 800.0])
    for _ in range(12_000):
        regime.learn(x, 0.02)
    assert np.trace(regime.covariance) < 1e3
    assert regime.predict(x) == pytest.approx(0.02, rel=1e-3)
    # And it still follows when the machine changes.
    for _ in range(2_000):
        regime.learn(x, 0.03)
    assert regime.predict(x) == pytest.approx(0.03, rel=1e-2)


def test_requests_are_told_what_they_are_promised() -> None:
    seen: list[Objective] = []

    class Look(Arrival):
        def admit(self, s: Seq, view: EngineView) -> bool:
            seen.append(s.req.objective)
            return True

    promise = Objective(ttft_s=1.0, tbt_s=0.2)
    replay(engine(Look()), bursts(3), objective=promise)
    assert set(seen) == {promise}
    assert Request(ids=(1,)).objective != promise
