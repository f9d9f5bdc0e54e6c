"""Models of well-known sizes with random weights, as real GGUF files: speed depends on sizes and types, not on values.

    "llama-1b:Q4_K" -> Recipe -> write -> a file that our engine and llama.cpp open

The blocks are random bytes under constant scales, drawn so that every matrix has weights of standard deviation
1 / sqrt(columns): activations neither die nor explode.  The text that such a model writes is nonsense.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nearfar.config import ModelConfig
from nearfar.errors import GGUFError, UsageError
from nearfar.gguf_reader import BLOCKS, GGUFFile, TensorType
from nearfar.gguf_writer import GGUFWriter
from nearfar.quant import n_bytes
from nearfar.weights import layer_tensors

U8 = NDArray[np.uint8]

SIZES = {
    "bitnet-2b": ModelConfig("bitnet", 30, 2560, 20, 5, 128, 6912, 128_256, 4096, rope_base=500_000.0),
    "llama-1b": ModelConfig("llama", 16, 2048, 32, 8, 64, 8192, 128_256, 4096, rope_base=500_000.0),
    "qwen-0.5b": ModelConfig("qwen2", 24, 896, 14, 2, 64, 4864, 151_936, 4096, rope_base=1_000_000.0),
    "tiny": ModelConfig("bitnet", 2, 256, 4, 2, 64, 512, 512, 1024),  # for a first try, and for tests
}
TYPES = tuple(
    TensorType[name]
    for name in ("TQ1_0", "TQ2_0", "Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16", "BF16")
)
HEAD = TensorType.Q4_0  # of the embedding, which is the head as well


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which random model: sizes by name, the type of the layers' matrices, the type of embedding and head."""

    size: str
    type: TensorType
    head: TensorType = HEAD

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise UsageError(f"random model {self.size!r}: expected one of {', '.join(SIZES)}")
        c = self.config
        for kind, widths in ((self.type, (c.d_model, c.d_q, c.d_ff)), (self.head, (c.d_model,))):
            if kind not in TYPES:
                raise UsageError(f"random weights of {kind.name}: expected one of {', '.join(t.name for t in TYPES)}")
            if bad := [n for n in widths if n % BLOCKS[kind][0]]:
                raise UsageError(
                    f"{self.size} has rows of {bad[0]} weights and {kind.name} blocks of {BLOCKS[kind][0]}: "
                    f"expected one of {', '.join(t.name for t in TYPES if all(n % BLOCKS[t][0] == 0 for n in widths))}"
                )

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """`SIZE:TYPE` or `SIZE:TYPE:HEAD`, for example bitnet-2b:TQ2_0 or llama-1b:Q4_K:Q6_K.  Raises UsageError."""
        size, *kinds = text.split(":")
        if not 1 <= len(kinds) <= 2 or any(kind.upper() not in TensorType.__members__ for kind in kinds):
            raise UsageError(
                f"random model {text!r}: expected SIZE:TYPE or SIZE:TYPE:HEAD, sizes {', '.join(SIZES)}, "
                f"types {', '.join(t.name for t in TYPES)}"
            )
        return cls(size, *(TensorType[kind.upper()] for kind in kinds))

    @property
    def config(self) -> ModelConfig:
        return SIZES[self.size]

    @property
    def name(self) -> str:
        """What every output says of it."""
        return f"random {self.size}, {self.type.name}, embedding and tied head {self.head.name}"


def default_folder() -> Path:
    """Where random models are kept unless the user names a folder: one of this user's own under the temporary one."""
    return Path(tempfile.gettempdir()) / f"nearfar-bench-{os.getuid() if hasattr(os, 'getuid') else 'user'}"


def cached(recipe: Recipe, folder: Path) -> Path:
    """The file of `recipe` in `folder`, written if it is not there yet.  Raises FileError."""
    path = folder / f"{recipe.size}-{recipe.type.name}-{recipe.head.name}.gguf"
    if not _is_whole(path, recipe):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write(recipe, path)
    return path


def write(recipe: Recipe, path: Path, *, seed: int = 0) -> Path:
    """Write the model; one tensor at a time is in memory.  A gigabyte takes some seconds.  Raises FileError."""
    c, rng = recipe.config, np.random.default_rng(seed)
    w = GGUFWriter(path)
    add_header(w, c, recipe.name)
    matrices = {"token_embd.weight": ((c.n_vocab, c.d_model), recipe.head)}
    vectors = {"output_norm.weight": c.d_model}
    for i in range(c.n_layers):
        for name, shape in layer_tensors(c, i).items():
            if len(shape) == 2:
                matrices[name] = ((shape[0], shape[1]), recipe.type)
            else:
                vectors[name] = shape[0]
    for name, n in vectors.items():
        fill = 0.0 if name.endswith(".bias") else 1.0
        w.add_tensor(name, np.full(n, fill, np.float32))
    for name, (shape, kind) in matrices.items():
        w.add_made(name, lambda shape=shape, kind=kind: random_blocks(rng, shape, kind), kind, shape)  # type: ignore[misc]
    return w.write()


