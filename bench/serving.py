"""The cloud core beside other servers on the same weights, taking turns: batched, single stream, prompts.

    bash bench/serving_install.sh                              the peers, each into an environment of its own
    python bench/serving.py                                    all of them, about an hour
    python bench/serving.py --peers nearfar:bf16,llama_cpp:Q8_0 --threads 2 --rounds 3 --json

The model is a Llama of 100 M random weights (serving_anchor.py).  Token lists in, greedy, ends of text ignored, prefix
caches off, new prompts in every turn, one warm-up.  A: 32 prompts of 128 ids at once, 128 new each, 4,096 tokens over
the whole time.  B: one prompt of 128, 64 tokens over the time of 65 less that of 1.  C: 4 prompts of 1,024, one token
each, 4,096 prompt tokens over the time.  Each server runs in a process of its own; ratios are of neighbours in time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from line import machine, say
from nearfar.bench.random_model import default_folder
from nearfar.cli.roofline import numbers
from nearfar.config import ModelConfig
from serving_anchor import ANCHOR, TINY, make

WORKER = Path(__file__).with_name("serving_peers.py")
OURS = "nearfar:bf16"
PEERS = (OURS, "openvino:F16", "openvino:Q8_0", "vllm:bfloat16", "llama_cpp:BF16", "llama_cpp:Q8_0", "llama_cpp:Q4_0")
TASKS = ("A", "B", "C")


class Server:
    """A worker process, asked in lines."""

    def __init__(self, peer: str, folder: Path, threads: int, envs: Path, worker: Path = WORKER) -> None:
        name, _, form = peer.partition(":")
        python = envs / name / "bin" / "python"
        command = [str(python) if python.is_file() else sys.executable, str(worker), name, str(folder), form]
        env = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "0",
        }
        self.peer = peer
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (a pipe that nobody reads would stop it)
        self.process = subprocess.Popen(
            [*command, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=env,
            start_new_session=True,
        )
        self.facts = self._answer()

    def batch(self, prompts: list[list[int]], new: int) -> tuple[float, float]:
        """(wall, CPU) seconds of one batch."""
        found = self.ask({"prompts": prompts, "new": new})
        return found["wall"], found["cpu"]

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """The answer to one line.  RuntimeError: the worker has ended."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise RuntimeError(f"{self.peer} ended with {self.process.returncode}: {self.log.read().strip()[-600:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()


def prompts(rng: random.Random, n: int, length: int, n_vocab: int) -> list[list[int]]:
    return [[rng.randrange(2, n_vocab) for _ in range(length)] for _ in range(n)]


def measure(server: Server, task: str, seed: int, n_vocab: int) -> tuple[float, float]:
    """Tokens a second of the wall clock, and of CPU time."""
    rng = random.Random(seed)
    if task == "A":
        times = server.batch(prompts(rng, 32, 128, n_vocab), 128)
        return 4096 / times[0], 4096 / times[1]
    if task == "B":
        short, long = (server.batch(prompts(rng, 1, 128, n_vocab), n) for n in (1, 65))
        return tuple(64 / max(b - a, 1e-9) for a, b in zip(short, long, strict=True))  # type: ignore[return-value]
    times = server.batch(prompts(rng, 4, 1024, n_vocab), 1)
    return 4096 / times[0], 4096 / times[1]


def compare(args: argparse.Namespace, folder: Path, threads: int, config: ModelConfig) -> list[dict[str, Any]]:
    """One row for each peer and task, at one number of threads."""
    rows = []
    with ExitStack() as stack:
        servers = []
        for peer in args.peers:
            try:
                server = Server(peer, folder, threads, args.envs)
            except RuntimeError as error:
                say(f"without {error}")
                continue
            stack.callback(server.close)
            say(f"{peer}: {server.facts['facts']}, ready after {server.facts['ready']:.1f} s")
            servers.append(server)
        for task in args.tasks:
            found: dict[str, list[tuple[float, float]]] = {s.peer: [] for s in servers}
            for turn in range(args.rounds + 1):
                for server in tuple(servers):
                    try:
                        speed = measure(server, task, turn, config.n_vocab)
                    except (RuntimeError, OSError) as error:
                        say(f"{task}: on without {error}")
                        servers.remove(server)
                        continue
                    if turn:  # the first is the warm-up
                        found[server.peer].append(speed)
                say(f"{threads} threads {task} turn {turn} of {args.rounds}")
            for server in servers:
                speeds = found[server.peer]
                walls = [wall for wall, _ in speeds]
                row = {
                    "task": task,
                    "threads": threads,
                    "peer": server.peer,
                    "facts": server.facts["facts"],
                    "ready_s": round(server.facts["ready"], 2),
                    "tokens_per_s": walls,
                    "median": median(walls),
                    "per_core_second": median(cpu for _, cpu in speeds),
                }
                if any(s.peer == OURS for s in servers):
                    row["ours_over_it"] = median(a[0] / b for a, b in zip(found[OURS], walls, strict=True))
                rows.append(row)
                if args.json:
                    print(json.dumps(row), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| task | threads | server | tokens/s (range) | per core-second | nearfar bf16 over it |",
        "|" + "---|" * 6,
    ]
    for r in rows:
        span = f"{r['median']:,.0f} ({min(r['tokens_per_s']):,.0f}-{max(r['tokens_per_s']):,.0f})"
        ratio = f"{r['ours_over_it']:.2f}" if "ours_over_it" in r else "-"
        lines.append(
            f"| {r['task']} | {r['threads']} | {r['facts']} | {span} | {r['per_core_second']:,.0f} | {ratio} |"
        )
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    summary, examples = (__doc__ or "").split("\n\n")[:2]
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--peers", type=lambda text: tuple(text.split(",")), default=PEERS, metavar="NAME:FORM,..")
    add("--tasks", type=lambda text: tuple(text.split(",")), default=TASKS, metavar="A,B,C")
    add("--threads", type=numbers(1, 256), default=(1, 2), metavar="N,..", help="default 1,2")
    add("--rounds", type=int, default=5, metavar="N", help="turns behind the warm-up (default %(default)s)")
    add("--folder", type=Path, default=default_folder() / "serving", help="where the model is kept")
    add("--envs", type=Path, default=default_folder() / "serving_envs", help="where the peers are installed")
    add("--tiny", action="store_true", help="a model of two layers: to see whether everything runs")
    add("--json", action="store_true", help="a JSON line a row instead of the table")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    config = TINY if args.tiny else ANCHOR
    folder = make(args.folder / ("tiny" if args.tiny else "anchor"), config)
    say(f"{machine()}, {time.strftime('%Y-%m-%d')}")
    rows = [row for threads in args.threads for row in compare(args, folder, threads, config)]
    if not args.json:
        print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
