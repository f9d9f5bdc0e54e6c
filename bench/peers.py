"""nearfar beside llama.cpp on the same files, taking turns: decode and prefill, ratios and medians.

    python bench/peers.py                                  every row that has a goal, about ten minutes
    python bench/peers.py --only llama-1b:Q4_0 --threads 1
    python bench/peers.py --llama-bench /opt/llama.cpp/bin/llama-bench --json > peers.jsonl

Each engine runs in a process of its own; turns go A B A B, so that a busy spell of the machine hits both, and every
ratio is of two neighbours in time.  The models are random (nearfar.bench.random_model): speed depends on sizes and
types only.  llama-cpp-python runs with its defaults: f16 cache, batches of 512, as many threads for prompts as for
tokens.  Every engine ends a token with the logits of one row and its argmax.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from line import machine, say
from nearfar.bench.random_model import Recipe, cached
from nearfar.cli.roofline import settings
from nearfar.errors import NearfarError
from turns import EngineProcess, new_parser

OURS, LLAMA = "nearfar", "llama-cpp-python"
DEPTH = 32  # prompt tokens before the decoded ones

# The goals: nearfar's speed over llama.cpp's on the same file, by (model, task, threads).
GOALS: dict[tuple[str, str, int], float] = {
    ("bitnet-2b:TQ2_0", "decode", 1): 2.5,
    ("bitnet-2b:TQ2_0", "decode", 2): 2.3,
    ("bitnet-2b:TQ1_0", "decode", 1): 4.0,
    ("bitnet-2b:TQ1_0", "decode", 2): 3.3,
    ("llama-1b:Q4_0", "decode", 1): 1.6,
    ("llama-1b:Q4_0", "decode", 2): 1.2,
    ("llama-1b:Q4_K", "decode", 1): 1.6,
    ("llama-1b:Q4_K", "decode", 2): 1.2,
    ("qwen-0.5b:Q4_0", "decode", 1): 1.6,
    ("qwen-0.5b:Q4_0", "decode", 2): 1.2,
    **{("bitnet-2b:TQ2_0", f"prefill {n}", threads): 4.0 for n in (128, 512) for threads in (1, 2)},
    **{
        (model, f"prefill {n}", threads): 1.5
        for model in ("llama-1b:Q4_0", "qwen-0.5b:Q4_0")
        for n in (128, 512)
        for threads in (1, 2)
    },
}


@dataclass(frozen=True)
class Row:
    """One comparison: tokens a second of each engine by turn, ours over theirs."""

    model: str
    task: str
    threads: int
    peer: str
    ours: list[float]
    theirs: list[float]
    goal: float | None

    @property
    def ratios(self) -> list[float]:
        """Of neighbours in time."""
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        return median(self.ratios)

    @property
    def met(self) -> bool | None:
        return None if self.goal is None else self.ratio >= self.goal


def main() -> int:
    args = parse()
    say(f"{machine()}; {'CPU time' if args.cpu_time else 'wall time'}; nearfar with {args.options}")
    wanted = list(dict.fromkeys(model for model, _, _ in GOALS)) if not args.only else args.only
    rows: list[Row] = []
    for model in wanted:
        recipe = Recipe.parse(model)
        path = cached(recipe, args.folder)
        for threads in args.threads:
            rows += compare(args, model, recipe, path, threads)
        if args.delete:
            path.unlink()
    if not args.json:
        print(table(rows))
    return 0


def parse() -> argparse.Namespace:
    parser = new_parser(__doc__, threads=(1, 2), rounds=7, tokens=16)
    parser.add_argument("--tasks", metavar="T,..", help="decode, prefill 128, prefill 512 (default: goals)")
    parser.add_argument("--prefill-rounds", type=int, default=3, metavar="N", help="turns for prompts (default 3)")
    parser.add_argument("--llama-bench", type=Path, action="append", default=[], metavar="PATH", help="another peer")
    parser.add_argument("--cpu-time", action="store_true", help="per CPU second, for a busy machine and one thread")
    args = parser.parse_args()
    args.options = settings(args.set)
    return args


def compare(args: argparse.Namespace, model: str, recipe: Recipe, path: Path, threads: int) -> list[Row]:
    """All tasks of one file with `threads` threads."""
    tasks = args.tasks.split(",") if args.tasks else [t for m, t, n in GOALS if m == model and n == threads]
    tasks = tasks or ["decode", "prefill 128", "prefill 512"]
    n_ctx = 16 + max(DEPTH + args.tokens, *(length(task) for task in tasks))
    rows = []
    with ExitStack() as stack:
        engines: dict[str, Callable[[str], float]] = {}
        for name, options in engine_options(args).items():
            engine = stack.enter_context(EngineProcess(path, options | {"threads": threads, "n_ctx": n_ctx}))
            engine.decode(8, 4)  # pages, threads
            engines[name] = speed_of(engine, args.tokens, args.cpu_time)
            say(f"{recipe.name}; {threads} threads; {name}: {engine.facts}")
        for binary in args.llama_bench:
            engines[binary.name] = llama_bench(binary, path, threads, args.tokens)
        for task in tasks:
            rounds = args.rounds if task == "decode" else args.prefill_rounds
            speeds: dict[str, list[float]] = {name: [] for name in engines}
            started = time.perf_counter()
            for _ in range(rounds):
                for name, speed in engines.items():
                    speeds[name].append(speed(task))
            for peer in list(speeds)[1:]:
                row = Row(model, task, threads, peer, speeds[OURS], speeds[peer], GOALS.get((model, task, threads)))
                rows.append(row)
                say(f"{line(row)}   ({time.perf_counter() - started:.0f} s)")
                if args.json:
                    print(json.dumps(record(row, recipe)), flush=True)
    return rows


def engine_options(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    engines: dict[str, dict[str, Any]] = {OURS: {"backend": "native"} | args.options}
    if not args.no_llama_cpp_python:
        engines[LLAMA] = {"backend": "llama"}
    return engines


def length(task: str) -> int:
    """Prompt tokens of a task."""
    return DEPTH if task == "decode" else int(task.removeprefix("prefill "))


def speed_of(engine: EngineProcess, n_tokens: int, cpu_time: bool) -> Callable[[str], float]:
    def speed(task: str) -> float:
        if task == "decode":
            return engine.decode(DEPTH, n_tokens, cpu_time=cpu_time)
        return engine.prefill(length(task), cpu_time=cpu_time)

    return speed


def llama_bench(binary: Path, path: Path, threads: int, n_tokens: int) -> Callable[[str], float]:
    """Tokens a second by llama.cpp's own benchmark; it opens the file anew each time, which it does not count."""

    def speed(task: str) -> float:
        n_prompt, n_gen = (0, n_tokens) if task == "decode" else (length(task), 0)
        command = f"{binary} -m {path} -t {threads} -p {n_prompt} -n {n_gen} -r 1 -o json".split()
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return parse_llama_bench(done.stdout)

    return speed


