"""`nearfar study`: found by the sdk's command line through the entry-point group `nearfar.verbs`.

torch is imported when the verb runs, never before.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nearfar.errors import UsageError
from nearfar_cloud.training.cli import ready
from nearfar_cloud.training.studies import STUDIES


def add_verb(verbs: Any) -> None:
    """Add `study` to the subparsers of `nearfar`."""
    parser = verbs.add_parser(
        "study",
        help="try a training idea on small models: arms on equal tokens, a JSON of numbers and a plot",
        description="Try a training idea on small models. Its arms are trained on equally many tokens, two at a time "
        "on one thread each, with several seeds; study_NAME.json and study_NAME.png hold what came out.",
        epilog="examples:\n"
        "  nearfar study wsd --data corpora --budget 10m\n"
        "  nearfar study wsd --data corpora --tokens 1000000 --seeds 1,2,3 --out studies --json\n"
        f"studies: {', '.join(STUDIES)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(STUDIES)}")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--budget", metavar="TIME", default="10m", help="of the whole study: 10m, 2h (default: 10m)")
    length.add_argument("--tokens", metavar="N", type=int, help="of each arm, instead of time: can be repeated exactly")
    parser.add_argument("--data", metavar="DIR", help="folder of the corpora (default: NEARFAR_DATA)")
    parser.add_argument("--out", metavar="DIR", default="studies", help="folder of the figures (default: %(default)s)")
    parser.add_argument("--seeds", metavar="N,N", default="1,2", help="each arm runs with each (default: %(default)s)")
    parser.add_argument("--no-compile", action="store_true", help="run without torch's compiler (slower)")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the study; the table or the JSON goes to stdout, progress to stderr."""
    if args.name not in STUDIES:
        raise UsageError(f"{args.name}: no such study; expected one of {', '.join(STUDIES)}")
    seeds = seeds_of(args.seeds)
    data = ready("study", args.data)

    import json

    from nearfar_cloud.training.schedule import Budget, parse_seconds
    from nearfar_cloud.training.studies.runner import Options, run_study, table

    budget = Budget(tokens=args.tokens) if args.tokens is not None else Budget(seconds=parse_seconds(args.budget))
    options = Options(data, Path(args.out), budget, seeds, compiled=not args.no_compile)
    path = run_study(STUDIES[args.name], options)
    text = path.read_text(encoding="utf-8")
    print(text if args.json else f"{table(json.loads(text))}\n\n{path} and {path.with_suffix('.png').name}")
    return 0


def seeds_of(text: str) -> tuple[int, ...]:
    """ "1,2" -> (1, 2).  Raises UsageError."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise UsageError(f"--seeds {text}: expected whole numbers such as 1,2")
    return tuple(int(part) for part in parts)
