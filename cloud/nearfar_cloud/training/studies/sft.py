"""Findings about supervised fine-tuning, tried on a small model (arXiv 2412.13337; theirs were 3 to 7 B weights).

    large batches with a low rate beat small ones       batch x rate, each on the same rows, equally many
    stacked = phased, with fewer rows                   all kinds of rows mixed, or requests first and calls after them
    low early gradient norm with high early loss        the rule ranks the runs after a tenth of their steps; Spearman
      predicts the better run                           with what the runs come to

The parent is a float model of stories, books and chats; the rows are supervised: requests with intents, short skills,
calls to homes, calls in dialogues.  The loss is that of the answers alone.  The rate is constant, without warm-up
(fine, says the paper) but for a short decay at the end.

Scaled down: the paper's batches of 128 to 7,680 samples stand as 1 : 4 : 16 of 1,024 tokens (about 25, 100 and 400 of
our rows), because 4,096 rows are a tenth of what a run of ten minutes sees, and a run needs steps.  The rates are three
times the planned 1e-3, 3e-4 and 1e-4: AdamW moves a weight by about the rate a step, weights of a model 128 wide are
larger (0.09), and our runs have dozens of steps.  Equal rows mean fewer steps for large batches, as in the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nearfar_cloud.training import checkpoint
from nearfar_cloud.training.checkpoint import Checkpoint
from nearfar_cloud.training.mix import Mix, Shares
from nearfar_cloud.training.recipe import RECIPES, Recipe
from nearfar_cloud.training.schedule import Phase
from nearfar_cloud.training.studies import held_out
from nearfar_cloud.training.studies.course import Counted, Course, batches, trainer_of
from nearfar_cloud.training.studies.plots import canvas, save
from nearfar_cloud.training.studies.study import Arm, Figures, Job, Report, Study
from nearfar_cloud.training.trainer import Batch
from nearfar_cloud.training.trainer import Report as StepReport

Order = Literal["stacked", "phased"]
PARENT = "parent"
PARENT_TOKENS = 4  # of an arm's tokens
BATCHES = (1, 4, 16)  # forward passes of a step, each of the recipe's 4 x 256 tokens
RATES = (3e-3, 1e-3, 3e-4)
ORDERS: tuple[Order, ...] = ("stacked", "phased")
EARLY = 0.1  # of the steps: when the rule is asked
LANGUAGE = {"stories": 35.0, "books": 30.0, "persona": 35.0}
# Phased: the first half of the tokens, then the second.  Stacked: both at once.
FIRST, SECOND = {"intents": 80.0, "skills": 20.0}, {"home": 50.0, "sgd": 50.0}
SOURCES = ("intents", "home", "sgd")  # that have held-out rows


# ---------------------------------------------------------------- arms


def recipe() -> Recipe:
    """Pico in floats.  Its shares are the parent's language (stable) and the stacked rows (decay).

    Its last batch is the largest of the arms: the runner gives every arm whole steps of that size.
    """
    known = RECIPES["pico"]
    stacked = {name: share / 2 for name, share in (FIRST | SECOND).items()}
    made = replace(known, name="sft", shape=replace(known.shape, weights="float"), micro_rows=4, peak_lr=2e-3)
    sizes = (made.micro_tokens, BATCHES[-1] * made.micro_tokens)
    return replace(made, batch_tokens=sizes, shares=Shares(LANGUAGE, stacked))


def arms(recipe: Recipe) -> list[Arm]:
    """The parent, and every batch with every rate, stacked and phased."""
    # Sources that a phase does not draw from stay in its table, so that all arms read the same files.
    shares = {"stacked": recipe.shares, "phased": Shares(dict.fromkeys(LANGUAGE, 0.0) | FIRST, SECOND)}
    tuned = replace(recipe, warmup=0.0, decay_from=0.9, weight_decay=0.0, prompt_weights=(0.0, 0.0))
    language = replace(recipe, batch_tokens=(2 * recipe.micro_tokens, 8 * recipe.micro_tokens))
    found = [Arm(PARENT, language, parent=True, once=True, cost=PARENT_TOKENS)]
    for order, passes, rate in product(ORDERS, BATCHES, RATES):
        batch = passes * recipe.micro_tokens
        made = replace(tuned, batch_tokens=(batch, batch), peak_lr=rate, shares=shares[order])
        options = {"order": order, "batch": batch, "rate": rate}
        found.append(Arm(f"{order} {batch} at {rate:g}", made, options, needs=(PARENT,)))
    return found


def train(job: Job) -> Figures:
    """One run of one arm."""
    if job.arm.name == PARENT:
        given = batches(job, job.recipe, "stable")
        trainer = trainer_of(job, job.recipe, given, PARENT_TOKENS * job.tokens)
    else:
        given = rows_in_order(job)
        trainer = trainer_of(job, job.recipe, given, job.tokens)
        trainer.model.load_state_dict(checkpoint.read(job.parents[PARENT] / "model.safetensors").tensors)
    rows = {name: r for name, r in held_out.load(job.lab.held_out).items() if name in SOURCES}
    course = Course(job, rows)
    course.follow(trainer, looks=0)
    if job.arm.name == PARENT:
        checkpoint.write(job.folder / "model.safetensors", Checkpoint(dict(trainer.model.state_dict()), {}))
    seen = {"rows_sha256": given.digest.hexdigest()}
    return course.figures(trainer.model) | early(course.steps) | dict(job.arm.options) | seen


class Phased(Counted):
    """Rows of the mix's first phase until `switch` tokens are drawn, of its second from there on."""

    def __init__(self, mix: Mix, switch: int) -> None:
        super().__init__(mix, "stable")
        self.switch, self.drawn = switch, 0

    def next_batch(self, n_sequences: int, phase: Phase, width: int) -> Batch:
        self.phase = "stable" if self.drawn < self.switch else "decay"
        self.drawn += n_sequences * width
        return super().next_batch(n_sequences, phase, width)

    def state(self) -> dict[str, Any]:
        return super().state() | {"drawn_in_order": self.drawn}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.drawn = state["drawn_in_order"]


