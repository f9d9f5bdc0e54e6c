"""Decode on a busy machine: n engine threads beside n busy loops, ours and llama.cpp's, idle and loaded by turns.

    python bench/busy.py
    python bench/busy.py --only llama-1b:Q4_0 --threads 1,2 --json

With one busy loop a core an engine gets half of each core, so half of its idle speed is its fair share.  An engine
whose threads wait for each other by spinning burns its own half; the figure is the part of the fair share that is left.
The CPU time between tokens is measured beside it: an engine that has nothing to do should use none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from line import machine
from nearfar.bench.random_model import Recipe, cached
from nearfar.cli.roofline import settings
from nearfar.errors import NearfarError
from turns import EngineProcess, new_parser

GOAL = 0.7  # of the fair share
DEPTH = 32  # prompt tokens before the decoded ones


@dataclass(frozen=True)
class Row:
    """One engine with `threads` threads: tokens a second by turn, idle and beside as many busy loops."""

    engine: str
    model: str
    threads: int
    idle: list[float]
    loaded: list[float]
    idle_cpu: float  # share of one CPU between tokens

    @property
    def shares(self) -> list[float]:
        """Of the fair share, by turn."""
        return [b / (a / 2) for a, b in zip(self.idle, self.loaded, strict=True)]

    @property
    def share(self) -> float:
        return median(self.shares)


def main() -> int:
    args = parse()
    print(f"{machine()}; nearfar with {args.options}", file=sys.stderr)
    rows: list[Row] = []
    for model in args.only or ["llama-1b:Q4_0", "bitnet-2b:TQ2_0"]:
        path = cached(Recipe.parse(model), args.folder)
        for threads in args.threads:
            for row in compare(args, model, path, threads):
                rows.append(row)
                print(line(row), file=sys.stderr, flush=True)
                if args.json:
                    print(json.dumps(asdict(row) | {"share": row.share, "machine": machine()}), flush=True)
        if args.delete:
            path.unlink()
    if not args.json:
        print(table(rows))
    return 0


def parse() -> argparse.Namespace:
    args = new_parser(__doc__, threads=(2,), rounds=3, tokens=12).parse_args()
    args.options = settings(args.set)
    return args


def compare(args: argparse.Namespace, model: str, path: Path, threads: int) -> Iterator[Row]:
    engines = {"nearfar": {"backend": "native"} | args.options}
    if not args.no_llama_cpp_python:
        engines["llama-cpp-python"] = {"backend": "llama"}
    with ExitStack() as stack:
        opened: dict[str, EngineProcess] = {}
        for name, options in engines.items():
            options |= {"threads": threads, "n_ctx": DEPTH + args.tokens + 8}
            opened[name] = stack.enter_context(EngineProcess(path, options))
            opened[name].decode(8, 4)  # pages, threads
        idle: dict[str, list[float]] = {name: [] for name in opened}
        loaded: dict[str, list[float]] = {name: [] for name in opened}
        for _ in range(args.rounds):
            for name, engine in opened.items():
                idle[name].append(engine.decode(DEPTH, args.tokens))
            with busy_loops(threads):
                for name, engine in opened.items():
                    loaded[name].append(engine.decode(DEPTH, args.tokens))
        for name, engine in opened.items():
            yield Row(name, model, threads, idle[name], loaded[name], engine.idle_cpu(1.0))


@contextmanager
def busy_loops(n: int) -> Iterator[None]:
    """`n` processes that do nothing but spin, pinned nowhere."""
    code = "print(1, flush=True)\nwhile True: pass"
    loops = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(n)]
    try:
        for loop in loops:
            assert loop.stdout is not None
            loop.stdout.readline()  # it spins
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.communicate()


def line(row: Row) -> str:
    met = "met" if row.share >= GOAL else "MISSED"
    goal = f"{GOAL:.0%} {met}" if row.engine == "nearfar" else "-"
    spread = f"{row.share:.0%} ({min(row.shares):.0%}-{max(row.shares):.0%})"
    return (
        f"{row.model:<16} {row.threads:>2}  {row.engine:<17} {median(row.idle):>7.1f} {median(row.loaded):>7.1f}  "
        f"{spread:<19} {row.idle_cpu:>8.1%}  {goal}"
    )


def table(rows: list[Row]) -> str:
    columns = f"{'idle':>7} {'loaded':>7}  {'of the fair share':<19} {'idle CPU':>8}  goal"
    head = f"{'model':<16} {'th':>2}  {'engine':<17} {columns}"
    note = "tokens a second, medians of turns; loaded: beside as many busy loops as threads; fair share: half of idle"
    return "\n".join([head, *map(line, rows), note])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NearfarError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
