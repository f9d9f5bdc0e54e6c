"""Several workers serve as one engine, and a lost one is no loss."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("msgspec", reason="msgspec is not installed (extra [cloud])")

from nearfar.errors import ContextError, NearfarError, UsageError
from nearfar_cloud.executors.transport import Link
from nearfar_cloud.fleet import supervisor, worker
from nearfar_cloud.fleet.load import Load, freeness, freest, load_of, total
from nearfar_cloud.fleet.messages import Abort, Broken, Submit, ToWorker
from nearfar_cloud.fleet.process import ProcessWorker
from nearfar_cloud.fleet.supervisor import Fleet
from nearfar_cloud.gateway import service
from nearfar_cloud.kv.pool import BLOCK
from nearfar_cloud.types import Output, Request
from tests.cloud import serving
from tests.cloud.fleet import (
    FACTS,
    POISON,
    Answer,
    Scripted,
    a_token,
    alone,
    children,
    collect,
    descriptors,
    random_fleet,
    step_until,
)
from tests.paths import ROOT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """Workers find the modules of the tests wherever they are started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        yield


# ------------------------------------------------------------ load


def load(used: int = 0, wanted: int = 0, waiting: int = 0, running: int = 0, n_blocks: int = 100) -> Load:
    return Load(n_blocks, n_blocks - used, 0, wanted, waiting, running, 0)


def test_freeness_is_the_steps_until_memory_is_full() -> None:
    assert freeness(load()) == 100 * BLOCK
    assert freeness(load(used=40, running=3)) == 20 * BLOCK
    assert freeness(load(used=40, wanted=30, waiting=2, running=3)) == 6 * BLOCK
    assert freeness(load(used=90, wanted=30, waiting=2, running=3)) == -20 * BLOCK
    assert total([load(used=1, running=1), load(wanted=2, waiting=1)]) == Load(200, 199, 0, 2, 1, 1, 0)


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([load(used=50, running=5), load(used=10, running=1)], 1),
        ([load(used=10, running=1), load(used=10, wanted=80, waiting=4, running=1)], 0),  # a queue is a load, too
        ([load(used=10, running=10), load(used=60, running=2)], 1),  # few long ones leave more than many short ones
        ([load(used=100, wanted=50, waiting=1, running=1), load(used=100, wanted=80, waiting=60, running=20)], 0),
        ([load(), load()], 0),
        ([], None),
    ],
)
def test_the_next_request_goes_to_the_freest(loads: list[Load], expected: int | None) -> None:
    assert freest(dict(enumerate(loads))) == expected


def test_the_load_of_an_engine_follows_what_it_holds() -> None:
    e = serving.engine(n_blocks=8)
    assert load_of(e) == Load(8, 8, 0, 0, 0, 0, 0)
    for n in range(3):
        e.submit(serving.request(n, prompt=200, max_tokens=40))
    e.step()
    seen = load_of(e)
    assert (seen.n_running, seen.n_waiting) == (2, 1)  # the third one does not fit
    assert seen.n_used == e.pool.n_used > 0
    assert seen.n_wanted == 4
    serving.drain(e)
    assert load_of(e).n_used == 0
    assert load_of(e).n_cached > 0


# ------------------------------------------------------------ the front, with workers that are scripted


class Script:
    """A fleet whose workers are the test's."""

    def __init__(self, n: int, **options: float) -> None:
        self.places: dict[int, list[Scripted]] = {i: [] for i in range(n)}
        self.fleet = Fleet(self._start, n, **options)

    def _start(self, number: int, closing: threading.Event) -> Scripted:
        self.places[number].append(Scripted())
        return self.places[number][-1]

    def __getitem__(self, number: int) -> Scripted:
        """The worker of now."""
        return self.places[number][-1]

    def submit(self, n: int = 1, ids: tuple[int, ...] = (1, 2, 3), max_tokens: int = 10) -> list[int]:
        return [self.fleet.submit_branches(Request(ids=ids, max_tokens=max_tokens), 1)[0] for _ in range(n)]

    def step(self, n: int = 3) -> list[tuple[int, tuple[int, ...], str | None]]:
        outputs = [out for _ in range(n) for out in self.fleet.step()]
        return [(out.seq, out.ids, out.finish) for out in outputs]

    def lose(self, number: int) -> None:
        """Its process is gone; another one is there in the end."""
        before = len(self.places[number])
        self[number].far.close()
        step_until(self.fleet, lambda: len(self.places[number]) > before and self.fleet.members[number].is_ready)


