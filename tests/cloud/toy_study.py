"""A study of a model that trains in milliseconds: what the tests of the runner run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from nearfar_cloud.training.recipe import DEVICE_FIRST, Recipe, Shape
from nearfar_cloud.training.studies.course import Course, batches, train_once, trainer_of
from nearfar_cloud.training.studies.study import Arm, Figures, Job, Report, Study

RECIPE = Recipe(
    "toy",
    Shape(512, 32, 2, 2, 1, 64, 128, exits=(1,)),
    seq_len=128,
    micro_rows=4,
    batch_tokens=(512, 512),
    shares=DEVICE_FIRST,
)


def arms(recipe: Recipe) -> list[Arm]:
    return [
        Arm("start", recipe, parent=True, once=True),
        Arm("plain", recipe),
        Arm("slow", replace(recipe, peak_lr=1e-4)),
        Arm("from start", recipe, needs=("start",), cost=2.0),
    ]


def train(job: Job) -> Figures:
    print("training", job.title, flush=True)
    if job.arm.options.get("dies"):
        os._exit(9)
    if job.arm.options.get("fails"):
        raise ValueError("a matrix of the wrong shape")
    if job.arm.name == "start":
        trainer, figures = train_once(job)
        (job.folder / "weights.txt").write_text(str(float(trainer.model.embedding.sum())))
        return figures
    if job.arm.needs:
        assert (job.parents["start"] / "weights.txt").is_file()
    rows, course = batches(job, job.recipe), Course(job)
    trainer = trainer_of(job, job.recipe, rows, job.tokens)
    course.follow(trainer, looks=2)
    return course.figures(trainer.model) | {"rows_sha256": rows.digest.hexdigest()}


def finding(report: Report) -> dict[str, Any]:
    return {"best": min(report["arms"], key=lambda name: report["arms"][name]["mean"]["loss"])}


def plot(report: Report, path: Path) -> None:
    from nearfar_cloud.training.studies import plots

    figure, (left, right) = plots.canvas(2)
    plots.curves(left, report["arms"], list(report["arms"]))
    plots.bars(right, report["arms"], "loss", "held-out loss")
    plots.save(figure, path)


STUDY = Study("toy", "does the runner run?", RECIPE, arms, train, finding, plot)
