"""Tokens never depend on who else is served: any schedule gives what one request at a time gives."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="torch is not installed (extra [train])")

from nearfar.errors import ContextError, UsageError
from nearfar.sampling import Sampling
from nearfar_cloud.engine import Engine
from nearfar_cloud.executors.local import LocalExecutor
from nearfar_cloud.kv.pool import KVPool
from nearfar_cloud.model.attention import KVStore
from nearfar_cloud.outside import ArrayRows, Question
from nearfar_cloud.scheduling.budget import Arrival, ChunkedPrefill, PrefillFirst, Priority, SplitFuse
from nearfar_cloud.scheduling.compose import Composer
from nearfar_cloud.scheduling.layered import LayeredPrefill
from nearfar_cloud.scheduling.policy import Policy
from nearfar_cloud.scheduling.spec import Speculation
from nearfar_cloud.scheduling.standard import standard
from nearfar_cloud.scheduling.view import EngineView
from nearfar_cloud.types import Objective, Preempt, Request, Seq, Status, StepPlan, Work
from tests.cloud import serving
from tests.cloud.serving import alone, check_empty, drain, engine, loaded, request, run

pytestmark = pytest.mark.usefixtures("one_thread")


class Chaos(Policy):
    """Any order, any piece of a gap, any layers, now and then nothing."""

    def __init__(self, rng: random.Random, *, layers: bool = True) -> None:
        self.rng, self.layers = rng, layers

    def order(self, seqs: Sequence[Seq], view: EngineView) -> Sequence[Seq]:
        return self.rng.sample(list(seqs), len(seqs))

    def admit(self, s: Seq, view: EngineView) -> bool:
        return self.rng.random() < 0.8

    def budget(self, view: EngineView) -> int:
        return self.rng.choice((1, 3, 64, 100, 400))

    def shape(self, work: Work, s: Seq, left: int, view: EngineView) -> Work | None:
        if self.rng.random() < 0.1:
            return None
        n = self.rng.choice((1, 2, 17, 64, work.n, work.n))
        last = None
        if self.layers and self.rng.random() < 0.3 and work.layers.n > 1:
            last = self.rng.randint(work.layers.first + 1, work.layers.last)
        return work.narrowed(s, n, last)


class Shaken(Composer):
    """Takes memory from somebody at random before it plans."""

    def __init__(self, rng: random.Random, policies: Sequence[Policy]) -> None:
        super().__init__(policies, rng.choice(("recompute", "swap", "cheaper")))
        self.rng = rng

    def plan(self, view: EngineView) -> StepPlan:
        running = [s for s in (*view.seqs, *view.idle) if s.status is Status.RUNNING and s.blocks]
        if running and self.rng.random() < 0.1:
            return StepPlan((), (Preempt(self.rng.choice(running).id, self.rng.choice(("recompute", "swap"))),))
        return super().plan(view)


class Guesses:
    """Drafts that are right, wrong, or right up to a point: it knows the answers."""

    def __init__(self, rng: random.Random, answers: Sequence[tuple[int, ...]], prompts: Sequence[int]) -> None:
        self.rng, self.answers, self.prompts = rng, answers, prompts

    def propose(self, ids: Sequence[int], n: int) -> list[int]:
        for answer, prompt in zip(self.answers, self.prompts, strict=True):
            done = len(ids) - prompt
            if 0 < done < len(answer) and tuple(ids[prompt:]) == answer[:done]:
                drafts = list(answer[done : done + n])
                if drafts and self.rng.random() < 0.5:
                    drafts[self.rng.randrange(len(drafts))] = self.rng.randrange(320)
                return drafts
        return []


class Eager(Speculation):
    """Checks any number of drafts, whether it pays or not."""

    def __init__(self, rng: random.Random, guesses: Guesses) -> None:
        super().__init__(lambda: guesses)
        self.rng = rng

    def lengths(self, seqs: Sequence[Seq], most: Sequence[int], view: EngineView) -> list[int]:
        return [self.rng.choice((n, n, self.rng.randint(0, n))) for n in most]


def some_policies(rng: random.Random) -> tuple[Policy, ...]:
    """A server's chain, one of its parts in another form, or chaos."""
    return rng.choice(
        (
            (Chaos(rng),),
            (Chaos(rng),),
            (*standard(), Chaos(rng)),
            standard(rng.choice((1, 70, 256))),
            (Arrival(), SplitFuse(rng.choice((5, 100)))),
            (*standard(), LayeredPrefill(rng.choice((20, 100)))),
            (Priority(), PrefillFirst()),
        )
    )


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6))
def test_any_schedule_gives_the_tokens_of_one_request_at_a_time(seed: int) -> None:
    shaken_up(seed)


