"""A model's tensors from a Hugging Face folder: config.json and safetensors files, memory-mapped until they are read.

Families: llama, qwen2, qwen3, and mixtures of experts (qwen3_moe, mixtral).  Names become those of GGUF, so that one
decoder serves both.  In these files the halves of a head rotate together, whatever the family.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nearfar.config import ModelConfig
from nearfar.errors import FileError, UnsupportedError, WeightsError
from nearfar_cloud.model.loader import DTYPES, Experts, Loaded

FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3", "mixtral": "llama"}
MOST = {"layers": 1024, "width": 1 << 20, "heads": 1024, "vocabulary": 1 << 22, "positions": 1 << 24, "experts": 4096}

# GGUF name within a layer -> name within a layer of the folder
LAYER = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
BIASES = {f"attn_{x}.bias": f"self_attn.{x}_proj.bias" for x in "qkv"}
HEAD_NORMS = {f"attn_{x}_norm.weight": f"self_attn.{x}_norm.weight" for x in "qk"}
DENSE = {f"ffn_{x}.weight": f"mlp.{x}_proj.weight" for x in ("gate", "up", "down")}
# Of a mixture: the router, and the three matrices of an expert.
_ROUTER = {"qwen3_moe": "mlp.gate.weight", "mixtral": "block_sparse_moe.gate.weight"}
_EXPERT = {
    "qwen3_moe": {x: f"mlp.experts.{{}}.{x}_proj.weight" for x in ("gate", "up", "down")},
    "mixtral": {
        x: f"block_sparse_moe.experts.{{}}.{w}.weight" for x, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    },
}


def is_mixture(folder: str | os.PathLike[str]) -> bool:
    """Whether the folder's config names a mixture of experts.  Raises FileError, WeightsError."""
    return _json(Path(folder) / "config.json").get("model_type") in _ROUTER


def load_folder(folder: str | os.PathLike[str], dtype: str = "fp32") -> Loaded:
    """Raises FileError (missing), WeightsError (contents), UnsupportedError (a family or a form that is not served)."""
    folder = Path(folder)
    raw = _json(folder / "config.json")
    family = str(raw.get("model_type"))
    if family not in FAMILIES:
        raise UnsupportedError(f"{folder}: model_type {family[:40]!r}, expected one of {', '.join(FAMILIES)}")
    facts = _Facts(raw, folder / "config.json")
    config, experts = facts.config(family), facts.experts(family)
    with _Shards(folder) as shards:
        tensors = _tensors(shards, family, config, experts, DTYPES[dtype])
        digest = hashlib.sha256(f"{dtype} {json.dumps(raw, sort_keys=True)} {shards.identity}".encode())
    if (factors := facts.rope_factors(config.head_dim)) is not None:
        tensors["rope_freqs.weight"] = factors
    return Loaded(config, tensors, DTYPES[dtype], "halves", digest.hexdigest(), experts)


