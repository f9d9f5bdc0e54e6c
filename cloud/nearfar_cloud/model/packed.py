"""Whole layers in the engine of the device: matrices as their file holds them, or rounded from any folder.

    GGUF file ──────────────┐
    Hugging Face folder ────┴─> Packed ─> NativeDecoder: embed, layers over paged blocks, logits

The kernels are the device's (`native/src/model.h`), so on the same file a row has the bits that it has there, whatever
the batch; and norms, rotations, rounding and products of a layer are one call instead of thirty.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nearfar import env
from nearfar.config import ModelConfig
from nearfar.errors import UnsupportedError
from nearfar.gguf_reader import TensorType
from nearfar.quant import quantize
from nearfar.weights import Weights
from nearfar_cloud.model.attention import KVStore, Spans, bits
from nearfar_cloud.model.decoder import rms_norm
from nearfar_cloud.model.hf import is_mixture, load_folder
from nearfar_cloud.model.loader import Loaded, open_gguf

try:
    from nearfar_native import _core as native
except ImportError:  # not built: models are dequantised instead
    native = None  # type: ignore[assignment]

Bytes = NDArray[np.uint8]
# What a folder can be packed to: the type its matrices are handed over in, and what the engine makes of floats.
FORMS = {
    "bf16": (TensorType.BF16, "bf16"),  # bf16 that multiply bf16
    "w8": (TensorType.F32, "w8"),  # 8 bits, a scale a row; the inputs of a product likewise
    "q8_0": (TensorType.Q8_0, "exact"),  # 8 bits, a scale for 32 weights
    "q4_0": (TensorType.Q4_0, "exact"),
}


@dataclass(frozen=True)
class Packed:
    """Matrices by GGUF name as (type, rows, cols, bytes), and vectors; `weights` is the open file behind them."""

    config: ModelConfig
    matrices: Mapping[str, tuple[int, int, int, Bytes]]
    vectors: Mapping[str, NDArray[np.float32]]
    rope_pairs: str
    fingerprint: str
    floats: str = "exact"  # what becomes of matrices of floats: "exact", "bf16", "w8"
    weights: Weights | None = None

    @property
    def kv_dtype(self) -> torch.dtype:
        """Of keys and values: as on a device (f16), or what tiles multiply, where weights were rounded anyway."""
        tiles = native is not None and _isa() == "amx" and self.config.head_dim % 32 == 0
        return torch.bfloat16 if tiles and self.weights is None else torch.float16

    def kernels(self, store: KVStore) -> str:
        """Whose bits: "" where all kernels have the same, else the kernels' name."""
        own_order = self.floats == "bf16" or store.k[0].dtype in (torch.bfloat16, torch.uint8)
        return _isa() if native is not None and own_order else ""


def can_pack(form: str = "file") -> bool:
    """Whether the extension is built, and has kernels for `form` that are worth it."""
    if native is None:
        return False
    return form not in ("bf16", "w8") or form in native.float_forms(_isa())


def _isa() -> str:
    """The kernels that this process uses: NEARFAR_ISA, or the best that the CPU has."""
    return native.isa(env.isa() or "")


def pack_gguf(path: str | os.PathLike[str]) -> Packed:
    """A file as it is, with the bits of the device.  Raises what `load_gguf` raises."""
    weights = open_gguf(path)
    digest, matrices, vectors = sha256(b"packed"), {}, {}
    for name, info in weights.file.tensors.items():
        if name.startswith("exit."):  # a device's business
            continue
        kind, shape, raw = weights.raw(name)
        digest.update(f"{name} {kind} {shape}".encode())
        digest.update(raw.tobytes())
        if len(info.shape) == 2:
            matrices[name] = (int(kind), *shape, raw)
        else:
            vectors[name] = weights.f32(name)
    vectors["final"] = weights.norm_gain("final")
    # The engine wants an embedding.  An upper half may have none: the head stands in, ModelFacts.check refuses ids.
    matrices.setdefault("token_embd.weight", matrices[weights.head_name])
    c = weights.config
    fingerprint = digest.hexdigest()
    return Packed(c, matrices, vectors, c.rope_pairs, fingerprint, weights=weights)  # type: ignore[arg-type]


