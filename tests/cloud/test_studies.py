"""Studies: arms on the same rows and equal tokens, continued where they stopped, reported by name when they fail."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")
for package in ("tokenizers", "hassil", "safetensors", "matplotlib"):
    pytest.importorskip(package, reason=f"{package} is not installed (extra [train])")

from nearfar.errors import UsageError  # noqa: E402
from nearfar_cloud.training import tokenizer as tokenizers  # noqa: E402
from nearfar_cloud.training.mix import data_hash  # noqa: E402
from nearfar_cloud.training.schedule import Budget  # noqa: E402
from nearfar_cloud.training.studies import STUDIES, capacity, cli, wsd  # noqa: E402
from nearfar_cloud.training.studies.runner import (  # noqa: E402
    Costs,
    Options,
    affordable,
    duration,
    jobs_of,
    report_of,
    run_study,
    set_up,
    tokenizer_path,
    tokens_of,
)
from nearfar_cloud.training.studies.study import Arm, ArmFailed, Job, Lab, Report, Study  # noqa: E402
from nearfar_cloud.training.studies.worker import Worker, study_of  # noqa: E402
from tests.cloud import mini_data, toy_study  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

TOY = "tests.cloud.toy_study"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mini_data.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def printed() -> io.StringIO:
    """What the verb says on stdout."""
    return io.StringIO()


@pytest.fixture(scope="module")
def out(data: Path, printed: io.StringIO, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that the verb ran."""
    folder = tmp_path_factory.mktemp("out")
    # Trained without the generators, whose texts take most of the time.
    n_vocab, shares = toy_study.RECIPE.shape.n_vocab, toy_study.RECIPE.shares
    path = tokenizer_path(folder, n_vocab, data_hash(data, sorted({*shares.stable, *shares.decay})))
    tokenizers.train(tokenizers.training_texts(data, ("home", "journals", "skills")), n_vocab).save(path)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setitem(STUDIES, "toy", TOY)
        assert verb("toy", "--tokens", "2000", "--data", str(data), "--out", str(folder), "--no-compile") == 0
    return folder


def verb(*args: str) -> int:
    parser = argparse.ArgumentParser()
    cli.add_verb(parser.add_subparsers())
    parsed = parser.parse_args(["study", *args])
    return int(parsed.run(parsed))


def options(data: Path, out: Path, tokens: int = 2048) -> Options:
    return Options(data, out, Budget(tokens=tokens), compiled=False)


def test_all_arms_of_a_seed_see_the_same_rows_and_equally_many(out: Path) -> None:
    report = json.loads((out / "study_toy.json").read_text())
    assert list(report["arms"]) == ["plain", "slow", "from start"]
    assert list(report["parents"]) == ["start"]
    assert list(report["parents"]["start"]["seeds"]) == ["1"]
    runs = {seed: [arm["seeds"][seed] for arm in report["arms"].values()] for seed in ("1", "2")}
    assert {run["tokens"] for seed in runs for run in runs[seed]} == {report["tokens_per_arm"]} == {2048}
    digests = {seed: {run["rows_sha256"] for run in runs[seed]} for seed in runs}
    assert len(digests["1"]) == len(digests["2"]) == 1
    assert digests["1"] != digests["2"]


def test_a_report_has_mean_and_spread_over_the_seeds_and_what_produced_them(out: Path) -> None:
    report = json.loads((out / "study_toy.json").read_text())
    for name in ("machine", "commit", "precision", "budget", "seconds", "seeds", "recipe", "held_out_rows", "finding"):
        assert report[name], name
    plain = report["arms"]["plain"]
    losses = [plain["seeds"][seed]["loss"] for seed in ("1", "2")]
    assert plain["mean"]["loss"] == pytest.approx(sum(losses) / 2)
    assert plain["spread"]["loss"] == pytest.approx(max(losses) - min(losses))
    assert report["finding"]["best"] in report["arms"]
    assert (out / "study_toy.png").stat().st_size > 10_000


