"""Workloads from a seed: Gamma intervals, Zipf lengths, and one long prompt among running answers.

BurstGPT (arXiv 2401.17644) found that real arrivals follow a Gamma distribution whose coefficient of variation is well
above the 1 of Poisson, and that lengths are Zipf-like.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nearfar.errors import UsageError
from nearfar_cloud.planning.workload import F64, I64, MOST_TOKENS, Workload


@dataclass(frozen=True, slots=True)
class Zipf:
    """Lengths k in least..most with probability proportional to k ** -exponent."""

    least: int
    most: int
    exponent: float = 1.1  # that of BurstGPT's generator

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most <= MOST_TOKENS or not 0 <= self.exponent <= 10:
            raise UsageError(
                f"lengths {self.least}..{self.most}, exponent {self.exponent}: expected 1 <= least <= most"
            )

    def probabilities(self) -> F64:
        """[most - least + 1]"""
        p = np.arange(self.least, self.most + 1, dtype=np.float64) ** -self.exponent
        return np.asarray(p / p.sum())

    @property
    def mean(self) -> float:
        return float(np.arange(self.least, self.most + 1) @ self.probabilities())

    def draw(self, n: int, rng: np.random.Generator) -> I64:
        """[n]"""
        return self.least + rng.choice(self.most - self.least + 1, n, p=self.probabilities()).astype(np.int64)


def generate(n: int, *, rate: float, cv: float, prompt: Zipf, output: Zipf, seed: int = 0) -> Workload:
    """`n` requests, `rate` a second on average, intervals from a Gamma distribution with coefficient of variation `cv`.

    By moments: shape 1 / cv^2, scale cv^2 / rate.  cv 1 is Poisson, 0 a metronome.
    """
    if n < 1 or not 0 < rate < float("inf") or not 0 <= cv <= 100:
        raise UsageError(f"n={n}, rate={rate}, cv={cv}: expected at least one request, a positive rate, cv 0..100")
    rng = np.random.default_rng(seed)
    gaps = rng.gamma(cv**-2, cv**2 / rate, n - 1) if cv else np.full(n - 1, 1 / rate)
    arrival = np.concatenate(([0.0], np.cumsum(gaps)))
    return Workload(f"gamma-cv{cv:g}-seed{seed}", arrival, prompt.draw(n, rng), output.draw(n, rng))


def injection(at_s: float, n_running: int = 16, n_prompt: int = 64, n_output: int = 256, long: int = 2048) -> Workload:
    """`n_running` answers are being written when, after `at_s` seconds, a prompt of `long` tokens arrives."""
    arrival = np.zeros(n_running + 1)
    arrival[-1] = at_s
    prompts, outputs = np.full(n_running + 1, n_prompt), np.full(n_running + 1, n_output)
    prompts[-1], outputs[-1] = long, 1
    return Workload(f"injection-{long}", arrival, prompts.astype(np.int64), outputs.astype(np.int64))
