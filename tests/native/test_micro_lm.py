"""Real trained ternary weights of another project, through the ternary kernels of every instruction set."""

from __future__ import annotations

import numpy as np
import pytest

from nearfar.gguf_reader import TensorType
from nearfar.quant import ACTIVATION_GRAIN, fake_quantize_activations, pack_ternary
from tests.micro_lm import read_micro_lm
from tests.paths import SHARED, needs_shared

_core = pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")

MAX_PRODUCT_ERROR = 5e-6  # of the largest |x| in the row: the integer sums are exact, the last products are f32


@needs_shared
@pytest.mark.parametrize("isa", _core.isas_available())
@pytest.mark.parametrize("kind", [TensorType.TQ1_0, TensorType.TQ2_0])
def test_trained_ternary_matrices_multiply_as_in_numpy(kind: TensorType, isa: str) -> None:
    model = read_micro_lm(SHARED / "weights" / "micro-lm-pro-ternary.bin")
    rng = np.random.default_rng(5)
    assert len(model.matrices) == 6 * model.n_layers
    for name, m in model.matrices.items():
        rows, cols = m.trits.shape
        packed = _core.Matrix(int(kind), rows, cols, pack_ternary(m.trits, m.scale, kind).reshape(-1), isa)
        x = rng.normal(size=(3, cols)).astype(np.float32)
        y = packed.multiply(x)
        weights = m.trits.astype(np.float32) * np.float32(np.float16(m.scale))  # the scale as the file type keeps it
        expected = fake_quantize_activations(x, ACTIVATION_GRAIN[kind]) @ weights.T
        error = np.abs(y - expected) / np.abs(x).max(axis=1, keepdims=True)
        assert error.max() < MAX_PRODUCT_ERROR, name
