"""Which model this is, part by part, so that two machines see whether their halves belong together.  Ground floor.

    tokenizer     the keys tokenizer.ggml.*
    arch          sizes, variants, rotation
    device        the tensors below the cut: embedding, layers [0, k), the head of the exits
    upper         the tensors that rows meet: layers [r, L), final norm, head; all tensors of a model that is not cut
    split         "k of L", or "k of L, rows of r" where r < k, as plain text: a whole model learns from it where to cut
    exits         of the device: their layers and gains
    codec         the channels that travel beside the codes
    calibration   of the exits: temperatures, maps, thresholds
    sampler       version of nearfar.sampling

A part is a BLAKE2b digest (`split` is not); a tensor counts with name, type, shape and bytes.  A file computes the
parts that it owns and carries the others as `nearfar split` wrote them down (nearfar.parts), so each half names the
pair.  This guards against mixing things up, not against malice: who writes a file writes its parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nearfar.config import ExitConfig, ModelConfig
from nearfar.digest import blake2b
from nearfar.errors import UsageError, WeightsError
from nearfar.gguf_reader import GGUFFile
from nearfar.weights import Weights, device_names, upper_names
from nearfar.wire.messages import MAX_OUTLIERS, SAMPLER_VERSION

DIGEST = 32  # bytes
PARTS = ("tokenizer", "arch", "device", "upper", "split", "exits", "codec", "calibration", "sampler")
FOR_ROWS = ("tokenizer", "arch", "device", "upper", "split", "codec", "sampler")  # exits are the device's own business
FOR_IDS = ("tokenizer", "sampler")  # any model with the same tokenizer may draft

ExitArrays = tuple[NDArray[np.float32], ...]

_DECLARED = re.compile(r"([a-z]{1,20}) ([0-9a-f]{2,128})")
_SPLIT = re.compile(rb"(\d{1,4}) of (\d{1,4})(?:, rows of (\d{1,4}))?")


class Split(NamedTuple):
    """Where a model is cut: the device half has the layers below `k`, and rows enter layer `rows_at` <= k."""

    k: int
    rows_at: int

    @classmethod
    def of(cls, c: ModelConfig) -> Split:
        return cls(c.split_layer, c.row_layer)

    def text(self, n_layers: int) -> bytes:
        """The part of the fingerprint."""
        cut = b"%d of %d" % (self.k, n_layers)
        return cut if self.rows_at == self.k else b"%s, rows of %d" % (cut, self.rows_at)


WHOLE = Split(0, 0)  # not cut


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A part that differs; empty bytes: that side does not have it."""

    part: str
    theirs: bytes
    ours: bytes

    def __str__(self) -> str:
        return f"{self.part} (theirs {shown(self.theirs)}, ours {shown(self.ours)})"


def parts(weights: Weights, at: Split | None = None) -> dict[str, bytes]:
    """Every part that the file computes or carries.  Reads all its tensors: about a second a gigabyte.

    `at`: where a whole model is to be cut; a half knows.  Raises UsageError, WeightsError.
    """
    return declared_parts(weights.file) | own_parts(weights, at)


def own_parts(weights: Weights, at: Split | None = None, known: dict[str, bytes] | None = None) -> dict[str, bytes]:
    """The parts that the file computes from what it holds.

    `known`: digests of its tensors by name, which this call fills: another cut of the same file then reads nothing.
    """
    known = {} if known is None else known
    file, c = weights.file, weights.config
    at = Split.of(c) if at is None else at
    k, r = at
    fits = at == WHOLE or 0 < r <= k < c.n_layers
    if not fits or (c.role != "full" and at != Split.of(c)):
        first, last = c.layers
        rows = "" if r == k else f", with rows of layer {r}"
        raise UsageError(
            f"{file.path} holds the layers [{first}, {last}) of {c.n_layers}: no model cut at layer {k}{rows}"
        )
    found = {
        "arch": _digest([_arch(c)]),
        "codec": codec_part(outliers(file, c)),
        "sampler": _digest([_json(SAMPLER_VERSION)]),
    }
    if k > 0:
        found["split"] = at.text(c.n_layers)
    if c.role != "upper":
        exits = {e: exit_arrays(weights, e) for e in c.exits if e.layer <= (k or c.n_layers)}
        found |= {"tokenizer": _tokenizer(file)} | exit_parts(exits)
        if k > 0:
            found["device"] = _tensors(file, device_names(file.tensors, k), known)
    if c.role != "device":
        found["upper"] = _tensors(file, upper_names(file.tensors, r) + ["token_embd.weight"] * (k == 0), known)
    return found


