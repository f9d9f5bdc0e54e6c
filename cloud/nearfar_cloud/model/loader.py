"""A model's tensors, from a GGUF file: checked against the header, turned into one dtype."""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from nearfar.config import ModelConfig
from nearfar.errors import UsageError
from nearfar.weights import Weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Experts:
    """Sizes of a mixture: experts in a layer, how many a row takes, their inner width."""

    n: int
    n_used: int
    d_ff: int
    renormalise: bool  # whether the weights of those taken are divided by their sum


@dataclass(frozen=True)
class Loaded:
    """Tensors by GGUF name in `dtype` (vectors too), and what tells this model from all others."""

    config: ModelConfig
    tensors: dict[str, Tensor]
    dtype: torch.dtype
    rope_pairs: str  # "adjacent" or "halves": which numbers of a head rotate together
    fingerprint: str
    experts: Experts | None = None

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of keys and values."""
        return torch.float32 if self.dtype == torch.float32 else torch.float16


def open_gguf(path: str | os.PathLike[str]) -> Weights:
    """A file with the layers up to the head.  Raises what `load_gguf` raises."""
    weights = Weights.open(path)
    if weights.config.role == "device":
        raise UsageError(
            f"{path} is the device half of a split model, layers [0, {weights.config.split_layer}): serve the upper "
            "half, or the whole model"
        )
    return weights


def load_gguf(path: str | os.PathLike[str], dtype: str = "fp32") -> Loaded:
    """A whole model or an upper half.

    Raises what Weights.open raises (FileError, GGUFError, WeightsError, UnsupportedError), UsageError for a device's.
    """
    with open_gguf(path) as weights:
        digest = sha256(dtype.encode())
        tensors = {}
        for name, info in weights.file.tensors.items():
            if name.startswith("exit."):  # a device's business
                continue
            raw = weights.file.raw(name)
            digest.update(f"{name} {info.type} {info.shape}".encode())
            digest.update(raw.tobytes())
            tensors[name] = torch.from_numpy(weights.f32(name)).to(DTYPES[dtype])
        for name in [name for name in tensors if name.endswith(".scale")]:  # BitNet's one scale a matrix
            scale = tensors.pop(name)
            tensors[f"{name.removesuffix('.scale')}.weight"] *= scale
        return Loaded(weights.config, tensors, DTYPES[dtype], weights.config.rope_pairs, digest.hexdigest())
