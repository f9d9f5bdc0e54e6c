"""A model that is ready to be served: an engine over it, its tokenizer, what its file says of chats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from nearfar.errors import FileError, TokenizerError, UsageError
from nearfar.tokenizer import Tokenizer, tokenizer_from_metadata
from nearfar.weights import Weights
from nearfar_cloud.engine import Engine
from nearfar_cloud.executors.base import Uppers
from nearfar_cloud.executors.local import KV, NO_UPPERS, LocalExecutor, kv_dtype
from nearfar_cloud.gateway.hf_tokenizer import folder_metadata
from nearfar_cloud.gateway.service import Core
from nearfar_cloud.kv.pool import BLOCK, n_blocks_of
from nearfar_cloud.model.attention import head_bytes
from nearfar_cloud.model.hf import is_mixture, load_folder
from nearfar_cloud.model.loader import Loaded, load_gguf, open_gguf
from nearfar_cloud.model.packed import FORMS, Packed, can_pack, pack_folder, pack_gguf
from nearfar_cloud.scheduling.compose import Composer
from nearfar_cloud.scheduling.spec import Speculation
from nearfar_cloud.scheduling.standard import standard

Form = Literal["file", "bf16", "w8", "q8_0", "q4_0", "fp32"]
SHIPPED = "nano"
MOST_CONTEXTS = 64  # whole contexts that the default number of blocks holds at most


@dataclass(frozen=True)
class Served:
    """What the gateway stands on."""

    name: str
    engine: Core
    tokenizer: Tokenizer | None  # None: upper layers alone, which read no text
    meta: Mapping[str, Any]  # keys as in a GGUF file
    weights: Weights | None = None  # of a GGUF file

    @property
    def n_ctx(self) -> int:
        """Positions of one prompt with its answer."""
        return min(self.engine.facts.n_ctx, BLOCK * self.engine.n_blocks)


def open_served(
    model: str,
    *,
    name: str | None = None,
    form: Form | None = None,
    kv: KV = "auto",
    kv_bytes: int = 1 << 29,
    prefix_cache: bool = True,
    hidden_share: tuple[int, int] | None = None,
) -> Served:
    """`model`: nano, the path of a GGUF file, or a folder as Hugging Face writes it.

    `form`: of the weights.  "file": as the GGUF file has them, in the device's kernels, with the device's tokens;
    "bf16": as most folders have them; "w8", "q8_0", "q4_0": a folder's, rounded; "fp32": in torch, as are mixtures of
    experts.  None: "file" for files, "bf16" for folders where the extension is built, else "fp32".
    `kv`: keys and values as the form has them, or "int8": half the memory, other tokens.
    `kv_bytes`: memory for them; `prefix_cache`: whether they serve later requests that begin alike.
    `hidden_share`: a layer, and how many percent of that memory are for rows that enter there or above alone.
    Raises FileError, UnsupportedError, UsageError.
    """
    described = describe(model, name, form)
    return described.served_by(_engine(_load(described.path, form), kv, kv_bytes, prefix_cache, hidden_share))


@dataclass(frozen=True)
class Described:
    """A model of which everything is known but its weights."""

    path: Path
    name: str
    tokenizer: Tokenizer | None
    meta: Mapping[str, Any]
    weights: Weights | None = None

    def served_by(self, engine: Core) -> Served:
        return Served(self.name, engine, self.tokenizer, self.meta, self.weights)


def describe(model: str, name: str | None = None, form: Form | None = None) -> Described:
    """`model`, the `form` that it is to have and errors as of `open_served`."""
    path = Path(str(files("nearfar") / "models" / f"{SHIPPED}.gguf")) if model == SHIPPED else Path(model)
    meta: Mapping[str, Any]
    weights = None
    if path.is_dir():
        if form == "file":
            raise UsageError(
                f"{path}: weights as they are in the file are served of GGUF files, of folders {', '.join(FORMS)}"
            )
        meta = folder_metadata(path)
    elif path.is_file():
        if form in FORMS and form != "bf16":
            raise UsageError(f"{path}: {form} is made of folders; a GGUF file is served as it is, as fp32 or bf16")
        # Stays open: a large vocabulary is read from the file's map as it is needed.
        weights = open_gguf(path)
        meta = weights.file.metadata
    else:
        expected = f"{SHIPPED!r} (the shipped model), the path of a GGUF file, or a folder from Hugging Face"
        raise FileError(f"{model}: no such file; expected {expected}")
    reads_text = weights is None or weights.config.role == "full"
    try:
        tokenizer = tokenizer_from_metadata(meta) if reads_text else None
        return Described(path, name or _name(path), tokenizer, meta, weights)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error


def _load(path: Path, form: Form | None) -> Loaded | Packed:
    if path.is_dir():
        return _load_folder(path, form)
    as_it_is = form == "file" or (form is None and can_pack())
    return pack_gguf(path) if as_it_is else load_gguf(path, form or "fp32")


def _load_folder(path: Path, form: Form | None) -> Loaded | Packed:
    dense = not is_mixture(path)
    if form is None:
        form = "bf16" if dense and can_pack("bf16") else "fp32"
    if form == "fp32" or (form == "bf16" and not (dense and can_pack("bf16"))):
        return load_folder(path, form)
    return pack_folder(path, form)


def _name(path: Path) -> str:
    return path.stem if path.suffix == ".gguf" else path.resolve().name


def _engine(
    loaded: Loaded | Packed, kv: KV, kv_bytes: int, prefix_cache: bool, hidden_share: tuple[int, int] | None
) -> Engine:
    c, uppers, for_all = loaded.config, NO_UPPERS, kv_bytes
    a_layer = 2 * c.n_kv_heads * head_bytes(c.head_dim, kv_dtype(loaded, kv))  # of a block
    most = MOST_CONTEXTS * n_blocks_of(c.n_ctx)
    if hidden_share is not None:
        layer, percent = hidden_share
        if not c.layers[0] < layer < c.layers[1]:
            raise UsageError(
                f"memory for rows that enter at layer {layer}: expected a layer inside of the model, "
                f"{c.layers[0] + 1}..{c.layers[1] - 1}"
            )
        for_rows = kv_bytes * percent // 100
        uppers, for_all = Uppers(min(for_rows // (a_layer * (c.layers[1] - layer)), most), layer), kv_bytes - for_rows
    a_block = a_layer * (c.layers[1] - c.layers[0])
    n_whole = min(for_all // a_block, most)
    if n_whole < 2:
        raise UsageError(f"{for_all} bytes for keys and values: this model needs at least {2 * a_block}")
    swap_bytes = kv_bytes // 2
    return Engine(
        LocalExecutor(
            loaded, n_whole + uppers.n, kv=kv, swap_bytes=swap_bytes, prefix_cache=prefix_cache, uppers=uppers
        ),
        Composer(standard(), "cheaper"),
        speculation=Speculation(),
    )
