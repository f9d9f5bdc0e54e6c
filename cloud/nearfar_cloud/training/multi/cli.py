"""`nearfar train-multi`: found by the sdk's command line through the entry-point group `nearfar.verbs`.

torch is imported when the verb runs, never before.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nearfar import env
from nearfar.errors import UsageError
from nearfar_cloud.training.cli import ready

DRAWS = ("balanced", "uniform")  # sampling.DRAWS, known here without importing it


def add_verb(verbs: Any) -> None:
    """Add `train-multi` to the subparsers of `nearfar`."""
    parser = verbs.add_parser(
        "train-multi",
        help="train one master from a run: `nearfar pack` makes a model of any size of it",
        description="Train one LoRA pair for each matrix and width of a finished run, search which matrix gets which "
        "width, and write a master that `nearfar pack` makes models of any size of.",
        epilog="examples:\n"
        "  nearfar train nano --weights float --budget 2h --data corpora --out runs/nano-float\n"
        "  nearfar train-multi --from runs/nano-float --budget 30m --data corpora --out master.gguf\n"
        "  nearfar train-multi --from runs/nano/checkpoints/stable-end.safetensors --budget 30m --data corpora "
        "--out master.gguf --json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="parent", metavar="RUN", required=True, help="a run's folder or a checkpoint")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--budget", metavar="TIME", help="seconds of training: 90s, 30m, 2h; the search comes on top")
    length.add_argument("--tokens", metavar="N", type=int, help="tokens instead of time: such a run can be repeated")
    parser.add_argument("--data", metavar="DIR", help="folder of the corpora (default: NEARFAR_DATA)")
    parser.add_argument("--out", metavar="FILE", default="master.gguf", help="the master (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint beside --out")
    parser.add_argument("--draw", choices=DRAWS, default="balanced", help="how a step's widths are drawn")
    parser.add_argument("--rank", type=int, default=4, metavar="R", help="of the pairs (default: %(default)s)")
    parser.add_argument(
        "--train-shared", action="store_true", help="latents, embedding and norms train as well, not the pairs alone"
    )
    parser.add_argument(
        "--without", metavar="SOURCE", action="append", default=[], help="leave out a source (repeatable)"
    )
    parser.add_argument("--points", type=int, default=24, metavar="N", help="of the frontier (default: %(default)s)")
    parser.add_argument("--threads", metavar="N", type=int, help="threads (default: all cores)")
    parser.add_argument("--json", action="store_true", help="progress as JSON lines")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train and print the path of the master."""
    data = ready("train-multi", args.data)
    for name, value, low, high in (("--rank", args.rank, 1, 256), ("--points", args.points, 2, 1024)):
        if not low <= value <= high:
            raise UsageError(f"{name} {value}: expected {low}..{high}")

    from nearfar_cloud.training.multi.run import Options, train_multi
    from nearfar_cloud.training.run import set_threads
    from nearfar_cloud.training.schedule import Budget, parse_seconds

    set_threads(args.threads or env.threads())
    budget = Budget(tokens=args.tokens) if args.tokens is not None else Budget(seconds=parse_seconds(args.budget))
    path = train_multi(
        Options(
            parent=Path(args.parent),
            data=data,
            out=Path(args.out),
            budget=budget,
            resume=args.resume,
            draw=args.draw,
            rank=args.rank,
            train_shared=args.train_shared,
            without=tuple(args.without),
            points=args.points,
            as_json=args.json,
        )
    )
    if not args.json:
        print(path)
    return 0
