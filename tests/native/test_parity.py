"""The compiled engine against its specification, `lower_numpy`, for every architecture and weight type.

Where activations are rounded to int8, the last bit of a float decides now and then on which side of a half a number
falls; such a flip moves one product by a whole step, in either engine.  So each layer is compared from the same input
rows, most numbers must agree closely, and all within some steps.  Without rounding all must agree closely.
"""

from __future__ import annotations

import numpy as np
import pytest

from nearfar.gguf_reader import TensorType
from nearfar.lower_numpy import NumpyLower
from nearfar.options import EngineOptions
from nearfar.quant import ACTIVATION_GRAIN
from nearfar.weights import Weights
from tests.tiny import ARCHITECTURES, NATIVE_TYPES, write_tiny

lower_native = pytest.importorskip("nearfar.lower_native", reason="the compiled engine is not built")

N_LAYERS, N_ROWS = 2, 70  # more than one block of the cache

# All in units of the standard deviation of the compared rows.
MAX_FLOAT_ERROR = 5e-5  # f32 sums in another order, through a layer; f16 cache: a key may round the other way
MAX_STEP_ERROR = 0.3  # some flips that meet in one number
MAX_RMS_ERROR = 0.03  # of a row in which something flipped: an error of structure is of order 1
CLEAR = 0.3  # a lead of the best logit that flips do not turn around

CASES = [(arch, kind) for arch in (*ARCHITECTURES, "bitnet-b1.58") for kind in NATIVE_TYPES]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[lower_native.NativeLower, NumpyLower]:
    arch, kind = request.param
    path = tmp_path_factory.mktemp("parity") / "m.gguf"
    wide = {"head_dim": 96, "n_heads": 8} if arch == "qwen3" else {}  # queries wider than the rows
    weights = Weights.open(write_tiny(path, arch, kind, exits=(1,), n_layers=N_LAYERS, **wide))
    return lower_native.NativeLower(weights, EngineOptions(threads=2)), NumpyLower(weights)


def grain(weights: Weights) -> int | None:
    return ACTIVATION_GRAIN[TensorType(weights.raw("blk.0.attn_q.weight")[0])]


def errors(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Largest and root-mean-square difference, in standard deviations of b."""
    difference = np.abs(a - b) / b.std()
    return float(difference.max()), float(np.sqrt(np.mean(difference**2)))


def test_every_layer_and_head_agrees_with_the_specification(
    engines: tuple[lower_native.NativeLower, NumpyLower],
) -> None:
    native, numpy = engines
    ids = (np.arange(N_ROWS) * 37 % 320).astype(np.int32)
    h = numpy.embed(ids)
    assert np.array_equal(native.embed(ids), h)
    kv, numpy_kv = native.new_kv(100, "f32"), numpy.new_kv(100, "f32")
    rounds = grain(native.weights) is not None
    for i in range(N_LAYERS):
        expected = numpy.forward(h, numpy_kv, i, i + 1)
        largest, rms = errors(native.forward(h, kv, i, i + 1), expected)
        assert largest < (MAX_STEP_ERROR if rounds else MAX_FLOAT_ERROR), f"layer {i}"
        assert rms < (MAX_RMS_ERROR if rounds else MAX_FLOAT_ERROR), f"layer {i}"
        h = expected
    for head in ("final", "exit.1"):
        assert errors(native.norm(h, head), numpy.norm(h, head))[0] < MAX_FLOAT_ERROR
        assert errors(native.logits(h, head), numpy.logits(h, head))[0] < MAX_FLOAT_ERROR  # the head is F32 here


def test_the_whole_model_takes_the_same_tokens_where_the_choice_is_clear(
    engines: tuple[lower_native.NativeLower, NumpyLower],
) -> None:
    native, numpy = engines
    ids = (np.arange(30) * 11 % 320).astype(np.int32)
    z = native.logits(native.forward(native.embed(ids), native.new_kv(64), 0, N_LAYERS))
    expected = numpy.logits(numpy.forward(numpy.embed(ids), numpy.new_kv(64), 0, N_LAYERS))
    top = np.sort(expected, axis=1)
    clear = top[:, -1] - top[:, -2] > CLEAR * expected.std()
    assert clear.sum() >= 3
    assert np.array_equal(z.argmax(axis=1)[clear], expected.argmax(axis=1)[clear])
