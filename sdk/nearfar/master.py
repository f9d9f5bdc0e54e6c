"""A master: one training whose matrices can be rounded to several widths, and the best mixture found for each size.

What training leaves behind for `nearfar pack` (LLM-QFA, arXiv 2405.20202): the latents W in bf16, for every matrix and
width b a pair A_b [r, K], B_b [N, r], and a frontier of assignments with their sizes and losses.  The matrix of width b
is Q_b(W + B_b A_b): the pair goes into the rounding, so that nothing of it is left beside the packed matrix.

It is a GGUF file of the architecture "nearfar-master" that no engine runs: the tensors of a `bitnet` model in floats,
`lora.{matrix}.{width}.a` and `.b` in f32, its keys, and those below.  An assignment is a text with one letter a matrix,
the embedding first: "8tt34..." (WIDTHS).  Written by nearfar_cloud/training/multi; imports the ground floor only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.config import MASTER, ModelConfig
from nearfar.errors import UnsupportedError, WeightsError
from nearfar.gguf_reader import BLOCKS, GGUFFile, TensorType
from nearfar.gguf_writer import GGUFWriter
from nearfar.quant import dequantize, n_bytes, pack_ternary, quantize, round_to_trits
from nearfar.weights import check_tensors, layer_tensors

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

# Letter of a width -> the type that a packed file holds it in.
WIDTHS: dict[str, TensorType] = {
    "t": TensorType.TQ1_0,
    "3": TensorType.Q3_K,
    "4": TensorType.Q4_0,
    "8": TensorType.Q8_0,
}
EMBEDDING_WIDTHS = "48"
EMBEDDING = "token_embd"
ARCH = "bitnet"  # of the models that are packed
PREFIX = "nearfar.master."
MAX_POINTS, MAX_RANK = 4096, 256


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix that gets a width; `name` without ".weight", `shape` [N, K]."""

    name: str
    shape: tuple[int, int]

    @property
    def widths(self) -> str:
        return EMBEDDING_WIDTHS if self.name == EMBEDDING else "".join(WIDTHS)

    def n_bytes(self, width: str) -> int:
        return n_bytes(WIDTHS[width], self.shape)


@dataclass(frozen=True, slots=True)
class Point:
    """An assignment of the frontier, and its loss (nats a token of held-out answers) when it was searched."""

    assignment: str
    loss: float


def bits(width: str) -> float:
    """Bits a weight takes in the file, its share of the scales included."""
    weights, size = BLOCKS[WIDTHS[width]]
    return 8 * size / weights


def with_pair(w: F32, a: F32, b: F32) -> F32:
    """W [N, K], A [r, K], B [N, r] -> W + B A.  Column by column: the order of the sums is a part of the result."""
    for i in range(len(a)):
        w = w + b[:, i : i + 1] * a[i : i + 1]
    return w


def pack_matrix(w: F32, width: str) -> U8:
    """f32 [N, K] -> raw bytes of the width's type."""
    kind = WIDTHS[width]
    if width == "t":
        return pack_ternary(*round_to_trits(w), kind)
    return quantize(w, kind)


class Master:
    """An open master file, checked; made by `open`."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self.file, self.config = file, config
        self.matrices = matrices(config)
        self.frontier = _frontier(file.metadata, self.matrices)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Master:
        """Open and check every tensor and key.

        Raises FileError and GGUFError (the container), WeightsError (what is missing, misshapen or out of range),
        UnsupportedError (a GGUF file that is no master).
        """
        file = GGUFFile.open(path)
        try:
            if file.metadata.get("general.architecture") != MASTER:
                found = str(file.metadata.get("general.architecture"))[:40]
                raise UnsupportedError(f"architecture {found!r}: expected {MASTER!r}, as `nearfar train-multi` writes")
            embedding = file.tensors.get(f"{EMBEDDING}.weight")
            config = ModelConfig.from_metadata(
                {**file.metadata, "general.architecture": ARCH}, embedding.shape[0] if embedding else 1
            )
            check_tensors(file, config)
            _check_pairs(file, matrices(config))
            return cls(file, config)
        except (WeightsError, UnsupportedError) as e:
            raise type(e)(f"{file.path}: {e}") from None

    def packed(self, matrix: Matrix, width: str) -> U8:
        """Raw bytes of one matrix at one width."""
        w = self._f32(f"{matrix.name}.weight")
        if matrix.name != EMBEDDING:
            w = with_pair(w, *(self._f32(name) for name in pair_names(matrix.name, width)))
        return pack_matrix(w, width)

    def _f32(self, name: str) -> F32:
        info = self.file.tensors[name]
        return dequantize(self.file.raw(name), info.type, info.shape)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Master:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def matrices(config: ModelConfig) -> tuple[Matrix, ...]:
    """The matrices in the order of an assignment's letters: the embedding, then layer by layer."""
    found = [Matrix(EMBEDDING, (config.n_vocab, config.d_model))]
    for i in range(config.n_layers):
        for name, shape in layer_tensors(config, i).items():
            if len(shape) == 2:
                found.append(Matrix(name.removesuffix(".weight"), (shape[0], shape[1])))
    return tuple(found)


