"""The model that servers are compared on: a Llama of 100 M random weights, in every form that one of them reads.

    FOLDER/hf/         config.json, model.safetensors (bf16)
    FOLDER/TYPE.gguf   the same weights as BF16, F16, Q8_0 or Q4_0

Speed depends on sizes and types, not on values; token lists go in and come out.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from nearfar.bench.random_model import add_header
from nearfar.config import ModelConfig
from nearfar.gguf_reader import TensorType
from nearfar.gguf_writer import GGUFWriter
from nearfar_cloud.model.hf import DENSE, LAYER
from nearfar_cloud.model.loader import Loaded
from nearfar_cloud.planning.random_model import random_model
from nearfar_cloud.planning.roofline import MODELS

ANCHOR, TINY = MODELS["llama-100m"], ModelConfig("llama", 2, 128, 2, 1, 64, 256, 512, 2048)
FILE_TYPES = {"BF16": 32, "F16": 1, "Q8_0": 7, "Q4_0": 2}  # general.file_type of llama.cpp


def make(folder: Path, config: ModelConfig = ANCHOR) -> Path:
    """Write what is not there yet; returns the folder."""
    done = folder / "done"
    if not done.is_file():
        (folder / "hf").mkdir(parents=True, exist_ok=True)
        model = random_model(config, "fp32")
        _write_folder(folder / "hf", model)
        for name in FILE_TYPES:
            _write_file(folder / f"{name}.gguf", model, name)
        done.write_text("")
    return folder


def _write_folder(folder: Path, model: Loaded) -> None:
    c, get = model.config, model.tensors
    whole = {"token_embd": "model.embed_tokens", "output": "lm_head", "output_norm": "model.norm"}
    tensors = {f"{theirs}.weight": get[f"{ours}.weight"] for ours, theirs in whole.items()}
    for i in range(c.n_layers):
        for ours, theirs in (LAYER | DENSE).items():
            x = get[f"blk.{i}.{ours}"]
            if ours in ("attn_q.weight", "attn_k.weight"):  # neighbours rotate together in the file, halves here
                x = x.reshape(-1, c.head_dim // 2, 2, c.d_model).transpose(1, 2).reshape(x.shape)
            tensors[f"model.layers.{i}.{theirs}"] = x
    bf16 = {name: x.bfloat16().contiguous() for name, x in tensors.items()}
    save_file(bf16, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
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
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def _write_file(path: Path, model: Loaded, type_name: str) -> None:
    w = GGUFWriter(path)
    add_header(w, model.config, path.parent.name)
    w.add("general.file_type", FILE_TYPES[type_name])
    for name, x in model.tensors.items():
        w.add_tensor(name, x.numpy(), TensorType[type_name] if x.ndim == 2 else TensorType.F32)
    w.write()