def test_a_rerun_trains_only_what_is_not_finished_and_finds_the_same_figures(
    data: Path, out: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((out / "study_toy.json").read_text())
    (missing,) = (out / "arms" / "toy").glob("slow-s2-*")
    (missing / "figures.json").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("arms/toy/*/figures.json")}
    run_study(TOY, options(data, out))
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert len(stamps) == 6
    assert "6 of 7 runs are finished already" in capfd.readouterr().err
    after = json.loads((out / "study_toy.json").read_text())
    for name in ("plain", "slow"):
        assert after["arms"][name]["mean"]["loss"] == before["arms"][name]["mean"]["loss"]


def test_an_arm_that_fails_or_is_killed_is_named_with_its_last_lines(tmp_path: Path) -> None:
    lab = Lab(tmp_path, tmp_path, tmp_path, tmp_path, "")
    worker = Worker()
    try:
        for option, reason in (("fails", "ValueError: a matrix of the wrong shape"), ("dies", "ended with 9")):
            arm = Arm("slow", toy_study.RECIPE, {option: True})
            worker.begin(Job(TOY, arm, 1, 1024, lab, tmp_path / option, {}, ""))
            with pytest.raises(ArmFailed, match=f"(?s)^slow, seed 1: .*{reason}.*\n    training slow, seed 1"):
                worker.end()
    finally:
        worker.stop()


COSTS = Costs(setup_s=2, first_s=10, look_s=1, last_look_s=4, token_s=1e-3)


def test_a_budget_of_time_becomes_as_many_whole_steps_as_fit() -> None:
    arms = toy_study.arms(toy_study.RECIPE)
    for seconds in (100.0, 777.0, 3600.0):
        n = affordable(arms, 2, toy_study.RECIPE, COSTS, seconds)
        assert n % 512 == 0
        assert duration(arms, 2, toy_study.RECIPE, COSTS, n) <= seconds
        assert duration(arms, 2, toy_study.RECIPE, COSTS, n + 512) > seconds
    assert affordable(arms, 2, toy_study.RECIPE, COSTS, 20) == 0


def test_the_duration_knows_that_arms_wait_for_their_parents_and_run_side_by_side() -> None:
    recipe = toy_study.RECIPE
    free = Costs(0, 0, 0, 0, token_s=1)
    assert duration([Arm("a", recipe), Arm("b", recipe)], 1, recipe, free, 10) == 10
    assert duration([Arm("a", recipe, parent=True), Arm("b", recipe, needs=("a",))], 1, recipe, free, 10) == 20
    assert duration([Arm("a", recipe), Arm("b", recipe, cost=3)], 2, recipe, free, 10) == 40


def test_a_budget_that_is_too_short_says_what_is_needed(tmp_path: Path) -> None:
    arms, recipe = toy_study.arms(toy_study.RECIPE), toy_study.RECIPE
    asked = Options(tmp_path, tmp_path, Budget(seconds=40))
    with pytest.raises(
        UsageError, match=r"budget of 40 s is too short .* 8 steps of each arm it needs about (\d+) s"
    ) as e:
        tokens_of(asked, arms, recipe, COSTS, spent_s=30)
    needed = Budget(seconds=1 + float(e.value.args[0].split()[-2]))
    assert tokens_of(Options(tmp_path, tmp_path, needed), arms, recipe, COSTS, spent_s=30) == 8 * 512


def test_the_verb_prints_a_table_and_names_its_files(out: Path, printed: io.StringIO) -> None:
    text = printed.getvalue()
    for part in ("does the runner run?", "seeds 1, 2", "plain", "(start)", "best: ", str(out / "study_toy.json")):
        assert part in text


