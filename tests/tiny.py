"""Small random models as real GGUF files, written with the `gguf` package: the material of most tests.

No download, no training: weights are drawn from a seed, scaled so that rows neither die nor explode.  The widths are
multiples of 256, because the ternary types and the K-quants come in blocks of 256; the tokenizer is a byte-level BPE
with a few merges and two control tokens, so that llama.cpp opens the files too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

ARCHITECTURES = ("llama", "qwen2", "qwen3", "bitnet")
FLOAT_TYPES = ("F32", "F16", "BF16")
QUANTIZED_TYPES = ("Q8_0", "Q4_0", "Q4_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0")
WEIGHT_TYPES = FLOAT_TYPES + QUANTIZED_TYPES
NATIVE_TYPES = WEIGHT_TYPES
END, USER = "<|e|>", "<|u|>"
MERGES = ("t h", "th e", "i n", "a n", "Ġ t", "Ġt he", "o n", "e r", "Ġ a", "an d")


def byte_alphabet() -> list[str]:
    """GPT-2's 256 printable stand-ins, in byte order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(other)) for b in range(256)]


def write_tiny(
    path: Path,
    arch: str = "llama",
    weight_type: str = "F32",
    *,
    seed: int = 0,
    n_layers: int = 4,
    d_model: int = 256,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int | None = None,
    d_ff: int = 512,
    n_vocab: int = 320,
    n_ctx: int = 512,
    exits: Sequence[int] = (),
    tau: float = 0.5,
    embedding_type: str = "F32",
    tied: bool = True,
    pre: str = "smollm",
    extra: dict[str, object] | None = None,
) -> Path:
    """Write a model and return its path.  `exits` adds exit norms as keys, each with threshold `tau`."""
    rng = np.random.default_rng(seed)
    head_dim = head_dim or d_model // n_heads
    w = gguf.GGUFWriter(str(path), "bitnet" if arch == "bitnet-b1.58" else arch)
    if arch == "bitnet-b1.58":
        w.kv_data[0]["general.architecture"].value = arch
    key = lambda name: f"{arch}.{name}"  # noqa: E731
    w.add_uint32(key("block_count"), n_layers)
    w.add_uint32(key("context_length"), n_ctx)
    w.add_uint32(key("embedding_length"), d_model)
    w.add_uint32(key("feed_forward_length"), d_ff)
    w.add_uint32(key("attention.head_count"), n_heads)
    w.add_uint32(key("attention.head_count_kv"), n_kv_heads)
    w.add_float32(key("attention.layer_norm_rms_epsilon"), 1e-5)
    w.add_float32(key("rope.freq_base"), 10_000.0)
    if arch == "qwen3" or head_dim * n_heads != d_model:
        w.add_uint32(key("attention.key_length"), head_dim)
        w.add_uint32(key("attention.value_length"), head_dim)
    _add_tokenizer(w, n_vocab, pre)

    def gain(n: int) -> np.ndarray:
        return rng.uniform(0.5, 1.5, n).astype(np.float32)

    if exits:
        w.add_array("nearfar.exit_layers", [int(e) for e in exits])
        for e in exits:
            w.add_string(f"nearfar.exit.{e}.kind", "norm")
            w.add_string(f"nearfar.exit.{e}.head", "tied")
            w.add_float32(f"nearfar.exit.{e}.tau", tau)
            w.add_array(f"nearfar.exit.{e}.norm", gain(d_model).tolist())
    for name, value in (extra or {}).items():
        {str: w.add_string, int: w.add_uint32, float: w.add_float32, list: w.add_array}[type(value)](name, value)

    def matrix(name: str, rows: int, cols: int, kind: str) -> None:
        raw, quantized = random_matrix(rng, rows, cols, kind)
        w.add_tensor(name, raw, raw_dtype=quantized)

    matrix("token_embd.weight", n_vocab, d_model, embedding_type)
    if not tied:
        matrix("output.weight", n_vocab, d_model, embedding_type)
    w.add_tensor("output_norm.weight", gain(d_model))
    d_q, d_kv = n_heads * head_dim, n_kv_heads * head_dim
    for i in range(n_layers):
        block = f"blk.{i}"
        w.add_tensor(f"{block}.attn_norm.weight", gain(d_model))
        w.add_tensor(f"{block}.ffn_norm.weight", gain(d_model))
        for part, rows, cols in (
            ("attn_q", d_q, d_model),
            ("attn_k", d_kv, d_model),
            ("attn_v", d_kv, d_model),
            ("attn_output", d_model, d_q),
            ("ffn_gate", d_ff, d_model),
            ("ffn_up", d_ff, d_model),
            ("ffn_down", d_model, d_ff),
        ):
            matrix(f"{block}.{part}.weight", rows, cols, weight_type)
        if arch == "qwen2":
            for part, rows in (("attn_q", d_q), ("attn_k", d_kv), ("attn_v", d_kv)):
                w.add_tensor(f"{block}.{part}.bias", rng.normal(0, 0.3, rows).astype(np.float32))
        if arch == "qwen3":
            w.add_tensor(f"{block}.attn_q_norm.weight", gain(head_dim))
            w.add_tensor(f"{block}.attn_k_norm.weight", gain(head_dim))
        if arch.startswith("bitnet"):
            w.add_tensor(f"{block}.attn_sub_norm.weight", gain(d_q))
            w.add_tensor(f"{block}.ffn_sub_norm.weight", gain(d_ff))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def random_matrix(rng: np.random.Generator, rows: int, cols: int, kind: str) -> tuple[np.ndarray, Type]:
    """Random weights [rows, cols] of standard deviation about 1 / sqrt(cols), in the bytes of type `kind`."""
    quantized = Type[kind]
    std = cols**-0.5
    if kind.endswith("_K"):  # the gguf package reads these but does not write them: draw the blocks themselves
        return _random_k_blocks(rng, rows, cols, kind, std), quantized
    if kind in ("TQ1_0", "TQ2_0"):
        x = (rng.integers(-1, 2, (rows, cols)) * std * 1.2).astype(np.float32)
        x[:, ::256] = std * 1.2  # no block without a weight: its scale would be lost
    else:
        x = rng.normal(0, std, (rows, cols)).astype(np.float32)
    if kind == "F32":
        return x, quantized
    return gguf.quants.quantize(x, quantized), quantized


