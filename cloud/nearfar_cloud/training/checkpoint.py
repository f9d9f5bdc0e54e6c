"""Checkpoints that survive anything: one safetensors file each, written aside, synced, renamed.  Used by trainer.py.

A file holds every tensor of the run and, in its header, a JSON state with a crc32 per tensor.  `Checkpoints` keeps the
last two, the end of the stable phase (adaptations branch from there) and the best on held-out rows.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nearfar.errors import DataError, FileError

KEEP_LAST = 2
SPARE = 16 << 20  # bytes that must stay free beside a new checkpoint


@dataclass(frozen=True)
class Checkpoint:
    """One moment of a run: tensors by name, and everything else as JSON."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().cpu().contiguous().numpy().tobytes())


def write(path: Path, checkpoint: Checkpoint) -> None:
    """Write atomically: after a crash at any time there is the old file or the new one.  Raises FileError."""
    tensors = {name: t.detach().contiguous() for name, t in checkpoint.tensors.items()}
    state = json.dumps(checkpoint.state, sort_keys=True)
    crcs = json.dumps({name: _crc(t) for name, t in tensors.items()})
    data = save(tensors, metadata={"state": state, "state_crc": str(zlib.crc32(state.encode())), "crc": crcs})
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < len(data) + SPARE:
        raise FileError(f"{path}: {len(data) >> 20} MB to write, {free >> 20} MB free; the checkpoint before it stays")
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise FileError(f"{path}: not written, {error.strerror}; the checkpoint before it stays") from None


def read(path: Path) -> Checkpoint:
    """Read and verify.  Raises FileError naming what is damaged."""
    try:
        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path}: damaged checkpoint: {error}") from None
    state = meta.get("state", "")
    if str(zlib.crc32(state.encode())) != meta.get("state_crc"):
        raise FileError(f"{path}: damaged checkpoint: its state does not match its checksum")
    crcs: dict[str, int] = json.loads(meta.get("crc", "{}"))
    for name, tensor in tensors.items():
        if crcs.get(name) != _crc(tensor):
            raise FileError(f"{path}: damaged checkpoint: tensor {name} does not match its checksum")
    return Checkpoint(tensors, json.loads(state))


class Checkpoints:
    """The folder of a run's checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def last(self) -> list[Path]:
        """The running checkpoints, newest first."""
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True)

    def save(self, step: int, checkpoint: Checkpoint) -> Path:
        """Write the checkpoint of a step, then forget all but the last two."""
        path = self.path(f"step-{step:08d}")
        write(path, checkpoint)
        for old in self.last()[KEEP_LAST:]:
            old.unlink(missing_ok=True)
        return path

    def keep(self, path: Path, name: str) -> None:
        """Keep the file under a name of its own ("stable-end", "best")."""
        part = self.path(name).with_suffix(".part")
        part.unlink(missing_ok=True)
        os.link(path, part)
        part.replace(self.path(name))

    def newest(self) -> tuple[Checkpoint, list[str]] | None:
        """The newest sound checkpoint and a sentence for each damaged one that was passed over; None without any.

        Raises FileError where there are checkpoints and all are damaged.
        """
        damaged: list[str] = []
        for path in self.last():
            try:
                return read(path), damaged
            except FileError as error:
                damaged.append(str(error))
        if damaged:
            raise FileError("no sound checkpoint is left: " + "; ".join(damaged))
        return None


def check_same_run(state: Mapping[str, Any], **hashes: str) -> None:
    """DataError naming both hashes unless the checkpoint was made with this recipe, data and so on."""
    for what, mine in hashes.items():
        found = state.get(f"{what}_sha256")
        if found != mine:
            raise DataError(
                f"the checkpoint was made with another {what}: {str(found)[:16]}, this run has {mine[:16]}; "
                "use the same, or train into another folder"
            )
