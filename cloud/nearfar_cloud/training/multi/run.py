"""From a run's checkpoint to a master: train the pairs, search the frontier, write.  What `nearfar train-multi` calls.

checkpoint -> MultiDecoder -> [step step step ...] -> search on held-out rows -> master.gguf
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nearfar.errors import Cancelled, DataError, FileError
from nearfar.master import Point
from nearfar_cloud.training import dev
from nearfar_cloud.training.card import card
from nearfar_cloud.training.checkpoint import Checkpoint, Checkpoints, read
from nearfar_cloud.training.dev import DevRows
from nearfar_cloud.training.finish import commit, machine
from nearfar_cloud.training.mix import Mix
from nearfar_cloud.training.model import Decoder
from nearfar_cloud.training.multi.linear import RANK, MultiDecoder
from nearfar_cloud.training.multi.master import write_master
from nearfar_cloud.training.multi.sampling import DRAWS, mean_bits
from nearfar_cloud.training.multi.search import search
from nearfar_cloud.training.multi.trainer import MultiTrainer, Report
from nearfar_cloud.training.recipe import RECIPES, Recipe
from nearfar_cloud.training.run import Log, dev_rows, interrupt_flag
from nearfar_cloud.training.schedule import Budget
from nearfar_cloud.training.tokenizer import RowTokenizer


@dataclass(frozen=True)
class Options:
    """What `nearfar train-multi` was asked for."""

    parent: Path  # the folder of a run, or one of its checkpoints
    data: Path
    out: Path  # the master
    budget: Budget
    draw: str = "balanced"
    rank: int = RANK
    train_shared: bool = False
    without: tuple[str, ...] = ()
    points: int = 24  # of the frontier
    tries: int = 6  # exchanges that are measured at each point
    search_rows: int = 200
    progress_s: float = 10.0
    as_json: bool = False


@dataclass(frozen=True)
class Parent:
    """A trained model to start from."""

    recipe: Recipe
    model: Decoder
    tokenizer: RowTokenizer


def train_multi(options: Options, recipes: Mapping[str, Recipe] = RECIPES) -> Path:
    """Train, search and write the master; returns its path.  `recipes`: those that may have made the parent.

    Raises Cancelled after Ctrl-C (nothing is written: the parent is as it was), FileError and DataError for a parent
    or data that do not fit, ConfigError for widths without whole blocks.
    """
    options.out.parent.mkdir(parents=True, exist_ok=True)
    log = Log(options.out.with_suffix(".log.jsonl"), as_json=options.as_json)
    parent = open_parent(options.parent, recipes)
    recipe = replace(parent.recipe, short=None)  # one width of sequences: a step is one pass
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
    train_pairs(trainer, log, options.progress_s)
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
    log.write({"kind": "done", "path": str(options.out)}, f"wrote {options.out}")
    return options.out


def open_parent(path: Path, recipes: Mapping[str, Recipe] = RECIPES) -> Parent:
    """A run's newest checkpoint, or the one named.  Raises FileError, DataError where no recipe of today made it."""
    if path.is_dir():
        newest = Checkpoints(path / "checkpoints").newest()
        if newest is None:
            raise FileError(f"{path}: expected the folder of a run with a checkpoint, or a checkpoint")
        checkpoint, folder = newest[0], path
    else:
        checkpoint, folder = read(path), path.parent.parent
    recipe = _recipe_of(checkpoint, path, recipes)
    model = Decoder(recipe.shape)
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in checkpoint.tensors.items() if k.startswith("model.")}
    )
    tokenizer = RowTokenizer.load(folder / "tokenizer.json")
    if tokenizer.n_vocab != recipe.shape.n_vocab:
        raise DataError(f"{folder}/tokenizer.json has {tokenizer.n_vocab} tokens, the model {recipe.shape.n_vocab}")
    return Parent(recipe, model, tokenizer)


def _recipe_of(checkpoint: Checkpoint, path: Path, recipes: Mapping[str, Recipe]) -> Recipe:
    name, found = str(checkpoint.state.get("recipe")), checkpoint.state.get("recipe_sha256")
    if name in recipes:
        recipe = recipes[name]
        float_twin = replace(recipe, shape=replace(recipe.shape, weights="float"))
        for r in (recipe, float_twin):
            if r.sha256 == found:
                return r
    raise DataError(
        f"{path} was made with a recipe {name} ({str(found)[:16]}) that is none of {', '.join(recipes)} today"
    )


def train_pairs(trainer: MultiTrainer, log: Log, progress_s: float = 10.0) -> None:
    """Steps until the budget is spent.  Raises Cancelled after Ctrl-C."""
    shown, window = 0.0, list[Report]()
    with interrupt_flag() as interrupted:
        while trainer.progress < 1:
            report = trainer.step()
            log.write({"kind": "step", **asdict(report)})
            window.append(report)
            if report.seconds - shown >= progress_s or trainer.progress >= 1:
                shown = report.seconds
                log.write(*_progress(trainer, window))
                window = []
            if interrupted():
                raise Cancelled(f"stopped at step {trainer.n}; nothing was written")


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
