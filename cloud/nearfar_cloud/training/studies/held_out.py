"""Held-out rows of a study: made once for a folder, the same for every arm and seed.  Read by course.py."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from nearfar_cloud.training import dev
from nearfar_cloud.training.dev import DevRows
from nearfar_cloud.training.model import Decoder
from nearfar_cloud.training.recipe import Recipe
from nearfar_cloud.training.run import dev_rows
from nearfar_cloud.training.tokenizer import RowTokenizer


def load(path: Path) -> dict[str, DevRows]:
    """Source -> its packed rows, as `make` stored them."""
    with np.load(path) as stored:
        names = dict.fromkeys(key.split("/")[0] for key in stored)
        return {
            n: DevRows(
                **{f.name: stored[f"{n}/{f.name}"] for f in fields(DevRows) if f.name != "n_rows"},
                n_rows=int(stored[f"{n}/n_rows"]),
            )
            for n in names
        }


def make(path: Path, data: Path, tokenizer: RowTokenizer, recipe: Recipe) -> None:
    """Store the rows of `run.dev_rows` at `path`; sources whose rows are all too long for the recipe are left out."""
    rows = {name: r for name, r in dev_rows(data, tokenizer, recipe, ()).items() if r.answer.any()}
    store(path, rows)


def store(path: Path, rows: dict[str, DevRows]) -> None:
    """Write what `load` reads, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    arrays = {f"{name}/{f.name}": np.asarray(getattr(r, f.name)) for name, r in rows.items() for f in fields(DevRows)}
    np.savez(part, **arrays)  # type: ignore[arg-type]  # its keywords are arrays
    part.replace(path)


def part(sources: dict[str, DevRows], sequences: int) -> dict[str, DevRows]:
    """About so many of the packed sequences, the same share of each source, in whole passes through the model."""
    share = min(1.0, sequences / sum(len(r.ids) for r in sources.values()))
    found = {}
    for name, r in sources.items():
        n = max(1, round(len(r.ids) * share / r.n_rows)) * r.n_rows
        arrays = {f.name: getattr(r, f.name)[:n] for f in fields(DevRows) if f.name != "n_rows"}
        found[name] = DevRows(**arrays, n_rows=r.n_rows)
    return found


def measure(model: Decoder, rows: dict[str, DevRows], dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """dev.evaluate of each source, the embedding as a file holds it."""
    return {name: dev.evaluate(model, r, dtype, q8=True) for name, r in rows.items()}


def overall(sources: dict[str, dict[str, float]]) -> dict[str, float]:
    """Loss of an answer's token (nats) and share of rows answered exactly, over all sources at full depth."""
    tokens = sum(f["tokens"] for f in sources.values())
    n_rows = sum(f["rows"] for f in sources.values())
    return {
        "loss": sum(f["loss.final"] * f["tokens"] for f in sources.values()) / max(tokens, 1),
        "exact": sum(f["exact.final"] * f["rows"] for f in sources.values()) / max(n_rows, 1),
    }
