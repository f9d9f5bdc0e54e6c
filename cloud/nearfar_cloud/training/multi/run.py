"""From a run's checkpoint to a master: train the pairs, search the frontier, write.  What `nearfar train-multi` calls.

checkpoint -> MultiDecoder -> [step step step ...] -> search on held-out rows -> master.gguf
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nearfar.errors import Cancelled, FileError, UsageError
from nearfar.master import Point
from nearfar_cloud.training import dev
from nearfar_cloud.training.card import card
from nearfar_cloud.training.checkpoint import Checkpoints, check_same_run
from nearfar_cloud.training.dev import DevRows
from nearfar_cloud.training.finish import commit, machine
from nearfar_cloud.training.mix import Mix
from nearfar_cloud.training.multi.linear import RANK, MultiDecoder
from nearfar_cloud.training.multi.master import write_master
from nearfar_cloud.training.multi.sampling import DRAWS, mean_bits
from nearfar_cloud.training.multi.search import search
from nearfar_cloud.training.multi.trainer import MultiTrainer, Report
from nearfar_cloud.training.parent import open_parent
from nearfar_cloud.training.recipe import RECIPES, Recipe
from nearfar_cloud.training.run import Log, dev_rows, interrupt_flag
from nearfar_cloud.training.schedule import Budget


@dataclass(frozen=True)
class Options:
    """What `nearfar train-multi` was asked for."""

    parent: Path  # the folder of a run, or one of its checkpoints
    data: Path
    out: Path  # the master
    budget: Budget
    resume: bool = False
    draw: str = "balanced"
    rank: int = RANK
    train_shared: bool = False
    without: tuple[str, ...] = ()
    points: int = 24  # of the frontier
    tries: int = 6  # exchanges that are measured at each point
    search_rows: int = 200
    progress_s: float = 10.0
    checkpoint_s: float = 60.0
    as_json: bool = False


def train_multi(options: Options, recipes: Mapping[str, Recipe] = RECIPES) -> Path:
    """Train, search and write the master; returns its path.  `recipes`: those that may have made the parent.

    Its checkpoints lie in a folder beside it, `master.checkpoints`; once the master is written they go.

    Raises Cancelled after Ctrl-C (a checkpoint is written first), FileError and DataError for a parent, data or a
    checkpoint that do not fit, ConfigError for widths without whole blocks.
    """
    options.out.parent.mkdir(parents=True, exist_ok=True)
    log = Log(options.out.with_suffix(".log.jsonl"), as_json=options.as_json)
    checkpoints = Checkpoints(options.out.with_suffix(".checkpoints"))
    saved, damaged = checkpoints.newest() or (None, [])
    if saved is not None and not options.resume:
        raise UsageError(f"{checkpoints.folder} holds step {saved.state['step']}: --resume it, or name another --out")
    for sentence in damaged:
        log.note(f"{sentence}; going on from the one before it")
    parent = open_parent(options.parent, recipes)
    recipe = replace(parent.recipe, short=None)  # one width of sequences: a step is one pass
    torch.manual_seed(recipe.seed)
    model = MultiDecoder(parent.model, rank=options.rank, train_shared=options.train_shared)
    mix = Mix(
        options.data,
        parent.tokenizer,
        seq_len=recipe.seq_len,
        seed=recipe.seed + 1,  # not the parent's order once more
        without=options.without,
        shares=recipe.shares,
        cache=options.out.parent / "cache",
        prompt_weights=recipe.prompt_weights,
    )
    rows = joined(dev_rows(options.data, parent.tokenizer, recipe, mix.without), options.search_rows)
    trainer = MultiTrainer(model, recipe, mix, options.budget, DRAWS[options.draw])
    asked = f"{options.draw} draws, rank {options.rank}, shared weights {'train' if options.train_shared else 'frozen'}"
    same = {"parent": parent.model.sha256, "data": mix.data_sha256, "set of options": asked}
    if saved is not None:
        check_same_run(saved.state, **same)
        trainer.restore(saved)
        log.note(f"resumed at step {trainer.n}, {trainer.tokens} tokens, {trainer.seconds:.0f} s")
    train_pairs(trainer, log, options.progress_s, Keeper(checkpoints, same, options.checkpoint_s))
    model.keep(True)
    points = search_frontier(model, rows, log, points=options.points, tries=options.tries)
    facts = {
        "parent_sha256": recipe.sha256,
        "draw": options.draw,
        "rank": options.rank,
        "train_shared": options.train_shared,
        "steps": trainer.n,
        "tokens": trainer.tokens,
        "seconds": round(trainer.seconds, 1),
        "machine": machine(),
        "torch": torch.__version__,
        "commit": commit(),
        "data_sha256": mix.data_sha256,
    }
    made = card(recipe, facts=facts, sources=mix.description(), held_out={})
    write_master(model, parent.tokenizer, options.out, card=made, points=points)
    shutil.rmtree(checkpoints.folder, ignore_errors=True)
    log.write({"kind": "done", "path": str(options.out)}, f"wrote {options.out}")
    return options.out


@dataclass
class Keeper:
    """Writes a checkpoint now and then.  `same`: what a run that goes on has to have in common with it."""

    checkpoints: Checkpoints
    same: Mapping[str, str]
    every_s: float
    kept: float = 0.0

    def keep(self, trainer: MultiTrainer, log: Log) -> None:
        """Write one.  A disk that is full ends nothing."""
        self.kept = trainer.seconds
        made = trainer.checkpoint()
        state = {**made.state, **{f"{what}_sha256": value for what, value in self.same.items()}}
        try:
            self.checkpoints.save(trainer.n, replace(made, state=state))
        except (FileError, OSError) as error:
            log.note(f"{error}; will try again at the next checkpoint")


def train_pairs(trainer: MultiTrainer, log: Log, progress_s: float = 10.0, keeper: Keeper | None = None) -> None:
    """Steps until the budget is spent.  Raises Cancelled after Ctrl-C."""
    shown, window = trainer.seconds, list[Report]()
    with interrupt_flag() as interrupted:
        while trainer.progress < 1:
            report = trainer.step()
            log.write({"kind": "step", **asdict(report)})
            window.append(report)
            if report.seconds - shown >= progress_s or trainer.progress >= 1:
                shown = report.seconds
                log.write(*_progress(trainer, window))
                window = []
            if keeper and (interrupted() or trainer.progress >= 1 or report.seconds - keeper.kept >= keeper.every_s):
                keeper.keep(trainer, log)
            if interrupted():
                goes_on = "--resume goes on from there" if keeper else "nothing was written"
                raise Cancelled(f"stopped at step {trainer.n}; {goes_on}")


def _progress(trainer: MultiTrainer, window: list[Report]) -> tuple[dict[str, Any], str]:
    last = window[-1]
    loss, kl = (float(np.mean([getattr(r, key) for r in window])) for key in ("loss", "kl"))
    record = {"kind": "progress", "progress": round(trainer.progress, 4), **asdict(last), "loss": loss, "kl": kl}
    line = (
        f"{trainer.progress:6.1%} step {last.step:6} {last.tokens / 1e6:6.2f} M tokens "
        f"{last.tokens / max(last.seconds, 1e-9):5.0f}/s loss {loss:.3f} kl {kl:.3f} grad {last.grad_norm:.2f}"
    )
    return record, line


def search_frontier(model: MultiDecoder, rows: DevRows, log: Log, *, points: int, tries: int) -> list[Point]:
    """The frontier, measured on `rows`, with a line for each of its points."""
    log.note(f"searching {len(model.matrices)} matrices on {count(rows)} held-out rows")
    found = search(lambda a: measure(model, rows, a)["loss.final"], model.matrices, points=points, tries=tries)
    for p in found:
        mean = mean_bits(p.assignment, model.matrices)
        log.write(
            {"kind": "point", "assignment": p.assignment, "loss": p.loss, "bits": mean},
            f"{mean:5.2f} bits loss {p.loss:.4f} {p.assignment}",
        )
    return found


def measure(model: MultiDecoder, rows: DevRows, assignment: str) -> dict[str, float]:
    """Figures of dev.evaluate at one assignment; rounded matrices are kept until something trains again."""
    model.assign(assignment)
    return dev.evaluate(model, rows, torch.float32, q8=True)


def joined(sources: Mapping[str, DevRows], limit: int) -> DevRows:
    """About `limit` rows, the same share of each source, as one packed set."""
    share = min(1.0, limit / max(sum(count(r) for r in sources.values()), 1))
    parts = [(rows, max(1, round(len(rows.ids) * share))) for rows in sources.values()]
    arrays = {
        f.name: np.concatenate([getattr(rows, f.name)[:n] for rows, n in parts])
        for f in fields(DevRows)
        if f.name != "n_rows"
    }
    return DevRows(**arrays, n_rows=min(rows.n_rows for rows, _ in parts))


def count(rows: DevRows) -> int:
    """Documents of a packed set."""
    return int((rows.doc.max(axis=1) + 1).sum())
