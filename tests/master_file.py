"""A small random master, written with numpy alone: the material of the tests of `nearfar pack`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.config import MASTER, ModelConfig
from nearfar.forms import ROWS_VERSION
from nearfar.gguf_reader import GGUFFile, TensorType
from nearfar.gguf_writer import GGUFWriter
from nearfar.master import EMBEDDING, WIDTHS, Point, add_frontier, matrices, pair_names
from tests.tiny import write_tiny

RANK = 2
Change = Callable[[str, TensorType, Any], tuple[str, TensorType, Any] | None]


def frontier(n_matrices: int) -> list[Point]:
    """From the smallest to the largest; losses fall as bytes rise."""
    n = n_matrices - 1
    texts = ["4" + "t" * n, "8" + "t" * n, "8" + "t" * (n - 9) + "3" * 9, "8" + "3" * n, "8" + "4" * n]
    texts += ["8" + "t348" * (n // 4), "8" * (n + 1)]
    return [Point(text, 2.0 - 0.1 * i) for i, text in enumerate(texts)]


def write_master_file(
    path: Path,
    *,
    points: Sequence[Point] | None = None,
    change: Change = lambda *tensor: tensor,
    extra: dict[str, Any] | None = None,
) -> Path:
    """A master of four layers with an exit that was calibrated; `change` may alter or drop (None) a tensor."""
    base = write_tiny(
        path.with_suffix(".base"), "bitnet", "F32", exits=(2,), tau=0.1, extra={"nearfar.rows": ROWS_VERSION}
    )
    rng, writer = np.random.default_rng(0), GGUFWriter(path)
    with GGUFFile.open(base) as file:
        config = ModelConfig.from_metadata(file.metadata, file.tensors["token_embd.weight"].shape[0])
        of = matrices(config)
        for key in file.metadata:
            if key not in ("general.architecture", *(extra or {})):
                writer.add_encoded(key, file.encoded(key))
        writer.add("general.architecture", MASTER)
        for key, value in (extra or {}).items():
            writer.add(key, value)
        add_frontier(writer, frontier(len(of)) if points is None else points)
        tensors: list[tuple[str, TensorType, Any]] = []
        for name, info in file.tensors.items():
            data = file.raw(name).view("<f4").reshape(info.shape)
            tensors.append((name, TensorType.BF16 if len(info.shape) == 2 else TensorType.F32, data))
    for m in of:
        for width in WIDTHS if m.name != EMBEDDING else ():
            a, b = pair_names(m.name, width)
            tensors.append((a, TensorType.F32, rng.normal(0, 0.05, (RANK, m.shape[1])).astype(np.float32)))
            tensors.append((b, TensorType.F32, rng.normal(0, 0.05, (m.shape[0], RANK)).astype(np.float32)))
    for tensor in tensors:
        if (kept := change(*tensor)) is not None:
            writer.add_tensor(kept[0], kept[2], kept[1])
    return writer.write()
