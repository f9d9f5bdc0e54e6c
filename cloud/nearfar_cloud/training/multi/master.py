"""Pairs, latents and frontier -> the master that `nearfar pack` reads.  nearfar/master.py says what the file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nearfar.config import MASTER
from nearfar.errors import ConfigError
from nearfar.gguf_reader import TensorType
from nearfar.gguf_writer import GGUFWriter
from nearfar.master import EMBEDDING, WIDTHS, Point, add_frontier, pair_names
from nearfar_cloud.training.export import add_keys
from nearfar_cloud.training.multi.linear import MultiDecoder
from nearfar_cloud.training.tokenizer import RowTokenizer


def write_master(
    model: MultiDecoder, tokenizer: RowTokenizer, path: Path, *, card: Mapping[str, Any], points: Sequence[Point]
) -> Path:
    """Write the master, whole or not at all.  Raises ConfigError for pairs beside the matrix, FileError by the disk."""
    if model.form != "inside":
        raise ConfigError("pairs beside the matrix cannot be packed: a stock file has no place for them")
    writer = GGUFWriter(path)
    add_keys(writer, model, tokenizer, card, MASTER)
    add_frontier(writer, points)
    writer.add_tensor(f"{EMBEDDING}.weight", model.embedding.detach().numpy(), TensorType.BF16)
    for i, block in enumerate(model.blocks):
        for norm in ("attn_norm", "attn_sub_norm", "ffn_norm", "ffn_sub_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", getattr(block, norm).gain.detach().numpy())
    for i, linear in model.linears():
        for name in linear.names:
            matrix = f"blk.{i}.{name}"
            writer.add_tensor(f"{matrix}.weight", linear.latent_of(name).detach().numpy(), TensorType.BF16)
            for width in WIDTHS:
                a, b = pair_names(matrix, width)
                writer.add_tensor(a, linear.a[name + width].detach().numpy())
                writer.add_tensor(b, linear.b[name + width].detach().numpy())
    writer.add_tensor("output_norm.weight", model.output_norm.gain.detach().numpy())
    return writer.write()
