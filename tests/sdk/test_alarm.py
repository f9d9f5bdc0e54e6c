"""What was calibrated is watched: a promise that holds is left alone, a broken one is noticed, and the text stays."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from nearfar.alarm import RATE, Alarm, is_audited
from nearfar.cancel import Cancel
from nearfar.collab import Collaboration
from nearfar.collab_options import Collab
from nearfar.errors import UsageError, WeightsError
from nearfar.halves import split
from nearfar.llm import LLM
from nearfar.lower import open_lower
from nearfar.sampling import Sampling
from nearfar.sequence import Notice, SharedStats
from nearfar.upper import LocalUpper, News
from nearfar.weights import Weights
from nearfar.wire.messages import CodecSpec, Mode, Open
from tests.sdk.test_collab import CODECS, GREEDY, IDS, MAX_LEN, PROMPT, WARM, Flaky, FlakyLink, Pair, answer, ids
from tests.tiny import write_tiny

DELTA = 0.02


def watched(losses: list[float], delta: float = DELTA, n: int = 100) -> int:
    """After how many answers of `n` tokens the alarm comes; 0: never."""
    alarm = Alarm(delta)
    for i, loss in enumerate(losses, 1):
        if alarm.saw(n, n, round(n * loss)):
            return i
    return 0


@pytest.mark.parametrize("worst", [1.0, 0.2, 0.04])
def test_a_promise_that_just_holds_is_seldom_called_broken(worst: float) -> None:
    """Mean losses of exactly delta, in the coarsest way and in finer ones."""
    chance, n_runs = Random(1), 400
    runs = [[worst * (chance.random() < DELTA / worst) for _ in range(300)] for _ in range(n_runs)]
    n_alarms = sum(watched(run) > 0 for run in runs)
    assert n_alarms <= n_runs * RATE + 3 * (n_runs * RATE) ** 0.5


@pytest.mark.parametrize(("loss", "within"), [(1.0, 3), (0.5, 5), (0.1, 40)])
def test_a_broken_promise_is_noticed_soon(loss: float, within: int) -> None:
    assert 0 < watched([loss] * within) <= within


def test_good_answers_before_do_not_hide_a_change_for_long() -> None:
    assert 0 < watched([0.0] * 100 + [0.3] * 20) <= 120


def test_the_alarm_is_raised_once_and_counts_go_on() -> None:
    alarm = Alarm(DELTA)
    assert [alarm.saw(10, 10, 5) for _ in range(20)].count(True) == 1
    assert alarm.is_raised
    assert (alarm.n_answers, alarm.disagreement) == (20, 0.5)
    assert not alarm.saw(0, 0, 0)  # an answer of which nothing was checked
    assert alarm.n_answers == 20


@pytest.mark.parametrize("delta", [0.0, 1.0, float("nan")])
def test_a_promise_that_makes_no_sense_is_refused(delta: float) -> None:
    with pytest.raises(WeightsError, match=r"calibration\.delta"):
        Alarm(delta)


def test_answers_with_looser_thresholds_are_held_to_the_looser_promise() -> None:
    for promised, is_broken in ((None, True), (0.06, False)):
        alarm = Alarm(DELTA)
        raised = [alarm.saw(100, 100, 6, promised) for _ in range(2000)]
        assert any(raised) == is_broken


def test_which_tokens_are_audited_follows_from_seed_and_position() -> None:
    chosen = [i for i in range(20_000) if is_audited(7, i, 0.01)]
    assert chosen == [i for i in range(20_000) if is_audited(7, i, 0.01)]
    assert chosen != [i for i in range(20_000) if is_audited(8, i, 0.01)]
    assert 140 < len(chosen) < 260
    assert not any(is_audited(7, i, 0.0) for i in range(100))
    assert all(is_audited(7, i, 1.0) for i in range(100))
    with pytest.raises(UsageError, match="audit"):
        Collab(audit=1.5)


# ------------------------------------------------------------ in answers


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Exits of a random model, sure of everything and right by chance, and a file that promises otherwise."""
    return Pair(tmp_path_factory.mktemp("pair"))


def calibrated(pair: Pair, how: Collab, delta: float | None = DELTA) -> Collaboration:
    c = pair.together(how)
    return Collaboration(c.engine, c.upper, how, delta=delta)