def pack_folder(folder: str | os.PathLike[str], form: str = "q8_0") -> Packed:
    """A Hugging Face folder with its matrices rounded to `form`.  Raises what load_folder raises, UnsupportedError."""
    if is_mixture(folder):
        raise UnsupportedError(f"{folder}: a mixture of experts is not packed; serve it as fp32 or bf16")
    return pack(load_folder(folder, "bf16" if form == "bf16" else "fp32"), form)


def pack(loaded: Loaded, form: str) -> Packed:
    """A dense model with its matrices rounded to `form`.  UnsupportedError: there is no such form.

    The inputs of a product are rounded like the weights, so sums of codes are whole numbers.
    """
    assert loaded.experts is None
    if form not in FORMS:
        raise UnsupportedError(f"form {form!r}: expected one of {', '.join(FORMS)}")
    kind, floats = FORMS[form]
    matrices, vectors = {}, {}
    for name, x in loaded.tensors.items():
        if x.ndim == 2:
            matrices[name] = (int(kind), *x.shape, _raw(x, kind))
        else:
            vectors[name] = x.float().numpy()
    vectors["final"] = vectors["output_norm.weight"]
    fingerprint = sha256(f"{form} {loaded.fingerprint}".encode()).hexdigest()
    return Packed(loaded.config, matrices, vectors, loaded.rope_pairs, fingerprint, floats)


def _raw(x: Tensor, kind: TensorType) -> Bytes:
    """The bytes of a matrix in a type of GGUF."""
    if kind == TensorType.BF16:
        return x.to(torch.bfloat16).contiguous().view(torch.uint8).numpy().reshape(-1)
    if kind == TensorType.F32:
        return x.contiguous().view(torch.uint8).numpy().reshape(-1)
    return quantize(x.numpy(), kind).reshape(-1)


class NativeDecoder:
    """`Decoder` on the compiled engine, on as many threads as torch has.  Rows are f32."""

    dtype = torch.float32

    def __init__(self, packed: Packed) -> None:
        if native is None:
            raise UnsupportedError("packed models need the compiled extension nearfar_native, which is not built")
        c = self.config = packed.config
        self._packed = packed  # the embedding is read from its bytes
        self._gain = torch.tensor(packed.vectors["final"])
        spec = native.ModelSpec(**c.engine_spec(packed.rope_pairs))
        threads = torch.get_num_threads()
        self._model = native.Model(
            spec, packed.matrices, packed.vectors, {}, *c.layers, threads, isa=_isa(), floats=packed.floats
        )
        self._store: native.PagedStore | None = None

    def attach(self, store: KVStore) -> str:
        """Keep keys and values there; the name of the attention."""
        dtype = store.k[0].dtype
        # The engine counts from layer 0: where an upper half has no layers, the first that it has stands in, untouched.
        k, v = ([bits(x) for x in [blocks[0]] * store.first + blocks] for blocks in (store.k, store.v))
        if dtype == torch.uint8:
            self._store = native.PagedStore(k, v, store.head_dim)
        else:
            self._store = native.PagedStore(k, v, bf16=dtype == torch.bfloat16)
        return "native"

    def embed(self, ids: Tensor) -> Tensor:
        """ids int64 [R] -> f32 [R, D]"""
        return torch.from_numpy(self._model.embed(ids.numpy().astype(np.int32)))

    def forward(self, x: Tensor, spans: Spans, first: int, last: int) -> Tensor:
        """x f32 [R, D] of the spans -> f32 [R, D] behind the layers [first, last)"""
        assert self._store is not None, "attach a store first"
        rows = np.ascontiguousarray(x.numpy())
        return torch.from_numpy(self._model.forward_paged(rows, self._store, spans.table, spans.blocks, first, last))

    def normed(self, x: Tensor) -> Tensor:
        """Rows of the last layer f32 [S, D] -> as the head reads them f32 [S, D]"""
        return rms_norm(x, self._gain, self.config.norm_eps)

    def logits(self, x: Tensor) -> Tensor:
        """x f32 [S, D] -> f32 [S, V]"""
        return torch.from_numpy(self._model.logits(np.ascontiguousarray(x.numpy()), "final"))
