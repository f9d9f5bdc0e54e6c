"""Latents -> the GGUF file that the device runs.  Last stop of the training walk: trainer -> export -> card.

The file is llama.cpp's `bitnet` architecture, so that an outside engine runs it too; what that engine does not know
(exits, rows, card) are keys, which it ignores, and never tensors, which it refuses.  Trits are packed as they are with
the scale that training multiplied with: nothing is estimated again.  Exits get tau = 1 (they never fire) until
`nearfar calibrate` has measured this very file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nearfar.errors import ConfigError
from nearfar.forms import CHAT_TEMPLATE, ROWS_VERSION
from nearfar.gguf_reader import TensorType, ValueType
from nearfar.gguf_writer import GGUFWriter
from nearfar.quant import TERNARY, pack_ternary, quantize
from nearfar_cloud.training.bitlinear import BitLinear
from nearfar_cloud.training.model import Decoder
from nearfar_cloud.training.tokenizer import PRE_TOKENIZER, RowTokenizer

ARCH = "bitnet"
FILE_VERSION = 1  # the key nearfar.version
FILE_TYPES = {TensorType.TQ1_0: 36, TensorType.TQ2_0: 37}  # general.file_type: llama.cpp's "mostly TQ1_0 / TQ2_0"
FLOATS = (TensorType.F32, TensorType.F16, TensorType.BF16)  # trits times scale, written out: to compare engines


def export(
    model: Decoder,
    tokenizer: RowTokenizer,
    path: Path,
    *,
    card: Mapping[str, Any],
    linear: TensorType = TensorType.TQ2_0,
    embedding: TensorType = TensorType.Q8_0,
) -> Path:
    """Write the model as one GGUF file, whole or not at all.

    `card` is the JSON of card.py; its "train" part becomes the keys `nearfar.train.*`.  Raises ConfigError where the
    shape does not fit ternary blocks or the tokenizer, FileError where the disk says no.  A float twin becomes F16.
    """
    model = model.cpu()
    shape = model.shape
    if shape.weights == "float":
        linear = TensorType.F16
    if linear in TERNARY and not shape.packs:
        raise ConfigError(f"d_model={shape.d_model}, d_ff={shape.d_ff}: ternary blocks need multiples of 256")
    if tokenizer.n_vocab != shape.n_vocab:
        raise ConfigError(f"the tokenizer has {tokenizer.n_vocab} tokens, the model {shape.n_vocab}")
    writer = GGUFWriter(path)
    add_keys(writer, model, tokenizer, card)
    if linear in FILE_TYPES:
        writer.add("general.file_type", FILE_TYPES[linear])
    _add_tensors(writer, model, linear, embedding)
    return writer.write()


def add_keys(
    writer: GGUFWriter, model: Decoder, tokenizer: RowTokenizer, card: Mapping[str, Any], architecture: str = ARCH
) -> None:
    """Every key of the file but its type: sizes, tokenizer, exits, card."""
    writer.add("general.architecture", architecture)
    _add_sizes(writer, model, str(card.get("name", "nearfar")))
    _add_tokenizer(writer, tokenizer)
    _add_nearfar(writer, model, card)


def _add_sizes(writer: GGUFWriter, model: Decoder, name: str) -> None:
    shape = model.shape
    writer.add("general.name", name)
    writer.add("general.license", "apache-2.0")
    writer.add("general.quantization_version", 2)
    writer.add(f"{ARCH}.block_count", shape.n_layers)
    writer.add(f"{ARCH}.context_length", shape.n_ctx)
    writer.add(f"{ARCH}.embedding_length", shape.d_model)
    writer.add(f"{ARCH}.feed_forward_length", shape.d_ff)
    writer.add(f"{ARCH}.attention.head_count", shape.n_heads)
    writer.add(f"{ARCH}.attention.head_count_kv", shape.n_kv_heads)
    writer.add(f"{ARCH}.attention.layer_norm_rms_epsilon", shape.norm_eps)
    writer.add(f"{ARCH}.rope.dimension_count", shape.head_dim)
    writer.add(f"{ARCH}.rope.freq_base", shape.rope_base)
    writer.add(f"{ARCH}.vocab_size", shape.n_vocab)


def _add_tokenizer(writer: GGUFWriter, tokenizer: RowTokenizer) -> None:
    tokens, merges, types = tokenizer.gguf()
    writer.add("tokenizer.ggml.model", "gpt2")
    writer.add("tokenizer.ggml.pre", PRE_TOKENIZER)
    writer.add("tokenizer.ggml.tokens", tokens)
    writer.add("tokenizer.ggml.token_type", types)
    writer.add("tokenizer.ggml.merges", merges, ValueType.STRING)
    writer.add("tokenizer.ggml.eos_token_id", tokenizer.eos_id)
    writer.add("tokenizer.ggml.padding_token_id", tokenizer.pad_id)
    writer.add("tokenizer.ggml.add_bos_token", False)
    writer.add("tokenizer.chat_template", CHAT_TEMPLATE)


def _add_nearfar(writer: GGUFWriter, model: Decoder, card: Mapping[str, Any]) -> None:
    exits = model.shape.exits
    writer.add("nearfar.version", FILE_VERSION)
    writer.add("nearfar.role", "full")
    writer.add("nearfar.rows", ROWS_VERSION)
    writer.add("nearfar.ffn_act", "silu")
    if exits:
        writer.add("nearfar.split_layer", exits[-1])
        writer.add("nearfar.exit_layers", list(exits))
    for e in exits:
        writer.add(f"nearfar.exit.{e}.kind", "norm")
        writer.add(f"nearfar.exit.{e}.head", "tied")
        writer.add(f"nearfar.exit.{e}.norm", model.exit_gain(e).detach().numpy())
        writer.add(f"nearfar.exit.{e}.temperature", 1.0)
        writer.add(f"nearfar.exit.{e}.tau", 1.0)
    for key, value in card.get("train", {}).items():
        if isinstance(value, (str, bool, int, float)):
            writer.add(f"nearfar.train.{key}", value)
    writer.add("nearfar.card", json.dumps(card, ensure_ascii=False, separators=(",", ":")))


def _add_tensors(writer: GGUFWriter, model: Decoder, linear: TensorType, embedding: TensorType) -> None:
    table = model.embedding.detach().float().numpy()
    writer.add_tensor("token_embd.weight", quantize(table, embedding), embedding, table.shape)
    for i, block in enumerate(model.blocks):
        for name in ("attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", getattr(block, name).gain.detach().numpy())
        for module in block.children():
            if isinstance(module, BitLinear):
                if not module.ternary:
                    for name, part in zip(module.names, module.latent.detach().split(module.sizes), strict=True):
                        writer.add_tensor(f"blk.{i}.{name}.weight", part.numpy(), linear)
                    continue
                for name, (trits, scale) in module.matrices().items():
                    if linear in FLOATS:
                        writer.add_tensor(f"blk.{i}.{name}.weight", trits.float().numpy() * scale, linear)
                    else:
                        raw = pack_ternary(trits.numpy(), scale, linear)
                        writer.add_tensor(f"blk.{i}.{name}.weight", raw, linear, tuple(trits.shape))
    writer.add_tensor("output_norm.weight", model.output_norm.gain.detach().numpy())
