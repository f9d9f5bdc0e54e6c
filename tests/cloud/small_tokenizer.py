"""A tokenizer of a few texts, in moments: counting merges on generated rows takes longer than a toy study."""

from __future__ import annotations

from pathlib import Path

from nearfar_cloud.training import tokenizer as tokenizers
from nearfar_cloud.training.mix import data_hash
from nearfar_cloud.training.recipe import Recipe
from nearfar_cloud.training.tokenizer import RowTokenizer

WORDS = (
    "turn off the kitchen lights",
    "play thai by Karl kitchen",
    '{"intent":"PlayMusic","slots":{"artist":" Karl"}}',
)


def small_tokenizer() -> RowTokenizer:
    return tokenizers.train(iter(WORDS * 3), 320)


def tokenizer_for(out: Path, data: Path, recipe: Recipe) -> None:
    """Where a study of `recipe` on `data` looks for its tokenizer in `out`."""
    name = data_hash(data, sorted({*recipe.shares.stable, *recipe.shares.decay}))[:8]
    small_tokenizer().save(out / f"tokenizer-{recipe.shape.n_vocab}-{name}.json")
