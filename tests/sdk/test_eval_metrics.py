"""Every metric and interval on cases small enough to work out by hand."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.eval.intervals import bootstrap, bootstrap_over, wilson
from nearfar.eval.metrics import (
    auroc,
    calibration_error,
    group_sums,
    micro_f1,
    normal_value,
    overlap,
    parse_answer,
    ratio,
    reliability,
    slot_pairs,
)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(8, 10, 0.49016, 0.94332), (0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (50, 100, 0.40383, 0.59617)],
)
def test_wilson_gives_the_published_bounds(hits: int, n: int, low: float, high: float) -> None:
    found = wilson(hits, n)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-5)
    assert found.value == hits / n
    assert found.n == n


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_a_wilson_interval_holds_its_share(pair: tuple[int, int]) -> None:
    found = wilson(*pair)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_nothing_observed_is_no_number() -> None:
    assert math.isnan(wilson(0, 0).value)
    assert math.isnan(bootstrap(np.zeros((0, 3)), micro_f1).value)
    assert np.isnan(micro_f1(np.zeros(3)))


def test_the_bootstrap_of_equal_groups_has_no_width_and_repeats_itself() -> None:
    same = bootstrap(np.tile([1.0, 2.0, 2.0], (30, 1)), micro_f1)
    assert (same.value, same.low, same.high) == (0.5, 0.5, 0.5)
    mixed = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0]] * 50)
    assert bootstrap(mixed, micro_f1) == bootstrap(mixed, micro_f1)


def test_the_bootstrap_of_a_share_agrees_with_wilson() -> None:
    counts = np.array([[1.0, 1.0]] * 60 + [[0.0, 1.0]] * 140)
    drawn, exact = bootstrap(counts, ratio), wilson(60, 200)
    assert (drawn.low, drawn.high) == pytest.approx((exact.low, exact.high), abs=0.015)


def test_the_bootstrap_of_any_statistic_agrees_with_that_of_sums() -> None:
    values = np.arange(40.0)
    found = bootstrap_over(40, lambda drawn: float(values[drawn].mean()), n_draws=1000)
    summed = bootstrap(np.stack([values, np.ones(40)], 1), lambda s: s[..., 0] / s[..., 1])
    assert (found.value, found.n) == (19.5, 40)
    assert (found.low, found.high) == pytest.approx((summed.low, summed.high), abs=1e-9)  # the same draws
    assert math.isnan(bootstrap_over(0, lambda drawn: 0.0).value)


def test_micro_f1_sums_before_it_divides() -> None:
    # 1 of 2 found is right, 1 of 3 wanted: 2*1/(2+3); and a second row 2/2/2
    assert micro_f1(np.array([1.0, 2.0, 3.0])) == pytest.approx(0.4)
    assert micro_f1(np.array([[1, 2, 3], [2, 2, 2]]).sum(0)) == pytest.approx(6 / 9)


def test_slots_are_multisets_of_normalised_pairs() -> None:
    found = slot_pairs({"person": ["Ann ", "bob", "bob"], "time": 6, "loud": True, "at": 20.0})
    assert found == Counter(
        {("person", "ann"): 1, ("person", "bob"): 2, ("time", "6"): 1, ("loud", "true"): 1, ("at", "20"): 1}
    )
    meet = overlap(found, slot_pairs({"person": ["ann", "bob"], "time": "six"}))
    assert (meet.shared, meet.found, meet.wanted, meet.exact) == (2, 6, 3, False)
    assert slot_pairs("no object") == Counter()
    assert overlap(Counter(), Counter()).exact


@pytest.mark.parametrize(("value", "text"), [("Two  Words", "two words"), (1.5, "1.5"), (None, "null"), (3.0, "3")])
def test_values_are_compared_as_plain_text(value: object, text: str) -> None:
    assert normal_value(value) == text


@pytest.mark.parametrize("text", ["", "{", '{"a":1} and more', "[1]", "3", "[" * 100_000])
def test_only_a_whole_json_object_is_an_answer(text: str) -> None:
    assert parse_answer(text) is None
    assert parse_answer(' {"a": 1}\n') == {"a": 1}


def test_auroc_counts_pairs_and_ties_half() -> None:
    assert auroc([0.9, 0.8], [0.1, 0.2]) == 1.0
    assert auroc([0.1], [0.9]) == 0.0
    assert auroc([0.5, 0.5], [0.5]) == 0.5
    assert auroc([0.9, 0.5, 0.4], [0.5, 0.1]) == pytest.approx((2 + 1.5 + 1) / 6)
    assert math.isnan(auroc([], [0.1]))


def test_auroc_agrees_with_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    rng = np.random.default_rng(3)
    a, b = rng.integers(0, 8, 40) / 8 + 0.2, rng.integers(0, 8, 60) / 8
    assert auroc(a, b) == pytest.approx(metrics.roc_auc_score([1] * 40 + [0] * 60, np.r_[a, b]))


def test_calibration_error_is_the_gap_of_equal_bins() -> None:
    confidence = np.array([0.6, 0.6, 0.9, 0.9])
    right = np.array([True, False, True, True])
    # two bins: |0.5 - 0.6| and |1 - 0.9|, half of the rows each
    assert calibration_error(confidence, right, n_bins=2) == pytest.approx(0.1)
    assert reliability(confidence, right, n_bins=2) == [pytest.approx((0.6, 0.5, 2)), pytest.approx((0.9, 1.0, 2))]
    assert calibration_error(np.array([1.0, 1.0]), np.array([True, True])) == 0.0


def test_groups_are_summed_in_the_order_they_appear() -> None:
    assert group_sums(["b", "a", "b"], [(1, 2), (3, 4), (5, 6)]).tolist() == [[6, 8], [3, 4]]
