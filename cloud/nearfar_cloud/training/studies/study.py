"""What a study is: arms trained on equally many tokens, and what is asked of their figures.  Read by runner.py.

A study is a module of this package with a `STUDY`; `studies.STUDIES` names it.  To add one, write

    def arms(recipe: Recipe) -> list[Arm]:          recipe is STUDY.recipe, its vocabulary that of the tokenizer
    def train(job: Job) -> Figures:                 one run of one arm, in a single-thread process of its own
    def finding(report: Report) -> dict[str, Any]:  the numbers that one wants to quote
    def plot(report: Report, path: Path) -> None:   the PNG
    STUDY = Study("name", "what it asks", recipe, arms, train, finding, plot)

`train` gets all it needs from its job (course.py has the usual loop over `Trainer`) and returns JSON.  Numbers at its
top level ("loss", "exact", ...) get a mean and a spread over the seeds; "loss" and "exact" must be there.  What later
arms need (a checkpoint) it leaves in `job.folder`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

from nearfar.errors import NearfarError
from nearfar_cloud.training.recipe import Recipe

Figures: TypeAlias = dict[str, Any]  # of one run: "loss", "exact", other numbers, "curve" and whatever the plot needs
Report: TypeAlias = dict[str, Any]  # study_NAME.json: runner.report_of says what it holds


@dataclass(frozen=True)
class Arm:
    """One training, repeated for every seed."""

    name: str
    recipe: Recipe
    options: Mapping[str, Any] = field(default_factory=dict)  # JSON for the study's `train`
    needs: tuple[str, ...] = ()  # arms that must be finished, of the same seed or trained once
    parent: bool = False  # trained for the arms that need it; stands under "parents" of the report
    once: bool = False  # with the first seed alone
    cost: float = (
        1.0  # its time, in that of STUDY.recipe on the tokens of one arm: a guess that the budget is shared by
    )


@dataclass(frozen=True)
class Lab:
    """Where a study is run, and what is common to all its arms."""

    data: Path
    out: Path
    tokenizer: Path
    held_out: Path  # rows, the same for all arms and seeds (held_out.py)
    data_sha256: str
    precision: str = "fp32"
    compiled: bool = False


@dataclass(frozen=True)
class Job:
    """One run of one arm."""

    study: str  # the module whose STUDY trains it
    arm: Arm
    seed: int
    tokens: int  # of every arm: the study's `train` shares them out where an arm has several parts
    lab: Lab
    folder: Path  # of this run alone
    parents: Mapping[str, Path]  # name -> the folder of each arm in `arm.needs`
    key: str

    @property
    def recipe(self) -> Recipe:
        """The arm's recipe with the seed of this run."""
        return replace(self.arm.recipe, seed=self.seed)

    @property
    def title(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"

    @property
    def result(self) -> Path:
        return self.folder / "figures.json"

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def figures(self) -> Figures | None:
        """Those of a run that is finished."""
        if not self.result.is_file():
            return None
        found: Figures = json.loads(self.result.read_text(encoding="utf-8"))
        return found


@dataclass(frozen=True)
class Study:
    """See above."""

    name: str
    question: str
    recipe: Recipe
    arms: Callable[[Recipe], list[Arm]]
    train: Callable[[Job], Figures]
    finding: Callable[[Report], dict[str, Any]]
    plot: Callable[[Report, Path], None]


class ArmFailed(NearfarError):
    """A run of an arm did not end; the message names it and has its last lines."""


def fingerprint(arm: Arm, seed: int, tokens: int, lab: Lab, parents: Mapping[str, str]) -> str:
    """Hex of all that decides what the run of an arm finds: figures under the same one need no second run.

    `parents`: name -> fingerprint of each arm it needs.  Code is not part of it.
    """
    facts = {
        "arm": asdict(arm) | {"cost": None},
        "seed": seed,
        "tokens": tokens,
        "data": lab.data_sha256,
        "tokenizer": sha256(lab.tokenizer.read_bytes()).hexdigest(),
        "precision": lab.precision,
        "compiled": lab.compiled,
        "parents": dict(parents),
    }
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
