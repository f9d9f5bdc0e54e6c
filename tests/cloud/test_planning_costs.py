"""Costs: a fit finds what the times were made of and tells how far it can be trusted; a roofline counts as by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from nearfar.config import ModelConfig
from nearfar.errors import DataError, FileError, MissingExtraError, UsageError
from nearfar_cloud.executors.sim import facts_of
from nearfar_cloud.planning import roofline
from nearfar_cloud.planning.generate import Zipf, generate
from nearfar_cloud.planning.profile import Fit, Piece, Sample, fit, grid, measure, not_negative, works_of
from nearfar_cloud.planning.replay import replay
from nearfar_cloud.planning.roofline import HARDWARE, MODELS, Hardware, Stage, Widths, cost_model, operators, totals
from nearfar_cloud.planning.simulate import POLICIES, simulated
from nearfar_cloud.scheduling.cost import CostModel, features

BELOW, ABOVE = (4e-3, 1e-4, 2e-7, 0.0), (1e-3, 3e-4, 2e-7, 1e-8)


def made_samples(noise: float = 0.0, knee: int = 16) -> list[Sample]:
    """Times that follow two regimes exactly, or up to some noise."""
    rng = np.random.default_rng(0)
    samples = []
    for shape in grid(4096, 512):
        x = features(works_of(shape, 4), 4)
        seconds = float(x @ np.array(BELOW if x[1] <= knee else ABOVE))
        samples.append(Sample(shape, seconds * (1 + noise * rng.standard_normal())))
    return samples


fitted = partial(fit, n_layers=4, model="m", dtype="bf16", threads=1)


def test_a_fit_finds_the_coefficients_and_the_knee() -> None:
    found = fitted(made_samples())
    assert found.knee == 16
    assert found.below == pytest.approx(BELOW, rel=1e-6, abs=1e-12)
    assert found.above == pytest.approx(ABOVE, rel=1e-6, abs=1e-12)
    assert found.error_held_out < 1e-9
    assert found.n_held_out == len(made_samples()) // 4
    assert found.n_held_out + found.n_fitted == len(made_samples())


def test_the_error_that_is_told_is_that_of_shapes_that_were_not_fitted() -> None:
    samples = made_samples(noise=0.05)
    found = fitted(samples)
    assert 0.01 < found.error_held_out < 0.1
    assert found.worst_held_out >= found.error_held_out
    # A shape that was held out may take any time: the coefficients stay, the error tells.
    order = np.random.default_rng(0).permutation(len(samples))
    out = int(order[-1])
    samples[out] = samples[out]._replace(seconds=samples[out].seconds * 100)
    other = fitted(samples)
    assert (other.below, other.above, other.knee) == (found.below, found.above, found.knee)
    assert other.error_held_out > found.error_held_out


def test_a_cost_model_of_a_fit_predicts_what_was_measured_from_its_first_step_on() -> None:
    cost = fitted(made_samples()).cost_model()
    for shape, seconds in made_samples()[::7]:
        assert cost.predict(works_of(shape, 4)) == pytest.approx(seconds, rel=1e-6)


def test_coefficients_are_never_negative_and_the_best_of_those() -> None:
    """Against the conditions of Karush, Kuhn and Tucker: the gradient is 0 where c > 0 and not negative elsewhere."""
    rng = np.random.default_rng(1)
    bound = 0
    for _ in range(30):
        x, y = rng.random((20, 4)), rng.random(20) + 0.1
        c = not_negative(x, y)
        z = x / y[:, None]
        gradient = z.T @ (z @ c - 1)
        assert (c >= 0).all()
        assert (np.abs(gradient[c > 0]) < 1e-9).all()
        assert (gradient[c == 0] > -1e-9).all()
        bound += bool((c == 0).any())
    assert bound > 5


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(UsageError, match="12 samples, 3 of them held out: expected at least 10"):
        fitted(made_samples()[:12])


def test_a_grid_holds_next_tokens_prompts_and_both_and_fits_into_memory() -> None:
    shapes = grid(1024, 64, most_batch=8, most_rows=256)
    for shape in shapes:
        assert sum(-(-p.end // 64) for p in shape) <= 64
        assert all(p.end <= 1024 for p in shape)
    kinds = {(min(p.n for p in s) == 1, max(p.n for p in s) > 1) for s in shapes}
    assert kinds == {(True, False), (False, True), (True, True)}
    with pytest.raises(UsageError, match="2 blocks and 1024 positions hold only"):
        grid(1024, 2)


@pytest.mark.usefixtures("one_thread")
def test_steps_of_a_real_model_are_measured_and_become_a_simulation(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="torch is not installed (extra [train])")
    from nearfar_cloud.executors.local import LocalExecutor
    from tests.cloud.serving import loaded

    executor = LocalExecutor(loaded(), 32)
    shapes = grid(1024, 32, most_batch=4, most_rows=32)
    samples = list(measure(executor, shapes, repeats=1))
    assert [s.shape for s in samples] == shapes
    assert all(s.seconds > 0 for s in samples)
    found = fit(samples, 4, model=executor.facts.fingerprint, dtype="fp32", threads=1)
    found.save(tmp_path / "fit.json")
    again = Fit.load(tmp_path / "fit.json")
    assert again == found
    workload = generate(6, rate=50, cv=2, prompt=Zipf(4, 128), output=Zipf(1, 8))
    done = replay(simulated(executor.facts, again.cost_model, POLICIES["chunked"](64), n_blocks=32), workload)
    assert all(s.finished for s in done.served)
    with pytest.raises(UsageError, match="33 blocks, the executor has 32"):
        list(measure(executor, [(Piece(1, 64 * 33 - 1),)]))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "bitnet"])
def test_a_model_of_sizes_alone_runs(arch: str) -> None:
    pytest.importorskip("torch", reason="torch is not installed (extra [train])")
    from nearfar_cloud.executors.local import LocalExecutor
    from nearfar_cloud.planning.random_model import random_model

    config = ModelConfig(arch, 2, 32, 4, 2, 8, 64, 50, 256)
    executor = LocalExecutor(random_model(config, "fp32"), 4)
    (sample,) = measure(executor, [(Piece(5, 0), Piece(1, 60))], repeats=1)
    assert sample.seconds > 0
    assert random_model(config, "fp32").fingerprint != random_model(config, "fp32", seed=1).fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, '"version": 1'),
        ({"below": None}, r"below=None, expected tuple"),
        ({"below": [1, 2, 3]}, r"below=\[1, 2, 3\], expected tuple"),
        ({"above": [0, 0, 0, -1]}, r"above=\[0, 0, 0, -1\]"),
        ({"above": [0, 0, 0, 0]}, "take no time"),
        ({"knee": 1.5}, r"knee=1.5, expected int"),
        ({"error_fitted": float("nan")}, r"error_fitted=nan"),
        ({"model": 7}, r"model=7, expected str"),
        ({"n_layers": 0}, "without layers"),
    ],
)
def test_a_file_that_holds_no_fit_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "fit.json"
    fitted(made_samples()).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match=message):
        Fit.load(path)


def test_a_fit_that_is_missing_cut_short_or_lacks_a_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "fit.json"
    with pytest.raises(FileError, match="No such file"):
        Fit.load(path)
    fitted(made_samples()).save(path)
    whole = path.read_text()
    path.write_text(whole[:50])
    with pytest.raises(DataError, match="not JSON"):
        Fit.load(path)
    path.write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k != "knee"}))
    with pytest.raises(DataError, match="lacks knee"):
        Fit.load(path)


# ------------------------------------------------------------ rooflines

SMALL = ModelConfig("llama", 3, 8, 2, 1, 4, 16, 32, 64)  # D 8, 2 query heads and 1 of keys, of 4; FFN 16; V 32
#              operations, bytes of weights, of keys and values, of activations; 2 rows, 4 positions read by each
BY_HAND = {
    "qkv": (2 * 2 * 8 * 16, 8 * 16 * 2, 2 * 8 * 2, 2 * (8 + 8) * 2),
    "attention": (4 * 8 * 8, 0, 8 * 8 * 2, 2 * (8 + 8) * 2),
    "o": (2 * 2 * 8 * 8, 8 * 8 * 2, 0, 2 * (8 + 8) * 2),
    "gate, up": (2 * 2 * 8 * 32, 8 * 32 * 2, 0, 2 * (8 + 32) * 2),
    "down": (2 * 2 * 16 * 8, 16 * 8 * 2, 0, 2 * (16 + 8) * 2),
    "head": (2 * 2 * 8 * 32, 8 * 32 * 2, 0, 2 * (8 + 32) * 2),
}


@pytest.mark.parametrize("bound", ["memory", "compute"])
def test_the_operators_of_a_layer_by_hand(bound: str) -> None:
    """1 GB/s beside 2 or 1 GFLOP/s: every operator has between 1 and 2 operations a byte."""
    hardware = Hardware("made", "made", 1e9, ((1, 2e9 if bound == "memory" else 1e9),))
    found = operators(SMALL, Stage.decode(2, 3), hardware)
    assert {o.name: (o.ops, o.weight_bytes, o.kv_bytes, o.activation_bytes) for o in found} == BY_HAND
    assert [o.times for o in found] == [3, 3, 3, 3, 3, 1]
    for o in found:
        ops, *parts = BY_HAND[o.name]
        assert 1 < o.intensity < 2
        assert o.intensity == ops / sum(parts)
        assert o.bound == bound
        assert o.seconds == pytest.approx((sum(parts) if bound == "memory" else ops) * 1e-9)
    t = totals(found, Stage.decode(2, 3))
    assert t["bytes"] == 3 * (352 + 192 + 192 + 672 + 352) + 672
    assert t["ops"] == 3 * (512 + 256 + 256 + 1024 + 512) + 1024
    assert t["ops_a_token"] == t["ops"] / 2
    assert t["tokens_s"] == pytest.approx(2 / t["seconds"])
    assert t["weight_bytes"] == 3 * (256 + 128 + 512 + 256) + 512


def test_a_prompt_reads_weights_once_and_its_rows_see_those_before_them() -> None:
    decode = {o.name: o for o in operators(SMALL, Stage.decode(1, 9), HARDWARE["a100-40g"])}
    prompt = {o.name: o for o in operators(SMALL, Stage.prefill(1, 10), HARDWARE["a100-40g"])}
    for name in BY_HAND:
        assert prompt[name].weight_bytes == decode[name].weight_bytes
    assert prompt["qkv"].ops == 10 * decode["qkv"].ops
    assert prompt["head"].ops == decode["head"].ops  # one row of each sequence
    assert prompt["attention"].ops == 4 * 8 * 55  # 1 + 2 + ... + 10 pairs
    assert prompt["attention"].kv_bytes == decode["attention"].kv_bytes


def test_widths_count_where_they_belong() -> None:
    wide, narrow = (
        {o.name: o for o in operators(SMALL, Stage.decode(2, 3), HARDWARE["a100-40g"], w)}
        for w in (Widths(), Widths(weight=0.5, kv=1.0))
    )
    assert narrow["down"].weight_bytes == wide["down"].weight_bytes / 4
    assert narrow["attention"].kv_bytes == wide["attention"].kv_bytes / 2
    assert narrow["down"].activation_bytes == wide["down"].activation_bytes


def test_a_peak_between_two_measured_numbers_of_rows_lies_between_theirs() -> None:
    h = Hardware("made", "made", 1e9, ((1, 1e9), (16, 16e9)))
    assert h.peak(4) == pytest.approx(4e9)
    assert (h.peak(1), h.peak(16), h.peak(1000)) == pytest.approx((1e9, 16e9, 16e9))


@pytest.mark.parametrize("model", ["llama-1b", "llama-8b"])
@pytest.mark.parametrize("stage", [Stage.decode(1, 1024), Stage.decode(32, 1024), Stage.prefill(1, 2048)])
def test_the_cost_model_of_a_machine_agrees_with_its_roofline(model: str, stage: Stage) -> None:
    config, hardware = MODELS[model], HARDWARE["h100-sxm"]
    roofs = totals(operators(config, stage, hardware), stage)["seconds"]
    works = works_of((Piece(stage.rows, stage.context),) * stage.batch, config.n_layers)
    # The roofline also counts activations; the cost model adds what memory and arithmetic of attention take.
    assert cost_model(config, hardware).predict(works) == pytest.approx(roofs, rel=0.2)


def test_a_model_that_is_only_known_by_its_sizes_can_be_simulated() -> None:
    config = MODELS["llama-8b"]
    make = partial(cost_model, config, HARDWARE["h100-sxm"])
    engine = simulated(facts_of(config), make, POLICIES["chunked"](512), n_blocks=400)
    done = replay(engine, generate(5, rate=2, cv=1, prompt=Zipf(100, 2000), output=Zipf(10, 100)))
    assert all(s.finished for s in done.served)
    # 8 G weights of 2 bytes through 3.35 TB/s.
    assert min(t for s in done.served for t in s.tbt_s) == pytest.approx(15e9 / 3.35e12, rel=0.1)


def test_a_row_of_hardware_is_kept_in_a_file_and_checked(tmp_path: Path) -> None:
    path = tmp_path / "row.json"
    for h in HARDWARE.values():
        h.save(path)
        assert Hardware.load(path) == h
    for text in ("{", "[]", '{"name": "x"}', '{"name": "x", "source": "", "bandwidth": 1, "peaks": 3}'):
        path.write_text(text)
        with pytest.raises(DataError, match="expected JSON with name, source, bandwidth, peaks"):
            Hardware.load(path)
    with pytest.raises(FileError, match="No such file"):
        Hardware.load(tmp_path / "none.json")
    good = HARDWARE["zen5-core"]
    for wrong in ({"bandwidth": 0.0}, {"peaks": ()}, {"peaks": ((2, 1e9), (1, 1e9))}, {"peaks": ((1, float("inf")),)}):
        with pytest.raises(DataError, match="expected a bandwidth and peaks over rising numbers of rows"):
            replace(good, **wrong)  # type: ignore[arg-type]


def test_a_stage_without_rows_is_refused() -> None:
    with pytest.raises(UsageError, match="expected batch >= 1"):
        Stage(0, 1, 5)


@pytest.mark.usefixtures("one_thread")
def test_this_machine_gets_a_row_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="torch is not installed (extra [train])")
    h = roofline.measure_hardware("fp32", threads=1, seconds=0.001)
    assert [m for m, _ in h.peaks] == list(roofline.ROWS)
    assert h.bandwidth > 1e6
    assert "measured, fp32, 1 threads" in h.source
    monkeypatch.setattr(roofline, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="torch"):
        roofline.measure_hardware()


def test_the_table_names_operators_bounds_and_the_step() -> None:
    stage = Stage.decode(1, 1024)
    text = roofline.table(operators(SMALL, stage, HARDWARE["a100-40g"]), stage, HARDWARE["a100-40g"])
    assert all(name in text for name in BY_HAND)
    assert "data sheet" in text
    assert "a step:" in text
    assert isinstance(cost_model(SMALL, HARDWARE["a100-40g"]), CostModel)
