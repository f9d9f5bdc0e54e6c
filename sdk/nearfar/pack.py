"""A master and a budget -> the model file that fits: look up, round, write.  Behind `nearfar pack`; numpy only.

    budget -> the frontier's assignment of least loss whose whole file fits -> every matrix rounded to its width -> GGUF

The budget is the whole file: header, tokenizer and card count as well.  Thresholds of exits belong to the tensors that
they were measured on, so the packed file has none: its exits never fire until `nearfar calibrate` has seen it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nearfar.errors import UsageError
from nearfar.gguf_writer import GGUFWriter
from nearfar.master import ARCH, WIDTHS, Master, Point

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "kib": 1024, "mib": 1024**2}
# Keys that are the master's own, and those of a calibration that the packed tensors have not seen.
_LEFT_OUT = re.compile(
    r"general\.(architecture|alignment)|nearfar\.(master|calibration|pack)\..+"
    r"|nearfar\.exit\.\d+\.(tau|tau_loose|temperature|isotonic_x|isotonic_y)"
)


@dataclass(frozen=True, slots=True)
class Packed:
    """What was written."""

    path: Path
    n_bytes: int
    point: Point


def parse_bytes(text: str) -> int:
    """ "1.6MB", "900kB", "1500000", "1.5MiB" -> bytes.  Raises UsageError."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([a-z]*)", text.strip().lower())
    if not match or match[2] not in _UNITS:
        raise UsageError(f"{text[:40]!r}: expected a size such as 1.6MB, 900kB or 1500000")
    return int(float(match[1]) * _UNITS[match[2]])


def pack(master: Master, budget: int, out: Path) -> Packed:
    """Write the best model of at most `budget` bytes.

    Raises UsageError where no assignment of the master is that small, FileError where the disk says no.
    """
    point, n_bytes = choose(master, budget)
    writer_of(master, point, out).write()
    return Packed(out, n_bytes, point)


def calibration_room(master: Master) -> int:
    """Bytes that the keys of a calibration can take: two isotonic arrays an exit, and a page of names and numbers."""
    return 1024 * (1 + len(master.config.exits)) if master.config.exits else 0


def choose(master: Master, budget: int) -> tuple[Point, int]:
    """The point of least loss (of equals, the smaller) that fits, and its size in bytes."""
    sizes = [(p, writer_of(master, p, Path()).n_bytes()) for p in master.frontier]
    floor = min(n for _, n in sizes)
    if budget < floor:
        raise UsageError(
            f"a budget of {budget:,} bytes: the smallest file that {master.file.path} makes has {floor:,} "
            f"({floor / 1e6:.2f} MB)"
        )
    return min(((p, n) for p, n in sizes if n <= budget), key=lambda x: (x[0].loss, x[1]))


def writer_of(master: Master, point: Point, out: Path) -> GGUFWriter:
    """A writer that holds the whole file of `point`; matrices are rounded when they are written."""
    file, writer = master.file, GGUFWriter(out)
    writer.add("general.architecture", ARCH)
    for key in file.metadata:
        if not _LEFT_OUT.fullmatch(key):
            writer.add_encoded(key, file.encoded(key))
    writer.add("nearfar.pack.assignment", point.assignment)
    for e in master.config.exits:
        writer.add(f"nearfar.exit.{e.layer}.temperature", 1.0)
        writer.add(f"nearfar.exit.{e.layer}.tau", 1.0)
    widths = {m.name: (m, width) for m, width in zip(master.matrices, point.assignment, strict=True)}
    for name, info in file.tensors.items():
        if (found := widths.get(name.removesuffix(".weight"))) is not None:
            matrix, width = found
            writer.add_made(name, partial(master.packed, matrix, width), WIDTHS[width], matrix.shape)
        elif not name.startswith("lora."):
            writer.add_tensor(name, file.raw(name), info.type, info.shape)
    return writer
