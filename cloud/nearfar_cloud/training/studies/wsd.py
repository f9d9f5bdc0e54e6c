"""Warm-up, stable, decay (MiniCPM, arXiv 2404.06395): against a cosine, with the good rows last, decayed again.

The paper: a decay over the last 10 % reaches what a cosine of the same length reaches, 2.5 % does not; good data
belongs into the decay; and one stable checkpoint can be decayed again and again.  Three questions:

    cosine, wsd 10 %, wsd 25 %      the mix of the stable phase throughout: the same rows, only the rate differs
    rows in the decay               three quarters language and dialogue at the full rate, then requests, calls and
                                    journals while the rate decays
    rows after the decay            the same rows in the same order, but the rate has decayed before the requests come:
                                    they are trained on at a low constant rate
    re-decay 2.5, 10, 25 %          one stable checkpoint (90 % of an arm's tokens), decayed over so much more
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from nearfar_cloud.training.checkpoint import read, write
from nearfar_cloud.training.mix import SHORT_ROWS, Shares
from nearfar_cloud.training.recipe import DEVICE_FIRST, Recipe
from nearfar_cloud.training.studies import plots
from nearfar_cloud.training.studies.course import RECIPE, Course, batches, train_once, trainer_of
from nearfar_cloud.training.studies.study import Arm, Figures, Job, Report, Study

STABLE = "stable"
STABLE_SHARE = 0.9  # of an arm's tokens in the stable checkpoint
RE_DECAYS = (0.025, 0.1, 0.25)  # of the tokens of the stable checkpoint
ROWS_LAST = 0.25  # of an arm's tokens: requests, calls and journals
DECAY_BEFORE = 0.25  # of an arm's tokens: where the rows come after the decay
AFTER_LR = 0.1  # of the peak: the constant rate after the decay
NEVER = 1 - 1e-9  # a decay that does not begin
AT_ONCE = 1e-9  # ... and one that begins with the second step
# The rows that the model answers are kept for the end.
ROWS_LAST_SHARES = Shares(
    stable={name: share for name, share in DEVICE_FIRST.stable.items() if name not in SHORT_ROWS},
    decay=DEVICE_FIRST.decay,
)


def arms(recipe: Recipe) -> list[Arm]:
    last = replace(recipe, shares=ROWS_LAST_SHARES, decay_from=1 - ROWS_LAST)
    stable = replace(recipe, decay_from=NEVER)
    return [
        Arm("cosine", replace(recipe, schedule="cosine", decay_from=0.75)),
        Arm("wsd 10 %", replace(recipe, decay_from=0.9)),
        Arm("wsd 25 %", replace(recipe, decay_from=0.75)),
        Arm("rows in the decay", last),
        Arm("rows after the decay", last, {"after": True}),
        Arm(STABLE, stable, parent=True, cost=STABLE_SHARE),
        *(
            Arm(f"re-decay {share:.1%}", stable, {"share": share}, needs=(STABLE,), cost=STABLE_SHARE * share)
            for share in RE_DECAYS
        ),
    ]


def train(job: Job) -> Figures:
    if job.arm.name == STABLE:
        return _stable(job)
    if job.arm.needs:
        return _re_decay(job)
    if job.arm.recipe.shares != ROWS_LAST_SHARES:
        return train_once(job, "stable")[1]
    first = job.tokens - whole_steps(ROWS_LAST * job.tokens, job.recipe)
    if job.arm.options.get("after"):
        return _rows_after(job, first)
    in_decay = replace(job.arm, recipe=replace(job.arm.recipe, decay_from=first / job.tokens))
    return train_once(replace(job, arm=in_decay))[1]


def _stable(job: Job) -> Figures:
    """The full rate to the end; the checkpoint stays in the job's folder."""
    tokens = whole_steps(STABLE_SHARE * job.tokens, job.recipe)
    trainer, figures = train_once(replace(job, tokens=tokens), "stable")
    write(job.folder / "stable.safetensors", trainer.checkpoint())
    return figures


def _re_decay(job: Job) -> Figures:
    """On from the stable checkpoint, rows and moments too, while the rate falls."""
    saved = read(job.parents[STABLE] / "stable.safetensors")
    begun = int(saved.state["tokens"])
    tokens = begun + whole_steps(job.arm.options["share"] * begun, job.recipe)
    recipe = replace(job.recipe, decay_from=begun / tokens)
    trainer = trainer_of(job, recipe, batches(job, recipe, "stable"), tokens)
    # The run goes on under another recipe: that is what is studied.
    trainer.restore(replace(saved, state=saved.state | {"recipe_sha256": recipe.sha256}))
    course = Course(job)
    course.tokens = begun
    course.follow(trainer, looks=2)
    return course.figures(trainer.model)


def _rows_after(job: Job, first: int) -> Figures:
    """Stable and decay on `first` tokens of the first rows, then the last rows at a low rate."""
    before = replace(job.recipe, decay_from=1 - DECAY_BEFORE * job.tokens / first)
    after = replace(job.recipe, peak_lr=AFTER_LR * job.recipe.peak_lr, final_lr=1.0, warmup=0.0, decay_from=AT_ONCE)
    rows, course = batches(job, job.recipe, "stable"), Course(job)
    trainer = trainer_of(job, before, rows, first)
    course.follow(trainer)
    rows.phase = "decay"
    second = trainer_of(job, after, rows, job.tokens - first)
    second.model.load_state_dict(trainer.model.state_dict())
    course.follow(second, looks=2)
    return course.figures(second.model) | {"rows_sha256": rows.digest.hexdigest()}


def whole_steps(tokens: float, recipe: Recipe) -> int:
    """The nearest number of whole steps of the recipe, in tokens; at least one step."""
    step = max(recipe.batch_tokens[1], recipe.micro_tokens)
    return max(1, round(tokens / step)) * step


def finding(report: Report) -> dict[str, Any]:
    """Differences of the mean held-out losses, in nats a token: below zero the first is better."""
    loss = {name: arm["mean"]["loss"] for name, arm in (report["arms"] | report["parents"]).items()}
    pairs = [("wsd 10 %", "cosine"), ("wsd 25 %", "cosine"), ("rows in the decay", "rows after the decay")]
    pairs += [(name, STABLE) for name in report["arms"] if name.startswith("re-decay")]
    found = {f"{a} minus {b}": round(loss[a] - loss[b], 4) for a, b in pairs}
    return found | {"largest spread": round(max(arm["spread"]["loss"] for arm in report["arms"].values()), 4)}


def plot(report: Report, path: Path) -> None:
    arms = report["arms"]
    figure, axes = plots.canvas(3)
    stable = {STABLE: report["parents"][STABLE]}
    of_one = [name for name in arms if not name.startswith("re-decay")]
    plots.curves(axes[0], arms, of_one)
    plots.curves(axes[1], stable | arms, [STABLE, *(name for name in arms if name not in of_one)])
    plots.bars(axes[2], arms | stable, "loss", "held-out loss at the end (bars: the seeds)")
    plots.save(figure, path)


STUDY = Study(
    "wsd",
    "warm-up, stable, decay: against a cosine, with good rows last, decayed again",
    RECIPE,
    arms,
    train,
    finding,
    plot,
)
