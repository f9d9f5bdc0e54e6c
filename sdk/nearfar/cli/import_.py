"""`nearfar import`: a checkpoint of another program becomes a GGUF file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nearfar.cli.verbs import Verbs, new_parser
from nearfar.importers import import_model


def add_verb(verbs: Verbs) -> None:
    parser = new_parser(
        verbs,
        "import",
        "convert a llama2.c checkpoint to GGUF",
        "nearfar import stories260K.bin --tokenizer tok512.bin -o stories260K.gguf",
        "nearfar run --model stories260K.gguf --raw 'Once upon a time'",
        detail="Weights go over number for number, as F32.",
    )
    parser.add_argument("checkpoint", help="llama2.c version 0: model.bin")
    parser.add_argument("--tokenizer", metavar="FILE", help="default: tokN.bin or tokenizer.bin beside it")
    parser.add_argument("-o", "--output", metavar="FILE", help="default: the checkpoint's name with .gguf")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    output = Path(args.output) if args.output else Path(args.checkpoint).with_suffix(".gguf")
    config = import_model(args.checkpoint, output, args.tokenizer)
    n_bytes = output.stat().st_size
    if args.json:
        print(json.dumps({"file": str(output), "bytes": n_bytes, "architecture": config.arch}))
    else:
        print(f"{output}: {n_bytes:,} bytes, {config.arch} with {config.n_layers} layers")
    return 0
