"""The capacity gap (arXiv 2311.07052): how much larger than its student is the best teacher?

The paper finds about 2.5 times, over many scales.  Here: a ternary student; float teachers of about 1, 1.8, 2.7 and 5.4
times its weights in matrices, each trained once on the rows of the first seed; the student with cross entropy alone and
with half of it replaced by the divergence from each teacher, on equal tokens.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from nearfar_cloud.training.checkpoint import read, write
from nearfar_cloud.training.model import Decoder
from nearfar_cloud.training.parent import model_of
from nearfar_cloud.training.recipe import Recipe
from nearfar_cloud.training.studies import plots
from nearfar_cloud.training.studies.course import RECIPE, Course, batches, train_once, trainer_of
from nearfar_cloud.training.studies.study import Arm, Figures, Job, Report, Study

ALONE = "cross entropy alone"
TEACHER_LR = 1.5e-3  # float models want less than ternary ones
# width, feed-forward, heads, heads for keys; and what a token costs in that of the student: to train the teacher, and
# to train the student with it (CPU time in f32 without the compiler)
TEACHERS = (
    (128, 256, 2, 1, 0.9, 1.4),
    (160, 384, 2, 1, 1.2, 1.5),
    (192, 512, 3, 1, 1.6, 1.6),
    (256, 832, 4, 1, 2.5, 1.9),
)
WEIGHTS = "teacher.safetensors"


def arms(recipe: Recipe) -> list[Arm]:
    taught = [Arm(ALONE, recipe)]
    teachers = []
    for d_model, d_ff, n_heads, n_kv_heads, own_cost, cost in TEACHERS:
        shape = replace(
            recipe.shape,
            d_model=d_model,
            d_ff=d_ff,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            exits=(),
            weights="float",
        )
        ratio = shape.n_linear / recipe.shape.n_linear
        of_teacher = replace(recipe, name=f"teacher {ratio:.1f}", shape=shape, peak_lr=TEACHER_LR)
        teachers.append(Arm(of_teacher.name, of_teacher, {"ratio": ratio}, parent=True, once=True, cost=own_cost))
        taught.append(Arm(f"taught by {ratio:.1f}", recipe, {"ratio": ratio}, needs=(of_teacher.name,), cost=cost))
    return taught + teachers


def train(job: Job) -> Figures:
    ratio = job.arm.options.get("ratio", 0.0)
    if job.arm.parent:
        trainer, figures = train_once(job)
        write(job.folder / WEIGHTS, trainer.checkpoint())
        return figures | {"ratio": ratio}
    rows, course = batches(job, job.recipe), Course(job)
    trainer = trainer_of(job, job.recipe, rows, job.tokens, teacher=_teacher(job))
    course.follow(trainer)
    return course.figures(trainer.model) | {"ratio": ratio, "rows_sha256": rows.digest.hexdigest()}


def _teacher(job: Job) -> Decoder | None:
    """The teacher that the arm needs; all arms of a study have one tokenizer."""
    if not job.arm.needs:
        return None
    (name,) = job.arm.needs
    recipe = next(arm.recipe for arm in arms(job.arm.recipe) if arm.name == name)
    return model_of(read(job.parents[name] / WEIGHTS), recipe)


def finding(report: Report) -> dict[str, Any]:
    """What each teacher brings, in nats a token (below zero: better than alone), and which brings most."""
    loss = {name: arm["mean"]["loss"] for name, arm in report["arms"].items()}
    taught = {name: round(value - loss[ALONE], 4) for name, value in loss.items() if name != ALONE}
    best = min(taught, key=lambda name: taught[name])
    spread = max(arm["spread"]["loss"] for arm in report["arms"].values())
    return {f"{name} minus alone": gain for name, gain in taught.items()} | {
        "best ratio": round(report["arms"][best]["mean"]["ratio"], 2),
        "largest spread": round(spread, 4),
    }


def plot(report: Report, path: Path) -> None:
    taught = {name: arm for name, arm in report["arms"].items() if name != ALONE}
    figure, axes = plots.canvas(3)
    for axis, key, title in (
        (axes[0], "loss", "held-out loss of answer tokens (nats)"),
        (axes[1], "exact", "held-out answers exact"),
    ):
        ratios = [arm["mean"]["ratio"] for arm in taught.values()]
        for seed in map(str, report["seeds"]):
            axis.plot(ratios, [arm["seeds"][seed][key] for arm in taught.values()], "C0.", ms=5)
            axis.axhline(report["arms"][ALONE]["seeds"][seed][key], color="C1", ls=":", lw=1)
        axis.plot(ratios, [arm["mean"][key] for arm in taught.values()], "C0-", label="taught")
        axis.axhline(report["arms"][ALONE]["mean"][key], color="C1", label="cross entropy alone")
        parents = report["parents"].values()
        own = [arm["mean"][key] for arm in parents]
        axis.plot([arm["mean"]["ratio"] for arm in parents], own, "C2x--", label="the teacher itself")
        axis.set(title=title, xlabel="teacher's weights over the student's")
        axis.legend(fontsize=8)
    plots.curves(axes[2], report["arms"], list(report["arms"]))
    plots.save(figure, path)


STUDY = Study("capacity", "which size of teacher teaches a small model best?", RECIPE, arms, train, finding, plot)
