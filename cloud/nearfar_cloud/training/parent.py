"""A trained model to start from or to learn from: opened from a run's folder or from one of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from nearfar.errors import DataError, FileError
from nearfar_cloud.training.checkpoint import Checkpoint, Checkpoints, read
from nearfar_cloud.training.model import Decoder
from nearfar_cloud.training.recipe import RECIPES, Recipe
from nearfar_cloud.training.tokenizer import RowTokenizer


@dataclass(frozen=True)
class Parent:
    """A trained model and what it was trained with."""

    recipe: Recipe
    model: Decoder
    tokenizer: RowTokenizer


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
    model = model_of(checkpoint, recipe)
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


def open_teacher(path: Path, tokenizer: RowTokenizer, recipes: Mapping[str, Recipe] = RECIPES) -> Decoder:
    """The model of `open_parent` for a student with `tokenizer`.  DataError where the teacher's is another one."""
    parent = open_parent(path, recipes)
    theirs, mine = parent.tokenizer.sha256[:16], tokenizer.sha256[:16]
    if theirs != mine:
        raise DataError(
            f"{path}: the teacher has the tokenizer {theirs}, the student {mine}; "
            "a teacher's probabilities are those of its own tokens: train both with the same tokenizer.json"
        )
    return parent.model


def model_of(checkpoint: Checkpoint, recipe: Recipe) -> Decoder:
    """The weights of a checkpoint as the model of the recipe that made it."""
    model = Decoder(recipe.shape)
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in checkpoint.tensors.items() if k.startswith("model.")}
    )
    return model
