"""A model of the same shape that says other things: what a server has been restarted with by mistake."""

from __future__ import annotations

from functools import partial
from math import prod
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nearfar.gguf_reader import GGUFFile
from nearfar.gguf_writer import GGUFWriter
from nearfar.weights import Weights

# A mark among the tokenizer's keys: any model with the device's tokenizer may answer by ids, so a stranger is one that
# has another.
MARK = "tokenizer.ggml.nearfar_other"


def write_other(model: Path, path: Path) -> Path:
    """The file `model` with the rows of its largest matrix of the last layer in reverse order; a whole model also gets
    a tokenizer of its own.  Names, types, shapes and sizes stay.  Raises FileError.
    """
    with Weights.open(model) as weights:
        file, writer = weights.file, GGUFWriter(path)
        for key in file.metadata:
            if key != "general.alignment":
                writer.add_encoded(key, file.encoded(key))
        if weights.config.role != "upper":
            writer.add(MARK, True)
        changed = _largest(file, f"blk.{weights.config.n_layers - 1}.")
        for name, info in file.tensors.items():
            make = partial(_reversed, file, name) if name == changed else partial(file.raw, name)
            writer.add_made(name, make, info.type, info.shape)
        return writer.write()


def _largest(file: GGUFFile, start: str) -> str:
    """The name of the matrix with the most weights among those whose names begin so."""
    return max(
        (name for name, info in file.tensors.items() if name.startswith(start) and len(info.shape) > 1),
        key=lambda name: prod(file.tensors[name].shape),
    )


def _reversed(file: GGUFFile, name: str) -> NDArray[np.uint8]:
    """u8 [bytes]: the last row first.  Rows are whole blocks of their type, so every weight stays a weight."""
    return np.ascontiguousarray(file.raw(name).reshape(file.tensors[name].shape[0], -1)[::-1]).reshape(-1)