@pytest.fixture
def script(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    monkeypatch.setattr(supervisor, "POLL_S", 0.01)
    monkeypatch.setattr(supervisor, "AGAIN_S", 0.0)
    made = Script(getattr(request, "param", 2))
    yield made
    made.fleet.close()


def test_requests_go_to_the_free_worker(script: Script) -> None:
    script[0].tell(used=40, running=4)
    script[1].tell(used=10, running=1)
    script.step()
    seqs = script.submit(2)
    script.step()
    assert script[0].submitted() == []
    assert script[1].submitted() == seqs
    script[0].tell(used=5, running=1)
    script[1].tell(used=60, running=3)
    script.step()
    seqs = script.submit(2)
    script.step()
    assert script[0].submitted() == seqs


def test_what_is_on_its_way_counts(script: Script) -> None:
    """Six requests at once, before any worker can tell of one: three go to each."""
    seqs = script.submit(6)
    script.step()
    assert (script[0].submitted(), script[1].submitted()) == (seqs[::2], seqs[1::2])
    script[0].tell()
    script[1].tell(used=40, running=1)  # 24 blocks for one are more than 61 for three
    script.step()
    seqs = script.submit(4)
    script.step()
    assert (script[0].submitted(), script[1].submitted()) == (seqs[:3], seqs[3:])
    script[0].tell()
    script[1].tell()
    script.step()
    seqs = [*script.submit(ids=(1,) * 640), *script.submit(3)]
    script.step()
    assert (script[0].submitted(), script[1].submitted()) == ([seqs[0], seqs[3]], seqs[1:3])


def test_suspects_come_back_one_at_a_time_and_a_second_loss_ends_the_guilty_one_alone(script: Script) -> None:
    script[1].tell(used=63, running=60)
    script.step()
    a, b, c = script.submit(3, max_tokens=5)
    script.step()
    assert script[0].submitted() == [a, b, c]
    script[0].tell(a_token(a, 11), a_token(b, 12))
    assert script.step() == [(a, (11,), None), (b, (12,), None)]
    script.lose(0)  # both are ready now: one suspect to each
    script.step()
    frames = {f.message.seqs[0]: f for i in (0, 1) for f in script[i].heard() if isinstance(f.message, Submit)}
    assert set(frames) == {a, b}
    assert frames[a].arrays[0].tolist() == [1, 2, 3, 11]
    assert (frames[a].message.n_followed, frames[a].message.max_tokens) == (1, 4)
    where = next(i for i in (0, 1) if a in script.fleet.members[i].open)
    script[where].tell(a_token(a, 13))  # cleared: the next suspect may come
    script.step()
    assert script[where].submitted() == [c]
    n_places = len(script.places[where])
    script[where].far.close()
    found = step_until(script.fleet, lambda: script.fleet.n_restarts == 2)
    assert [(out.seq, out.finish) for out in found] == [(c, "error")]
    assert "2 workers were lost" in found[0].error
    other = script[1 - where]
    other.tell(a_token(b, 14))
    step_until(script.fleet, lambda: len(script.places[where]) > n_places and script.fleet.members[where].is_ready)
    script.step()
    assert [*script[where].submitted(), *other.submitted()] == [a]  # it was there by chance: it goes on
    assert script.fleet.n_restarts == 2


def test_two_workers_that_are_lost_at_once_cost_nobody_an_answer(script: Script) -> None:
    """Both ends are heard in one look: nobody goes from one of them to the other."""
    seqs = script.submit(4)
    script.step()
    assert len(script[0].submitted()) == len(script[1].submitted()) == 2
    places = [script[0], script[1]]
    for place in places:
        place.far.close()
    found = step_until(script.fleet, lambda: script.fleet.n_restarts == 2)
    found += step_until(
        script.fleet, lambda: all(script[i] is not places[i] and script.fleet.members[i].is_ready for i in (0, 1))
    )
    left = list(seqs)
    while left:
        found += script.fleet.step()
        for i in (0, 1):
            for seq in script[i].submitted():
                script[i].tell(a_token(seq, finish="length"))
                left.remove(seq)
    found += step_until(script.fleet, lambda: not script.fleet._open)
    assert sorted((out.seq, out.finish) for out in found) == [(seq, "length") for seq in seqs]


def test_what_a_lost_worker_never_had_goes_elsewhere_without_blame(script: Script) -> None:
    script[1].tell(used=40, running=1)
    script.step()
    script[0].far.close()
    (a,) = script.submit()
    assert script.step(1) == []  # sent before its end was heard
    assert script[1].submitted() == [a]
    assert script.fleet._open[a].n_crashes == 0
    script[1].far.close()
    assert script.step(5) == []  # one loss, not two


def test_a_sign_of_life_holds_up_nobody(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rest after a step that brought nothing would never end here."""
    monkeypatch.setattr(service, "REST_S", 3600.0)

    async def served() -> list[Output]:
        running = service.Service(script.fleet)
        running.start()
        try:
            mailbox = service.Mailbox()
            (seq,) = running.submit(Request(ids=(1, 2), max_tokens=2), mailbox, [None])
            while not await asyncio.to_thread(script[0].submitted):
                pass
            for _ in range(3):
                script[1].tell()
            script[0].tell(a_token(seq, 11))
            first = await asyncio.wait_for(mailbox.get(), 60)
            script[1].tell()
            script[0].tell(a_token(seq, 12, finish="length"))
            return [first, await asyncio.wait_for(mailbox.get(), 60)]
        finally:
            await asyncio.to_thread(running.stop)

    assert [out.ids for out in asyncio.run(served())] == [(11,), (12,)]


def test_workers_side_by_side_are_as_fast_as_all_of_them(script: Script) -> None:
    assert service.speed(script.fleet) == 0
    script.fleet.counts.rows, script.fleet.counts.run_s = 600, 3.0  # 300 rows in 1.5 s, each
    assert service.speed(script.fleet) == 400
    engine = serving.engine()
    engine.counts.rows, engine.counts.run_s = 600, 3.0
    assert service.speed(engine) == 200


@pytest.mark.parametrize("script", [1], indirect=True)
def test_a_worker_on_trial_gets_nothing_else(script: Script) -> None:
    a, b = script.submit(2)
    script.step()
    script.lose(0)
    (c,) = script.submit()
    script.step()
    assert script[0].submitted() == [a]
    script[0].tell(a_token(a))
    script.step()
    assert script[0].submitted() == [b]  # before the new one
    script[0].tell(a_token(b, finish="length"))
    script.step()
    assert script[0].submitted() == [c]


def test_a_suspect_is_not_blamed_while_another_one_is_as_silent(script: Script) -> None:
    script[1].tell(used=40, running=1)
    script.step()
    (a,) = script.submit()
    script.step()
    assert script[0].submitted() == [a]
    script[0].tell(used=50, running=1)
    script.step()
    (b,) = script.submit()
    script.step()
    assert script[1].submitted() == [b]
    script[0].far.close()
    step_until(script.fleet, lambda: script.fleet.n_restarts == 1)
    script.step(1)
    assert script[1].submitted() == [a]  # which has told nothing yet, nor has b
    script[1].far.close()
    found = step_until(script.fleet, lambda: script.fleet.n_restarts == 2)
    assert not found
    assert {s.seq for s in script.fleet._open.values() if s.is_suspect} == {a, b}


def test_who_tells_tokens_between_losses_is_given_up_in_the_end(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "MOST_CRASHES", 3)
    (a,) = script.submit()
    for n in (1, 2, 3):
        script.step()
        where = next(i for i in (0, 1) if a in script.fleet.members[i].open)
        assert script[where].submitted() == [a]
        script[where].tell(a_token(a))
        assert script.step() == [(a, (7,), None)]
        before = len(script.places[where])
        script[where].far.close()
        found = step_until(
            script.fleet,
            lambda i=where, k=before: len(script.places[i]) > k and script.fleet.members[i].is_ready,
        )
        assert [(out.seq, out.finish) for out in found] == ([(a, "error")] if n == 3 else [])
    assert "3 workers were lost" in found[0].error


def test_branches_go_together_and_come_back_alone(script: Script) -> None:
    first, second = script.fleet.submit_branches(Request(ids=(5,), max_tokens=9), 2)
    script.step()
    (frame,) = [*script[0].heard(), *script[1].heard()]
    assert isinstance(frame.message, Submit)
    assert frame.message.seqs == (first, second)
    script.lose(0)
    script.step()
    frames = [f.message for i in (0, 1) for f in script[i].heard()]
    assert sorted((m.seqs, m.sampling.seed) for m in frames if isinstance(m, Submit)) == [((first,), 0), ((second,), 1)]


@pytest.mark.parametrize("script", [1], indirect=True)
def test_a_fleet_ends_with_its_last_worker(script: Script) -> None:
    script.submit()
    script.step()
    script.fleet._start = no_worker
    script[0].far.close()
    with pytest.raises(NearfarError, match="no worker is left"):
        step_until(script.fleet, lambda: False)


def test_aborts_reach_who_has_the_sequence_or_end_what_nobody_has(script: Script) -> None:
    a, b = script.submit(2)
    script.step()
    script[0].heard(), script[1].heard()
    script.fleet.abort(a)
    script.step()
    assert [f.message for f in script[0].heard()] == [Abort(a)]
    script[0].far.close()  # before it could answer
    assert (a, (), "abort") in script.step(5)
    script.fleet.abort(a)  # over: nothing happens
    script.fleet.abort(999)
    script.lose(1)
    assert script.fleet.members[0].open or script.fleet.members[1].open  # b goes on
    script.fleet.abort(b)
    script.step()
    assert not [out for out in script.step() if out[0] == a]


@pytest.mark.parametrize("script", [1], indirect=True)
def test_what_nobody_has_ends_at_once_while_no_worker_is_there(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    (a,) = script.submit()
    script.step()
    monkeypatch.setattr(supervisor, "AGAIN_S", 3600.0)
    start, script.fleet._start = script.fleet._start, no_worker
    script[0].far.close()
    step_until(script.fleet, lambda: script.fleet.members[0].n_starts == 1)  # a is suspect, nobody comes
    (b,) = script.submit()
    first, second, third = script.fleet.submit_branches(Request(ids=(5,), max_tokens=9), 3)
    for seq in (a, b, second):
        script.fleet.abort(seq)
    assert sorted(script.step(1)) == [(a, (), "abort"), (b, (), "abort"), (second, (), "abort")]
    assert set(script.fleet._open) == {first, third}
    assert not script.fleet._suspects
    assert sum(map(len, script.fleet._fresh)) == 2
    script.fleet._start = start
    script.fleet.members[0].start_at = 0.0
    step_until(script.fleet, lambda: script.fleet.members[0].is_ready)
    script.step()
    frames = [f.message for f in script[0].heard()]
    assert [(m.seqs, m.sampling.seed) for m in frames if isinstance(m, Submit)] == [((first,), 0), ((third,), 2)]


def no_worker(number: int, closing: threading.Event) -> Scripted:
    raise OSError("no more processes")


@pytest.mark.parametrize(
    "nonsense",
    [b"GET / HTTP/1.1\r\n\r\n", bytes(64), b"nfc1\xff\xff\xff\xff" + bytes(8), b"nfc1\x02" + bytes(11) + b"\xc1\xc1"],
)
def test_a_worker_that_talks_nonsense_is_replaced(script: Script, nonsense: bytes) -> None:
    (a,) = script.submit()
    script.step()
    place = script[0]
    assert place.submitted() == [a]
    place.raw.send(nonsense)
    step_until(script.fleet, lambda: script.fleet.n_restarts == 1)
    assert place.killed
    step_until(script.fleet, lambda: len(script.places[0]) == 2 and script.fleet.members[0].is_ready)
    script.step()
    assert [*script[0].submitted(), *script[1].submitted()] == [a]


def test_a_worker_that_says_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "POLL_S", 0.01)
    script = Script(1, silence_s=0.2)
    step_until(script.fleet, lambda: script.fleet.n_restarts >= 1)
    assert script.places[0][0].killed
    script.fleet.close()


def test_a_worker_with_another_model_is_not_taken(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [Scripted(facts=replace(FACTS, fingerprint="another")) for _ in range(supervisor.MOST_STARTS)]
    left = iter(others)
    script.fleet._start = lambda number, closing: next(left)
    script[0].far.close()
    step_until(script.fleet, lambda: 0 not in script.fleet.members)
    assert all(place.killed for place in others)
    script[1].tell()
    (a,) = script.submit()
    script.step()
    assert script[1].submitted() == [a]


def test_a_model_that_cannot_be_loaded_is_told_at_the_start() -> None:
    def start(number: int, closing: threading.Event) -> Scripted:
        place = Scripted()
        place.heard()
        place.link.read()
        place.far.post(Broken("model.gguf: cut short"))
        return place

    with pytest.raises(NearfarError, match=r"model\.gguf: cut short"):
        Fleet(start, 2)

    def fails(number: int, closing: threading.Event) -> Scripted:
        raise OSError("no more processes")

    with pytest.raises(NearfarError, match="no more processes"):
        Fleet(fails, 1)


def test_a_fleet_that_closes_gives_up_a_start() -> None:
    begun = threading.Event()

    def start(number: int, closing: threading.Event) -> Scripted:
        if number == 0:
            assert begun.wait(60)
            raise OSError("no more processes")
        begun.set()
        assert closing.wait(60), "nobody says that the fleet closes"
        raise NearfarError("the fleet closes")

    with pytest.raises(NearfarError, match="no more processes"):
        Fleet(start, 2)


def test_what_can_never_be_served_is_refused_at_the_door(script: Script) -> None:
    submit = script.fleet.submit_branches
    with pytest.raises(ContextError, match="hold 1024"):
        submit(Request(ids=(1,) * 1000, max_tokens=100), 1)
    with pytest.raises(UsageError, match="vocabulary"):
        submit(Request(ids=(320,)), 1)
    with pytest.raises(UsageError, match="hooks"):
        submit(Request(ids=(1,)), 2, [None])
    with pytest.raises(UsageError, match="without a source"):
        submit(Request(ids=(1,)), 1, [object()])  # type: ignore[list-item]


# ------------------------------------------------------------ real processes


def some_requests(rng: random.Random) -> list[tuple[Request, int]]:
    """Requests long enough that a worker dies in the middle of them, with how many answers to each."""
    found = []
    for _ in range(rng.randint(3, 6)):
        r = serving.request(rng.randrange(50), shared=rng.choice((0, 130)), max_tokens=rng.randint(30, 120))
        found.append((replace(r, n_logprobs=rng.choice((0, 0, 2))), rng.choice((1, 1, 1, 3))))
    return found


def killed_at_random(fleet: Fleet, seed: int, n_kills: int) -> None:
    """Requests come while others run, workers are killed meanwhile: all is as with one engine and one request."""
    step_until(fleet, lambda: len(fleet.loads) == len(fleet.members))
    rng = random.Random(seed)
    asked = some_requests(rng)
    expected = [alone(r, branch) for r, n in asked for branch in range(n)]
    n_first = rng.randint(1, len(asked))
    seqs = [seq for r, n in asked[:n_first] for seq in fleet.submit_branches(r, n)]
    late = asked[n_first:]
    n_all = sum(len(a.ids) for a in expected[: len(seqs)])
    kills = sorted(rng.randint(1, n_all * 2 // 3) for _ in range(n_kills))
    before, killed = fleet.n_restarts, set[int]()

    def meanwhile(answers: dict[int, Answer]) -> None:
        if late and rng.random() < 0.2:
            r, n = late.pop()
            answers |= dict.fromkeys(fleet.submit_branches(r, n), Answer())
        alive = [m.pid for m in fleet.members.values() if m.is_ready and m.pid not in killed]
        clear = len(alive) == len(fleet.members) and not any(s.is_suspect for s in fleet._open.values())
        if kills and clear and sum(len(a.ids) for a in answers.values()) >= kills[0]:
            kills.pop(0)
            killed.add(pid := rng.choice(alive))
            os.kill(pid, signal.SIGKILL)

    order = list(expected[: len(seqs)])
    tail = [[alone(r, b) for b in range(n)] for r, n in reversed(late)]
    found = collect(fleet, seqs, meanwhile)
    while late:  # nobody was left to wait for
        r, n = late.pop()
        found |= collect(fleet, fleet.submit_branches(r, n))
    order += [a for group in tail for a in group]
    assert list(found.values()) == order
    assert killed
    step_until(fleet, lambda: fleet.n_restarts == before + len(killed))


@pytest.fixture(scope="module")
def fleets(importable: None) -> Iterator[dict[int, Fleet]]:
    made = {n: random_fleet(n) for n in (1, 2)}
    yield made
    for fleet in made.values():
        fleet.close()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [1, 2])
def test_a_lost_worker_loses_nothing(fleets: dict[int, Fleet], n: int, seed: int) -> None:
    killed_at_random(fleets[n], seed, n_kills=1 + seed % 2)


def test_greedy_and_sampled_tokens_and_log_probabilities_go_on_after_a_kill(fleets: dict[int, Fleet]) -> None:
    """Of one request, so that it is certain that a worker dies in the middle of it; grammars are tested with nano."""
    fleet = fleets[2]
    sampling = replace(serving.request(0).sampling, temperature=0.8, repetition_penalty=1.3, seed=5)
    for asked in (Request(ids=(7, 8, 9), max_tokens=700), Request(ids=(7, 8), max_tokens=700, sampling=sampling)):
        req = replace(asked, n_logprobs=2)
        before, killed = fleet.n_restarts, False
        step_until(fleet, lambda: len(fleet.loads) == 2)

        def kill(answers: dict[int, Answer]) -> None:
            nonlocal killed
            if not killed and any(len(a.ids) >= 20 for a in answers.values()):
                killed = True
                os.kill(next(m.pid for m in fleet.members.values() if m.open), signal.SIGKILL)

        (seq,) = fleet.submit_branches(req, 1)
        found = collect(fleet, [seq], kill)
        assert found[seq] == alone(req)
        assert fleet.n_restarts == before + 1


def test_a_request_that_kills_its_workers_is_given_up_and_harms_nobody() -> None:
    fleet = random_fleet(2, chaos=False, poisoned=True)
    try:
        good = [serving.request(n, prompt=100, max_tokens=60) for n in range(4)]
        seqs = [fleet.submit_branches(r, 1)[0] for r in good[:2]]
        (guilty,) = fleet.submit_branches(Request(ids=POISON, max_tokens=20), 1)
        seqs += [fleet.submit_branches(r, 1)[0] for r in good[2:]]
        found = collect(fleet, [*seqs, guilty])
        assert found[guilty].finish == "error"
        assert "2 workers were lost" in found[guilty].error
        assert [found[seq] for seq in seqs] == [alone(r) for r in good]
        assert fleet.n_restarts == 2  # and no third one
        step_until(fleet, lambda: len(fleet.loads) == 2)
        again = fleet.submit_branches(good[0], 1)
        assert list(collect(fleet, again).values()) == [alone(good[0])]
    finally:
        fleet.close()


def test_nothing_is_left_of_a_fleet() -> None:
    """Processes, descriptors, threads: whatever the workers were doing."""
    alone(Request(ids=(1,)))  # what torch opens once is there
    threads, held, processes = threading.active_count(), descriptors(), children()
    fleet = random_fleet(2, chaos=False)
    fleet.submit_branches(Request(ids=(1, 2), max_tokens=900), 2)
    step_until(fleet, lambda: any(m.open for m in fleet.members.values()))
    os.kill(fleet.members[1].pid, signal.SIGKILL)
    os.kill(fleet.members[0].pid, signal.SIGSTOP)  # one hangs
    step_until(fleet, lambda: fleet.n_restarts == 1)
    assert len(children() - processes) >= 1
    os.kill(fleet.members[0].pid, signal.SIGCONT)
    fleet.close()
    assert children() == processes
    assert descriptors() == held
    assert threading.active_count() == threads
    fleet.abort(1)  # nobody is there: nothing happens


def test_a_worker_that_still_loads_ends_with_sigterm(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    place = ProcessWorker("tests.cloud.fleet:open_slowly", {"begun": str(begun)})
    try:
        while not begun.exists():
            assert place._process.poll() is None
            time.sleep(0.01)
        place._process.send_signal(signal.SIGTERM)
        assert place._process.wait(60) == -signal.SIGTERM
    finally:
        place.kill()
        place.close()


def test_a_worker_that_cannot_load_ends_quietly_when_its_front_is_gone() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    link: Link[ToWorker] = Link(ours, ToWorker)
    worker.run(link, "tests.cloud.fleet:open_nothing", {})
    assert link.fileno() == -1  # closed


def test_a_worker_that_hangs_is_replaced() -> None:
    fleet = random_fleet(1, chaos=False, silence_s=3.0)
    try:
        req = Request(ids=(1, 2, 3), max_tokens=400)
        (seq,) = fleet.submit_branches(req, 1)
        stopped = False

        def stop(answers: dict[int, Answer]) -> None:
            nonlocal stopped
            if not stopped and len(answers[seq].ids) >= 5:
                stopped = True
                os.kill(fleet.members[0].pid, signal.SIGSTOP)

        assert collect(fleet, [seq], stop)[seq] == alone(req)
        assert fleet.n_restarts >= 1
    finally:
        fleet.close()
