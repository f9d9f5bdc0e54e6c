"""One model's weights: a GGUF file whose every tensor has been compared with the model it names.

Imports the ground floor only.  Behind `Weights.open` nothing is missing, misshapen or not finite.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from nearfar.config import ExitConfig, ModelConfig
from nearfar.errors import UnsupportedError, UsageError, WeightsError
from nearfar.gguf_reader import READABLE, GGUFFile, TensorInfo, TensorType
from nearfar.quant import all_finite, dequantize

FLOATS = frozenset({TensorType.F32, TensorType.F16, TensorType.BF16})

Shape = tuple[int, ...]


class Weights:
    """The tensors of one model; made by `open`."""

    def __init__(self, file: GGUFFile, config: ModelConfig) -> None:
        self.file = file
        self.config = config

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, vouched: Callable[[GGUFFile], bool] | None = None) -> Weights:
        """Open a GGUF file and check presence, shape, type and scales of every tensor against its own header.

        `vouched(file)` tells whether the matrices of this very file were found finite before: a pass over all of it
        that is then not made again.

        Raises FileError and GGUFError (the container), WeightsError (tensor, expected, found), UnsupportedError (an
        architecture, a tensor type or a split file that this engine does not run).
        """
        file = GGUFFile.open(path)
        try:
            config = _read_config(file)
            check_tensors(file, config, vouched=vouched is not None and vouched(file))
        except (WeightsError, UnsupportedError) as e:
            raise type(e)(f"{file.path}: {str(e).removeprefix(f'{file.path}: ')}") from None
        return cls(file, config)

    def has(self, name: str) -> bool:
        return name in self.file.tensors

    def raw(self, name: str) -> tuple[TensorType, Shape, NDArray[np.uint8]]:
        """Type, shape (numpy order) and bytes (u8, read-only) of a tensor."""
        bytes_ = self.file.raw(name)
        info = self.file.tensors[name]
        return info.type, info.shape, bytes_

    def f32(self, name: str) -> NDArray[np.float32]:
        """A tensor as f32 of its shape: a new array."""
        kind, shape, raw = self.raw(name)
        return dequantize(raw, kind, shape)

    def norm_gain(self, head: str) -> NDArray[np.float32]:
        """f32 [D]: the RMSNorm gain of one of `heads`.  Raises UsageError for another one."""
        if head not in self.heads:
            raise UsageError(f"{self.file.path} has no head {head!r}: its heads are {', '.join(self.heads)}")
        if head == "final":
            return self.f32("output_norm.weight")
        if self.has(f"{head}.norm.weight"):
            return self.f32(f"{head}.norm.weight")
        return np.array(self.file.metadata[f"nearfar.{head}.norm"], dtype=np.float32)

    def residual(self, head: str) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """down [R, D] and up [D, R] of a head whose exit has a rank R; None for the others."""
        if all(head != f"exit.{e.layer}" or not e.rank for e in self.config.exits):
            return None
        return self.f32(f"{head}.down.weight"), self.f32(f"{head}.up.weight")

    @property
    def head_name(self) -> str:
        """The matrix that turns normed rows into logits; the embedding where the two are tied."""
        return "output.weight" if self.has("output.weight") else "token_embd.weight"

    @property
    def heads(self) -> list[str]:
        """ "exit.{layer}" of each exit, and "final" where the last layer of the model is here."""
        final = [] if self.config.role == "device" else ["final"]
        return [f"exit.{e.layer}" for e in self.config.exits] + final

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read_config(file: GGUFFile) -> ModelConfig:
    parts = file.metadata.get("split.count", 1)
    if parts != 1:
        raise UnsupportedError(f"one of {str(parts)[:40]} parts of a model: join them with llama-gguf-split --merge")
    vocabulary = vocabulary_of(file)
    config = ModelConfig.from_metadata(file.metadata, vocabulary.shape[0] if vocabulary else 1)
    if vocabulary is None:
        raise WeightsError("no tensor token_embd.weight: the file holds no model (only a tokenizer?)")
    return config


def vocabulary_of(file: GGUFFile) -> TensorInfo | None:
    """The tensor with a row for each token: the embedding, or in an upper half the head."""
    head = file.tensors.get("output.weight") if file.metadata.get("nearfar.role") == "upper" else None
    return head or file.tensors.get("token_embd.weight")


def layer_tensors(c: ModelConfig, i: int) -> dict[str, Shape]:
    """Name -> shape of the tensors that layer `i` must have."""
    d, q, kv, f = c.d_model, c.d_q, c.d_kv, c.d_ff
    shapes: dict[str, Shape] = {
        "attn_norm.weight": (d,),
        "attn_q.weight": (q, d),
        "attn_k.weight": (kv, d),
        "attn_v.weight": (kv, d),
        "attn_output.weight": (d, q),
        "ffn_norm.weight": (d,),
        "ffn_gate.weight": (f, d),
        "ffn_up.weight": (f, d),
        "ffn_down.weight": (d, f),
    }
    if c.has_qkv_bias:
        shapes |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
    if c.has_qk_norms:
        shapes |= {"attn_q_norm.weight": (c.head_dim,), "attn_k_norm.weight": (c.head_dim,)}
    if c.has_sub_norms:
        shapes |= {"attn_sub_norm.weight": (q,), "ffn_sub_norm.weight": (f,)}
    return {f"blk.{i}.{name}": shape for name, shape in shapes.items()}


def optional_tensors(c: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of the tensors that a file may have besides."""
    shapes: dict[str, Shape] = {}
    if c.role != "upper":  # which needs the head, and no embedding beside it
        shapes["output.weight"] = (c.n_vocab, c.d_model)
    shapes |= {f"exit.{e.layer}.norm.weight": (c.d_model,) for e in c.exits}
    if c.arch == "llama":
        shapes["rope_freqs.weight"] = (c.head_dim // 2,)
    if c.has_sub_norms:  # BitNet's one scale a matrix beside the matrix
        matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        shapes |= {f"blk.{i}.{m}.scale": (1,) for i in range(*c.layers) for m in matrices}
    return shapes


def device_names(names: Iterable[str], k: int) -> list[str]:
    """Of the tensors of a model those that its layers [0, k) and the exits in them compute with, in their order."""
    return [n for n in names if n in (*_BOTH, "token_embd.weight", "output.weight") or 0 <= _layer(n) < k]


def upper_names(names: Iterable[str], k: int) -> list[str]:
    """Of the tensors of a model those that its layers from `k` on and the final head compute with, in their order."""
    names = list(names)
    head = "output.weight" if "output.weight" in names else "token_embd.weight"
    return [n for n in names if n in (*_BOTH, "output_norm.weight", head) or _layer(n) >= k]


_BOTH = ("rope_freqs.weight",)


def _layer(name: str) -> int:
    """The layer of a tensor `blk.{i}.*`; -1 for others."""
    found = re.match(r"blk\.(\d{1,4})\.", name)
    return int(found[1]) if found else -1


def needed_tensors(file: GGUFFile, c: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of the tensors that a file of this role must have."""
    vocabulary = (c.n_vocab, c.d_model)
    has_head = c.role == "upper" and "output.weight" in file.tensors  # else the embedding is the head
    shapes: dict[str, Shape] = {"output.weight" if has_head else "token_embd.weight": vocabulary}
    if c.role != "device":
        shapes["output_norm.weight"] = (c.d_model,)
    for i in range(*c.layers):
        shapes |= layer_tensors(c, i)
    return shapes | residual_tensors(c.exits, c.d_model)


def residual_tensors(exits: Iterable[ExitConfig], d_model: int) -> dict[str, Shape]:
    """Name -> shape of what exits with a rank need besides their norms."""
    shapes: dict[str, Shape] = {}
    for e in exits:
        if e.rank:
            shapes[f"exit.{e.layer}.down.weight"] = (e.rank, d_model)
            shapes[f"exit.{e.layer}.up.weight"] = (d_model, e.rank)
    return shapes


def check_tensors(file: GGUFFile, c: ModelConfig, *, vouched: bool = False) -> None:
    """Every tensor of the model is there, in its shape, of a type that can be read, and finite.

    `vouched`: the matrices were found finite before.  Raises WeightsError, UnsupportedError.
    """
    needed = needed_tensors(file, c)
    missing = [name for name in needed if name not in file.tensors]
    if missing:
        raise WeightsError(
            f"no tensor {missing[0]}{f' (and {len(missing) - 1} more)' if missing[1:] else ''}: "
            f"{_named(c)} needs it; is the file complete?"
        )
    known = needed | {name: shape for name, shape in optional_tensors(c).items() if name in file.tensors}
    for name in _unknown_parts(file, c, known):
        raise WeightsError(f"tensor {name} has no place in {_named(c)}")
    for name, shape in known.items():
        _check_tensor(file, name, shape, vouched and len(shape) == 2)
    _check_exits(file, c)


def _named(c: ModelConfig) -> str:
    if c.role == "full":
        return f"a {c.arch} model of {c.n_layers} layers"
    first, last = c.layers
    return f"the {c.role} half, layers [{first}, {last}), of a {c.arch} model of {c.n_layers}"


def _unknown_parts(file: GGUFFile, c: ModelConfig, known: dict[str, Shape]) -> Iterator[str]:
    """Tensors that look like a part of the computation but that this engine would leave out."""
    for name in file.tensors:
        if name not in known and re.match(r"blk\.|output|token_|exit\.|rope_", name):
            yield name


def _check_tensor(file: GGUFFile, name: str, shape: Shape, is_finite: bool) -> None:
    info = file.tensors[name]
    if info.shape != shape:
        raise WeightsError(f"{name} is {list(info.shape)}, the header wants {list(shape)}; exported for another model?")
    if len(shape) == 1 and info.type in READABLE and info.type not in FLOATS:
        raise WeightsError(f"{name} is {info.type.name}: expected F32, F16 or BF16 for a vector")
    raw = file.raw(name)
    if not is_finite and not all_finite(raw, info.type, shape):
        raise WeightsError(f"{name} holds a {'number' if info.type in FLOATS else 'scale'} that is not finite")


def _check_exits(file: GGUFFile, c: ModelConfig) -> None:
    for e in c.exits:
        if f"exit.{e.layer}.norm.weight" in file.tensors:
            continue
        key = f"nearfar.exit.{e.layer}.norm"
        gain = file.metadata.get(key)
        if not isinstance(gain, list) or len(gain) != c.d_model or not all(isinstance(g, (int, float)) for g in gain):
            raise WeightsError(f"{key}: expected {c.d_model} numbers, the gain of the exit after layer {e.layer}")
        if not np.isfinite(np.array(gain, dtype=np.float64)).all():
            raise WeightsError(f"{key} holds a number that is not finite")
