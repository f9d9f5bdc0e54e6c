"""One model's weights: a GGUF file whose every tensor has been compared with the model it names.

Imports the ground floor only.  Behind `Weights.open` nothing is missing, misshapen or not finite.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from nearfar.config import ModelConfig
from nearfar.errors import UnsupportedError, WeightsError
from nearfar.gguf_reader import READABLE, GGUFFile, TensorType
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
        """f32 [D]: the RMSNorm gain of "final" or of an early exit, "exit.{layer}"."""
        if head == "final":
            return self.f32("output_norm.weight")
        if self.has(f"{head}.norm.weight"):
            return self.f32(f"{head}.norm.weight")
        gain = self.file.metadata.get(f"nearfar.{head}.norm")
        if gain is None:
            raise WeightsError(f"{self.file.path} has no head {head!r}: its exits are {self.exit_names}")
        return np.array(gain, dtype=np.float32)

    @property
    def head_name(self) -> str:
        """The matrix that turns normed rows into logits; the embedding where the two are tied."""
        return "output.weight" if self.has("output.weight") else "token_embd.weight"

    @property
    def exit_names(self) -> list[str]:
        return [f"exit.{e.layer}" for e in self.config.exits]

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
    embedding = file.tensors.get("token_embd.weight")
    config = ModelConfig.from_metadata(file.metadata, embedding.shape[0] if embedding else 1)
    if embedding is None:
        raise WeightsError("no tensor token_embd.weight: the file holds no model (only a tokenizer?)")
    return config


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
    shapes: dict[str, Shape] = {"output.weight": (c.n_vocab, c.d_model)}
    shapes |= {f"exit.{e.layer}.norm.weight": (c.d_model,) for e in c.exits}
    if c.arch == "llama":
        shapes["rope_freqs.weight"] = (c.head_dim // 2,)
    if c.has_sub_norms:  # BitNet's one scale a matrix beside the matrix
        matrices = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        shapes |= {f"blk.{i}.{m}.scale": (1,) for i in range(c.n_layers) for m in matrices}
    return shapes


def check_tensors(file: GGUFFile, c: ModelConfig, *, vouched: bool = False) -> None:
    """Every tensor of the model is there, in its shape, of a type that can be read, and finite.

    `vouched`: the matrices were found finite before.  Raises WeightsError, UnsupportedError.
    """
    needed: dict[str, Shape] = {"token_embd.weight": (c.n_vocab, c.d_model), "output_norm.weight": (c.d_model,)}
    for i in range(c.n_layers):
        needed |= layer_tensors(c, i)
    missing = [name for name in needed if name not in file.tensors]
    if missing:
        raise WeightsError(
            f"no tensor {missing[0]}{f' (and {len(missing) - 1} more)' if missing[1:] else ''}: "
            f"{c.arch} with {c.n_layers} layers needs it; is the file complete?"
        )
    known = needed | {name: shape for name, shape in optional_tensors(c).items() if name in file.tensors}
    for name in _unknown_parts(file, c, known):
        raise WeightsError(f"tensor {name} has no place in a {c.arch} model of {c.n_layers} layers")
    for name, shape in known.items():
        _check_tensor(file, name, shape, vouched and len(shape) == 2)
    _check_exits(file, c)


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
