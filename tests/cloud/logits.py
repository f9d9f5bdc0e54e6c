"""The logits of every head, by torch and by the engine that opens the exported file: parity tests compare them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from nearfar.lower import open_lower
from nearfar.weights import Weights
from nearfar_cloud.training.model import Decoder


def torch_logits(model: Decoder, ids: np.ndarray, *, q8: bool = True) -> dict[str, np.ndarray]:
    """ids i32 [T] -> head -> f32 [T, V]"""
    batch = torch.from_numpy(ids.astype(np.int64))[None]
    with torch.no_grad():
        head = model.head(q8_embedding=q8)
        final, exits = model(batch, torch.arange(len(ids))[None], torch.zeros_like(batch), head)
        rows = {"final": final, **{f"exit.{e}": h for e, h in exits.items()}}
        return {name: (h @ head.mT)[0].numpy() for name, h in rows.items()}


def engine_logits(path: Path, ids: np.ndarray, backend: str) -> dict[str, np.ndarray]:
    """ids i32 [T] -> head -> f32 [T, V]"""
    lower = open_lower(Weights.open(path), backend)
    out = {}
    for name, layers in (("final", lower.config.n_layers), *((f"exit.{e.layer}", e.layer) for e in lower.config.exits)):
        kv = lower.new_kv(len(ids), "f32")
        out[name] = lower.logits(lower.forward(lower.embed(ids), kv, 0, layers), name)
    return out
