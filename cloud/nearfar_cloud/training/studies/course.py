"""One training inside a study: the mix of its seed, steps to the end of the budget, held-out figures on the way.

mix -> Counted -> Trainer -> [step ... step, look] ... -> figures          (what most studies' `train` does)
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256
from typing import Any

from nearfar_cloud.training.dev import DevRows
from nearfar_cloud.training.mix import Mix
from nearfar_cloud.training.model import Decoder
from nearfar_cloud.training.recipe import RECIPES, Recipe
from nearfar_cloud.training.schedule import Budget, Phase
from nearfar_cloud.training.studies import held_out
from nearfar_cloud.training.studies.study import Figures, Job
from nearfar_cloud.training.tokenizer import RowTokenizer
from nearfar_cloud.training.trainer import DTYPES, Batch, Report, Trainer

# Batches of one size: the course of the rate is the question, not that of the batch.
RECIPE = replace(RECIPES["pico"], batch_tokens=(2048, 2048), prompt_weights=(0.2, 0.1))
LOOKS = 6  # measurements on the way
LOOK_SEQUENCES = 48  # packed held-out rows of a measurement on the way; the last one has them all


class Counted:
    """A mix that keeps a digest of what it gave, so that arms can show that they saw the same rows.

    `phase` holds it in one phase whatever the trainer asks for: rows then do not depend on the schedule.
    """

    def __init__(self, mix: Mix, phase: Phase | None = None) -> None:
        self.mix, self.phase, self.digest = mix, phase, sha256()
        self.data_sha256 = mix.data_sha256

    def next_batch(self, n_sequences: int, phase: Phase, width: int) -> Batch:
        batch = self.mix.next_batch(n_sequences, self.phase or phase, width)
        self.digest.update(batch.ids.tobytes())
        return batch

    def state(self) -> dict[str, Any]:
        return self.mix.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.mix.restore(state)


def batches(job: Job, recipe: Recipe, phase: Phase | None = None) -> Counted:
    """The rows of the run's seed from their beginning, shared out as the recipe says."""
    mix = Mix(
        job.lab.data,
        RowTokenizer.load(job.lab.tokenizer),
        seq_len=recipe.seq_len,
        short_len=recipe.short[1] if recipe.short else None,
        seed=job.seed,
        shares=recipe.shares,
        cache=job.lab.out / "cache",
        prompt_weights=recipe.prompt_weights,
    )
    return Counted(mix, phase)


class Course:
    """What is found along one run, which may have several trainings one after the other."""

    def __init__(self, job: Job, rows: dict[str, DevRows] | None = None) -> None:
        """`rows` are looked at instead of those of the study."""
        self.rows = rows or held_out.load(job.lab.held_out)
        self.few = held_out.part(self.rows, LOOK_SEQUENCES)
        self.dtype = DTYPES[job.lab.precision]
        self.curve: list[tuple[int, float]] = []  # tokens of the run, held-out loss
        self.steps: list[Report] = []
        self.tokens, self.seconds = 0, 0.0

    def follow(self, trainer: Trainer, looks: int = LOOKS) -> None:
        """Train to the end of the trainer's budget and look at the held-out rows `looks` times on the way."""
        begun, tokens, seconds = trainer.progress, trainer.tokens, trainer.seconds
        ahead = [begun + (1 - begun) * (i + 1) / (looks + 1) for i in range(looks)]
        before = self.tokens
        while trainer.progress < 1:
            self.steps.append(trainer.step())
            self.tokens = before + trainer.tokens - tokens
            if ahead and ahead[0] <= trainer.progress < 1:
                ahead = [at for at in ahead if at > trainer.progress]
                self.curve.append((self.tokens, self.look(trainer.model)))
        self.seconds += trainer.seconds - seconds

    def look(self, model: Decoder) -> float:
        """Held-out loss on a part of the rows, nats a token of the answer."""
        return held_out.overall(held_out.measure(model, self.few, self.dtype))["loss"]

    def figures(self, model: Decoder) -> Figures:
        """At the end of the run: what every study reports."""
        sources = held_out.measure(model, self.rows, self.dtype)
        found: Figures = held_out.overall(sources)
        self.curve.append((self.tokens, self.look(model)))
        more = {"tokens": self.tokens, "train_s": round(self.seconds, 2), "curve": self.curve, "sources": sources}
        return found | more


def train_once(job: Job, phase: Phase | None = None) -> tuple[Trainer, Figures]:
    """The plain case: the arm's recipe on the tokens of an arm."""
    recipe = job.recipe
    rows = batches(job, recipe, phase)
    trainer = trainer_of(job, recipe, rows, job.tokens)
    course = Course(job)
    course.follow(trainer)
    return trainer, course.figures(trainer.model) | {"rows_sha256": rows.digest.hexdigest()}


def trainer_of(job: Job, recipe: Recipe, rows: Counted, tokens: int, **more: Any) -> Trainer:
    """A trainer in the precision of the study."""
    return Trainer(recipe, rows, Budget(tokens=tokens), precision=job.lab.precision, compiled=job.lab.compiled, **more)
