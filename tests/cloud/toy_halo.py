"""The study `halo` with a model that trains in milliseconds; a module, because workers find a study by its name."""

from __future__ import annotations

from dataclasses import replace

from nearfar_cloud.training.recipe import Shape
from nearfar_cloud.training.studies import halo

SHAPE = Shape(512, 32, 2, 2, 1, 64, 128, exits=(1,), weights="float")
RECIPE = replace(halo.recipe(), shape=SHAPE, seq_len=128, micro_rows=2, batch_tokens=(256, 256))
STUDY = replace(halo.STUDY, recipe=RECIPE)
