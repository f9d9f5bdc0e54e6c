"""Warm up, stay stable, decay: functions of progress."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nearfar.errors import ConfigError, UsageError
from nearfar_cloud.training.recipe import RECIPES
from nearfar_cloud.training.schedule import Budget, learning_rate, micro_batches, parse_seconds, phase
from tests.cloud.toy_batches import TINY, tiny_recipe

RECIPE = tiny_recipe(peak_lr=1e-2, warmup=0.1, decay_from=0.6, final_lr=0.02)


def test_the_rate_warms_up_stays_and_decays_to_its_end() -> None:
    assert learning_rate(0.05, RECIPE) == pytest.approx(5e-3)
    assert learning_rate(0.1, RECIPE) == learning_rate(0.59, RECIPE) == pytest.approx(1e-2)
    assert learning_rate(0.8, RECIPE) == pytest.approx(1e-2 * (1 + 0.02) / 2)
    assert learning_rate(1.0, RECIPE) == pytest.approx(2e-4)
    assert learning_rate(0.0, RECIPE) > 0  # the very first step already learns


def test_the_cosine_falls_in_half_a_wave_from_the_warm_up_to_the_end() -> None:
    recipe = tiny_recipe(peak_lr=1e-2, warmup=0.1, decay_from=0.6, final_lr=0.02, schedule="cosine")
    assert learning_rate(0.05, recipe) == learning_rate(0.05, RECIPE)
    assert learning_rate(0.1, recipe) == pytest.approx(1e-2)
    assert learning_rate(0.1 + 0.9 / 3, recipe) == pytest.approx(1e-2 * (0.02 + 0.98 * 0.75))  # cos 60 degrees
    assert learning_rate(0.55, recipe) == pytest.approx(1e-2 * (1 + 0.02) / 2)
    assert learning_rate(1.0, recipe) == pytest.approx(2e-4)
    assert phase(0.7, recipe) == "decay"  # rows and loss weights change where they did


def test_the_rate_never_jumps() -> None:
    rates = [learning_rate(i / 1000, RECIPE) for i in range(1001)]
    assert max(abs(a - b) for a, b in zip(rates[1:], rates[:-1], strict=True)) < 2e-4


def test_the_decay_begins_where_the_recipe_says() -> None:
    assert phase(0.5999, RECIPE) == "stable"
    assert phase(0.6, RECIPE) == "decay"


def test_the_batch_grows_until_the_decay_and_then_stays() -> None:
    recipe = tiny_recipe(batch_tokens=(128, 1024), decay_from=0.6)
    counts = [micro_batches(i / 100, recipe) for i in range(101)]
    assert counts[0] == 1
    assert counts == sorted(counts)
    assert set(counts[60:]) == {8}


def test_progress_counts_seconds_or_tokens() -> None:
    assert Budget(seconds=200).progress(50, 10**9) == 0.25
    assert Budget(tokens=1000).progress(10**9, 250) == 0.25
    assert Budget(tokens=1000).progress(0, 2000) == 1.0


@pytest.mark.parametrize("kwargs", [{}, {"seconds": 1, "tokens": 1}, {"seconds": 0}, {"tokens": -5}])
def test_a_budget_is_one_number_above_zero(kwargs: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="above zero"):
        Budget(**kwargs)


def test_times_are_read_with_their_units() -> None:
    assert [parse_seconds(t) for t in ("90", "45s", "30m", "1.5h")] == [90, 45, 1800, 5400]
    for text in ("", "soon", "3d", "-1m"):
        with pytest.raises(UsageError, match="expected a time"):
            parse_seconds(text)


def test_the_shapes_of_the_recipes_are_those_of_the_design() -> None:
    assert {name: (r.shape.n_linear, r.shape.n_embedding) for name, r in RECIPES.items() if name == "nano"} == {
        "nano": (3_538_944, 1_048_576)
    }
    small, teacher = RECIPES["small"].shape, RECIPES["teacher"].shape
    assert (small.n_linear, teacher.n_linear) == (23_592_960, 61_341_696)
    assert (teacher.exits, teacher.weights, teacher.n_vocab) == ((), "float", small.n_vocab)
    assert RECIPES["nano"].shape.packs
    assert RECIPES["small"].shape.packs
    assert not RECIPES["xs"].shape.packs


def test_recipes_that_differ_have_different_hashes() -> None:
    assert len({r.sha256 for r in (*RECIPES.values(), tiny_recipe(), tiny_recipe(seed=2))}) == len(RECIPES) + 2


@pytest.mark.parametrize(
    "change", [{"n_heads": 3}, {"n_kv_heads": 3}, {"exits": (3,)}, {"exits": (2, 1)}, {"exits": (0,)}]
)
def test_a_shape_that_cannot_be_built_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        replace(TINY, **change)


@pytest.mark.parametrize("change", [{"seq_len": 65}, {"warmup": 0.8}, {"decay_from": 1.0}, {"distill": 1.5}])
def test_a_course_that_cannot_be_run_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        tiny_recipe(**change)
