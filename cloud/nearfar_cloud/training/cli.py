"""`nearfar train`: found by the sdk's command line through the entry-point group `nearfar.verbs`.

torch is imported when the verb runs, never before.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nearfar import env
from nearfar.errors import MissingExtraError, UsageError

RECIPE_NAMES = ("nano", "pico", "xs", "small", "teacher")  # recipe.RECIPES, known here without importing it


def add_verb(verbs: Any) -> None:
    """Add `train` to the subparsers of `nearfar`."""
    parser = verbs.add_parser(
        "train",
        help="train a model of a recipe on the corpora of a folder",
        description="Train a model of a recipe on the corpora of a folder, and write it as a GGUF file with its card.",
        epilog="examples:\n"
        "  nearfar train nano --budget 2h --data corpora --out runs/nano\n"
        "  nearfar train nano --budget 2h --data corpora --out runs/nano --resume\n"
        "  nearfar train small --teacher runs/teacher --budget 2h --data corpora --device cuda\n"
        "  nearfar train pico --tokens 200000 --data corpora --out runs/pico --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", choices=RECIPE_NAMES, help="sizes and course of the training")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--budget", metavar="TIME", help="seconds of training: 90s, 30m, 2h")
    length.add_argument("--tokens", metavar="N", type=int, help="tokens instead of time: such a run can be repeated")
    parser.add_argument("--data", metavar="DIR", help="folder of the corpora (default: NEARFAR_DATA)")
    parser.add_argument("--out", metavar="DIR", help="folder of the run (default: runs/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument(
        "--without", metavar="SOURCE", action="append", default=[], help="leave out a source (repeatable)"
    )
    parser.add_argument(
        "--weights", choices=("ternary", "float"), help="float: the twin that rounds nothing (default: the recipe's)"
    )
    parser.add_argument(
        "--teacher", metavar="RUN", help="distill a model with the same tokenizer: a run's folder or a checkpoint"
    )
    parser.add_argument("--threads", metavar="N", type=int, help="threads (default: all cores)")
    parser.add_argument("--device", metavar="NAME", default="cpu", help="cpu, or cuda where there is a GPU")
    parser.add_argument("--no-compile", action="store_true", help="run without torch's compiler (slower)")
    parser.add_argument("--json", action="store_true", help="progress as JSON lines")
    parser.set_defaults(run=run)


def ready(verb: str, data: str | None) -> Path:
    """The folder of the corpora, `data` or NEARFAR_DATA; for every verb that trains, before torch loads.

    Raises MissingExtraError, UsageError.
    """
    for package in ("torch", "tokenizers", "safetensors", "hassil", "yaml"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "train", f"nearfar {verb}")
    folder = data or env.data_dir()
    if not folder:
        raise UsageError(f"nearfar {verb} needs the folder of the corpora: --data DIR, or NEARFAR_DATA")
    if not Path(folder).is_dir():
        raise UsageError(f"--data {folder}: no such folder")
    # Threads that wait at a barrier sleep instead of spinning: on shared cores the difference was fivefold.  Read by
    # the OpenMP runtime when torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return Path(folder)


def run(args: argparse.Namespace) -> int:
    """Train and print the path of the GGUF file."""
    data = ready("train", args.data)

    from nearfar_cloud.training.recipe import RECIPES
    from nearfar_cloud.training.run import Options, checked_device, set_threads, train
    from nearfar_cloud.training.schedule import Budget, parse_seconds

    set_threads(args.threads or env.threads())
    budget = Budget(tokens=args.tokens) if args.tokens is not None else Budget(seconds=parse_seconds(args.budget))
    options = Options(
        data=data,
        out=Path(args.out or f"runs/{args.recipe}"),
        budget=budget,
        resume=args.resume,
        without=tuple(args.without),
        compiled=not args.no_compile,
        device=checked_device(args.device),
        teacher=Path(args.teacher) if args.teacher else None,
        as_json=args.json,
    )
    recipe = RECIPES[args.recipe]
    if args.weights:
        recipe = replace(recipe, shape=replace(recipe.shape, weights=args.weights))
    path = train(recipe, options)
    if not args.json:
        print(path)
    return 0
