"""`lut="fast"`: the engine's lookups equal their specification, and cost a model next to nothing on real text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nearfar.cli.verbs import shipped_path
from nearfar.errors import UsageError
from nearfar.eval.perplexity import MAX_LUT_RISE, LutGate, lut_gate, perplexity, read_text, text_ids
from nearfar.gguf_reader import TensorType
from nearfar.llm import LLM
from nearfar.lower_numpy import NumpyLower
from nearfar.options import EngineOptions
from nearfar.quant import lookup_product, one_scale_a_row, pack_ternary, quantize_activations
from nearfar.tokenizer import tokenizer_from_metadata
from nearfar.weights import Weights
from tests.micro_lm import read_micro_lm
from tests.paths import SHARED, needs_shared
from tests.tiny import write_tiny

lower_native = pytest.importorskip("nearfar.lower_native", reason="the compiled engine is not built")
_core = lower_native._core

FAST = EngineOptions(threads=2, lut="fast")
EXACT = EngineOptions(threads=2)
MAX_ENTRY_ERROR = 0.5 + 2.0**-15  # of a table, in its own units; kLutEntryError
FLOAT_SLACK = 1 + 2.0**-20  # three float roundings of the product

needs_lookups = pytest.mark.skipif(not lower_native.has_lookups(), reason="the kernels in use have no lookups")


def made(rows: int, cols: int, seed: int, density: float = 0.6) -> tuple[np.ndarray, np.ndarray]:
    """Trits [rows, cols] and activations [5, cols] with a few large ones."""
    rng = np.random.default_rng(seed)
    trits = (rng.integers(0, 2, (rows, cols)) * 2 - 1) * (rng.random((rows, cols)) < density)
    x = rng.standard_normal((5, cols)).astype(np.float32)
    x[:, ::197] *= 12
    return trits.astype(np.int8), x


def multiply(
    trits: np.ndarray, scale: float, x: np.ndarray, *, lut: bool, kind: TensorType = TensorType.TQ2_0
) -> np.ndarray:
    raw = pack_ternary(trits, scale, kind)
    matrix = _core.Matrix(int(kind), *trits.shape, raw.reshape(-1), lower_native.selected_isa(), lut)
    assert matrix.kind == ("l3" if lut else "i2")
    return matrix.multiply(x)


@pytest.mark.parametrize("cols", [256, 512, 768, 2560])
@pytest.mark.parametrize("rows", [1, 3, 17, 70])
def test_lookups_give_the_bits_of_their_specification(rows: int, cols: int) -> None:
    trits, x = made(rows, cols, seed=rows + cols)
    row_scales = np.full(rows, np.float16(0.37), np.float32)
    assert np.array_equal(multiply(trits, 0.37, x, lut=True), lookup_product(x, trits, row_scales))


@pytest.mark.parametrize("cols", [256, 2560])
def test_a_lookup_product_stays_within_its_bound_of_the_exact_one(cols: int) -> None:
    trits, x = made(70, cols, seed=1)
    exact, near = multiply(trits, 0.37, x, lut=False), multiply(trits, 0.37, x, lut=True)
    q, scale = quantize_activations(x, 0)
    groups = np.abs(np.pad(q[:, 0], ((0, 0), (0, -cols % 3)))).reshape(len(x), -1, 3).sum(axis=-1)
    step = np.maximum(1, groups.max(axis=-1) / 127)  # [T]
    unit = np.float32(np.float16(0.37)) * scale[:, 0, 0] * step  # [T]
    bound = unit * MAX_ENTRY_ERROR * groups.shape[1] * FLOAT_SLACK
    error = np.abs(near.astype(np.float64) - exact)
    assert (error <= bound[:, None]).all()
    assert error.max() > 0
    # Independent roundings add up like a random walk, far below the bound.
    assert np.sqrt(np.mean(error**2)) < bound.max() / 10


def test_scales_that_differ_in_a_row_and_codes_of_two_are_no_lookups() -> None:
    trits, _ = made(3, 512, seed=2)
    scales = np.full((3, 2), 0.5, np.float32)
    found = one_scale_a_row(trits, scales)
    assert found is not None
    assert np.array_equal(found[0], trits)
    assert np.array_equal(found[1], np.full(3, 0.5))
    zeros = trits.copy()
    zeros[1, :256] = 0
    scales[1, 0] = 9  # of a block that is zero throughout
    found = one_scale_a_row(zeros, scales)
    assert found is not None
    assert np.array_equal(found[1], np.full(3, 0.5))
    scales[1, 0] = 0.5
    scales[2, 1] = 0.25
    assert one_scale_a_row(trits, scales) is None
    assert one_scale_a_row(np.full((1, 256), 2, np.int8), np.ones((1, 1), np.float32)) is None


@needs_lookups
@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_a_model_by_lookup_follows_the_specification(tmp_path: Path, kind: str) -> None:
    weights = Weights.open(write_tiny(tmp_path / "m.gguf", "bitnet", kind, n_layers=2))
    native, numpy = lower_native.NativeLower(weights, FAST), NumpyLower(weights, FAST)
    assert "l3" in {panel.kind for panel in native.panels()}
    ids = (np.arange(40) * 37 % 320).astype(np.int32)
    h = numpy.embed(ids)
    kv, numpy_kv = native.new_kv(64, "f32"), numpy.new_kv(64, "f32")
    for i in range(2):
        expected = numpy.forward(h, numpy_kv, i, i + 1)
        error = np.abs(native.forward(h, kv, i, i + 1) - expected) / expected.std()
        # As without lookups: a number near a half may round the other way and moves a table by a step.
        assert np.sqrt(np.mean(error**2)) < 0.03
        assert error.max() < 0.3
        h = expected


@needs_lookups
def test_rows_by_lookup_do_not_depend_on_how_many_share_a_call() -> None:
    with Weights.open(shipped_path()) as weights:
        lower = lower_native.NativeLower(weights, FAST)
        ids = (np.arange(70) * 37 % weights.config.n_vocab).astype(np.int32)
        n_layers = weights.config.n_layers
        whole = lower.forward(lower.embed(ids), lower.new_kv(80), 0, n_layers)
        kv = lower.new_kv(80)
        parts = [lower.forward(lower.embed(part), kv, 0, n_layers) for part in np.split(ids, [1, 3, 6, 14, 47])]
        assert np.array_equal(np.concatenate(parts), whole)
        alone = lower_native.NativeLower(weights, EngineOptions(threads=1, lut="fast"))
        assert np.array_equal(alone.forward(alone.embed(ids), alone.new_kv(80), 0, n_layers), whole)


def test_kernels_without_lookups_refuse_the_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    without = [isa for isa in lower_native.isas_available() if not _core.has_lookups(isa)]
    if not without:
        pytest.skip("all kernel sets of this CPU have lookups; the C++ tests refuse made ones")
    monkeypatch.setenv("NEARFAR_ISA", without[0])
    with Weights.open(shipped_path()) as weights, pytest.raises(UsageError, match='lut "off"'):
        lower_native.NativeLower(weights, FAST)


def test_an_unknown_mode_and_lookups_in_llama_cpp_are_refused() -> None:
    with pytest.raises(UsageError, match="expected one of off, fast"):
        EngineOptions(lut="slow")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="own engine"):
        LLM.open(shipped_path(), backend="llama", lut="fast")


@needs_lookups
def test_the_shipped_model_answers_by_lookup() -> None:
    with LLM.open(shipped_path(), lut="fast") as llm:
        assert llm.generate("turn on the light", max_tokens=4).stats.n_generated > 0


# ---------------------------------------------------------------- the gate


def test_the_gate_opens_below_half_a_percent() -> None:
    assert MAX_LUT_RISE == 0.005
    assert LutGate(100, 20.0, 20.09).passed
    assert not LutGate(100, 20.0, 20.11).passed


def test_perplexity_is_the_exponential_of_the_mean_loss(tmp_path: Path) -> None:
    weights = Weights.open(write_tiny(tmp_path / "m.gguf", "llama", "F32", n_layers=1))
    lower = NumpyLower(weights)
    ids = (np.arange(20) * 7 % 320).astype(np.int32)
    losses = []
    for part in (ids[:8], ids[8:16], ids[16:]):
        z = lower.logits(lower.forward(lower.embed(part), lower.new_kv(8, "f32"), 0, 1)).astype(np.float64)
        p = np.exp(z) / np.exp(z).sum(axis=-1, keepdims=True)
        losses += [-np.log(p[i, part[i + 1]]) for i in range(len(part) - 1)]
    assert perplexity(lower, ids, window=8) == pytest.approx(np.exp(np.mean(losses)), rel=1e-6)


@needs_shared
@needs_lookups
@pytest.mark.skipif(lower_native.selected_isa() == "ref", reason="the scalar kernels take minutes for so much text")
@pytest.mark.parametrize("name", ["tinystories_valid_slice.txt.xz", "books/aesop_fables_v-s-vernon-jones.txt.xz"])
def test_the_shipped_model_passes_the_gate_on_real_text(name: str) -> None:
    with Weights.open(shipped_path()) as weights:
        tokenizer = tokenizer_from_metadata(weights.file.metadata)
        ids = text_ids(tokenizer, read_text(SHARED / "text" / name, 40_000), 8192)
        gate = lut_gate(lower_native.NativeLower(weights, EXACT), lower_native.NativeLower(weights, FAST), ids)
    assert gate.n_tokens == 8192
    assert gate.fast != gate.exact  # the lookups ran
    assert gate.passed, f"perplexity {gate.exact:.3f} -> {gate.fast:.3f}, {100 * gate.rise:+.3f} %"


@needs_shared
def test_trained_matrices_of_another_model_multiply_within_two_percent() -> None:
    path = next((SHARED / "weights").rglob("micro-lm-*.bin"), None)
    if path is None:
        pytest.skip("no micro-lm weights in the reference data")
    model = read_micro_lm(path)
    rng = np.random.default_rng(3)
    for matrix in list(model.matrices.values())[:12]:
        if matrix.trits.shape[1] % 256:
            continue
        x = rng.standard_normal((4, matrix.trits.shape[1])).astype(np.float32)
        exact, near = (multiply(matrix.trits, matrix.scale, x, lut=lut) for lut in (False, True))
        assert np.sqrt(np.mean((near - exact) ** 2)) < 0.02 * exact.std()


@needs_lookups
def test_the_command_shows_what_lookups_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from nearfar.cli.main import main

    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a light that would not turn off. " * 3)
    assert main(["eval", "nano", "--text", str(text), "--lut", "fast", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["passed"] == (facts["rise"] < MAX_LUT_RISE)
    assert facts["perplexity"] > 1
    assert main(["eval", "nano", "--text", str(text)]) == 0
    assert "by lookup" not in capsys.readouterr().out
