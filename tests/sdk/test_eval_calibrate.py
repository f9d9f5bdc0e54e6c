"""Calibration: the statistics against known values, a bad exit refused, and a file that differs in its keys only."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from nearfar.config import ExitConfig
from nearfar.errors import DataError
from nearfar.eval import calibrate as cal
from nearfar.eval.exits import Trace, View, decide, loss
from nearfar.gguf_reader import GGUFFile
from nearfar.lower import open_lower
from nearfar.weights import Weights
from tests.tiny import write_tiny


@pytest.mark.parametrize(("delta", "needed"), [(0.01, 299), (0.02, 149), (0.05, 59)])
def test_without_any_disagreement_so_many_answers_are_needed(delta: float, needed: int) -> None:
    assert cal.hoeffding_bentkus(0.0, needed, delta) <= 0.05 < cal.hoeffding_bentkus(0.0, needed - 1, delta)


@pytest.mark.parametrize(
    ("delta", "n", "percent"),
    [
        (0.01, 500, 0.0),
        (0.01, 1000, 0.3),
        (0.01, 2000, 0.5),
        (0.02, 500, 0.6),
        (0.02, 1000, 1.0),
        (0.02, 2000, 1.3),
        (0.05, 500, 2.8),
        (0.05, 1000, 3.5),
        (0.05, 2000, 3.95),
    ],
)
def test_the_largest_share_that_passes_is_that_of_the_table(delta: float, n: int, percent: float) -> None:
    """Shares are whole answers of n."""
    passing = [k for k in range(n // 10) if cal.hoeffding_bentkus(k / n, n, delta) <= 0.05]
    assert 100 * max(passing) / n == pytest.approx(percent)


def test_the_binomial_tail_is_exact_on_a_coin() -> None:
    assert cal.binomial_cdf(2, 4, 0.5) == pytest.approx(11 / 16)
    assert cal.binomial_cdf(0, 3, 0.1) == pytest.approx(0.9**3)
    assert cal.binomial_cdf(3, 3, 0.1) == 1.0


def test_no_answers_prove_nothing() -> None:
    assert cal.hoeffding_bentkus(0.0, 0, 0.02) == 1.0
    assert cal.hoeffding_bentkus(0.5, 1000, 0.02) == 1.0


def test_isotonic_pools_what_falls() -> None:
    xs, ys = cal.isotonic([1, 2, 3, 4], [0.0, 1.0, 0.0, 1.0])
    assert xs.tolist() == [1, 2, 3, 4]
    assert ys.tolist() == [0.0, 0.5, 0.5, 1.0]
    xs, ys = cal.isotonic([0.3, 0.3, 0.9], [1.0, 0.0, 1.0])
    assert (xs.tolist(), ys.tolist()) == ([0.3, 0.9], [0.5, 1.0])


def test_isotonic_is_the_regression_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.isotonic", reason="scikit-learn is not installed")
    rng = np.random.default_rng(0)
    x = rng.integers(0, 50, 400) / 50
    y = (rng.random(400) < x).astype(float)
    xs, ys = cal.isotonic(x, y)
    expected = sklearn.IsotonicRegression().fit(x, y).predict(x)
    np.testing.assert_allclose(np.interp(x, xs, ys), expected, atol=1e-12)
    assert (np.diff(xs) > 0).all()
    assert (np.diff(ys) >= 0).all()


def test_a_thinned_map_keeps_its_ends() -> None:
    xs = np.arange(500.0)
    short, _ = cal.thinned(xs, xs, 64)
    assert len(short) <= 64
    assert (short[0], short[-1]) == (0, 499)


def test_the_temperature_that_made_the_tokens_is_found() -> None:
    rng = np.random.default_rng(1)
    logits = (rng.normal(0, 4, (6000, 12))).astype(np.float32)
    p = np.exp(logits / 2.5)
    p /= p.sum(1, keepdims=True)
    truth = (p.cumsum(1) > rng.random((6000, 1))).argmax(1)
    assert cal.fit_temperature(logits, truth) == pytest.approx(2.5, rel=0.1)


def test_the_path_opens_the_deepest_exit_first_and_only_loosens() -> None:
    steps = cal.path(2, (0.9, 0.5))
    assert [tuple(round(t, 6) for t in taus) for taus in steps] == [(1, 0.9), (1, 0.5), (0.9, 0.5), (0.5, 0.5)]
    assert all(float(np.float32(t)) == t for taus in steps for t in taus)


def test_the_walk_stops_at_the_first_step_that_fails() -> None:
    means = {0.9: 0.0, 0.8: 0.001, 0.7: 0.3, 0.6: 0.0}
    tested = cal.walk([(t,) for t in means], lambda taus: np.full(1000, means[taus[0]]), delta=0.02)
    assert [step.taus for step in tested] == [(0.9,), (0.8,), (0.7,)]
    assert cal.chosen(tested, 1) == (0.8,)
    assert cal.chosen(tested[2:], 1) == (1.0,)


def views(n: int, wrong_when_sure: float, seed: int = 0) -> list[View]:
    """Answers of 20 tokens whose one exit claims 0.97 everywhere and is wrong in a share of them."""
    rng = np.random.default_rng(seed)
    return [View(1, rng.random((1, 20)) >= wrong_when_sure, np.full((1, 20), 0.97)) for _ in range(n)]


def test_an_exit_that_is_surer_than_it_should_be_is_refused() -> None:
    steps = cal.path(1)
    honest, boaster = (
        cal.chosen(cal.walk(steps, lambda taus, vs=vs: [loss(v, taus) for v in vs], delta=0.02), 1)
        for vs in (views(600, 0.004), views(600, 0.03))
    )
    assert honest[0] < 0.97
    assert boaster[0] > 0.97  # every level that lets tokens leave was refused


def test_the_promise_is_kept_in_nineteen_of_twenty_calibrations() -> None:
    """Many worlds whose true loss sits just above delta: the step may pass in at most one of twenty."""
    passed = sum(
        cal.walk([(0.9,)], lambda taus, seed=seed: [loss(v, taus) for v in views(300, 0.0201, seed)], delta=0.02)[0].p
        <= cal.ALPHA
        for seed in range(100)
    )
    assert passed <= 5


def test_rows_that_wait_after_a_prompt_keep_a_token_from_leaving() -> None:
    sure = np.full((2, 5), 0.99)
    assert decide(View(10, sure > 0, sure), (0.9, 0.9)).tolist() == [0, 0, 0, 0, 0]
    assert decide(View(100, sure > 0, sure), (0.9, 0.9)).tolist() == [2, 0, 0, 0, 0]  # 100 rows may not wait
    assert decide(View(10, sure > 0, sure), (1.0, 0.9)).tolist() == [1, 1, 1, 1, 1]
    assert decide(View(10, sure > 0, sure), (1.0, 1.0)).tolist() == [2, 2, 2, 2, 2]
    many = np.full((1, 40), 0.99)
    assert decide(View(1, many > 0, many), (0.9,)).tolist().index(1) == 32  # the debt of 32 rows is full


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("calibrate") / "m.gguf"
    return write_tiny(path, "bitnet", "TQ2_0", n_layers=4, exits=(2, 3), tau=1.0, extra={"general.name": "tiny"})


def planted_traces(lower, n: int, agree: float) -> list[Trace]:
    """Traces whose truth is exit 3's own token in a share `agree` of places, and another token elsewhere."""
    rng = np.random.default_rng(7)
    traces = []
    for i in range(n):
        rows = {e: rng.normal(0, 1, (12, lower.config.d_model)).astype(np.float32) for e in (2, 3)}
        tokens = lower.logits(rows[3], "exit.3").argmax(1).astype(np.int32)
        off = rng.random(12) >= agree
        tokens[off] = (tokens[off] + 1) % lower.config.n_vocab
        traces.append(Trace(f"planted {i}", 4, tokens, np.ones(12, np.float32), rows))
    return traces


