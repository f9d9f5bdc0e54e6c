"""A model cut in two files: a device half, which ends at an exit, and an upper half, which takes rows.

    NAME-device.gguf   tokenizer, embedding, blk.0 .. blk.k-1, exits up to layer k
    NAME-upper.gguf    blk.r .. blk.L-1, final norm, head

Rows enter layer r, which is k, or lies below it: then both halves have the layers [r, k), and rows leave the device
before it goes on to its upper exits, as in CE-CoLLM (2411.02829).

Tensors keep names, types and bytes; they go from map to file, so a model may be larger than memory.  Both files carry
the fingerprints of all parts (wire/fingerprint.py).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nearfar.config import SPLIT_VERSION, ExitConfig, Role
from nearfar.errors import FileError, MismatchError, UsageError
from nearfar.gguf_reader import GGUFFile, ValueType
from nearfar.gguf_writer import GGUFWriter, write_together
from nearfar.weights import Weights, device_names, residual_tensors, upper_names
from nearfar.wire.fingerprint import (
    FOR_ROWS,
    WHOLE,
    ExitArrays,
    Split,
    codec_part,
    compare,
    exit_arrays,
    exit_parts,
    model_fp,
    own_parts,
    parts,
)

# Keys of the whole model that are written anew or not at all; those that only a reader of text or an exit needs.
_ANEW = re.compile(
    r"general\.alignment|nearfar\.(version|role|n_layers|split_layer|row_layer|fingerprint|parts|golden|exit_layers)"
    r"|nearfar\.codec\..+"
)
_DEVICE_ONLY = re.compile(r"tokenizer\..+|nearfar\.rows|nearfar\.(exit|calibration)\..+")

Exits = dict[ExitConfig, ExitArrays]  # lowest first


@dataclass(frozen=True, slots=True)
class Halves:
    """The files that were written, and the fingerprint of the pair."""

    device: Path
    upper: Path
    fingerprint: bytes


def split(
    whole: Weights,
    k: int,
    folder: Path,
    *,
    rows_at: int | None = None,
    make_exit: bool = False,
    outliers: Sequence[int] = (),
    golden: str = "",
) -> Halves:
    """Cut the model at layer `k` and write both halves into `folder`, or neither.

    `rows_at`: the layer that rows enter, where that is below k.  `make_exit`: after layer k stands an exit that nobody
    trained, where there is none.  `outliers`: the channels that travel beside the codes; `golden`: the self-test
    (wire/golden.py).  Raises UsageError, FileError.
    """
    exits, r = exits_below(whole, k, make_exit=make_exit), checked_rows_at(k, rows_at)
    made_of = own_parts(whole, Split(k, r)) | exit_parts(exits) | {"codec": codec_part(outliers)}
    names = {"device": device_names(whole.file.tensors, k), "upper": upper_names(whole.file.tensors, r)}
    names["device"] += [n for e in exits if whole.has(n := f"exit.{e.layer}.norm.weight")]
    names["device"] += residual_tensors(exits, whole.config.d_model)
    writers: dict[Role, GGUFWriter] = {
        "device": GGUFWriter(folder / f"{whole.file.path.stem}-device.gguf"),
        "upper": GGUFWriter(folder / f"{whole.file.path.stem}-upper.gguf"),
    }
    for role, writer in writers.items():
        _add_keys(writer, whole, role, exits)
        writer.add("nearfar.version", SPLIT_VERSION)
        writer.add("nearfar.role", role)
        writer.add("nearfar.n_layers", whole.config.n_layers)
        writer.add("nearfar.split_layer", k)
        writer.add("nearfar.row_layer", r)
        writer.add("nearfar.codec.outlier_channels", list(outliers), ValueType.U32)
        writer.add("nearfar.fingerprint", model_fp(made_of).hex())
        writer.add("nearfar.parts", [f"{name} {part.hex()}" for name, part in made_of.items()])
        for name in names[role]:
            info = whole.file.tensors[name]
            writer.add_made(name, partial(_bytes, whole.file, name), info.type, info.shape)
    if golden:
        writers["device"].add("nearfar.golden", golden)
    _make_folder(folder)
    write_together(list(writers.values()))
    return Halves(writers["device"].path, writers["upper"].path, model_fp(made_of))


def checked_rows_at(k: int, rows_at: int | None) -> int:
    """The layer that rows enter where the device half ends at layer `k`.  Raises UsageError."""
    if rows_at is not None and not 0 < rows_at <= k:
        raise UsageError(f"rows of layer {rows_at} from a device half cut at layer {k}: expected 1..{k}")
    return rows_at or k


def exits_below(whole: Weights, k: int, *, make_exit: bool = False) -> Exits:
    """The exits of a device half cut at layer `k`.  Raises UsageError where the model cannot be cut there."""
    c = whole.config
    if c.role != "full":
        raise UsageError(f"{whole.file.path} is the {c.role} half of a model that was cut: expected a whole one")
    if not 0 < k < c.n_layers:
        raise UsageError(f"cut at layer {k}: the model has {c.n_layers} layers, expected 1..{c.n_layers - 1}")
    exits = {e: exit_arrays(whole, e) for e in c.exits if e.layer <= k}
    if not exits or max(e.layer for e in exits) < k:
        if not make_exit:
            raise UsageError(
                f"no exit after layer {k} (the model has {_listed(e.layer for e in c.exits)}), so a device half could "
                "end no token by itself: cut at an exit, or let --make-exit put one there that is not trained"
            )
        exits[ExitConfig(k)] = (whole.norm_gain("final"),)
    return exits


def check_pair(device: Weights, upper: Weights, needed: Collection[str] = FOR_ROWS) -> None:
    """Whether the two belong together; the upper one may be a whole model.

    Raises MismatchError with the parts that differ, UsageError for files of other roles.
    """
    roles = device.config.role, upper.config.role
    if roles not in (("device", "upper"), ("device", "full")):
        raise UsageError(
            f"{device.file.path} ({roles[0]}) below {upper.file.path} ({roles[1]}): expected a device half, and its "
            "upper half or the whole model"
        )
    if roles[1] == "upper":
        ours = parts(upper)
    else:  # it takes the channels that the device names
        ours = own_parts(upper, Split.of(device.config) if "split" in needed else WHOLE)
        del ours["codec"]
    if found := compare(parts(device), ours, needed):
        raise MismatchError(
            f"{device.file.path} (theirs) does not belong to {upper.file.path} (ours): they differ in "
            f"{', '.join(map(str, found))}; take the half that was split off together with it"
        )


def _add_keys(writer: GGUFWriter, whole: Weights, role: Role, exits: Exits) -> None:
    """The keys of the whole model that concern this half, and its exits."""
    dropped = [f"nearfar.exit.{e.layer}." for e in whole.config.exits if e not in exits]
    for key in whole.file.metadata:
        kept = not _ANEW.fullmatch(key) and not key.startswith(tuple(dropped))
        if kept and (role == "device" or not _DEVICE_ONLY.fullmatch(key)):
            writer.add_encoded(key, whole.file.encoded(key))
    if role == "upper":
        return
    writer.add("nearfar.exit_layers", [e.layer for e in exits], ValueType.U32)
    for e in exits.keys() - set(whole.config.exits):  # the one that was made
        writer.add(f"nearfar.exit.{e.layer}.kind", "norm")
        writer.add(f"nearfar.exit.{e.layer}.head", "tied")
        writer.add(f"nearfar.exit.{e.layer}.norm", exits[e][0])
        writer.add(f"nearfar.exit.{e.layer}.tau", e.tau)


def _bytes(file: GGUFFile, name: str) -> NDArray[np.uint8]:
    """A tensor as it is, without those before it in memory."""
    file.release_pages()
    return file.raw(name)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{folder} cannot be made: {error.strerror or error}") from None


def _listed(layers: Iterable[int]) -> str:
    found = [str(layer) for layer in layers]
    return f"exits after {', '.join(found)}" if found else "no exits"
