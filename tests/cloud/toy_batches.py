"""Batches without a data folder: short made-up documents, packed, a pure function of seed and number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar_cloud.training.mix import LONG_RUN, NO_TARGET
from nearfar_cloud.training.recipe import Recipe, Shape

TINY = Shape(n_vocab=64, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=64, n_ctx=64, exits=(1, 2))


def tiny_recipe(**changes: Any) -> Recipe:
    """A model that trains in milliseconds."""
    settings = {"seq_len": 32, "micro_rows": 4, "batch_tokens": (128, 256), "precision": "fp32", "shares": LONG_RUN}
    return Recipe("tiny", **{"shape": TINY, **settings, **changes})


@dataclass
class ToyBatch:
    ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    weights: NDArray[np.float32]
    pos: NDArray[np.int64]
    doc: NDArray[np.int64]


class ToyBatches:
    """Each document counts upwards from a random number; `always` gives the same batch again and again."""

    def __init__(self, recipe: Recipe, *, seed: int = 0, always: bool = False, data_sha256: str = "toy") -> None:
        self.recipe, self.seed, self.always, self.data_sha256, self.n = recipe, seed, always, data_sha256, 0

    def next_batch(self, n_sequences: int, phase: str, width: int) -> ToyBatch:
        rng = np.random.default_rng([self.seed, 0 if self.always else self.n])
        self.n += 1
        shape = (n_sequences, width)
        ids, targets = np.zeros(shape, np.int64), np.full(shape, NO_TARGET, np.int64)
        pos, doc = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for b in range(n_sequences):
            at = d = 0
            while at < width:
                n = min(int(rng.integers(4, 12)), width - at)
                ids[b, at : at + n] = (rng.integers(64) + np.arange(n)) % 64
                targets[b, at : at + n - 1] = ids[b, at + 1 : at + n]
                pos[b, at : at + n], doc[b, at : at + n] = np.arange(n), d
                at, d = at + n, d + 1
        return ToyBatch(ids, targets, (targets >= 0).astype(np.float32), pos, doc)

    def state(self) -> dict[str, Any]:
        return {"n": self.n}

    def restore(self, state: dict[str, Any]) -> None:
        self.n = state["n"]