def exit_arrays(weights: Weights, e: ExitConfig) -> ExitArrays:
    """What an exit computes with: its gain f32 [D], and where it has a rank the two matrices of its residual."""
    return weights.norm_gain(f"exit.{e.layer}"), *(weights.residual(f"exit.{e.layer}") or ())


def exit_parts(exits: Mapping[ExitConfig, ExitArrays]) -> dict[str, bytes]:
    """The two parts about exits, lowest first."""
    return {
        "exits": _digest([b"%d %s" % (e.layer, b"".join(x.tobytes() for x in found)) for e, found in exits.items()]),
        "calibration": _digest([_json([_calibration(e) for e in exits])]),
    }


def _calibration(e: ExitConfig) -> dict[str, object]:
    """The facts that `nearfar calibrate` finds; the rank shows in the arrays."""
    return {name: value for name, value in asdict(e).items() if name != "rank" and value is not None}


def codec_part(outliers: Sequence[int]) -> bytes:
    """Of the channels that travel beside the codes."""
    return _digest([_json(list(outliers))])


def declared_parts(file: GGUFFile) -> dict[str, bytes]:
    """The parts as `nearfar split` wrote them into the file, its own included; none in a model that was not cut."""
    found = {}
    for text in file.metadata.get("nearfar.parts", ()):
        match = _DECLARED.fullmatch(str(text))
        if match is None or match[1] not in PARTS or len(match[2]) % 2:
            raise WeightsError(
                f"{file.path}: nearfar.parts holds {str(text)[:40]!r}, expected a name and a fingerprint"
            )
        found[match[1]] = bytes.fromhex(match[2])
    return found


def model_fp(parts: Mapping[str, bytes]) -> bytes:
    """One fingerprint of all parts, 32 bytes."""
    return _digest([b"%s %d %s" % (name.encode(), len(parts[name]), parts[name]) for name in sorted(parts)])


def compare(
    theirs: Mapping[str, bytes], ours: Mapping[str, bytes], needed: Collection[str] = FOR_ROWS
) -> list[Mismatch]:
    """The parts among `needed` that we have and that are not the same on the other side."""
    return [
        Mismatch(name, theirs.get(name, b""), ours[name])
        for name in PARTS
        if name in needed and name in ours and theirs.get(name) != ours[name]
    ]


def split_of(parts: Mapping[str, bytes], n_layers: int) -> Split:
    """Where the other side's model was cut; `WHOLE` if it was not, or is no model of `n_layers` layers."""
    match = _SPLIT.fullmatch(parts.get("split", b""))
    if not match or int(match[2]) != n_layers:
        return WHOLE
    k = int(match[1])
    found = Split(k, int(match[3] or k))
    return found if 0 < found.rows_at <= k < n_layers else WHOLE


def outliers(file: GGUFFile, c: ModelConfig) -> tuple[int, ...]:
    """The channels that travel beside the codes (nearfar.codec.outlier_channels)."""
    found = file.metadata.get("nearfar.codec.outlier_channels", [])
    fine = isinstance(found, list) and all(type(i) is int and 0 <= i < c.d_model for i in found)
    if not fine or found != sorted(set(found)) or len(found) > MAX_OUTLIERS:
        raise WeightsError(
            f"{file.path}: nearfar.codec.outlier_channels={str(found)[:60]}: expected at most {MAX_OUTLIERS} rising "
            f"channels of 0..{c.d_model - 1}"
        )
    return tuple(found)


def shown(part: bytes) -> str:
    """A part for people: text as it is, the first digits of a digest."""
    if not part:
        return "none"
    return part.decode() if _SPLIT.fullmatch(part) else f"{part[:6].hex()}…"


def _arch(c: ModelConfig) -> bytes:
    """The facts that are the same in both halves."""
    own = ("exits", "role", "split_layer", "row_layer")
    return _json({name: getattr(c, name) for name in c.__dataclass_fields__ if name not in own})


def _tokenizer(file: GGUFFile) -> bytes:
    names = sorted(name for name in file.metadata if name.startswith("tokenizer.ggml."))
    return _digest([b"%s %s" % (name.encode(), file.encoded(name)) for name in names])


def _tensors(file: GGUFFile, names: Iterable[str], known: dict[str, bytes]) -> bytes:
    names = sorted(set(names))
    for name in names:
        if name not in known:
            info = file.tensors[name]
            digest = blake2b(f"{name} {int(info.type)} {info.shape} ".encode(), digest_size=DIGEST)
            digest.update(file.raw(name).data)
            known[name] = digest.digest()
            file.release_pages()  # a model may be larger than memory
    return _digest([known[name] for name in names])


def _digest(pieces: Sequence[bytes]) -> bytes:
    """Of the pieces in their order, each with its length."""
    digest = blake2b(digest_size=DIGEST)
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "little"))
        digest.update(piece)
    return digest.digest()


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