@pytest.mark.parametrize("codec", [CODECS[1], IDS], ids=lambda c: c.id.name)
def test_lossless_answers_tell_that_sure_drafts_fail_and_stay_the_oracles(pair: Pair, codec: CodecSpec) -> None:
    c = calibrated(pair, Collab(Mode.LOSSLESS, codec))
    told: list[Notice] = []
    stats: list[SharedStats] = []
    for seed in range(8):
        s = c.new_sequence(Sampling(temperature=1.0, seed=seed), use_exits=True)
        s.on_notice = told.append
        s.continue_with(PROMPT)
        assert [c.step(s).id for _ in range(12)] == pair.oracle(codec, s.sampling, 12)
        s.finish()
        stats.append(s.shared_stats())
    assert told.count(Notice("alarm")) == 1
    assert [x.alarm for x in stats] == sorted(x.alarm for x in stats)  # once it is raised it stays
    assert stats[-1].alarm
    assert stats[-1].disagreement == sum(x.sure_wrong for x in stats) / sum(x.sure for x in stats)
    assert stats[0].audits == 0


@pytest.mark.parametrize("audit", [1.0, 0.3])
@pytest.mark.parametrize("codec", [CODECS[1], IDS], ids=lambda c: c.id.name)
def test_lossy_answers_are_audited_and_stay_what_they_were(pair: Pair, codec: CodecSpec, audit: float) -> None:
    plain, _ = answer(calibrated(pair, Collab(Mode.LOSSY, codec, audit=0)), WARM, 20)
    tokens, s = answer(calibrated(pair, Collab(Mode.LOSSY, codec, audit=audit)), WARM, 20)
    assert ids(tokens) == ids(plain)
    text = PROMPT + ids(tokens)
    chosen = [i for i in range(len(PROMPT), len(text)) if is_audited(WARM.seed, i, audit)]
    sure = [i for i in chosen if tokens[i - len(PROMPT)].source.startswith("exit")]
    stats = s.shared_stats()
    assert stats.audits == len(sure) > 3
    assert stats.sure == len(sure)  # the answers to the last ones too
    wrong = [i for i in sure if pair.oracle(codec, WARM, 1, text[:i]) != [text[i]]]
    assert stats.sure_wrong == len(wrong)


def test_without_a_promise_nothing_is_audited_and_nothing_is_an_alarm(pair: Pair) -> None:
    for how, delta in ((Collab(Mode.LOSSY, CODECS[1], audit=1.0), None), (Collab(Mode.LOSSY, CODECS[1], 0.0), DELTA)):
        c = calibrated(pair, how, delta)
        _, s = answer(c, GREEDY, 12)
        assert c.alarm is None
        assert (s.shared_stats().audits, s.shared_stats().alarm) == (0, False)


def test_an_answer_without_exits_says_nothing_about_them(pair: Pair) -> None:
    c = calibrated(pair, Collab(Mode.LOSSLESS, CODECS[1]))
    s = c.new_sequence(GREEDY, use_exits=False)
    s.continue_with(PROMPT)
    for _ in range(6):
        c.step(s)
    s.finish()
    assert c.alarm is not None
    assert c.alarm.n_answers == 0


@pytest.mark.parametrize("is_closed", [False, True], ids=["whole", "closed early"])
def test_who_ends_an_answer_early_does_not_wait_for_its_audits(tmp_path: Path, is_closed: bool) -> None:
    waits = list[float]()

    class Silent(Flaky):
        def open(self, opening: Open, cancel: Cancel | None = None) -> FlakyLink:
            link = super().open(opening)
            opened = link.receive(0)

            def receive(timeout_s: float) -> list[News]:
                waits.append(timeout_s)
                news = opened[:]
                opened.clear()
                return news

            link.receive = receive  # type: ignore[method-assign]
            return link

    whole = Weights.open(write_tiny(tmp_path / "m.gguf", "llama", "F32", exits=(1, 2), tau=0.0))
    halves = split(whole, 2, tmp_path)
    upper = Silent(LocalUpper(open_lower(Weights.open(halves.upper)), MAX_LEN))
    how = Collab(Mode.LOSSY, CODECS[1], audit=1.0, self_test="never")
    with LLM.open(halves.device, threads=1, n_ctx=MAX_LEN, upper=upper, collab=how) as llm:
        assert isinstance(llm.stepper, Collaboration)
        llm.stepper.alarm = Alarm(DELTA)
        stream = llm.stream(PROMPT, max_tokens=4)
        for _ in range(2):
            next(stream)
        waits.clear()
        if is_closed:
            stream.close()
        else:
            list(stream)
    assert any(waits) != is_closed
