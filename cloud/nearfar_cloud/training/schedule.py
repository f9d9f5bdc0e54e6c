"""What changes in the course of a run: rate, batch size, phase.  Functions of `progress` 0..1, used by trainer.py.

Warm up, stay stable, decay (WSD, MiniCPM, arXiv 2404.06395):

    lr     /------------------\\
          /                    \\__
    0   warmup            decay_from  1

The other schedule is half a cosine wave from the warm-up to the end.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from nearfar.errors import UsageError
from nearfar_cloud.training.recipe import Recipe

Phase = Literal["stable", "decay"]
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True, slots=True)
class Budget:
    """How long a run is: seconds of training (wall time inside steps), or tokens (such a run repeats bit for bit)."""

    seconds: float | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        given = [x for x in (self.seconds, self.tokens) if x is not None]
        if len(given) != 1 or given[0] <= 0:
            raise UsageError("a run has either a budget of time or a number of tokens, above zero")

    def progress(self, seconds: float, tokens: int) -> float:
        """0..1: how much of the run lies behind."""
        share = tokens / self.tokens if self.tokens else seconds / (self.seconds or 1)
        return min(share, 1.0)


def parse_seconds(text: str) -> float:
    """ "90", "45s", "30m", "1.5h" -> seconds.  Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if not match:
        raise UsageError(f"{text!r}: expected a time such as 90s, 30m or 2h")
    return float(match[1]) * _UNITS[match[2]]


def phase(progress: float, recipe: Recipe) -> Phase:
    """The phase at `progress`, the share of the budget that is used (0..1)."""
    return "decay" if progress >= recipe.decay_from else "stable"


def learning_rate(progress: float, recipe: Recipe) -> float:
    """Linear up to the peak, flat, linear down to `final_lr` of it; or along a cosine from the peak to there."""
    if progress < recipe.warmup:
        return recipe.peak_lr * max(progress / recipe.warmup, 0.01)
    if recipe.schedule == "cosine":
        fall = (1 - math.cos(math.pi * (progress - recipe.warmup) / (1 - recipe.warmup))) / 2
    else:
        fall = max(0.0, progress - recipe.decay_from) / (1 - recipe.decay_from)
    return recipe.peak_lr * (1 - (1 - recipe.final_lr) * fall)


def micro_batches(progress: float, recipe: Recipe) -> int:
    """Forward passes of one step: the batch grows geometrically until the decay begins, then stays."""
    first, last = recipe.batch_tokens
    share = min(progress / recipe.decay_from, 1.0)
    tokens = float(first * (last / first) ** share)
    return max(1, round(tokens / recipe.micro_tokens))
