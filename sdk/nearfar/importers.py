"""`nearfar import`: checkpoints of other programs become GGUF files, number for number.

One format so far: llama2.c version 0 (Karpathy), which has no magic number: seven int32 (dim, hidden, layers, heads,
key-value heads, vocabulary, positions; a negative vocabulary means that the head is a matrix of its own), then all
weights as f32, tensor kind by tensor kind over the layers.  It rotates adjacent pairs, as GGUF's `llama` does, so q and
k go over as they are (checkpoints from Hugging Face, which rotate halves, would need their rows permuted).
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nearfar.config import ModelConfig
from nearfar.errors import FileError, TokenizerError, UnsupportedError, UsageError, WeightsError
from nearfar.gguf_reader import MAGIC
from nearfar.gguf_writer import GGUFWriter, Value
from nearfar.weights import Weights

F32 = NDArray[np.float32]

ROPE_BASE = 10_000.0
NORM_EPS = 1e-5

# First bytes of formats that people may try, and what to say.
_OTHERS = {
    MAGIC: (UsageError, "it is a GGUF file already: run it as it is"),
    b"24ka": (UnsupportedError, "llama2.c version 1 or 2: expected version 0 (export it with --version 0)"),
    b"EOPT": (UnsupportedError, "a micro-lm: its block (LayerNorm, GELU, biases) is none of ours"),
    b"PK\x03\x04": (UnsupportedError, "a PyTorch or zip archive: expected a llama2.c checkpoint"),
}

# Token kinds of tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


@dataclass(frozen=True, slots=True)
class Llama2cHeader:
    """The seven numbers at the start of a llama2.c checkpoint."""

    dim: int
    hidden: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    n_vocab: int
    n_ctx: int
    tied: bool

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the order of the file."""
        n, d, f, kv = self.n_layers, self.dim, self.hidden, self.n_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd": (self.n_vocab, d),
            "attn_norm": (n, d),
            "attn_q": (n, d, d),
            "attn_k": (n, kv, d),
            "attn_v": (n, kv, d),
            "attn_output": (n, d, d),
            "ffn_norm": (n, d),
            "ffn_gate": (n, f, d),
            "ffn_down": (n, d, f),
            "ffn_up": (n, f, d),
            "output_norm": (d,),
            "cos": (self.n_ctx, self.head_dim // 2),
            "sin": (self.n_ctx, self.head_dim // 2),
        }
        return shapes if self.tied else shapes | {"output": (self.n_vocab, d)}


def import_model(
    src: str | os.PathLike[str], dst: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None
) -> ModelConfig:
    """Turn the llama2.c checkpoint `src` into the GGUF file `dst`, and open that once as a check.

    `tokenizer` is llama2.c's tokenizer file; left out, tok{vocabulary}.bin or tokenizer.bin beside `src`.  Raises
    FileError (missing, cut short), WeightsError, TokenizerError (the contents), UnsupportedError (another format).
    """
    src, dst = Path(src), Path(dst)
    header, tensors = read_llama2c(src)
    if dst.exists() and dst.samefile(src):
        raise UsageError(f"{dst}: source and destination are one file")
    tokens = read_llama2c_tokenizer(_find_tokenizer(src, header.n_vocab, tokenizer), header.n_vocab)
    metadata = _metadata(src.stem, header, tokens)
    ModelConfig.from_metadata(metadata, header.n_vocab)  # refused here, it leaves no file behind
    _write(dst, metadata, tensors)
    with Weights.open(dst) as weights:
        return weights.config


def read_llama2c(path: Path) -> tuple[Llama2cHeader, dict[str, F32]]:
    """Header and tensors (name -> f32, shapes as Llama2cHeader.tensors) of a version-0 checkpoint."""
    data = _read(path)
    kind, message = _OTHERS.get(data[:4], (None, ""))
    if kind is not None:
        raise kind(f"{path}: {message}")
    if len(data) < 28:
        raise WeightsError(f"{path} has {len(data)} bytes: expected a llama2.c checkpoint, which starts with 28")
    header = _header(path, struct.unpack("<7i", data[:28]))
    shapes = header.tensors()
    expected = 28 + 4 * sum(int(np.prod(shape, dtype=object)) for shape in shapes.values())
    if len(data) != expected:
        raise WeightsError(f"{path} has {len(data)} bytes, its header wants {expected}: cut short, or no llama2.c file")
    tensors, at = {}, 28
    for name, shape in shapes.items():
        n = int(np.prod(shape))
        tensors[name] = np.frombuffer(data, "<f4", n, at).reshape(shape).astype(np.float32)
        at += 4 * n
        if not np.isfinite(tensors[name]).all():
            raise WeightsError(f"{path}: {name} holds a number that is not finite")
    _check_rotation(path, header, tensors["cos"], tensors["sin"])
    return header, tensors


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise FileError(f"{path} is not a plain file")
        return path.read_bytes()
    except FileNotFoundError:
        raise FileError(f"{path}: no such file") from None
    except OSError as e:
        raise FileError(f"{path} cannot be read: {e.strerror or e}") from None


def _header(path: Path, numbers: tuple[int, ...]) -> Llama2cHeader:
    dim, hidden, n_layers, n_heads, n_kv_heads, n_vocab, n_ctx = numbers
    sizes = (dim, hidden, n_layers, n_heads, n_kv_heads, abs(n_vocab), n_ctx)
    if not all(1 <= n <= 1 << 24 for n in sizes) or dim % n_heads or n_heads % n_kv_heads or dim // n_heads % 2:
        raise WeightsError(
            f"{path} starts with {', '.join(map(str, numbers))}: as dim, hidden, layers, heads, key-value heads, "
            "vocabulary, positions of a llama2.c checkpoint they do not fit together; is it another format?"
        )
    return Llama2cHeader(dim, hidden, n_layers, n_heads, n_kv_heads, abs(n_vocab), n_ctx, tied=n_vocab > 0)


def _check_rotation(path: Path, header: Llama2cHeader, cos: F32, sin: F32) -> None:
    """The file's own tables must be those that `rope.freq_base` will give."""
    half = header.head_dim // 2
    angle = np.arange(header.n_ctx)[:, None] * ROPE_BASE ** (-np.arange(half) / half)
    off = max(float(np.abs(cos - np.cos(angle)).max()), float(np.abs(sin - np.sin(angle)).max()))
    if not off < 1e-3:
        raise UnsupportedError(f"{path}: its rotation tables are {off:.3g} away from those of base {ROPE_BASE:g}")


def _find_tokenizer(src: Path, n_vocab: int, given: str | os.PathLike[str] | None) -> Path:
    if given is not None:
        return Path(given)
    for name in (f"tok{n_vocab}.bin", "tokenizer.bin"):
        if (src.parent / name).is_file():
            return src.parent / name
    raise UsageError(f"no tok{n_vocab}.bin or tokenizer.bin beside {src}: name the tokenizer file with --tokenizer")


def read_llama2c_tokenizer(path: Path, n_vocab: int) -> list[tuple[bytes, float]]:
    """(bytes, score) of each token: i32 longest token, then n_vocab x (f32 score, i32 length, bytes)."""
    data, at, tokens = _read(path), 4, []
    for i in range(n_vocab):
        if at + 8 > len(data):
            raise TokenizerError(f"{path} ends after {i} tokens: expected {n_vocab}")
        score, n = struct.unpack_from("<fi", data, at)
        at += 8
        if not 0 <= n <= len(data) - at or score != score:
            raise TokenizerError(f"{path}: token {i} of {n} bytes with score {score}, {len(data) - at} bytes are left")
        tokens.append((data[at : at + n], score))
        at += n
    if at != len(data):
        raise TokenizerError(f"{path} goes on after {n_vocab} tokens: made for a larger vocabulary?")
    return tokens


def _metadata(name: str, h: Llama2cHeader, tokens: list[tuple[bytes, float]]) -> dict[str, Value]:
    keys: dict[str, Value] = {
        "general.architecture": "llama",
        "general.name": name,
        "llama.block_count": h.n_layers,
        "llama.context_length": h.n_ctx,
        "llama.embedding_length": h.dim,
        "llama.feed_forward_length": h.hidden,
        "llama.attention.head_count": h.n_heads,
        "llama.attention.head_count_kv": h.n_kv_heads,
        "llama.attention.layer_norm_rms_epsilon": NORM_EPS,
        "llama.rope.dimension_count": h.head_dim,
        "llama.rope.freq_base": ROPE_BASE,
        "llama.vocab_size": h.n_vocab,
    }
    return keys | _tokenizer_keys(tokens)


def _tokenizer_keys(tokens: list[tuple[bytes, float]]) -> dict[str, Value]:
    """llama2.c keeps SentencePiece's order: unknown, begin, end, 256 bytes, pieces; it writes U+2581 as a space."""
    texts = [raw.decode("utf-8", "surrogateescape").replace(" ", "\u2581") for raw, _ in tokens]
    first = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    if [t.strip("\n") for t in texts[:3]] + texts[3:259] != first:
        raise TokenizerError("expected <unk>, <s>, </s> and 256 byte tokens first: not a SentencePiece vocabulary?")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": first + texts[259:],
        "tokenizer.ggml.scores": [score for _, score in tokens],
        "tokenizer.ggml.token_type": [_UNKNOWN, _CONTROL, _CONTROL] + [_BYTE] * 256 + [_NORMAL] * (len(tokens) - 259),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": True,
    }


def _write(dst: Path, metadata: dict[str, Value], tensors: dict[str, F32]) -> None:
    w = GGUFWriter(dst)
    for key, value in metadata.items():
        w.add(key, value)
    for part, x in tensors.items():
        if part in ("token_embd", "output_norm", "output"):
            w.add_tensor(f"{part}.weight", x)
        elif part not in ("cos", "sin"):
            for i, layer in enumerate(x):
                w.add_tensor(f"blk.{i}.{part}.weight", layer)
    w.write()
