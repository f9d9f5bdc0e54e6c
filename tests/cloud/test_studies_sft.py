"""The study of supervised fine-tuning: the early rule on made-up numbers, the order of rows, the study end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")
for package in ("tokenizers", "hassil", "safetensors", "matplotlib", "scipy"):
    pytest.importorskip(package, reason=f"{package} is not installed (extra [train])")

from nearfar_cloud.training.mix import Mix  # noqa: E402
from nearfar_cloud.training.schedule import Budget  # noqa: E402
from nearfar_cloud.training.studies import sft  # noqa: E402
from nearfar_cloud.training.studies.runner import Options, run_study, step_tokens  # noqa: E402
from nearfar_cloud.training.trainer import Report  # noqa: E402
from tests.cloud import mini_data, toy_sft  # noqa: E402
from tests.cloud.small_tokenizer import small_tokenizer, tokenizer_for  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mini_data.write(tmp_path_factory.mktemp("data"))


def test_the_rule_prefers_a_low_gradient_norm_and_a_high_early_loss() -> None:
    norms, losses = [1.0, 2.0, 3.0, 0.5], [2.0, 1.5, 1.0, 3.0]
    scores = sft.rule(norms, losses)
    assert sorted(range(4), key=lambda i: -scores[i]) == [3, 0, 1, 2]
    assert sft.spearman(scores, [0.3, 0.2, 0.1, 0.9]) == 1.0
    assert sft.spearman(scores, [-0.3, -0.2, -0.1, -0.9]) == -1.0


def test_the_rule_is_torn_where_its_two_signs_disagree() -> None:
    assert sft.rule([1.0, 2.0], [1.0, 2.0]) == [0.0, 0.0]
    assert sft.spearman([0.0, 0.0], [0.1, 0.2]) is None


def test_early_is_the_first_tenth_of_the_steps_and_two_at_least() -> None:
    def steps(n: int) -> list[Report]:
        return [Report(i, "stable", 0, 0.0, 0.0, float(i), 1, 0.0, 10.0 * i) for i in range(n)]

    assert sft.early(steps(40)) == {"steps": 40, "early_loss": 1.5, "early_grad_norm": 15.0}
    assert sft.early(steps(5)) == {"steps": 5, "early_loss": 0.5, "early_grad_norm": 5.0}


def test_phased_rows_are_requests_first_and_calls_after_them(data: Path) -> None:
    recipe = toy_sft.RECIPE
    phased = next(arm.recipe for arm in sft.arms(recipe) if arm.name.startswith("phased"))
    mix = Mix(data, small_tokenizer(), seq_len=recipe.seq_len, seed=1, shares=phased.shares)
    rows = sft.Phased(mix, switch=4 * recipe.seq_len)
    for _ in range(2):
        rows.next_batch(2, "stable", recipe.seq_len)
    drawn = mix.state()["tokens"]
    assert not any(drawn["decay"].values())
    assert drawn["stable"]["intents"] > drawn["stable"]["skills"] > 0
    before = rows.state()
    batch = rows.next_batch(2, "stable", recipe.seq_len)
    drawn = mix.state()["tokens"]
    assert {name for name, n in drawn["decay"].items() if n} == {"home", "sgd"}
    rows.restore(before)
    assert (rows.next_batch(2, "stable", recipe.seq_len).ids == batch.ids).all()


def test_stacked_and_phased_arms_have_the_same_shares_over_both_halves() -> None:
    arms = sft.arms(sft.recipe())
    stacked = next(arm.recipe.shares for arm in arms if arm.name.startswith("stacked"))
    phased = next(arm.recipe.shares for arm in arms if arm.name.startswith("phased"))
    halves = [phased.of("stable", ()), phased.of("decay", ())]
    assert {*phased.stable, *phased.decay} == {*stacked.stable, *stacked.decay}
    assert stacked.of("decay", ()) == {
        name: pytest.approx(sum(half.get(name, 0.0) for half in halves) / 2) for name in stacked.decay
    }


def report_of(**runs: tuple[float, float, float]) -> dict[str, Any]:
    """exact, early norm, early loss of each (order, passes) at one rate."""
    arms = {}
    for name, (exact, norm, loss) in runs.items():
        order, batch = name.split("_")
        mean = {"exact": exact, "loss": 1 - exact, "early_grad_norm": norm, "early_loss": loss, "batch": float(batch)}
        arms[f"{order} {batch} at 0.001"] = {"mean": mean}
    return {"arms": arms}


def test_the_finding_names_the_best_arm_and_where_the_rules_choice_came_in() -> None:
    found = sft.finding(
        report_of(
            stacked_1024=(0.1, 3.0, 1.0),
            stacked_4096=(0.4, 1.0, 3.0),
            phased_1024=(0.2, 2.5, 1.5),
            phased_4096=(0.5, 1.5, 2.0),
        )
    )
    assert found["best"] == {"arm": "phased 4096 at 0.001", "exact": 0.5, "loss": 0.5}
    assert found["picked_by_the_rule"] == {"arm": "stacked 4096 at 0.001", "place": 2, "of": 4}
    assert found["best_loss_by_batch"] == {"1024": 0.8, "4096": 0.5}
    assert found["stacked_less_phased"] == {"exact": -0.1, "loss": 0.1}
    assert found["spearman_of_the_rule"] == {"exact": 0.8, "loss": 0.8}


def test_the_study_runs_from_end_to_end(data: Path, tmp_path: Path) -> None:
    tokenizer_for(tmp_path, data, toy_sft.RECIPE)
    path = run_study("tests.cloud.toy_sft", Options(data, tmp_path, Budget(tokens=2048), (1,), compiled=False))
    report = json.loads(path.read_text())
    assert list(report["parents"]) == ["parent"]
    assert list(report["arms"]) == [f"{order} 512 at {rate:g}" for order in sft.ORDERS for rate in sft.RATES]
    runs = [arm["seeds"]["1"] for arm in report["arms"].values()]
    assert {run["tokens"] for run in runs} == {2048}
    assert {run["steps"] for run in runs} == {4}
    rows = {order: {run["rows_sha256"] for run in runs if run["order"] == order} for order in sft.ORDERS}
    assert len(rows["stacked"]) == len(rows["phased"]) == 1
    assert rows["stacked"] != rows["phased"]
    assert all(run["early_grad_norm"] > 0 and set(run["sources"]) <= set(sft.SOURCES) for run in runs)
    assert report["parents"]["parent"]["mean"]["tokens"] >= sft.PARENT_TOKENS * 2048
    assert -1 <= report["finding"]["spearman_of_the_rule"]["loss"] <= 1
    assert path.with_suffix(".png").stat().st_size > 10_000


def test_the_runner_gives_every_arm_whole_steps() -> None:
    step = step_tokens(sft.recipe())
    assert {step % arm.recipe.batch_tokens[1] for arm in sft.arms(sft.recipe())} == {0}


def test_the_arms_differ_in_batch_rate_and_order_alone() -> None:
    tuned = [arm.recipe for arm in sft.arms(sft.recipe()) if not arm.parent]
    same = {"batch_tokens": (1, 1), "peak_lr": 1.0, "shares": tuned[0].shares}
    assert len({replace(recipe, **same).sha256 for recipe in tuned}) == 1
    assert len({recipe.sha256 for recipe in tuned}) == len(tuned) == 18
