"""Models from folders and files: every family as the formulas say, damaged ones refused with what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [train])")

import torch
from safetensors.torch import save_file

from nearfar.errors import FileError, UnsupportedError, WeightsError
from nearfar_cloud.engine import Engine
from nearfar_cloud.model.decoder import Decoder
from nearfar_cloud.model.hf import BIASES, DENSE, HEAD_NORMS, LAYER, load_folder
from nearfar_cloud.model.linear import Linear
from nearfar_cloud.model.loader import Experts, Loaded
from nearfar_cloud.model.moe import Mixture
from tests.cloud import serving
from tests.cloud.serving import alone, engine, loaded, request, run


def write_folder(folder: Path, model: Loaded, family: str, **changes: Any) -> Path:
    """A GGUF model of the tests as a folder; llama's pairs of neighbours become halves."""
    c = model.config
    tensors = {
        "model.embed_tokens.weight": model.tensors["token_embd.weight"],
        "model.norm.weight": model.tensors["output_norm.weight"],
    }
    names = LAYER | DENSE | (BIASES if c.has_qkv_bias else {}) | (HEAD_NORMS if c.has_qk_norms else {})
    for i in range(c.n_layers):
        for ours, theirs in names.items():
            x = model.tensors[f"blk.{i}.{ours}"]
            if c.arch == "llama" and ours in ("attn_q.weight", "attn_k.weight"):
                x = x.reshape(-1, c.head_dim // 2, 2, c.d_model).transpose(1, 2).reshape(x.shape)
            tensors[f"model.layers.{i}.{theirs}"] = x.contiguous()
    config = {
        "model_type": family,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.d_ff,
        "vocab_size": c.n_vocab,
        "max_position_embeddings": c.n_ctx,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_base,
    }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | changes))
    save_file({k: v.clone() for k, v in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_folder_gives_the_tokens_of_the_same_weights_in_a_file(tmp_path: Path, family: str) -> None:
    model = load_folder(write_folder(tmp_path, loaded(family), family))
    assert run(engine(model=model), [request(n) for n in (0, 1)]) == [alone(n, family) for n in (0, 1)]


def write_mixture(folder: Path, family: str) -> Path:
    """A random mixture of two layers, eight experts of which a row takes two."""
    rng = torch.Generator().manual_seed(1)
    d, f, n, v = 64, 32, 8, 320

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng) * shape[-1] ** -0.5

    tensors = {"model.embed_tokens.weight": draw(v, d), "model.norm.weight": torch.ones(d)}
    for i in range(2):
        layer = f"model.layers.{i}."
        tensors |= {layer + "input_layernorm.weight": torch.ones(d)}
        tensors |= {layer + "post_attention_layernorm.weight": torch.ones(d)}
        tensors |= {layer + f"self_attn.{x}_proj.weight": draw(32 if x in "kv" else d, d) for x in "qkvo"}
        if family == "qwen3_moe":
            tensors |= {layer + f"self_attn.{x}_norm.weight": torch.ones(16) for x in "qk"}
        block = "mlp" if family == "qwen3_moe" else "block_sparse_moe"
        parts = ("gate_proj", "up_proj", "down_proj") if family == "qwen3_moe" else ("w1", "w3", "w2")
        tensors |= {layer + f"{block}.gate.weight": 3 * draw(n, d)}
        for e in range(n):
            for part, shape in zip(parts, ((f, d), (f, d), (d, f)), strict=True):
                tensors[layer + f"{block}.experts.{e}.{part}.weight"] = draw(*shape)
    config = {"model_type": family, "hidden_size": d, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": f, "moe_intermediate_size": f}
    config |= {"num_experts": n, "num_local_experts": n, "num_experts_per_tok": 2, "norm_topk_prob": True}
    config |= {"vocab_size": v, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_a_mixture_is_the_same_in_a_batch_and_alone(tmp_path: Path, family: str) -> None:
    model = load_folder(write_mixture(tmp_path, family))
    numbers = [n for n in range(8) if len(request(n).ids) < 150][:4]

    def on(e: Engine, chosen: list[int]) -> list[tuple[int, ...]]:
        return run(e, [request(n) for n in chosen])

    together = on(engine(model=model), numbers)
    assert together == [on(engine(serving.Whole(), model=model), [n])[0] for n in numbers]
    assert len(set(together)) > 1


@pytest.mark.parametrize("renormalise", [False, True])
def test_a_mixture_is_the_weighted_sum_of_its_experts(renormalise: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    n, k, d, f = 6, 3, 32, 16
    router, gate, up, down = (
        torch.randn(*shape, generator=rng) * 0.3 for shape in ((n, d), (n, f, d), (n, f, d), (n, d, f))
    )
    mixture = Mixture(Experts(n, k, f, renormalise), router, gate, up, down)
    x = torch.randn(9, d, generator=rng)
    for row, y in zip(x, mixture(x), strict=True):
        p = torch.softmax(router @ row, 0)
        best = p.argsort(descending=True)[:k]
        share = p[best] / p[best].sum() if renormalise else p[best]
        want = sum(
            g * (down[e] @ (torch.nn.functional.silu(gate[e] @ row) * (up[e] @ row)))
            for e, g in zip(best, share, strict=True)
        )
        torch.testing.assert_close(y, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("n_out", "n_in"), [(96, 64), (320, 64), (64, 128), (48, 2304)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_a_product_has_the_same_bits_among_any_others(n_out: int, n_in: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(2)
    linear = Linear(torch.randn(n_out, n_in, generator=rng).to(dtype))
    x = torch.randn(70, n_in, generator=rng).to(dtype)
    whole = linear(x)
    for n in (1, 2, 3, 5, 6, 9, 16, 31, 64, 65):
        assert torch.equal(linear(x[:n]), whole[:n]), n


def test_a_file_in_bf16_gives_the_same_tokens_in_a_batch() -> None:
    model = loaded("llama", "bf16")
    numbers = (0, 1, 3)
    together = run(engine(model=model), [request(n) for n in numbers])
    assert together == [run(engine(serving.Whole(), model=model), [request(n)])[0] for n in numbers]


def test_llama_3s_long_waves_turn_slower(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 64, "rope_theta": 10_000.0}
    plain, scaled = (
        Decoder(load_folder(write_folder(tmp_path / str(i), loaded(), "llama", **changes))).frequency
        for i, changes in enumerate(({}, {"rope_parameters": rope}))
    )
    assert torch.equal(scaled[0], plain[0])
    assert scaled[-1] == pytest.approx(float(plain[-1]) / 8, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "gpt2"}, UnsupportedError, "model_type 'gpt2', expected one of llama"),
        ({"hidden_size": 128}, WeightsError, r"is \[320, 64\], config.json wants \[320, 128\]"),
        ({"num_hidden_layers": 5}, WeightsError, r"no tensor model\.layers\.4\."),
        ({"num_hidden_layers": 10**9}, WeightsError, "num_hidden_layers=1000000000, expected a whole number"),
        ({"num_hidden_layers": None}, WeightsError, "num_hidden_layers=None"),
        ({"vocab_size": -1}, WeightsError, "vocab_size=-1"),
        ({"rms_norm_eps": "a"}, WeightsError, "rms_norm_eps=a, expected a positive number"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, UnsupportedError, "rotation 'yarn'"),
        ({"hidden_act": "gelu"}, UnsupportedError, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, UnsupportedError, "sliding window"),
        ({"num_key_value_heads": 3}, WeightsError, "do not fit together"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    folder = write_folder(tmp_path, loaded(), "llama", **changes)
    with pytest.raises(error, match=message):
        load_folder(folder)


def test_a_damaged_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"config\.json: no such file"):
        load_folder(tmp_path / "nowhere")
    folder = write_folder(tmp_path / "a", loaded(), "llama")
    (folder / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="not JSON"):
        load_folder(folder)
    folder = write_folder(tmp_path / "b", loaded(), "llama")
    whole = (folder / "model.safetensors").read_bytes()
    for cut in (0, 7, 8, 100, len(whole) - 1):
        (folder / "model.safetensors").write_bytes(whole[:cut])
        with pytest.raises(WeightsError, match=r"model\.safetensors"):
            load_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileError, match=r"model\.safetensors: no such file"):
        load_folder(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(WeightsError, match="names of files beside it"):
        load_folder(folder)


def test_a_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    model = loaded()
    spoiled = {k: v.clone() for k, v in model.tensors.items()}
    spoiled["blk.2.ffn_up.weight"][3, 4] = float("nan")
    folder = write_folder(tmp_path, Loaded(model.config, spoiled, model.dtype, "adjacent", ""), "llama")
    with pytest.raises(WeightsError, match=r"layers\.2\.mlp\.up_proj\.weight holds a number that is not finite"):
        load_folder(folder)
