"""When is a token sure enough to stop below full depth?  Pure functions of logits and calibration.

An exit's confidence is the largest softmax probability after temperature scaling (1706.04599), mapped to the
measured agreement with full depth by an isotonic table.  The threshold comes from Learn-then-Test (2110.01052) on
the exact file; see `nearfar.eval.calibrate`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from nearfar.config import ExitConfig

DRAFT = 0.88  # with the layers above it an exit's draft takes twice as long here, and holds more often
MAX_DEBT = 32  # rows that may wait for the layers above an exit; bounds the work of the token that catches up


def max_softmax(logits: NDArray[np.float32], temperature: float = 1.0) -> float:
    """logits [V] -> the largest probability, in (0, 1]."""
    z = (logits - logits.max()) / np.float32(temperature)
    return float(1.0 / np.exp(z).sum())


def confidence(logits: NDArray[np.float32], exit_config: ExitConfig) -> float:
    """logits [V] of an exit head -> estimated probability that full depth takes the same token."""
    raw = max_softmax(logits, exit_config.temperature)
    if not exit_config.isotonic_x:
        return raw
    return float(np.interp(raw, exit_config.isotonic_x, exit_config.isotonic_y))


def decayed(tau: float, t: int, n: int, decay: float) -> float:
    """The threshold of token `t` (0 is the first) of an answer of `n` at most: stricter early, where errors cost most.

    CALM's decaying threshold (2207.07061), Phi(tau, t) = clip(0.9 tau + 0.1 exp(-decay t / n)), but never below `tau`,
    for which alone something was promised; so 1 stays 1.
    """
    return max(tau, min(1.0, 0.9 * tau + 0.1 * math.exp(-decay * t / n)))


def draft_tau(e: ExitConfig) -> float:
    """The threshold for a draft that somebody will check: a wrong one costs a reply, not the answer.

    So it may be looser than the calibrated one, if the confidence is a measured probability (that of the likeliest
    token, so of greedy drafts).  DRAFT: bench/collab_acceptance.py.
    """
    return min(e.tau, DRAFT) if e.isotonic_x else e.tau


def should_exit(conf: float, tau: float, debt: int, max_debt: int = MAX_DEBT) -> bool:
    """`debt` counts the rows that would wait if this token stopped here.

    `conf > tau`, not `>=`: a softmax in floats saturates to exactly 1.0, and tau = 1 must mean "never".
    """
    return tau < 1 and conf > tau and debt <= max_debt
