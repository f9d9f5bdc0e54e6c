"""What few files have: scales beside matrices, an own output matrix, rope factors, linear rope scaling, odd widths."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from nearfar.lower_numpy import NumpyLower
from nearfar.options import EngineOptions
from nearfar.weights import Weights
from tests.native.test_parity import MAX_FLOAT_ERROR, errors
from tests.tiny import write_tiny

lower_native = pytest.importorskip("nearfar.lower_native", reason="the compiled engine is not built")


def with_tensors(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    """A copy of a file with more (F32) tensors."""
    reader = gguf.GGUFReader(path)
    arch = str(reader.fields["general.architecture"].contents())
    copy = path.with_suffix(".more.gguf")
    writer = gguf.GGUFWriter(str(copy), arch)
    for name, field in reader.fields.items():
        if not name.startswith(("GGUF.", "general.architecture")):
            kind = field.types[0]
            sub = field.types[-1] if kind is gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy


def assert_parity(path: Path, start: int = 0) -> np.ndarray:
    """Runs all layers in both engines; returns the rows."""
    weights = Weights.open(path)
    native, numpy = lower_native.NativeLower(weights, EngineOptions(threads=1)), NumpyLower(weights)
    ids = (np.arange(20) * 13 % 320).astype(np.int32)
    kv, numpy_kv = native.new_kv(64, "f32"), numpy.new_kv(64, "f32")
    h = native.forward(native.embed(ids), kv, 0, weights.config.n_layers)
    expected = numpy.forward(numpy.embed(ids), numpy_kv, 0, weights.config.n_layers)
    assert errors(h, expected)[0] < MAX_FLOAT_ERROR
    assert errors(native.logits(h), numpy.logits(expected))[0] < MAX_FLOAT_ERROR
    return expected


def test_scales_beside_the_matrices_multiply_the_products(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "bitnet", "F32", n_layers=2)
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    scales = {f"blk.{i}.{p}.scale": np.float32([0.5 + 0.1 * j + i]) for i in range(2) for j, p in enumerate(parts)}
    assert not np.allclose(assert_parity(with_tensors(path, scales)), assert_parity(path), atol=0.1)


def test_rope_factors_divide_the_frequencies(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "llama", "F32", n_layers=2)
    factors = {"rope_freqs.weight": np.linspace(1, 8, 32).astype(np.float32)}
    assert not np.allclose(assert_parity(with_tensors(path, factors)), assert_parity(path), atol=0.01)


def test_linear_rope_scaling_stretches_the_positions(tmp_path: Path) -> None:
    stretched = {"qwen2.rope.scaling.type": "linear", "qwen2.rope.scaling.factor": 4.0}
    plain = assert_parity(write_tiny(tmp_path / "a.gguf", "qwen2", "F32", n_layers=2))
    scaled = assert_parity(write_tiny(tmp_path / "b.gguf", "qwen2", "F32", n_layers=2, extra=stretched))
    assert not np.allclose(plain, scaled, atol=0.01)


def test_an_output_matrix_of_its_own_is_the_head(tmp_path: Path) -> None:
    assert_parity(write_tiny(tmp_path / "m.gguf", "qwen3", "F16", n_layers=2, tied=False))


@pytest.mark.parametrize(
    ("d_model", "n_heads", "n_kv_heads", "head_dim", "d_ff"),
    [(64, 8, 4, 8, 172), (36, 3, 1, 12, 50), (70, 5, 5, 14, 65), (48, 12, 1, 20, 31)],
)
def test_widths_that_fit_no_register(
    tmp_path: Path, d_model: int, n_heads: int, n_kv_heads: int, head_dim: int, d_ff: int
) -> None:
    path = write_tiny(
        tmp_path / "m.gguf",
        "llama",
        "F32",
        n_layers=2,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        d_ff=d_ff,
    )
    assert_parity(path)


def test_positions_near_a_million_keep_their_angles(tmp_path: Path) -> None:
    """An f32 angle is off by up to 0.05 there: the scaling puts the positions where it would show."""
    far = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1 / 900.0}
    assert_parity(write_tiny(tmp_path / "m.gguf", "llama", "F32", n_layers=2, extra=far))
