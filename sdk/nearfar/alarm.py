"""Do sure tokens still hold as often as calibration promised?  A test that may look after every answer.

The loss of an answer is that of `nearfar calibrate`: the share of its tokens that an exit was sure of and that are not
the upper side's.  Its mean was to be `delta` at most.  Somebody who begins with 1 and bets on more has after losses
x_1..x_n of 0..1

    W_n(b) = (1 + b (x_1 - delta)) ... (1 + b (x_n - delta)),      0 <= b <= 1 / delta

and as long as the promise holds this is a supermartingale: it ever reaches 1 / rate with probability `rate` at most
(Ville's inequality; Waudby-Smith and Ramdas, 2010.09686; 2110.06177 for models in use).  So does the mean of several
who bet differently, as nobody knows beforehand how large a loss to bet on.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from nearfar.errors import WeightsError

RATE = 0.01  # chance of an alarm, ever, while the promise holds
STAKES = (0.01, 0.03, 0.1, 0.3)  # b * delta: the share of the wealth that an answer without loss takes


@dataclass(slots=True)
class Alarm:
    """What the answers of one LLM have shown of its thresholds."""

    delta: float
    n_answers: int = 0
    sure: int = 0  # tokens that an exit was sure of and the upper side has decided too
    sure_wrong: int = 0  # ... otherwise
    is_raised: bool = False
    _wealth: list[float] = field(default_factory=lambda: [1.0] * len(STAKES))

    def __post_init__(self) -> None:
        if not 0 < self.delta < 1:
            raise WeightsError(f"nearfar.calibration.delta={self.delta}: expected a number between 0 and 1")

    @property
    def disagreement(self) -> float:
        """The share of the sure tokens that did not hold; 0 before there are any."""
        return self.sure_wrong / self.sure if self.sure else 0.0

    def saw(self, checked: int, sure: int, sure_wrong: int, delta: float | None = None) -> bool:
        """An answer of which `checked` tokens were decided on both sides; True when the alarm is raised: once.

        `delta`: what was promised for this answer, where that is something else.
        """
        if not checked:
            return False
        self.n_answers, self.sure, self.sure_wrong = self.n_answers + 1, self.sure + sure, self.sure_wrong + sure_wrong
        loss = sure_wrong / checked
        self._wealth = [
            w * (1 + c * (loss / (delta or self.delta) - 1)) for w, c in zip(self._wealth, STAKES, strict=True)
        ]
        if self.is_raised or sum(self._wealth) < len(STAKES) / RATE:
            return False
        self.is_raised = True
        return True


def is_audited(seed: int, position: int, share: float) -> bool:
    """Whether the token at `position` belongs to the `share` that is checked; the same each time, and no matter when.

    A word of the counter that noise leaves at 0 (sampling.py) keeps the two apart.
    """
    if share <= 0:
        return False
    draw = int(np.random.Philox(key=seed, counter=[0, 0, 1, position]).random_raw())
    return draw < share * 2.0**64