def test_a_calibrated_copy_differs_in_its_keys_only(tiny: Path, tmp_path: Path) -> None:
    weights = Weights.open(tiny)
    lower = open_lower(weights, "numpy")
    found = cal.calibrate(lower, planted_traces(lower, 540, 1.0))
    out = cal.write_calibrated(weights.file, tmp_path / "out.gguf", found, {"planted": 540})
    again = Weights.open(out)
    before, after = weights.file, again.file
    assert list(before.tensors) == list(after.tensors)
    for name, info in before.tensors.items():
        assert (info.type, info.shape) == (after.tensors[name].type, after.tensors[name].shape)
        assert before.raw(name).tobytes() == after.raw(name).tobytes()
    for key in before.metadata:
        if not key.startswith("nearfar.exit."):
            assert before.encoded(key) == after.encoded(key)
    assert again.config.exits == found.exits  # what was tested is what the file holds, to the bit
    assert after.metadata["nearfar.calibration.id"] == cal.tensors_id(before) == cal.tensors_id(after)
    assert after.metadata["nearfar.calibration.mix"] == "planted 540"
    by_layer = {e.layer: e for e in found.exits}
    assert by_layer[3].tau < 1  # agrees always
    assert by_layer[2].tau == 1  # agrees by chance only: no token leaves there, so it is closed