def random_blocks(rng: np.random.Generator, shape: tuple[int, int], kind: TensorType) -> U8:
    """Raw bytes of a matrix [rows, cols] of `kind`, weights of mean about 0 and deviation about 1 / sqrt(cols)."""
    std = shape[1] ** -0.5
    raw = np.frombuffer(rng.bytes(n_bytes(kind, shape)), np.uint8).copy()
    if kind in (TensorType.F16, TensorType.BF16):
        return _floats(raw.view("<u2"), std, kind).view(np.uint8)
    blocks = raw.reshape(-1, BLOCKS[kind][1])
    if kind is TensorType.TQ1_0:
        blocks[:] = _TQ1_0_BYTES[blocks]
    elif kind is TensorType.TQ2_0:
        blocks[:] = _TQ2_0_BYTES[blocks]
    for at, unit in _SCALES[kind].items():
        blocks[:, at : at + 2] = np.array([std * unit], "<f2").view(np.uint8)
    return raw


def _trit_bytes() -> tuple[U8, U8]:
    """Any byte -> a byte that the ternary types write: TQ1_0's rounded-up base 3, TQ2_0's fields of 0, 1, 2."""
    every = np.arange(256, dtype=np.int64)
    five = ((every % 243) * 256 + 242) // 243
    fields = [every >> 2 * f & 3 for f in range(4)]
    four = sum(np.where(field == 3, 1, field) << 2 * f for f, field in enumerate(fields))
    return five.astype(np.uint8), np.asarray(four).astype(np.uint8)


_TQ1_0_BYTES, _TQ2_0_BYTES = _trit_bytes()

# Where a block keeps its f16 scales, and their values for weights of deviation 1: the deviation of the codes (times
# their integer scales) inverted; a minimum is the scale times the mean code, so that the weights' mean is about 0.
_SCALES: dict[TensorType, dict[int, float]] = {
    TensorType.TQ1_0: {52: 1.22},
    TensorType.TQ2_0: {64: 1.41},
    TensorType.Q2_K: {80: 1 / 14, 82: 1.5 / 14},
    TensorType.Q3_K: {108: 1 / 43},
    TensorType.Q4_0: {0: 1 / 4.6},
    TensorType.Q4_1: {0: 1 / 4.6, 2: -7.5 / 4.6},
    TensorType.Q4_K: {0: 1 / 259, 2: 7.5 / 259},
    TensorType.Q5_K: {0: 1 / 527, 2: 15.5 / 527},
    TensorType.Q6_K: {208: 1 / 1370},
    TensorType.Q8_0: {0: 1 / 74},
}


def _floats(bits: NDArray[np.uint16], std: float, kind: TensorType) -> NDArray[np.uint16]:
    """Random signs and mantissas under one exponent, so |w| is even over [2^e, 2^(e+1)): deviation 1.53 * 2^e."""
    e = round(np.log2(std / 1.53))
    mantissa, bias = (10, 15) if kind is TensorType.F16 else (7, 127)
    keep = np.uint16(0x8000 | ((1 << mantissa) - 1))
    return bits & keep | np.uint16((e + bias) << mantissa)


def _is_whole(path: Path, recipe: Recipe) -> bool:
    """True if `path` holds this recipe's model: written under the final name only when complete."""
    if not path.is_file():
        return False
    try:
        with GGUFFile.open(path) as file:
            return bool(file.metadata.get("general.name") == recipe.name)
    except GGUFError:
        return False


def add_header(w: GGUFWriter, c: ModelConfig, name: str) -> None:
    """The keys of a model of these sizes, and of the smallest tokenizer."""
    w.add("general.architecture", c.arch)
    w.add("general.name", name)
    for key, value in {
        "block_count": c.n_layers,
        "context_length": c.n_ctx,
        "embedding_length": c.d_model,
        "feed_forward_length": c.d_ff,
        "attention.head_count": c.n_heads,
        "attention.head_count_kv": c.n_kv_heads,
        "attention.layer_norm_rms_epsilon": c.norm_eps,
        "rope.freq_base": c.rope_base,
        "rope.dimension_count": c.head_dim,
    }.items():
        w.add(f"{c.arch}.{key}", value)
    if c.d_q != c.d_model:
        w.add(f"{c.arch}.attention.key_length", c.head_dim)
        w.add(f"{c.arch}.attention.value_length", c.head_dim)
    _add_tokenizer(w, c.n_vocab)


def _add_tokenizer(w: GGUFWriter, n_vocab: int) -> None:
    """The smallest byte-level tokenizer that llama.cpp opens: 256 bytes, one merge, an end, and unused tokens."""
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's printable stand-ins for bytes
    words = [chr(b) for b in letters] + [chr(256 + i) for i in range(256 - len(letters))]
    words += ["th", "<|end|>"]
    w.add("tokenizer.ggml.model", "gpt2")
    w.add("tokenizer.ggml.pre", "smollm")
    w.add("tokenizer.ggml.tokens", [*words, *(f"[unused{i}]" for i in range(n_vocab - len(words)))])
    kinds = np.full(n_vocab, 5, np.int32)  # 5: unused
    kinds[:257], kinds[257] = 1, 3  # normal, control
    w.add("tokenizer.ggml.token_type", kinds)
    w.add("tokenizer.ggml.merges", ["t h"])
    w.add("tokenizer.ggml.eos_token_id", 257)
    w.add("tokenizer.ggml.add_bos_token", False)
