"""`nearfar pack`: from a master, the best model of at most so many bytes."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from nearfar.arguments import real, whole
from nearfar.cli.verbs import Verbs, new_parser
from nearfar.errors import UsageError
from nearfar.master import WIDTHS, Master
from nearfar.pack import Packed, calibration_room, pack, parse_bytes


def add_verb(verbs: Verbs) -> None:
    parser = new_parser(
        verbs,
        "pack",
        "make the best model of at most so many bytes from a master",
        "nearfar pack master.gguf --budget 1.6MB -o small.gguf",
        "nearfar pack master.gguf --budget 900kB -o small.gguf --data data/",
        detail="The budget is the whole file. Exits of the packed file never fire; with --data, where the corpora "
        "are, `nearfar calibrate` is run on it at once.",
    )
    parser.add_argument("master", help="a file of `nearfar train-multi`")
    parser.add_argument("--budget", required=True, metavar="SIZE", help="largest file: 1.6MB, 900kB or bytes")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the model's file")
    parser.add_argument("--data", metavar="DIR", help="folder of the corpora: calibrate the exits as well")
    parser.add_argument(
        "--limit", type=whole(1, 1 << 20), default=600, metavar="N", help="answers of each set to do so"
    )
    parser.add_argument("--delta", type=real(1e-4, 0.5), default=0.02, metavar="D", help="as in `nearfar calibrate`")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    out, budget = Path(args.output), parse_bytes(args.budget)
    if out.exists() and out.samefile(args.master):
        raise UsageError(f"{out}: expected another name than the master's")
    with Master.open(args.master) as master:
        names = [m.name for m in master.matrices]
        if args.data:
            packed, calibration = _pack_calibrated(master, budget, out, args)
        else:
            packed, calibration = pack(master, budget, out), None
    letters = packed.point.assignment
    if args.json:
        facts = {"output": str(out), "bytes": packed.n_bytes, "budget": budget, "loss": packed.point.loss}
        widths = dict(zip(names, letters, strict=True))
        print(json.dumps(facts | {"widths": widths, "calibration": calibration}))
        return 0
    counts = [f"{letters[1:].count(w)} of {'trits' if w == 't' else f'{w} bits'}" for w in WIDTHS if w in letters[1:]]
    print(f"{out}: {packed.n_bytes:,} of {budget:,} bytes; embedding of {letters[0]} bits, {', '.join(counts)}")
    print(f"loss of held-out answers when it was searched: {packed.point.loss:.3f} nats a token")
    if calibration is None:
        print("its exits never fire: `nearfar calibrate` chooses thresholds")
    return 0


def _pack_calibrated(master: Master, budget: int, out: Path, args: argparse.Namespace) -> tuple[Packed, dict[str, Any]]:
    """Pack aside, measure that file, and write its calibrated copy: the thresholds count as bytes of the budget too."""
    from nearfar.corpora import data_folder
    from nearfar.eval.cli import calibrate_copy, calibration_facts, held_out
    from nearfar.llm import LLM

    tasks = held_out(data_folder(args.data), None)
    aside = out.with_name(f".{out.name}.{os.getpid()}.uncalibrated")
    try:
        packed = pack(master, budget - calibration_room(master), aside)
        with LLM.open(aside, cache="off") as llm:
            result, mix = calibrate_copy(llm, aside, out, tasks, limit=args.limit, delta=args.delta)
    finally:
        aside.unlink(missing_ok=True)
    return Packed(out, out.stat().st_size, packed.point), calibration_facts(result, mix)