def some_requests(rng: random.Random) -> tuple[int, list[tuple[int, int]], list[tuple[int, ...]]]:
    """How many ids all begin with; numbers of requests, with how many answers each; the answers of each alone."""
    n_shared = rng.choice((0, 0, 130))
    asked = [(rng.randrange(12), rng.choice((1, 1, 1, 3))) for _ in range(rng.randint(1, 5))]
    return n_shared, asked, [alone(n, shared=n_shared, branch=i) for n, n_answers in asked for i in range(n_answers)]


def shaken_up(seed: int) -> None:
    """Some requests under a schedule of chance; AssertionError if a token or a block is not where it should be."""
    rng = random.Random(seed)
    n_shared, asked, answers = some_requests(rng)
    requests = [replace(request(n, shared=n_shared), objective=some_objective(rng)) for n, _ in asked]
    guesses = Guesses(rng, answers, [len(r.ids) for r, (_, n) in zip(requests, asked, strict=True) for _ in range(n)])
    speculation = rng.choice((None, Eager(rng, guesses), Eager(rng, guesses), Speculation(lambda: guesses)))
    executor = LocalExecutor(loaded(), n_blocks=rng.choice((6, 8, 12, 40)))
    e = Engine(
        executor,
        Shaken(rng, some_policies(rng)),
        speculation=speculation,
        prefix_cache=rng.random() < 0.7,
        parked_rows=rng.choice((30, 1 << 14)),
        clock=functools.partial(next, itertools.count()),  # moves at every look: no schedule depends on the machine
    )
    seqs: list[int] = []
    found: dict[int, tuple[int, ...]] = {}
    coming = list(zip(requests, asked, strict=True))
    for _ in range(20_000):
        if coming and rng.random() < 0.3:
            r, (_, n) = coming.pop(0)
            seqs += [e.submit(r)] if n == 1 else e.submit_branches(r, n)
        for out in e.step():
            serving.collect(found, out)
        e.pool.check([s.blocks for s in e.seqs.values()])
        if not coming and not e.seqs and not e.has_work:
            break
    assert [found[s] for s in seqs] == answers
    check_empty(e)


def some_objective(rng: random.Random) -> Objective:
    seconds = (None, None, 1.0, 30.0, 500.0)
    return Objective(rng.choice(seconds), rng.choice(seconds), rng.choice(seconds), rng.randint(0, 1), rng.choice("ab"))


def one_too_many(self: Engine, s: Seq) -> tuple[tuple[int, ...], int]:
    """A prefix hit that is a block too long for its chain."""
    blocks = self.pool.match(self._chain(s).upto(s.ids, s.n_known - 1))
    more = [b for b in self.pool._hash if b not in blocks][:1] if blocks else []
    return tuple(blocks + more), self.pool.n_idle(blocks + more)