def _tensors(
    shards: _Shards, family: str, c: ModelConfig, experts: Experts | None, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Every tensor, by GGUF name, in its shape."""
    d, f = c.d_model, c.d_ff
    shapes = {
        "attn_norm.weight": (d,),
        "attn_q.weight": (c.d_q, d),
        "attn_k.weight": (c.d_kv, d),
        "attn_v.weight": (c.d_kv, d),
        "attn_output.weight": (d, c.d_q),
        "ffn_norm.weight": (d,),
        "attn_q.bias": (c.d_q,),
        "attn_k.bias": (c.d_kv,),
        "attn_v.bias": (c.d_kv,),
        "attn_q_norm.weight": (c.head_dim,),
        "attn_k_norm.weight": (c.head_dim,),
        "ffn_gate.weight": (f, d),
        "ffn_up.weight": (f, d),
        "ffn_down.weight": (d, f),
    }
    found = {
        "token_embd.weight": shards.get("model.embed_tokens.weight", (c.n_vocab, d), dtype),
        "output_norm.weight": shards.get("model.norm.weight", (d,), dtype),
    }
    if "lm_head.weight" in shards:
        found["output.weight"] = shards.get("lm_head.weight", (c.n_vocab, d), dtype)
    names = dict(LAYER) | (BIASES if c.has_qkv_bias else {}) | (HEAD_NORMS if c.has_qk_norms else {})
    for i in range(c.n_layers):
        for ours, theirs in (names | ({} if experts else DENSE)).items():
            found[f"blk.{i}.{ours}"] = shards.get(f"model.layers.{i}.{theirs}", shapes[ours], dtype)
        if experts:
            layer = f"model.layers.{i}."
            found[f"blk.{i}.ffn_gate_inp.weight"] = shards.get(layer + _ROUTER[family], (experts.n, d), dtype)
            for part, pattern in _EXPERT[family].items():
                shape = (d, experts.d_ff) if part == "down" else (experts.d_ff, d)
                each = [shards.get(layer + pattern.format(e), shape, dtype) for e in range(experts.n)]
                found[f"blk.{i}.ffn_{part}_exps.weight"] = torch.stack(each)
    return found


class _Shards:
    """The safetensors files of a folder: which tensor lies where."""

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            places = _json(index).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
                raise WeightsError(f"{index}: expected weight_map, the file of each tensor")
            files = sorted(set(places.values()))
            if any(Path(name).name != name for name in files):
                raise WeightsError(f"{index}: expected names of files beside it")
        else:
            files = ["model.safetensors"]
        self._files: dict[str, Any] = {}
        self._place: dict[str, str] = {}
        for name in files:
            if not (folder / name).is_file():
                raise FileError(f"{folder / name}: no such file; is the folder complete?")
            try:
                opened: Any = safe_open(folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{folder / name}: {error}") from None
            self._files[name] = opened.__enter__()
            self._place |= dict.fromkeys(opened.keys(), name)
        self.identity = " ".join(f"{name} {(folder / name).stat().st_size} {_digest(folder / name)}" for name in files)

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if name not in self._place:
            raise WeightsError(f"{self.folder}: no tensor {name}")
        file = self._files[self._place[name]]
        found = tuple(file.get_slice(name).get_shape())
        if found != shape:
            raise WeightsError(f"{self.folder}: {name} is {list(found)}, config.json wants {list(shape)}")
        tensor: Tensor = file.get_tensor(name)
        if not tensor.is_floating_point():
            raise UnsupportedError(f"{self.folder}: {name} is {tensor.dtype}, expected floating point numbers")
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{self.folder}: {name} holds a number that is not finite")
        return tensor.to(dtype)

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.__exit__(None, None, None)


def _digest(path: Path) -> str:
    """Of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileError(f"{path}: no such file; expected a folder as Hugging Face writes it") from None
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: expected an object")
    return value


class _Facts:
    """Typed, bounded look-ups in config.json."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self.raw, self.path = raw, path

    def whole(self, key: str, limit: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST[limit]:
            raise WeightsError(f"{self.path}: {key}={str(value)[:40]}, expected a whole number 1..{MOST[limit]}")
        return value

    def real(self, source: Mapping[str, Any], key: str, default: float | None = None) -> float:
        value = source.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise WeightsError(f"{self.path}: {key}={str(value)[:40]}, expected a positive number")
        return float(value)

    @property
    def rope(self) -> Mapping[str, Any]:
        """What is said of the rotation: in `rope_parameters` by newer files, in two keys by older ones."""
        said = self.raw.get("rope_parameters") or self.raw.get("rope_scaling") or {}
        if not isinstance(said, dict):
            raise WeightsError(f"{self.path}: expected the parameters of the rotation as an object")
        return said

    @property
    def rope_kind(self) -> str:
        kind = str(self.rope.get("rope_type", self.rope.get("type", "default")))
        if kind not in ("default", "linear", "llama3"):
            raise UnsupportedError(f"{self.path}: rotation {kind[:40]!r}, this engine knows default, linear and llama3")
        return kind

    def config(self, family: str) -> ModelConfig:
        if self.raw.get("hidden_act", "silu") != "silu":
            raise UnsupportedError(f"{self.path}: hidden_act {str(self.raw['hidden_act'])[:40]!r}, expected silu")
        if self.raw.get("use_sliding_window") or (family == "mixtral" and self.raw.get("sliding_window")):
            raise UnsupportedError(f"{self.path}: attention in a sliding window is not served")
        d, heads = self.whole("hidden_size", "width"), self.whole("num_attention_heads", "heads")
        kv = self.whole("num_key_value_heads", "heads", heads)
        head_dim = self.whole("head_dim", "width", max(1, d // heads))
        if heads % kv or head_dim % 2:
            raise WeightsError(f"{self.path}: {heads} heads of {head_dim}, {kv} for keys: they do not fit together")
        biased = self.raw.get("attention_bias", False)
        if biased and family != "qwen2":
            raise UnsupportedError(f"{self.path}: attention_bias in a {family} model is not served")
        theta = self.rope.get("rope_theta", self.raw.get("rope_theta", 10_000.0))
        return ModelConfig(
            arch=FAMILIES[family],
            n_layers=self.whole("num_hidden_layers", "layers"),
            d_model=d,
            n_heads=heads,
            n_kv_heads=kv,
            head_dim=head_dim,
            d_ff=self.whole("intermediate_size", "width"),
            n_vocab=self.whole("vocab_size", "vocabulary"),
            n_ctx=self.whole("max_position_embeddings", "positions"),
            norm_eps=self.real(self.raw, "rms_norm_eps", 1e-6),
            rope_base=self.real({"rope_theta": theta}, "rope_theta"),
            rope_scale=1 / self.real(self.rope, "factor") if self.rope_kind == "linear" else 1.0,
        )

    def experts(self, family: str) -> Experts | None:
        if family == "mixtral":
            n = self.whole("num_local_experts", "experts")
            d_ff = self.whole("intermediate_size", "width")
            renormalise = True
        elif family == "qwen3_moe":
            # Files of transformers 5 name it as mixtral's do.
            n = self.whole("num_experts" if "num_experts" in self.raw else "num_local_experts", "experts")
            d_ff = self.whole("moe_intermediate_size", "width")
            renormalise = bool(self.raw.get("norm_topk_prob", False))
            if self.raw.get("mlp_only_layers") or self.raw.get("decoder_sparse_step", 1) != 1:
                raise UnsupportedError(f"{self.path}: a mixture in some layers only is not served")
        else:
            return None
        used = self.whole("num_experts_per_tok", "experts")
        if used > n:
            raise WeightsError(f"{self.path}: {used} experts a token of {n}")
        return Experts(n, used, d_ff, renormalise)

    def rope_factors(self, head_dim: int) -> Tensor | None:
        """f32 [hd/2] that divide the frequencies (Llama 3.1): long waves turn slower, short ones as before."""
        if self.rope_kind != "llama3":
            return None
        factor = self.real(self.rope, "factor")
        low, high = self.real(self.rope, "low_freq_factor"), self.real(self.rope, "high_freq_factor")
        trained = self.real(self.rope, "original_max_position_embeddings")
        theta = self.rope.get("rope_theta", self.raw.get("rope_theta", 10_000.0))
        frequency = float(theta) ** (-torch.arange(head_dim // 2, dtype=torch.float64) * 2 / head_dim)
        turns = trained * frequency / (2 * math.pi)  # of a wave within what the model was trained for
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 / (share + (1 - share) / factor)).float()