def test_the_verb_says_what_it_does_not_know(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STUDIES, "toy", TOY)
    monkeypatch.delenv("NEARFAR_DATA", raising=False)
    with pytest.raises(UsageError, match=r"nosuch: no such study; expected one of .*toy"):
        verb("nosuch", "--data", str(data))
    with pytest.raises(UsageError, match="no such folder"):
        verb("toy", "--data", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="needs the folder of the corpora"):
        verb("toy")
    for length in (("--budget", "0m"), ("--tokens", "0"), ("--tokens", "-5"), ("--budget", "soon")):
        with pytest.raises(UsageError):
            verb("toy", "--data", str(data), *length)
    for seeds in ("", "1,x", "1,1"):
        with pytest.raises(UsageError, match="seeds"):
            verb("toy", "--data", str(data), "--seeds", seeds)


# ---- the studies themselves, small and in this process


def reported(study: Study, data: Path, out: Path, tokens: int) -> Report:
    """The report of a study of the toy recipe; its arms are trained here, one after the other."""
    small = replace(study, recipe=toy_study.RECIPE)
    asked = replace(options(data, out, tokens), seeds=(1,))
    recipe, lab = set_up(small, asked)
    jobs = jobs_of(STUDIES[study.name], small.arms(recipe), tokens, lab, asked.seeds)
    for job in jobs:
        job.folder.mkdir(parents=True)
        job.result.write_text(json.dumps(study.train(job)))
    report = report_of(small, recipe, jobs, lab, asked, 1.0)
    study.plot(report, out / f"{study.name}.png")
    assert (out / f"{study.name}.png").stat().st_size > 10_000
    return report


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_found_under_its_name_and_its_arms_need_arms_that_there_are(name: str) -> None:
    study = study_of(STUDIES[name])
    assert study.name == name
    arms = study.arms(study.recipe)
    assert len({arm.name for arm in arms}) == len(arms)
    for arm in arms:
        assert all(need in {other.name for other in arms if other.parent} for need in arm.needs)


def test_wsd_compares_schedules_on_the_same_rows_and_decays_one_checkpoint_three_times(data: Path, out: Path) -> None:
    report = reported(wsd.STUDY, data, out, 10 * 512)
    arms = report["arms"]
    digests = {name: arm["seeds"]["1"].get("rows_sha256") for name, arm in arms.items()}
    assert digests["cosine"] == digests["wsd 10 %"] == digests["wsd 25 %"]
    assert digests["rows in the decay"] == digests["rows after the decay"] != digests["cosine"]
    of_one = [name for name in arms if not name.startswith("re-decay")]
    assert {arms[name]["mean"]["tokens"] for name in of_one} == {10 * 512}
    stable = report["parents"]["stable"]["mean"]["tokens"]
    assert stable == 9 * 512
    assert [arms[f"re-decay {share}"]["mean"]["tokens"] - stable for share in ("2.5%", "10.0%", "25.0%")] == [
        512,
        512,
        2 * 512,
    ]
    assert arms["cosine"]["mean"]["loss"] != arms["wsd 10 %"]["mean"]["loss"]
    assert report["finding"]["wsd 10 % minus cosine"] == pytest.approx(
        arms["wsd 10 %"]["mean"]["loss"] - arms["cosine"]["mean"]["loss"], abs=1e-4
    )
    assert "re-decay 25.0% minus stable" in report["finding"]


def test_capacity_teaches_one_student_by_teachers_of_rising_size(data: Path, out: Path) -> None:
    report = reported(capacity.STUDY, data, out, 3 * 512)
    ratios = [teacher["mean"]["ratio"] for teacher in report["parents"].values()]
    assert ratios == sorted(ratios)
    assert len(ratios) == 4
    assert [arm["mean"]["ratio"] for arm in report["arms"].values()] == [0, *ratios]
    runs = [arm["seeds"]["1"] for arm in report["arms"].values()]
    assert len({run["rows_sha256"] for run in runs}) == 1
    assert len({run["loss"] for run in runs}) == 5  # every teacher teaches
    assert report["finding"]["best ratio"] in [round(r, 2) for r in ratios]


def test_the_teachers_of_capacity_are_those_that_its_page_names() -> None:
    arms = capacity.arms(capacity.RECIPE)
    assert [arm.name for arm in arms if arm.parent] == ["teacher 1.0", "teacher 1.8", "teacher 2.7", "teacher 5.4"]
