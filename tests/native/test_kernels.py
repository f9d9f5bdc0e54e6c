"""Every kernel against the numeric rule y = fake_quantize(x) @ dequantize(W).T; and the kernels' object files."""

from __future__ import annotations

import shutil
import subprocess

import numpy as np
import pytest

from nearfar.gguf_reader import TensorType
from nearfar.quant import ACTIVATION_GRAIN, dequantize, fake_quantize_activations
from tests.paths import ROOT
from tests.tiny import NATIVE_TYPES, random_matrix

_core = pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")

# f32 sums over up to 1280 products of order 1/36 in another order than numpy's; integer sums are exact.
MAX_PRODUCT_ERROR = 5e-6

OBJECTS = sorted(
    path
    for isa in ("avx", "amx", "neon")
    for path in (ROOT / "build").glob(f"cp*/CMakeFiles/nearfar_core.dir/src/*_{isa}*.o")
)


@pytest.mark.parametrize("isa", _core.isas_available())
@pytest.mark.parametrize("kind", NATIVE_TYPES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 256), (65, 512), (130, 1280)])
def test_a_product_follows_the_rule(kind: str, isa: str, rows: int, cols: int) -> None:
    rng = np.random.default_rng(rows)
    raw = np.ascontiguousarray(random_matrix(rng, rows, cols, kind)[0]).view(np.uint8).reshape(-1)
    number = TensorType[kind]
    matrix = _core.Matrix(int(number), rows, cols, raw, isa)
    x = rng.normal(size=(9, cols)).astype(np.float32)
    x[3] = 0
    x[4, 5] = 100  # an outlier
    y = matrix.multiply(x)
    expected = fake_quantize_activations(x, ACTIVATION_GRAIN[number]) @ dequantize(raw, number, (rows, cols)).T
    scale = np.abs(x).max(axis=1, keepdims=True) + 1e-9  # [M, 1]
    assert np.abs((y - expected) / scale).max() < MAX_PRODUCT_ERROR
    assert not y[3].any()
    for i in range(9):
        assert np.array_equal(matrix.multiply(x[i : i + 1])[0], y[i]), "a row alone differs from the row in company"


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm (binutils) is missing")
@pytest.mark.skipif(not OBJECTS, reason="no object files under build/: the engine was not built from this tree")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda p: p.name)
def test_kernel_objects_hold_no_weak_symbol(path) -> None:
    """Else the linker may take an AVX-512 copy of an inline function for everybody, and old CPUs die of it."""
    symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line for line in symbols if line[17:18] in "WVu"] == []
    assert any(line[17:18] in "TDR" for line in symbols), "nothing is exported: is this a kernel's object?"


@pytest.mark.parametrize("n", [1, 7, 64, 1000])
def test_the_largest_number_of_a_row_is_the_first_of_equals_and_must_be_finite(n: int) -> None:
    rng = np.random.default_rng(n)
    z = rng.normal(size=(40, n)).astype(np.float32)
    z[:10] = np.round(z[:10])  # many equals
    z[10:12] = [[0.0], [-0.0]]
    z[11, n // 2] = 0.0  # equal to what stands before it
    z[12] = -np.abs(z[12])
    assert np.array_equal(_core.largest(z), z.argmax(axis=1))
    for i, bad in enumerate((np.nan, -np.nan, np.inf, -np.inf)):
        z[i, rng.integers(n)] = bad
    assert np.array_equal(_core.largest(z)[:4], [-1] * 4)
    assert np.array_equal(_core.largest(z)[4:], z[4:].argmax(axis=1))