def pair_names(matrix: str, width: str) -> tuple[str, str]:
    """The tensors A and B of one matrix and width."""
    return f"lora.{matrix}.{width}.a", f"lora.{matrix}.{width}.b"


def add_frontier(writer: GGUFWriter, points: Sequence[Point]) -> None:
    """The keys of the frontier."""
    writer.add(f"{PREFIX}assignments", [p.assignment for p in points])
    writer.add(f"{PREFIX}losses", np.array([p.loss for p in points], np.float32))


def is_assignment(text: object, of: Sequence[Matrix]) -> bool:
    """Whether `text` names a width that each matrix can have."""
    return (
        isinstance(text, str)
        and len(text) == len(of)
        and all(width in m.widths for width, m in zip(text, of, strict=True))
    )


def _frontier(meta: Mapping[str, Any], of: Sequence[Matrix]) -> tuple[Point, ...]:
    texts, losses = meta.get(f"{PREFIX}assignments"), meta.get(f"{PREFIX}losses")
    if not isinstance(texts, list) or not isinstance(losses, list) or not 1 <= len(texts) <= MAX_POINTS:
        raise WeightsError(f"{PREFIX}assignments, {PREFIX}losses: expected lists of 1..{MAX_POINTS} points")
    if len(texts) != len(losses):
        raise WeightsError(f"the frontier has {len(texts)} assignments and {len(losses)} losses: expected as many")
    for text, loss in zip(texts, losses, strict=True):
        if not is_assignment(text, of):
            raise WeightsError(
                f"assignment {str(text)[:80]!r}: expected {len(of)} letters, the first of "
                f"{EMBEDDING_WIDTHS}, the others of {''.join(WIDTHS)}"
            )
        if not isinstance(loss, float) or not math.isfinite(loss):
            raise WeightsError(f"loss {str(loss)[:40]} of the frontier: expected a finite number")
    return tuple(Point(text, loss) for text, loss in zip(texts, losses, strict=True))


def _check_pairs(file: GGUFFile, of: Sequence[Matrix]) -> None:
    for m in of:
        for width in m.widths:
            if m.shape[1] % BLOCKS[WIDTHS[width]][0]:
                raise WeightsError(
                    f"{m.name} is {list(m.shape)}: expected rows of whole blocks of {WIDTHS[width].name}"
                )
    for name, shape, rank in _pairs(file, of):
        info = file.tensors.get(name)
        if info is None:
            raise WeightsError(f"no tensor {name}: a master has a pair for each matrix and width; is it complete?")
        if info.type is not TensorType.F32 or info.shape != shape or not 1 <= rank <= MAX_RANK:
            raise WeightsError(
                f"{name} is {info.type.name} {list(info.shape)}: expected F32 {list(shape)}, rank 1..{MAX_RANK}"
            )
        if not np.isfinite(dequantize(file.raw(name), info.type, info.shape)).all():
            raise WeightsError(f"{name} holds a number that is not finite")


def _pairs(file: GGUFFile, of: Sequence[Matrix]) -> Iterator[tuple[str, tuple[int, int], int]]:
    """Name, shape and rank of every tensor of a pair; the rank is that of A."""
    for m in of[1:]:
        for width in m.widths:
            a, b = pair_names(m.name, width)
            rank = file.tensors[a].shape[0] if a in file.tensors else 1
            yield a, (rank, m.shape[1]), rank
            yield b, (m.shape[0], rank), rank
