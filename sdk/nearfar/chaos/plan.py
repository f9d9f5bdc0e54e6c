"""What the suite will ask and what will go wrong meanwhile: drawn from the seed, answer by answer, before it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from nearfar.chaos.schedule import Fault, Schedule
from nearfar.errors import UsageError


@dataclass(frozen=True, slots=True)
class Kind:
    """How often a fault is drawn beside the others, and how long it lasts (seconds, evenly from low to high).

    What costs seconds is rare: a half-open connection is found after 5 s of silence, a killed server loads its model.
    """

    weight: float
    seconds: tuple[float, float] = (0.0, 0.0)


FAULTS = {
    "reset": Kind(40),
    "cut": Kind(30),
    "stall": Kind(24, (0.01, 0.15)),
    "stop": Kind(3, (0.05, 0.4)),
    "blackout": Kind(1.2, (0.1, 0.5)),
    "evict": Kind(0.6),
    "device": Kind(0.6),
    "half-open": Kind(0.3),
    "kill": Kind(0.2, (0.0, 0.3)),
    "swap": Kind(0.1, (1.0, 3.0)),
}
MAX_CUT = 1024  # bytes that still go through: more than a message, less than an answer


@dataclass(frozen=True, slots=True)
class Task:
    """One answer: what is asked, and the faults, at so many of its tokens."""

    number: int
    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int
    faults: Schedule


@dataclass(frozen=True, slots=True)
class Plan:
    """What every answer of a run has in common.

    `temperature`: None takes turns between greedy and sampled answers.
    """

    seed: int
    kinds: tuple[str, ...] = tuple(FAULTS)
    every: int = 20  # one fault in so many tokens of an answer
    max_tokens: int = 128  # of an answer
    temperature: float | None = None

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in FAULTS]:
            raise UsageError(f"faults {unknown[0]!r}: expected some of {', '.join(FAULTS)}")
        if not self.kinds:
            raise UsageError("no kind of fault: expected at least one")

    def task(self, number: int, prompts: Sequence[Sequence[int]], room: int, name: str) -> Task:
        """The answer of that number.  `room`: positions of the context; `name`: of the codec, which draws anew."""
        draws = Random(f"{self.seed} {name} {number}")
        prompt = tuple(prompts[number % len(prompts)])
        n = min(self.max_tokens, room - len(prompt))
        temperature = (0.0, 0.8)[number % 2] if self.temperature is None else self.temperature
        seed = draws.getrandbits(32)
        return Task(number, prompt, n, temperature, seed, Schedule(self.seed, "token", self._faults(draws, n)))

    def _faults(self, draws: Random, n_tokens: int) -> tuple[Fault, ...]:
        """One in each stretch; the first stretches are the ones that every answer has."""
        weights = [FAULTS[kind].weight for kind in self.kinds]
        found = []
        for first in range(0, n_tokens, self.every):
            kind = draws.choices(self.kinds, weights)[0]
            seconds = round(draws.uniform(*FAULTS[kind].seconds), 3)
            way, n_bytes = draws.choice(("up", "down")), draws.randrange(MAX_CUT)
            is_cut = kind == "cut"
            at = float(first + draws.randrange(self.every))
            found.append(Fault(at, kind, seconds, way if is_cut else "up", n_bytes if is_cut else 0))
        return tuple(found)
