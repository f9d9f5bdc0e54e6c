"""`Weights.open` is the door: behind it every tensor is there, of its shape, of a type that is read, and finite."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nearfar.errors import FileError, GGUFError, UnsupportedError, UsageError, WeightsError
from nearfar.gguf_reader import BLOCKS, TensorType
from nearfar.weights import Weights, layer_tensors
from tests.edited import Edit, Tensors, edited
from tests.gguf_bytes import STRING, gguf, kv, string, tensor
from tests.paths import SHARED, needs_shared
from tests.tiny import ARCHITECTURES, WEIGHT_TYPES, write_tiny


def _f32(x: np.ndarray) -> tuple[TensorType, tuple[int, ...], np.ndarray]:
    x = np.ascontiguousarray(x, "<f4")
    return TensorType.F32, x.shape, x.reshape(-1).view(np.uint8)


def _zeros(kind: TensorType, *shape: int) -> tuple[TensorType, tuple[int, ...], np.ndarray]:
    weights, size = BLOCKS[kind]
    return kind, shape, np.zeros(int(np.prod(shape)) // weights * size, np.uint8)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder, made = tmp_path_factory.mktemp("weights"), {}

    def model(arch: str = "llama", weight_type: str = "F32", exits: tuple[int, ...] = ()) -> Path:
        key = f"{arch}-{weight_type}-{exits}"
        if key not in made:
            (folder / key).mkdir()
            made[key] = write_tiny(folder / key / "m.gguf", arch, weight_type, n_layers=2, exits=exits)
        return made[key]

    return model


@pytest.mark.parametrize("arch", [*ARCHITECTURES, "bitnet-b1.58"])
@pytest.mark.parametrize("weight_type", ["F32", "TQ2_0"])
def test_every_architecture_opens_and_has_what_its_layers_need(arch: str, weight_type: str, models) -> None:
    with Weights.open(models(arch, weight_type)) as w:
        assert w.config.arch == arch
        for i in range(w.config.n_layers):
            for name, shape in layer_tensors(w.config, i).items():
                assert w.f32(name).shape == shape
        assert w.raw("blk.0.attn_q.weight")[:2] == (TensorType[weight_type], (256, 256))


@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_every_weight_type_opens(weight_type: str, models) -> None:
    with Weights.open(models("llama", weight_type)) as w:
        x = w.f32("blk.1.ffn_down.weight")
        assert x.shape == (256, 512)
        assert x.dtype == np.float32
        assert np.isfinite(x).all()
        assert 0.01 < x.std() < 0.2


def test_the_head_is_the_embedding_unless_there_is_one(tmp_path: Path, models) -> None:
    assert Weights.open(models()).head_name == "token_embd.weight"
    assert Weights.open(write_tiny(tmp_path / "u.gguf", n_layers=1, tied=False)).head_name == "output.weight"


# ---- exits


def test_an_exit_gain_is_found_as_a_key_and_as_a_tensor(models) -> None:
    path = models("bitnet", "TQ2_0", (1,))
    w = Weights.open(path)
    gain = w.norm_gain("exit.1")
    assert gain.dtype == np.float32
    np.testing.assert_array_equal(gain, np.array(w.file.metadata["nearfar.exit.1.norm"], np.float32))

    def as_tensor(meta: dict, tensors: Tensors) -> None:
        tensors["exit.1.norm.weight"] = _f32(np.array(meta.pop("nearfar.exit.1.norm")))

    np.testing.assert_array_equal(Weights.open(edited(path, as_tensor)).norm_gain("exit.1"), gain)
    assert w.norm_gain("final").shape == (256,)


def test_a_head_that_is_not_there_is_named(models) -> None:
    with pytest.raises(UsageError, match=r"no head 'exit\.2': its heads are exit\.1, final"):
        Weights.open(models("bitnet", "TQ2_0", (1,))).norm_gain("exit.2")


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        (None, "expected 256 numbers"),
        ([1.0] * 255, "expected 256 numbers"),
        (["x"] * 256, "expected 256 numbers"),
        ([1.0] * 255 + [float("nan")], "not finite"),
    ],
)
def test_an_exit_without_a_sound_gain_is_refused(gain: list | None, said: str, models) -> None:
    def edit(meta: dict, _: Tensors) -> None:
        del meta["nearfar.exit.1.norm"]
        if gain is not None:
            meta["nearfar.exit.1.norm"] = gain

    with pytest.raises(WeightsError, match=rf"nearfar\.exit\.1\.norm.*{said}"):
        Weights.open(edited(models("bitnet", "TQ2_0", (1,)), edit))


# ---- what is refused


def _drop(name: str) -> Edit:
    return lambda _, tensors: tensors.pop(name)


def _put(name: str, value: tuple) -> Edit:
    return lambda _, tensors: tensors.update({name: value})


def _set(key: str, value: object) -> Edit:
    return lambda meta, _: meta.update({key: value})


@pytest.mark.parametrize(
    ("arch", "edit", "error", "said"),
    [
        ("llama", _drop("token_embd.weight"), WeightsError, "no tensor token_embd.weight"),
        (
            "llama",
            _drop("output_norm.weight"),
            WeightsError,
            "no tensor output_norm.weight: a llama model of 2 layers needs it",
        ),
        ("llama", _drop("blk.1.ffn_up.weight"), WeightsError, "no tensor blk.1.ffn_up.weight"),
        ("qwen2", _drop("blk.0.attn_k.bias"), WeightsError, "no tensor blk.0.attn_k.bias"),
        ("qwen3", _drop("blk.0.attn_q_norm.weight"), WeightsError, "no tensor blk.0.attn_q_norm.weight"),
        ("bitnet", _drop("blk.1.ffn_sub_norm.weight"), WeightsError, "no tensor blk.1.ffn_sub_norm.weight"),
        ("llama", _set("llama.block_count", 3), WeightsError, "no tensor blk.2.attn_norm.weight (and 8 more)"),
        ("llama", _set("llama.block_count", 1), WeightsError, "blk.1.attn_norm.weight has no place in a llama model"),
        (
            "llama",
            _put("blk.0.attn_q.weight", _zeros(TensorType.F32, 256, 128)),
            WeightsError,
            "blk.0.attn_q.weight is [256, 128], the header wants [256, 256]; exported for another model?",
        ),
        ("llama", _put("blk.0.attn_q.weight", _zeros(TensorType.F32, 256)), WeightsError, "is [256], the header"),
        ("llama", _put("token_embd.weight", _zeros(TensorType.F32, 320)), WeightsError, "token_embd.weight is [320]"),
        ("llama", _put("output.weight", _zeros(TensorType.F32, 9, 256)), WeightsError, "output.weight is [9, 256]"),
        ("llama", _put("rope_freqs.weight", _zeros(TensorType.F32, 3)), WeightsError, "rope_freqs.weight is [3]"),
        ("llama", _put("blk.0.attn_norm.weight", _zeros(TensorType.Q8_0, 256)), WeightsError, "expected F32, F16"),
        (
            "llama",
            _put("blk.0.attn_q.bias", _zeros(TensorType.F32, 256)),
            WeightsError,
            "blk.0.attn_q.bias has no",
        ),
        ("llama", _put("blk.0.attn_q.scale", _zeros(TensorType.F32, 1)), WeightsError, "blk.0.attn_q.scale has no"),
        ("llama", _put("exit.1.norm.weight", _zeros(TensorType.F32, 256)), WeightsError, "exit.1.norm.weight has no"),
        ("llama", _set("general.architecture", "mamba"), UnsupportedError, "architecture 'mamba': the nearfar engine"),
        ("llama", _set("split.count", 3), UnsupportedError, "one of 3 parts of a model"),
        ("llama", _set("llama.expert_count", 8), UnsupportedError, "a mixture of experts"),
        ("llama", lambda meta, _: meta.pop("general.architecture"), WeightsError, "no general.architecture"),
        ("llama", lambda meta, _: meta.pop("llama.context_length"), WeightsError, "lacks llama.context_length"),
        (
            "llama",
            _put("blk.0.attn_q.weight", _zeros(TensorType.IQ2_XXS, 256, 256)),
            UnsupportedError,
            "blk.0.attn_q.weight is of type IQ2_XXS",
        ),
    ],
)
def test_a_file_that_is_no_whole_model_is_refused_with_the_reason(
    arch: str, edit: Edit, error: type[Exception], said: str, models
) -> None:
    with pytest.raises(error, match=re.escape(said)) as caught:
        Weights.open(edited(models(arch), edit))
    assert str(caught.value).count("edited.gguf") == 1  # the path, once


def test_the_type_of_bitnet_cpp_is_refused_by_name(tmp_path: Path, models) -> None:
    whole = models("bitnet").read_bytes()
    entry = b"blk.0.attn_q.weight" + bytes([2, 0, 0, 0]) + 2 * (256).to_bytes(8, "little")
    at = whole.index(entry) + len(entry)
    path = tmp_path / "i2_s.gguf"
    path.write_bytes(whole[:at] + (36).to_bytes(4, "little") + whole[at + 4 :])
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_q\.weight is of type I2_S; this engine reads F32, F16"):
        Weights.open(path)


@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_a_scale_that_is_not_finite_is_refused_and_its_tensor_named(weight_type: str, models) -> None:
    at = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208, "TQ1_0": 52, "TQ2_0": 64}.get(weight_type, 0)
    nan = {"F32": b"\x00\x00\xc0\x7f", "BF16": b"\xc0\x7f"}.get(weight_type, b"\x00\x7e")

    def edit(_: dict, tensors: Tensors) -> None:
        tensors["blk.1.ffn_gate.weight"][2][at : at + len(nan)] = np.frombuffer(nan, np.uint8)

    with pytest.raises(WeightsError, match=r"blk\.1\.ffn_gate\.weight holds a (number|scale) that is not finite"):
        Weights.open(edited(models("llama", weight_type), edit))


def test_bitnet_scales_and_llama_frequencies_are_accepted(models) -> None:
    scaled = edited(models("bitnet"), _put("blk.0.attn_q.scale", _f32(np.array([0.5]))))
    assert Weights.open(scaled).f32("blk.0.attn_q.scale").tolist() == [0.5]
    factors = edited(models(), _put("rope_freqs.weight", _f32(np.ones(32))))
    assert Weights.open(factors).has("rope_freqs.weight")


def test_tensors_of_other_purposes_are_left_alone(models) -> None:
    assert Weights.open(edited(models(), _put("vision.patch.weight", _zeros(TensorType.F32, 8)))).has(
        "vision.patch.weight"
    )


@needs_shared
def test_a_file_that_holds_only_a_vocabulary_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="architecture 'gpt2'"):
        Weights.open(SHARED / "tokenizers" / "ggml-vocab-gpt-2.gguf")


def test_a_header_without_tensors_is_refused_however_many_layers_it_announces(tmp_path: Path, models) -> None:
    def empty(meta: dict, tensors: Tensors) -> None:
        tensors.clear()
        meta["llama.block_count"] = 1024

    with pytest.raises(WeightsError, match=r"no tensor token_embd\.weight"):
        Weights.open(edited(models(), empty))


@pytest.mark.parametrize("broken", ["cut", "offset", "count", "magic", "missing"])
def test_damage_below_the_model_comes_up_as_a_file_error(broken: str, tmp_path: Path, models) -> None:
    whole, path = models().read_bytes(), tmp_path / "x.gguf"
    damaged = {
        "cut": whole[: len(whole) // 2],
        "offset": gguf([kv("general.architecture", STRING, string("llama"))], [tensor("a", offset=1 << 40)], bytes(64)),
        "count": whole[:8] + (1 << 63).to_bytes(8, "little") + whole[16:],
        "magic": b"GGML" + whole[4:],
        "missing": None,
    }[broken]
    if damaged is not None:
        path.write_bytes(damaged)
    with pytest.raises(FileError if broken == "missing" else GGUFError, match=r"x\.gguf"):
        Weights.open(path)