def test_an_exit_that_disagrees_gets_no_threshold_that_fires(tiny: Path) -> None:
    lower = open_lower(Weights.open(tiny), "numpy")
    found = cal.calibrate(lower, planted_traces(lower, 540, 0.6))
    assert found.report["exited and different"].value <= found.delta
    assert found.report["tokens leaving at exit.2"].value == 0


def test_the_looser_thresholds_are_lower_and_in_the_file(tiny: Path, tmp_path: Path) -> None:
    weights = Weights.open(tiny)
    found = cal.calibrate(open_lower(weights, "numpy"), planted_traces(open_lower(weights, "numpy"), 540, 0.993))
    deepest = found.exits[-1]
    assert deepest.tau_loose is not None
    assert deepest.tau_loose < deepest.tau
    assert found.delta_loose == 2 * found.delta
    assert found.report["the same at the looser thresholds"].value <= found.delta_loose
    out = cal.write_calibrated(weights.file, tmp_path / "out.gguf", found, {})
    assert Weights.open(out).config.exits == found.exits
    assert Weights.open(out).file.metadata["nearfar.calibration.delta_loose"] == pytest.approx(0.04)


def test_too_few_answers_are_refused_in_words(tiny: Path) -> None:
    lower = open_lower(Weights.open(tiny), "numpy")
    with pytest.raises(DataError, match="held-out answers: expected at least 149"):
        cal.calibrate(lower, planted_traces(lower, 30, 1.0))


def test_other_tensors_have_another_calibration_id(tiny: Path, tmp_path: Path) -> None:
    data = bytearray(tiny.read_bytes())
    with GGUFFile.open(tiny) as file:
        at = file.tensors["output_norm.weight"].offset
        before = cal.tensors_id(file)
    data[at] ^= 1
    other = tmp_path / "other.gguf"
    other.write_bytes(data)
    with GGUFFile.open(other) as file:
        assert cal.tensors_id(file) != before


def test_the_reliability_plot_is_a_picture(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    lower = open_lower(Weights.open(tiny), "numpy")
    found = cal.calibrate(lower, planted_traces(lower, 540, 0.9))
    assert cal.plot(found, tmp_path / "r.png")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_every_answer_has_one_part_and_the_parts_are_even() -> None:
    parts = [cal.part_of(f"answer {i}") for i in range(3000)]
    assert {p: math.isclose(parts.count(p), 1000, rel_tol=0.1) for p in "ABC"} == dict.fromkeys("ABC", True)


def test_fitted_numbers_are_those_that_the_file_holds(tiny: Path) -> None:
    lower = open_lower(Weights.open(tiny), "numpy")
    for e in cal.calibrate(lower, planted_traces(lower, 540, 0.9)).exits:
        assert isinstance(e, ExitConfig)
        assert all(float(np.float32(v)) == v for v in (e.temperature, e.tau, *e.isotonic_x, *e.isotonic_y))
