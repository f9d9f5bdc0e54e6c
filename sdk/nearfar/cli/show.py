"""`nearfar show`: what a GGUF file holds, from its header alone.  No weight is read."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nearfar.cli.verbs import SHIPPED, Verbs, model_path, new_parser
from nearfar.config import ModelConfig
from nearfar.errors import UnsupportedError
from nearfar.gguf_reader import READABLE, GGUFFile, TensorInfo, TensorType
from nearfar.weights import vocabulary_of

BAR = 24  # characters of the longest bar
LONGEST_VALUE = 70


def add_verb(verbs: Verbs) -> None:
    parser = new_parser(
        verbs,
        "show",
        "show a GGUF file's header, layers, types and bytes per token",
        "nearfar show nano",
        "nearfar show model.gguf --keys",
        "nearfar show model.gguf --json",
    )
    parser.add_argument("model", nargs="?", default=SHIPPED, help="path of a GGUF file (default: the shipped model)")
    parser.add_argument("--keys", action="store_true", help="also print every key of the header")
    parser.add_argument("--tensors", action="store_true", help="also print every tensor")
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Part:
    """Tensors that are read together: one layer, the embedding, a head."""

    name: str
    tensors: tuple[TensorInfo, ...]

    @property
    def n_bytes(self) -> int:
        return sum(t.n_bytes for t in self.tensors)

    @property
    def n_weights(self) -> int:
        return sum(count(t.shape) for t in self.tensors)

    @property
    def types(self) -> str:
        """The types of its matrices, the most bytes first."""
        n_bytes: dict[str, int] = {}
        for t in self.tensors:
            if len(t.shape) > 1 or len(self.tensors) == 1:
                n_bytes[t.type.name] = n_bytes.get(t.type.name, 0) + t.n_bytes
        return " ".join(sorted(n_bytes, key=lambda name: -n_bytes[name]))


def run(args: argparse.Namespace) -> int:
    with GGUFFile.open(model_path(args.model)) as file:
        if args.json:
            print(json.dumps(facts(file, with_keys=True), ensure_ascii=False, default=str))
            return 0
        print(picture(file))
        if args.keys:
            print(keys(file))
        if args.tensors:
            print(tensors(file))
    return 0


def config_of(file: GGUFFile) -> ModelConfig | str:
    """The model's sizes, or one sentence on why our engine does not run it."""
    vocabulary = vocabulary_of(file)
    if vocabulary is None or "general.architecture" not in file.metadata:
        return "holds no model"
    if "tokenizer.ggml.model" not in file.metadata and file.metadata.get("nearfar.role") != "upper":
        return "holds no tokenizer"
    if unread := sorted({t.type.name for t in file.tensors.values() if t.type not in READABLE}):
        known = ", ".join(t.name for t in TensorType if t in READABLE)
        return f"tensors of type {', '.join(unread)}: this engine reads {known}"
    try:
        return ModelConfig.from_metadata(file.metadata, vocabulary.shape[0])
    except UnsupportedError as error:
        return str(error)


def parts_of(file: GGUFFile) -> list[Part]:
    """Embedding, layers in order, heads and the rest."""
    layers: dict[int, list[TensorInfo]] = {}
    others: dict[str, list[TensorInfo]] = {}
    for name, tensor in file.tensors.items():
        if found := re.match(r"blk\.(\d+)\.", name):
            layers.setdefault(int(found[1]), []).append(tensor)
        else:
            part = re.sub(r"(exit\.\d+)\.(down|up)$", r"\1", name.removesuffix(".weight").removesuffix(".norm"))
            others.setdefault(part, []).append(tensor)
    first = [Part("token_embd", tuple(others.pop("token_embd")))] if "token_embd" in others else []
    middle = [Part(f"layer {i}", tuple(layers[i])) for i in sorted(layers)]
    return first + middle + [Part(name, tuple(found)) for name, found in others.items()]


def bytes_per_token(file: GGUFFile, config: ModelConfig) -> dict[str, int]:
    """Bytes of weights that one decoded token reads up to each head; "kv": what a position adds to the cache (f16)."""
    parts, (first, last) = {part.name: part for part in parts_of(file)}, config.layers
    head = parts["output" if "output" in parts else "token_embd"].n_bytes
    row = parts["token_embd"].n_bytes // config.n_vocab if first == 0 else 0
    depth = [parts.get(f"layer {i}", Part("", ())).n_bytes for i in range(first, last)]
    read = {}
    for e in config.exits:
        own = parts.get(f"exit.{e.layer}", Part("", ())).n_bytes
        read[f"exit.{e.layer}"] = row + sum(depth[: e.layer]) + own + head
    if config.role != "device":
        read["full"] = row + sum(depth) + head
    return {**read, "kv": 2 * 2 * len(depth) * config.d_kv}


