"""`nearfar split`: a model becomes a device half and an upper half."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfar.arguments import whole
from nearfar.cli.show import bars, config_of, parts_of, size
from nearfar.cli.verbs import Verbs, model_path, new_parser

LONGEST_TEXT = 8192  # tokens of a text that channels are chosen by

if TYPE_CHECKING:
    from nearfar.halves import Halves
    from nearfar.weights import Weights
    from nearfar.wire.golden import Golden


def add_verb(verbs: Verbs) -> None:
    parser = new_parser(
        verbs,
        "split",
        "cut a model into a device half and an upper half",
        "nearfar split nano --at 4",
        "nearfar split model.gguf --at 8 --make-exit --out halves/ --text calibration.txt",
        "nearfar split model.gguf --at 16 --rows-at 8",
        detail="The device half has the layers [0, K), the tokenizer and the exits up to layer K, where it must have "
        "one; alone it is a model of its own. The upper half has the layers [K, L) and the head, and takes rows. The "
        "whole model serves in place of either. With --rows-at R rows leave the device earlier, "
        "and both halves have the layers [R, K).",
    )
    parser.add_argument("model", help="nano, or the path of a GGUF file")
    parser.add_argument(
        "--at", type=whole(1, 1023), required=True, metavar="K", help="where the device half ends, at an exit"
    )
    parser.add_argument(
        "--rows-at", type=whole(1, 1023), metavar="R", help="the first layer of the upper half, R <= K (default: K)"
    )
    parser.add_argument("--out", default=".", metavar="DIR", help="folder of the two files (default: this one)")
    parser.add_argument("--make-exit", action="store_true", help="where layer K has no exit: one that is not trained")
    parser.add_argument("--text", metavar="FILE", help="choose the channels that rows carry beside their codes by it")
    parser.add_argument(
        "--no-test", action="store_true", help="compute nothing: no channels, no self-test (for models beyond memory)"
    )
    parser.add_argument("--threads", type=whole(1, 256), metavar="N", help="threads of the engine")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from nearfar.halves import checked_rows_at, exits_below, split
    from nearfar.weights import Weights
    from nearfar.wire.golden import as_json

    with Weights.open(model_path(args.model)) as model:
        exits_below(model, args.at, make_exit=args.make_exit)  # says no before anything is computed
        rows_at = checked_rows_at(args.at, args.rows_at)
        channels, golden = ((), []) if args.no_test else _probe(model, rows_at, args)
        halves = split(
            model,
            args.at,
            Path(args.out),
            rows_at=rows_at,
            make_exit=args.make_exit,
            outliers=channels,
            golden=as_json(golden) if golden else "",
        )
    facts = _facts(halves, channels, golden)
    print(json.dumps(facts, ensure_ascii=False) if args.json else _picture(halves, facts))
    return 0


def _probe(model: Weights, rows_at: int, args: argparse.Namespace) -> tuple[tuple[int, ...], list[Golden]]:
    """Outlier channels and self-test, from the whole model."""
    from nearfar.eval.perplexity import read_text
    from nearfar.lower import open_lower
    from nearfar.options import EngineOptions
    from nearfar.probes import TEXTS, channels, golden
    from nearfar.tokenizer import tokenizer_from_metadata

    tokenizer = tokenizer_from_metadata(model.file.metadata)
    prompts = [tokenizer.encode(text) for text in TEXTS]
    texts = [tokenizer.encode(read_text(Path(args.text)))[:LONGEST_TEXT]] if args.text else prompts
    lower = open_lower(model, options=EngineOptions(threads=args.threads, cache="off"))
    found = channels(lower, rows_at, texts)
    return found, golden(lower, rows_at, prompts, found)


def _facts(halves: Halves, channels: tuple[int, ...], golden: list[Golden]) -> dict[str, Any]:
    facts: dict[str, Any] = {"fingerprint": halves.fingerprint.hex()}
    for role, path in (("device", halves.device), ("upper", halves.upper)):
        facts[role] = {"path": str(path), "bytes": path.stat().st_size}
    return facts | {"outlier_channels": list(channels), "golden": len(golden)}


def _picture(halves: Halves, facts: dict[str, Any]) -> str:
    """Both halves from bottom to top, with what travels between them."""
    from nearfar.gguf_reader import GGUFFile
    from nearfar.wire.codec import Codec
    from nearfar.wire.messages import CodecId, CodecSpec

    with GGUFFile.open(halves.device) as device, GGUFFile.open(halves.upper) as upper:
        c, parts = config_of(device), {"device": parts_of(device), "upper": parts_of(upper)}
        assert not isinstance(c, str), c
        longest = max(p.n_bytes for found in parts.values() for p in found)
        spec = CodecSpec(CodecId.INT8_OS, outliers=tuple(facts["outlier_channels"]))
        row = Codec.of(spec, c.d_model).row_bytes
        lines = [f"{halves.device} · {size(facts['device']['bytes'])} · layers [0, {c.split_layer})"]
        lines += [*bars(parts["device"], c, longest), ""]
        n = len(facts["outlier_channels"])
        beside = f", {n} channel{'s' * (n != 1)} of them as fp16" if n else ""
        early = f" below layer {c.row_layer}" if c.row_layer < c.split_layer else ""
        lines += [f"       ↓ a row of {c.d_model} numbers for each token{early}: {row} bytes as int8{beside}", ""]
        lines += [f"{halves.upper} · {size(facts['upper']['bytes'])} · layers [{c.row_layer}, {c.n_layers})"]
        lines += [*bars(parts["upper"], config_of(upper), longest), ""]
    tests = f", a self-test of {facts['golden']} prompts" if facts["golden"] else ", no self-test"
    return "\n".join([*lines, f"fingerprint of the pair {facts['fingerprint'][:16]}{tests}"])
