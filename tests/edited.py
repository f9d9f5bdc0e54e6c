"""A GGUF file again, with some keys or tensors changed: what the tests of refusals stand on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from nearfar.gguf_reader import GGUFFile, TensorType, ValueType
from nearfar.gguf_writer import GGUFWriter

Tensors = dict[str, tuple[TensorType, tuple[int, ...], np.ndarray]]
Edit = Callable[[dict[str, object], Tensors], object]


def edited(path: Path, edit: Edit) -> Path:
    """The file again, after `edit` has changed its metadata and tensors."""
    with GGUFFile.open(path) as file:
        meta = dict(file.metadata)
        tensors = {n: (t.type, t.shape, file.raw(n).copy()) for n, t in file.tensors.items()}
    edit(meta, tensors)
    w = GGUFWriter(path.with_name("edited.gguf"))
    for key, value in meta.items():
        w.add(key, value, ValueType.F32 if value == [] else None)
    for name, (kind, shape, raw) in tensors.items():
        w.add_tensor(name, raw, kind, shape)
    return w.write()
