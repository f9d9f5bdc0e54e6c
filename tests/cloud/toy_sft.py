"""The study `sft` with a model that trains in milliseconds; a module, because workers find a study by its name."""

from __future__ import annotations

from dataclasses import replace

from nearfar_cloud.training.recipe import Recipe, Shape
from nearfar_cloud.training.studies import sft
from nearfar_cloud.training.studies.study import Arm

SHAPE = Shape(512, 32, 2, 2, 1, 64, 128, exits=(1,), weights="float")
RECIPE = replace(sft.recipe(), shape=SHAPE, seq_len=128, micro_rows=1, batch_tokens=(128, 4 * 128))


def arms(recipe: Recipe) -> list[Arm]:
    """The parent and the arms of one batch: every rate, stacked and phased."""
    return [arm for arm in sft.arms(recipe) if arm.parent or arm.options["batch"] == 4 * recipe.micro_tokens]


STUDY = replace(sft.STUDY, recipe=RECIPE, arms=arms)
