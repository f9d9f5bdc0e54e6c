"""Which widths a step trains: one assignment, drawn.  Pure functions of a random generator; used by trainer.py.

Drawing every matrix's width for itself makes mean widths crowd around the middle (the central limit): both ends of the
budget are hardly ever trained (LLM-QFA, 2405.20202, section 3.3).  `balanced` draws the mean first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from nearfar.master import EMBEDDING_WIDTHS, WIDTHS, Matrix, bits

Draw = Callable[[np.random.Generator, Sequence[Matrix]], str]

LETTERS = "".join(WIDTHS)
BITS = np.array([bits(width) for width in LETTERS])  # rising
STEEPEST = 60.0  # of the tilt: beyond it, all but one width have a chance below 1e-20


def mean_bits(assignment: str, of: Sequence[Matrix]) -> float:
    """Bits a weight, over the matrices without the embedding."""
    sizes = np.array([math.prod(m.shape) for m in of[1:]])
    return float(np.array([bits(width) for width in assignment[1:]]) @ sizes / sizes.sum())


def uniform(rng: np.random.Generator, of: Sequence[Matrix]) -> str:
    """Each matrix its own width, all widths alike."""
    return _embedding(rng) + "".join(rng.choice(list(LETTERS), len(of) - 1))


def balanced(rng: np.random.Generator, of: Sequence[Matrix]) -> str:
    """The mean width uniform between the narrowest and the widest, then an assignment that has about this mean.

    Widths are drawn with chances ~ exp(tilt * bits), the tilt such that the mean is expected; then matrices in random
    order are moved to another width where that brings the mean nearer.
    """
    sizes = np.array([math.prod(m.shape) for m in of[1:]], np.float64)
    share = sizes / sizes.sum()
    target = rng.uniform(BITS[0], BITS[-1])
    drawn = rng.choice(len(LETTERS), len(share), p=_tilted(target))
    for i in rng.permutation(len(share)):
        rest = float(share @ BITS[drawn]) - share[i] * BITS[drawn[i]]
        miss = np.abs(rest + share[i] * BITS - target)
        if miss.min() < miss[drawn[i]]:
            drawn[i] = int(miss.argmin())
    return _embedding(rng) + "".join(LETTERS[i] for i in drawn)


def always(assignment: str) -> Draw:
    """One assignment every time: a model trained for one budget alone."""
    return lambda rng, of: assignment


def _embedding(rng: np.random.Generator) -> str:
    return str(rng.choice(list(EMBEDDING_WIDTHS)))


def _tilted(target: float) -> np.ndarray:
    """Chances of the widths, ~ exp(tilt * bits), whose mean is `target`."""
    low, high = -STEEPEST, STEEPEST
    for _ in range(60):
        tilt = (low + high) / 2
        weight = np.exp(tilt * (BITS - (BITS[-1] if tilt > 0 else BITS[0])))
        chances = weight / weight.sum()
        if chances @ BITS < target:
            low = tilt
        else:
            high = tilt
    return np.asarray(chances)


DRAWS: dict[str, Draw] = {"balanced": balanced, "uniform": uniform}
