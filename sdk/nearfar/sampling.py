"""From logits to one token id.  `sample` is a function: the same logits, seed and position give the same token.

Randomness is Gumbel noise from a counter-based generator (Philox, Salmon et al. 2011) keyed by seed and position,
so a rerun, a fork or another machine draws the same noise: argmax(z / T + g) is a draw from softmax(z / T).
The order of the filters is llama.cpp's: penalty, top-k, top-p, min-p, temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import UsageError

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose among the logits.  The defaults are greedy."""

    temperature: float = 0.0  # 0: the largest logit
    top_k: int = 0  # keep the k largest; 0: all
    top_p: float = 1.0  # keep the smallest set with this much probability
    min_p: float = 0.0  # keep what has at least this share of the largest probability
    repetition_penalty: float = 1.0  # logits of recent tokens: divided by it if positive, else multiplied (1909.05858)
    repetition_window: int = 64  # how many recent tokens
    seed: int = 0

    def __post_init__(self) -> None:
        def need(ok: bool, what: str) -> None:
            if not ok:
                raise UsageError(f"sampling: {what}")

        need(
            math.isfinite(self.temperature) and self.temperature >= 0, f"temperature={self.temperature}: expected 0 up"
        )
        need(self.top_k >= 0, f"top_k={self.top_k}: expected 0 (all) or more")
        need(0 < self.top_p <= 1, f"top_p={self.top_p}: expected above 0, up to 1")
        need(0 <= self.min_p <= 1, f"min_p={self.min_p}: expected 0..1")
        need(
            math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0,
            f"repetition_penalty={self.repetition_penalty}: expected above 0",
        )
        need(self.repetition_window >= 0, f"repetition_window={self.repetition_window}: expected 0 or more")
        need(0 <= self.seed < 1 << 64, f"seed={self.seed}: expected 0..2^64-1")


def sample(logits: Array, sampling: Sampling, position: int, recent: Sequence[int] = ()) -> int:
    """logits [V] -> token id.  `position` is that of the new token; `recent` are the ids before it, oldest first."""
    z = penalize(logits, sampling, recent)
    if sampling.temperature == 0:
        return int(z.argmax())
    z = keep_min_p(keep_top_p(keep_top_k(z, sampling.top_k), sampling.top_p), sampling.min_p)
    return int((z / np.float32(sampling.temperature) + gumbel(sampling.seed, position, len(z))).argmax())


def penalize(z: Array, sampling: Sampling, recent: Sequence[int]) -> Array:
    """Push down the tokens of the last `repetition_window` positions."""
    if sampling.repetition_penalty == 1 or not sampling.repetition_window or not recent:
        return z
    ids = np.unique(np.asarray(recent[-sampling.repetition_window :], np.int64))
    penalty = np.float32(sampling.repetition_penalty)
    z = z.copy()
    z[ids] = np.where(z[ids] > 0, z[ids] / penalty, z[ids] * penalty)
    return z


def keep_top_k(z: Array, k: int) -> Array:
    """All but the k largest become -inf (ties at the edge stay)."""
    if not 0 < k < len(z):
        return z
    edge = np.partition(z, len(z) - k)[len(z) - k]
    return np.where(z >= edge, z, np.float32(-np.inf))


def keep_top_p(z: Array, p: float) -> Array:
    """Keep the smallest set of tokens whose probabilities reach p (nucleus sampling, 1904.09751)."""
    if p >= 1:
        return z
    order = np.argsort(-z, kind="stable")
    probability = np.exp(z[order] - z[order[0]])
    before = np.cumsum(probability) - probability  # mass of the tokens ahead
    out = np.full_like(z, -np.inf)
    kept = order[before < p * probability.sum()]
    out[kept] = z[kept]
    return out


def keep_min_p(z: Array, p: float) -> Array:
    """Keep tokens with at least `p` times the largest probability (2407.01082)."""
    return z if p <= 0 else np.where(z >= z.max() + np.float32(math.log(p)), z, np.float32(-np.inf))


def gumbel(seed: int, position: int, n: int) -> Array:
    """Standard Gumbel noise, f32 [n]."""
    bits = np.random.Philox(key=seed, counter=[0, 0, 0, position])
    u = np.random.Generator(bits).random(n, np.float32)  # [0, 1)
    return -np.log(-np.log(np.clip(u, np.float32(1e-12), np.float32(1 - 2**-24)))).astype(np.float32)
