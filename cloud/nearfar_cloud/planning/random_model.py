"""A model of sizes alone: its steps take as long as those of a trained one, its tokens mean nothing."""

from __future__ import annotations

from hashlib import sha256

import torch

from nearfar.config import ModelConfig
from nearfar.weights import layer_tensors
from nearfar_cloud.model.loader import DTYPES, Loaded


def random_model(config: ModelConfig, dtype: str = "bf16", seed: int = 0) -> Loaded:
    """Matrices of deviation 1 / sqrt(columns), gains of 1, biases of 0; the head is not tied to the embedding."""
    shapes = {"token_embd.weight": (config.n_vocab, config.d_model), "output.weight": (config.n_vocab, config.d_model)}
    shapes |= {"output_norm.weight": (config.d_model,)}  # type: ignore[dict-item]
    for i in range(config.n_layers):
        shapes |= layer_tensors(config, i)  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=rng, dtype=DTYPES[dtype]) * shape[1] ** -0.5
        if len(shape) == 2
        else torch.full(shape, 0.0 if name.endswith(".bias") else 1.0, dtype=DTYPES[dtype])
        for name, shape in shapes.items()
    }
    digest = sha256(f"random {config} {dtype} {seed}".encode()).hexdigest()
    return Loaded(config, tensors, DTYPES[dtype], config.rope_pairs, digest)