def parse_llama_bench(text: str) -> float:
    """The average speed of the one test in llama-bench's JSON."""
    tests = json.loads(text)
    if len(tests) != 1 or "avg_ts" not in tests[0]:
        raise SystemExit(f"llama-bench: expected one test with avg_ts, got {text[:200]}")
    return float(tests[0]["avg_ts"])


def record(row: Row, recipe: Recipe) -> dict[str, Any]:
    facts = {"ratio": row.ratio, "low": min(row.ratios), "high": max(row.ratios), "met": row.met}
    return asdict(row) | facts | {"weights": recipe.name, "machine": machine()}


def line(row: Row) -> str:
    spread = f"{row.ratio:.2f}x ({min(row.ratios):.2f}-{max(row.ratios):.2f})"
    goal = "-" if row.goal is None else f"{row.goal:.1f}x {'met' if row.met else 'MISSED'}"
    return (
        f"{row.model:<16} {row.task:<12} {row.threads:>2}  {row.peer:<17} "
        f"{median(row.ours):>8.1f} {median(row.theirs):>8.1f}  {spread:<20} {goal}"
    )


def table(rows: list[Row]) -> str:
    head = f"{'model':<16} {'task':<12} {'th':>2}  {'peer':<17} {'nearfar':>8} {'peer':>8}  {'ratio (spread)':<20} goal"
    note = "tokens a second, medians of turns; the ratio is the median of neighbours'; embedding and tied head Q4_0"
    return "\n".join([head, *map(line, rows), note])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NearfarError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