def rows_in_order(job: Job) -> Counted:
    """The supervised rows, stacked or phased."""
    rows = batches(job, job.recipe, "decay")
    return Phased(rows.mix, job.tokens // 2) if job.arm.options["order"] == "phased" else rows


# ---------------------------------------------------------------- the rule


def early(steps: Sequence[StepReport]) -> dict[str, float]:
    """Mean loss and gradient norm (before clipping) of the first tenth of the steps, of two at least."""
    first = steps[: max(2, math.ceil(EARLY * len(steps)))]
    return {
        "steps": len(steps),
        "early_loss": float(np.mean([step.loss for step in first])),
        "early_grad_norm": float(np.mean([step.grad_norm for step in first])),
    }


def rule(grad_norms: Sequence[float], losses: Sequence[float]) -> list[float]:
    """The early figures of runs -> a score for each, higher for those that should end better.

    The place by loss (higher is better) less the place by gradient norm (lower is better).
    """
    from scipy.stats import rankdata  # type: ignore[import-untyped]

    return [float(x) for x in rankdata(losses) - rankdata(grad_norms)]


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation -1..1; None where one of the two ranks nothing."""
    from scipy.stats import spearmanr

    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return round(float(spearmanr(a, b).statistic), 4)


# ---------------------------------------------------------------- what comes out


def finding(report: Report) -> dict[str, Any]:
    """The rule's rank correlations over all arms, the best arms (by loss), and stacked against phased."""
    means = {name: arm["mean"] for name, arm in report["arms"].items()}
    exact, loss = ([m[key] for m in means.values()] for key in ("exact", "loss"))
    grad_norms, losses = ([m[key] for m in means.values()] for key in ("early_grad_norm", "early_loss"))
    scores = rule(grad_norms, losses)
    places = sorted(means, key=lambda name: means[name]["loss"])
    picked = max(zip(scores, means, strict=True))[1]
    pairs = [(means[name], means[name.replace("stacked", "phased")]) for name in means if name.startswith("stacked")]
    by_batch: dict[str, list[float]] = {}
    for m in means.values():
        by_batch.setdefault(f"{m['batch']:.0f}", []).append(m["loss"])
    return {
        "spearman_of_the_rule": {"exact": spearman(scores, exact), "loss": spearman(scores, [-x for x in loss])},
        "spearman_of_low_grad_norm": spearman([-x for x in grad_norms], exact),
        "spearman_of_high_early_loss": spearman(losses, exact),
        "picked_by_the_rule": {"arm": picked, "place": places.index(picked) + 1, "of": len(places)},
        "best": {"arm": places[0]} | {key: round(means[places[0]][key], 4) for key in ("exact", "loss")},
        "best_loss_by_batch": {batch: round(min(found), 4) for batch, found in by_batch.items()},
        "stacked_less_phased": {
            key: round(float(np.mean([stacked[key] - phased[key] for stacked, phased in pairs])), 4)
            for key in ("exact", "loss")
        },
    }


def plot(report: Report, path: Path) -> None:
    """Loss over batch and rate, stacked and phased; the rule's score against what the runs came to."""
    figure, axes = canvas(3)
    means = {name: arm["mean"] for name, arm in report["arms"].items()}
    sizes = sorted({m["batch"] for m in means.values()})
    losses = [m["loss"] for m in means.values()]
    middle = (min(losses) + max(losses)) / 2
    for axis, order in zip(axes, ORDERS, strict=False):
        of_order = {(m["batch"], m["rate"]): m["loss"] for name, m in means.items() if name.startswith(order)}
        table = [[of_order[size, rate] for rate in RATES] for size in sizes]
        axis.imshow(table, vmin=min(losses), vmax=max(losses), aspect="auto")
        for (size, rate), value in of_order.items():
            place = {"x": RATES.index(rate), "y": sizes.index(size), "color": "w" if value < middle else "k"}
            axis.text(s=f"{value:.2f}", ha="center", va="center", **place)
        axis.set(title=f"{order}: held-out loss", xlabel="rate", ylabel="tokens of a step")
        axis.set(xticks=range(len(RATES)), xticklabels=[f"{rate:g}" for rate in RATES])
        axis.set(yticks=range(len(sizes)), yticklabels=[f"{size:.0f}" for size in sizes])
    scores = rule([m["early_grad_norm"] for m in means.values()], [m["early_loss"] for m in means.values()])
    for (name, m), score in zip(means.items(), scores, strict=True):
        mark = "o" if name.startswith("stacked") else "s"
        axes[2].plot(score, m["loss"], mark, color=f"C{sizes.index(m['batch'])}")
    for i, size in enumerate(sizes):
        axes[2].plot([], [], "o", color=f"C{i}", label=f"{size:.0f} tokens a step")
    axes[2].set(title="the early rule against the end (squares: phased)", ylabel="held-out loss (nats)")
    axes[2].set(xlabel="place by early loss less place by early gradient norm")
    axes[2].legend(fontsize=8)
    save(figure, path)


STUDY = Study(
    "sft",
    "Which batch and rate fine-tune a small model best, does the order of the rows matter, and do early steps tell?",
    recipe(),
    arms,
    train,
    finding,
    plot,
)