def facts(file: GGUFFile, *, with_keys: bool) -> dict[str, Any]:
    config = config_of(file)
    found: dict[str, Any] = {
        "file": str(file.path),
        "bytes": file.path.stat().st_size,
        "gguf_version": file.version,
        "architecture": file.metadata.get("general.architecture"),
        "runs": not isinstance(config, str),
        "parts": [
            {"name": p.name, "types": p.types, "weights": p.n_weights, "bytes": p.n_bytes} for p in parts_of(file)
        ],
        "tensors": [
            {"name": t.name, "type": t.type.name, "shape": list(t.shape), "bytes": t.n_bytes}
            for t in file.tensors.values()
        ],
    }
    if isinstance(config, str):
        found["why_not"] = config
    else:
        found["config"] = {name: getattr(config, name) for name in config.__dataclass_fields__ if name != "exits"}
        found["exits"] = [{"layer": e.layer, "tau": e.tau, "temperature": e.temperature} for e in config.exits]
        found["bytes_per_token"] = bytes_per_token(file, config)
    if with_keys:
        found["keys"] = {key: shown(value) for key, value in file.metadata.items()}
    return found


def picture(file: GGUFFile) -> str:
    """The model from bottom to top as a person would draw it."""
    config = config_of(file)
    name = file.metadata.get("general.name", file.path.stem)
    n_weights = sum(count(t.shape) for t in file.tensors.values())
    lines = [
        f"{shown(name)} · {file.path.name} · {size(file.path.stat().st_size)} · GGUF v{file.version} · "
        f"{shown(file.metadata.get('general.architecture', 'no architecture'))} · {n_weights / 1e6:.2f} M weights"
    ]
    if isinstance(config, str):
        lines.append(config)
    else:
        lines += [
            f"{config.n_layers} layers of width {config.d_model}, {config.n_heads} heads on {config.n_kv_heads} of "
            f"{config.head_dim}, feed-forward {config.d_ff} ({config.ffn_act}), vocabulary {config.n_vocab}, "
            f"context {config.n_ctx}"
        ]
        if config.role != "full":
            lines.append(
                f"{half_of(config)} · fingerprint of the pair {str(file.metadata.get('nearfar.fingerprint'))[:16]}"
            )
    lines += ["", *bars(parts_of(file), config)]
    if not isinstance(config, str):
        lines += ["", *reads(bytes_per_token(file, config))]
    return "\n".join(lines)


def where_cut(k: int, rows_at: int) -> str:
    """Where the device half ends, and where rows leave it, if that is earlier."""
    return f"cut at layer {k}" + (f", rows of layer {rows_at}" if rows_at < k else "")


def half_of(config: ModelConfig) -> str:
    """Which layers of a split model a file holds, for people."""
    first, last = config.layers
    return f"{config.role} half: layers [{first}, {last}) of {config.n_layers}"


def bars(parts: list[Part], config: ModelConfig | str, longest: int = 0) -> Iterable[str]:
    """A line for each part; `longest`: bytes of the longest bar (default: of the largest part)."""
    longest = longest or max((p.n_bytes for p in parts), default=1)
    exits = {} if isinstance(config, str) else {f"layer {e.layer - 1}": e for e in config.exits}
    for part in parts:
        bar = "█" * max(1, round(BAR * part.n_bytes / longest))
        yield f"  {shown(part.name, 24):<14} {part.types:<10} {size(part.n_bytes):>9}  {bar}"
        if exit_config := exits.get(part.name):
            when = "off: not calibrated" if exit_config.tau >= 1 else f"leaves at confidence > {exit_config.tau:.3f}"
            if not isinstance(config, str) and exit_config == config.last_exit:
                when += "; without an upper half, ends every token"
            yield f"  └─ exit {exit_config.layer}: {when}"


def reads(read: dict[str, int]) -> Iterable[str]:
    kv = read.pop("kv")
    full = max(read.values())
    for head, n in read.items():
        where = "full depth" if head == "full" else head.replace(".", " ")
        yield f"  one token to {where:<10} reads {size(n):>9} of weights{'' if n == full else f' ({n / full:.0%})'}"
    yield f"  and adds {size(kv)} to the cache (f16)"


def keys(file: GGUFFile) -> str:
    return "\n" + "\n".join(f"  {key} = {shown(value)}" for key, value in file.metadata.items())


def tensors(file: GGUFFile) -> str:
    found = file.tensors.values()
    return "\n" + "\n".join(
        f"  {shown(t.name, 40):<34} {t.type.name:<6} {list(t.shape)} {size(t.n_bytes)}" for t in found
    )


def shown(value: Any, longest: int = LONGEST_VALUE) -> str:
    """A header value on one line: long lists by their length, strings cut and without control characters."""
    if not isinstance(value, (str, int, float, bool)) and hasattr(value, "__len__"):
        if len(value) > 8:
            return f"{len(value)} values"
        value = list(value)
    text = str(value).encode("utf-8", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def size(n: int) -> str:
    """Bytes as people read them (1 kB = 1000 B)."""
    if n < 1000:
        return f"{n} B"
    return f"{n / 1000:.1f} kB" if n < 1_000_000 else f"{n / 1_000_000:.2f} MB"


def count(shape: tuple[int, ...]) -> int:
    n = 1
    for length in shape:
        n *= length
    return n