def _random_k_blocks(rng: np.random.Generator, rows: int, cols: int, kind: str, std: float) -> np.ndarray:
    n = rows * cols // 256

    def f16(value: float) -> np.ndarray:
        return np.full((n, 1), value, np.float16).view(np.uint8)

    def octets(count: int) -> np.ndarray:
        return rng.integers(0, 256, (n, count), np.uint8)

    # dmin / d is the mean code: the weights' mean is about 0
    if kind == "Q2_K":  # 4-bit scales and mins, 2-bit codes, d, dmin
        d = std / 14
        blocks = [octets(16), octets(64), f16(d), f16(1.5 * d)]
    elif kind == "Q3_K":  # high bits, low 2 bits, 6-bit scales, d
        blocks = [octets(32), octets(64), octets(12), f16(std / 43)]
    elif kind == "Q4_K":  # d, dmin, 12 bytes of 6-bit scales and mins, 128 bytes of codes
        d = std / 200
        blocks = [f16(d), f16(7.5 * d), octets(12), octets(128)]
    elif kind == "Q5_K":  # the same with 32 bytes of high bits before the codes
        d = std / 527
        blocks = [f16(d), f16(15.5 * d), octets(12), octets(32), octets(128)]
    else:  # Q6_K: low 4 bits, high 2 bits, 16 int8 scales, d
        blocks = [octets(128), octets(64), octets(16), f16(std / 1370)]
    return np.concatenate(blocks, axis=1).reshape(rows, -1)


def _add_tokenizer(w: gguf.GGUFWriter, n_vocab: int, pre: str) -> None:
    merged = [pair.replace(" ", "") for pair in MERGES]
    words = [*byte_alphabet(), *merged, END, USER]
    fill = [f"[unused{i}]" for i in range(n_vocab - len(words))]
    kinds = [1] * (256 + len(merged)) + [3, 3] + [5] * len(fill)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(pre)
    w.add_token_list([*words, *fill])
    w.add_token_types(kinds)
    w.add_token_merges(list(MERGES))
    w.add_eos_token_id(256 + len(merged))
    w.add_add_bos_token(False)