def shares_a_block_too_many(self: Engine, s: Seq, real: Callable[[Engine, Seq], None] = Engine._branch) -> None:
    """Branches keep the block that the prompt does not fill, too, without a copy of their own."""
    branches = self.branches.get(s.id, [])
    real(self, s)
    for branch in branches if s.id not in self.branches else []:
        if len(s.blocks) > len(branch.blocks) and branch.status is Status.RUNNING:
            more = s.blocks[len(branch.blocks) : len(branch.blocks) + 1]
            self.pool.share(more)
            branch.blocks += more


FAULTS = {
    "branches write into one block": (Engine, "_branch", shares_a_block_too_many),
    "rejected drafts stay computed": (Seq, "truncate", lambda self, n: None),
    "a hit is a block too long": (Engine, "_hit", one_too_many),
    "a swapped block comes back elsewhere": (
        KVStore,
        "restore",
        lambda self, blocks, *rest, real=KVStore.restore: real(self, blocks.flip(0), *rest),
    ),
    "keys lie one row off": (
        LocalExecutor,
        "run",
        lambda self, batch, real=LocalExecutor.run: real(
            self, [replace(w, start=w.start + (w.start > 64)) for w in batch]
        ),
    ),
    "blocks of the preempted stay taken": (KVPool, "release", lambda self, blocks: None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_noticed(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """The property above is worth something: without one line that matters it fails."""
    for seed in range(60):
        some_requests(random.Random(seed))  # alone they are served without the fault
        with monkeypatch.context() as patch:
            patch.setattr(*FAULTS[fault])
            if _fails(seed):
                return
    pytest.fail("nothing was noticed")


def _fails(seed: int) -> bool:
    try:
        shaken_up(seed)
    except (AssertionError, KeyError, IndexError):
        return True
    return False


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "bitnet"])
def test_every_family_is_the_same_in_a_batch(arch: str) -> None:
    numbers = list(range(6))
    e = engine(*standard(70), model=loaded(arch), n_blocks=40)
    assert run(e, [request(n) for n in numbers]) == [alone(n, arch) for n in numbers]


def test_hidden_rows_that_enter_at_a_layer_give_the_tokens_of_the_whole_model() -> None:
    """A device runs the layers below; here the same model does."""
    entry = 2
    lower = LocalExecutor(loaded(), 8)
    e = engine(n_blocks=24)
    for n in (n for n in range(8) if request(n).sampling.repetition_penalty == 1):
        wanted, others = request(n), [e.submit(request(m)) for m in (7, 8)]
        seq = e.submit(Request(entry=entry, outside=True, sampling=wanted.sampling))
        found: dict[int, tuple[int, ...]] = {}
        text, new = list(wanted.ids), wanted.ids
        while len(text) < len(wanted.ids) + wanted.max_tokens:
            e.append(seq, rows=ArrayRows(_rows(lower, new, len(text) - len(new), entry)))
            e.ask(seq, Question(1, len(text) - 1, len(text) - 1))
            told: list[tuple[int, ...]] = []
            while not told:
                for out in e.step():
                    if out.seq == seq:
                        told.append(out.ids)
                    else:
                        serving.collect(found, out)
            new = told[0]
            text += new
        assert tuple(text[len(wanted.ids) :]) == alone(n)
        lower.drop(1)
        e.abort(seq)
        for s, ids in drain(e).items():
            found[s] = found.get(s, ()) + ids
        assert [found[s] for s in others] == [alone(7), alone(8)]
        check_empty(e)


def _rows(lower: LocalExecutor, ids: Sequence[int], start: int, entry: int) -> np.ndarray:
    from nearfar_cloud.executors.base import BatchWork
    from nearfar_cloud.types import LayerRange

    blocks = np.arange(8, dtype=np.int32)[: -(-(start + len(ids)) // 64)]
    work = BatchWork(1, start, len(ids), LayerRange(0, entry), blocks, np.asarray(ids, np.int32), None, None)
    lower.run([work])
    first, parked = lower._parked[1, entry]
    return parked[start - first :].numpy().copy()


def test_a_prompt_that_begins_like_an_earlier_one_is_not_computed_again() -> None:
    e = engine()
    first = run(e, [request(1, shared=200)])
    before = e.counts.rows
    assert run(e, [request(1, shared=200)]) == first == [alone(1, shared=200)]
    n = len(request(1, shared=200).ids)
    assert e.counts.cached_tokens == (n - 1) // 64 * 64
    assert e.counts.rows - before < n


def test_a_model_can_do_without_the_prefix_cache() -> None:
    executor = LocalExecutor(loaded(), 24, prefix_cache=False)
    e = Engine(executor, Composer(standard()))
    assert run(e, [request(1, shared=200)]) == run(e, [request(1, shared=200)]) == [alone(1, shared=200)]
    assert e.counts.cached_tokens == 0
    assert Engine(executor, Composer(standard()), prefix_cache=True).prefix_cache


def test_another_tenant_finds_nothing() -> None:
    e = engine()
    r = request(1, shared=200)
    run(e, [r])
    run(e, [Request(ids=r.ids, max_tokens=2, objective=Objective(tenant="other"))])
    assert e.counts.cached_tokens == 0


def test_a_step_never_has_more_rows_than_its_budget_and_tokens_come_at_every_step() -> None:
    e = engine(Arrival(), ChunkedPrefill(96))
    for n in range(4):
        e.submit(request(n, prompt=5, max_tokens=60))
    for _ in range(3):
        e.step()
    e.submit(request(9, prompt=600, max_tokens=2))
    for _ in range(5):
        before = e.counts.rows
        outputs = e.step()
        assert len(outputs) == 4
        assert e.counts.rows - before <= 96


def test_prefill_first_stalls_those_who_generate() -> None:
    e = engine(PrefillFirst())
    e.submit(request(1, prompt=5, max_tokens=60))
    e.step()
    e.submit(request(9, prompt=600, max_tokens=2))
    e.step()
    assert {s.status for s in e.seqs.values()} == {Status.RUNNING}


def test_higher_priorities_go_first_and_take_the_memory_of_lower_ones() -> None:
    e = engine(Arrival(), Priority(), ChunkedPrefill(), n_blocks=5)
    low = e.submit(request(1, prompt=200, max_tokens=20))
    e.step()
    high = e.submit(Request(ids=request(2, prompt=200).ids, max_tokens=20, objective=Objective(priority=1)))
    order = []
    while e.seqs or e.has_work:
        order += [out.seq for out in e.step() if out.finish]
    assert order == [high, low]
    assert e.counts.preempted > 0
    check_empty(e)


def test_branches_of_a_prompt_are_requests_with_seeds_of_their_own_and_compute_it_once() -> None:
    n = next(n for n in range(24) if request(n).sampling.temperature > 0)
    wanted = [alone(n, shared=130, branch=i) for i in range(4)]
    assert len(set(wanted)) > 1
    for prefix_cache in (False, True):
        e = engine(prefix_cache=prefix_cache)
        seqs = e.submit_branches(request(n, shared=130), 4)
        found = drain(e)
        assert [found[s] for s in seqs] == wanted
        prompt = len(request(n, shared=130).ids)
        shared = (prompt - 1) // 64 * 64
        assert e.counts.rows == prompt + 3 * (prompt - shared) + sum(len(x) - 1 for x in wanted)
        assert e.counts.cached_tokens == 3 * shared
        check_empty(e)


def test_a_branch_whose_first_goes_away_begins_by_itself() -> None:
    e = engine(Arrival(), ChunkedPrefill(64))
    seqs = e.submit_branches(request(1, shared=200), 3)
    e.step()
    e.abort(seqs[0])
    e.abort(seqs[2])
    assert drain(e)[seqs[1]] == alone(1, shared=200, branch=1)
    check_empty(e)
    # The first one may also be done with its only token before the others begin.
    seqs = e.submit_branches(replace(request(1, shared=200), max_tokens=1), 3)
    found = drain(e)
    assert [found[s] for s in seqs] == [alone(1, shared=200, branch=i)[:1] for i in range(3)]
    check_empty(e)


def test_hooks_of_branches_follow_their_own_answers() -> None:
    e, hooks = engine(), [Follows(), Follows()]
    seqs = e.submit_branches(request(3), 2, hooks)
    found = drain(e)
    assert [tuple(hook.told) for hook in hooks] == [found[s] for s in seqs]


def test_an_aborted_request_leaves_nothing_behind() -> None:
    e = engine()
    kept, gone = e.submit(request(1)), e.submit(request(2, prompt=200))
    first = e.step()
    e.abort(gone)
    e.abort(gone)
    e.abort(12345)
    assert drain_more(e, first, kept) == alone(1)
    check_empty(e)


def test_a_work_that_fails_harms_no_other_one(monkeypatch: pytest.MonkeyPatch) -> None:
    e = engine()
    real = e.executor.run

    def run_or_fail(batch: list) -> list:
        if any(w.ids is not None and 319 in w.ids for w in batch):
            raise MemoryError("no room for this one")
        return real(batch)

    monkeypatch.setattr(e.executor, "run", run_or_fail)
    good = [n for n in range(8) if 319 not in request(n).ids and 319 not in alone(n)][:4]
    seqs = [e.submit(request(n)) for n in good]
    bad = e.submit(Request(ids=(1, 319, 2), max_tokens=4))
    found: dict[int, tuple[int, ...]] = {}
    errors = {}
    while e.seqs or e.has_work:
        for out in e.step():
            if out.error:
                errors[out.seq] = out.error
            else:
                serving.collect(found, out)
    assert list(errors) == [bad]
    assert "no room for this one" in errors[bad]
    assert [found[s] for s in seqs] == [alone(n) for n in good]
    check_empty(e)


def test_logits_that_are_not_finite_end_their_request_only() -> None:
    e = engine(n_blocks=24)
    assert isinstance(e.executor, LocalExecutor)
    rows = np.full((3, 64), np.nan, np.float32)
    bad = e.submit(Request(rows=ArrayRows(rows), entry=2, outside=True))
    e.ask(bad, Question(req=1, pos=2, verify_from=2))
    good = e.submit(request(1))
    outputs = e.step()
    assert [(o.seq, o.finish) for o in outputs if o.error] == [(bad, "error")]
    assert drain_more(e, outputs, good) == alone(1)
    # What it left in its blocks reaches nobody.
    assert run(e, [request(n) for n in range(6)]) == [alone(n) for n in range(6)]


def drain_more(e: Engine, outputs: Sequence[object], seq: int) -> tuple[int, ...]:
    found: dict[int, tuple[int, ...]] = {}
    for out in outputs:
        if out.seq == seq:  # type: ignore[attr-defined]
            serving.collect(found, out)  # type: ignore[arg-type]
    return found.get(seq, ()) + drain(e).get(seq, ())


class Follows:
    """A hook that counts what it is told, and raises from its `fails_at`-th token on."""

    def __init__(self, fails_at: int = 1_000) -> None:
        self.told: list[int] = []
        self.fails_at = fails_at

    def apply(self, logits: np.ndarray) -> np.ndarray:
        if len(self.told) == self.fails_at:
            raise RuntimeError("the hook is broken")
        return logits

    def accept(self, token: int) -> None:
        self.told.append(token)

    def rollback(self, n: int) -> None:
        del self.told[len(self.told) - n :]


def test_a_hook_that_raises_ends_its_own_request_and_moves_no_other_hook_twice() -> None:
    e, follows = engine(), Follows()
    good = e.submit(request(1), follows)
    bad = e.submit(request(3), Follows(fails_at=1))
    found: dict[int, tuple[int, ...]] = {}
    errors = {}
    while e.seqs or e.has_work:
        for out in e.step():
            if out.error:
                errors[out.seq] = out.error
            else:
                serving.collect(found, out)
    assert list(errors) == [bad]
    assert "the hook is broken" in errors[bad]
    assert found[good] == alone(1) == tuple(follows.told)
    check_empty(e)


def test_stop_ids_end_an_answer_and_are_not_told() -> None:
    whole = alone(3)
    r = request(3)
    stop = whole[len(whole) // 2]
    e = engine()
    e.submit(Request(ids=r.ids, max_tokens=r.max_tokens, sampling=r.sampling, stop_ids=frozenset({stop})))
    found = drain(e)
    assert next(iter(found.values())) == whole[: whole.index(stop)]


def test_logprobs_are_those_of_the_logits() -> None:
    e = engine()
    e.submit(Request(ids=request(1).ids, max_tokens=3, n_logprobs=5))
    told = []
    while e.seqs or e.has_work:
        told += [(i, p) for out in e.step() for i, p in zip(out.ids, out.logprobs, strict=True)]
    assert len(told) == 3
    for token, p in told:
        assert p.top[0] == (token, p.own)
        assert [x for _, x in p.top] == sorted((x for _, x in p.top), reverse=True)
        assert sum(np.exp(x) for _, x in p.top) <= 1


def a_row(width: int) -> ArrayRows:
    return ArrayRows(np.zeros((1, width), np.float32))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Request(ids=()), UsageError, "empty prompt"),
        (lambda: Request(ids=(1,), max_tokens=0), UsageError, "max_tokens=0"),
        (lambda: Request(ids=(1,), entry=2), UsageError, "either ids, or rows"),
        (lambda: Request(ids=(1,), entry=2, outside=True), UsageError, "either ids, or rows"),
        (lambda: Request(rows=a_row(64), outside=True), UsageError, "either ids, or rows"),
        (lambda: Request(rows=a_row(64), entry=2), UsageError, "either ids, or rows"),
        (lambda: Request(ids=(1,), n_logprobs=99), UsageError, "n_logprobs=99"),
        (lambda: Request(ids=(320,)), UsageError, r"ids 320\.\.320: the vocabulary holds 0\.\.319"),
        (lambda: Request(ids=(-1,)), UsageError, "ids -1"),
        (lambda: Request(ids=(1,) * 1000, max_tokens=100), ContextError, "1100 positions"),
        (lambda: Request(rows=a_row(63), entry=2, outside=True), UsageError, r"expected \[n, 64\]"),
        (lambda: Request(rows=a_row(64), entry=4, outside=True), UsageError, "enter at layer 4"),
        (lambda: Request(ids=(1,) * 1025, outside=True), ContextError, "1025 positions"),
        (lambda: Request(ids=(1,), outside=True, n_logprobs=1), UsageError, "tells no log-probabilities"),
        (
            lambda: Request(entry=2, outside=True, sampling=Sampling(repetition_penalty=1.1)),
            UsageError,
            "rows come without them",
        ),
        (lambda: Sampling(temperature=float("nan")), UsageError, "temperature=nan"),
    ],
)
def test_what_can_never_be_served_is_refused_at_the_door(make: object, error: type, message: str) -> None:
    e = engine()
    with pytest.raises(error, match=message):
        e.submit(make())  # type: ignore[operator]
    assert not e.has_work


@pytest.mark.parametrize(
    ("make", "n", "hooks"),
    [
        (lambda: Request(ids=(1,)), 0, None),
        (lambda: Request(ids=(1,)), 2, [None]),
        (lambda: Request(ids=(1,), max_tokens=1, pooled=True), 2, None),
    ],
)
def test_branches_that_cannot_be_are_refused(make: object, n: int, hooks: object) -> None:
    with pytest.raises(UsageError, match="expected ids, n >= 1 and a hook"):
        engine().submit_branches(make(), n, hooks)  # type: ignore[operator, arg-type]
