"""Bursts of a real service on the cloud core and on other servers: same requests, model, threads; one at a time.

    bash bench/serving_install.sh envs openvino llama_server
    python bench/serving_bursts.py --envs envs --trace azure_llm_2023_code_first70.csv.xz

Arrivals and lengths (by `--divide`) are those of the trace; its time is stretched so that requests come at shares
(`--loads`) of what the first server answers when all are there at once.  Greedy, prefix caches off, prompts drawn anew
in every round behind a warm-up, all servers in their process and without HTTP (serving_live.py).  Figures are medians
over the rounds: TTFT from arrival to first token, TBT between tokens, goodput as `nearfar cloud replay` has it.

On a busy machine `--cpu-time --threads 1` goes by the CPU time that each server takes, as if it had a core of its own.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from line import machine, say
from nearfar.bench.random_model import default_folder
from nearfar.config import ModelConfig
from nearfar.errors import NearfarError
from nearfar_cloud.counts import Counts
from nearfar_cloud.planning.generate import Zipf, generate
from nearfar_cloud.planning.replay import Replay, Served
from nearfar_cloud.planning.report import Slo, Summary, summarise
from nearfar_cloud.planning.traces import load_trace
from nearfar_cloud.planning.workload import Workload
from serving import Server
from serving_anchor import ANCHOR, TINY, make

WORKER = Path(__file__).with_name("serving_live.py")
PEERS = ("nearfar:w8@standard", "nearfar:w8@prefill-first", "openvino:Q8_0", "llama_server:Q8_0")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    config = TINY if args.tiny else ANCHOR
    folder = make(args.folder / ("tiny" if args.tiny else "anchor"), config)
    say(f"{machine()}, {time.strftime('%Y-%m-%d')}")
    with ExitStack() as stack:
        servers = []
        for peer in args.peers:
            try:
                server = Server(peer, folder, args.threads, args.envs, WORKER)
            except RuntimeError as error:
                say(f"without {error}")
                continue
            stack.callback(server.close)
            say(f"{peer}: {server.facts['facts']}, ready after {server.facts['ready']:.1f} s")
            servers.append(server)
        if not servers:
            raise NearfarError("no server could be started")
        rows = compare(args, servers, config)
    print(json.dumps({"machine": machine(), "runs": rows}) if args.json else table(rows))
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    summary, examples = (__doc__ or "").split("\n\n")[:2]
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--peers", type=lambda text: tuple(text.split(",")), default=PEERS, metavar="NAME:FORM,..")
    add("--trace", type=Path, help="whose arrivals and lengths are replayed (without: a generated burst, CV 4)")
    add("--loads", type=lambda text: [float(x) for x in text.split(",")], default=[0.3, 0.6, 0.9], metavar="X,..")
    add("--capacity", type=float, metavar="X", help="requests/s that loads are shares of, where they are known")
    add("--requests", type=int, default=60, metavar="N", help="of the workload (default %(default)s)")
    add("--divide", type=int, default=8, metavar="N", help="lengths of the trace by N (default 8)")
    add("--rounds", type=int, default=3, metavar="N", help="behind the warm-up (default %(default)s)")
    add("--threads", type=int, default=2, metavar="N", help="of each server (default %(default)s)")
    add("--cpu-time", action="store_true", help="the clock is each server's CPU time; needs --threads 1")
    add("--ttft", type=float, default=1.0, metavar="S", help="limit of goodput (default 1 s)")
    add("--tbt", type=float, default=0.15, metavar="S", help="limit of goodput (default 0.15 s)")
    add("--folder", type=Path, default=default_folder() / "serving", help="where the model is kept")
    add("--envs", type=Path, default=default_folder() / "serving_envs", help="where the peers are installed")
    add("--tiny", action="store_true", help="a model of two layers: to see whether everything runs")
    add("--json", action="store_true")
    args = parser.parse_args(argv)
    if args.cpu_time and args.threads != 1:
        parser.error(f"--cpu-time with --threads {args.threads}: CPU time is time on a core only with --threads 1")
    return args


def compare(args: argparse.Namespace, servers: list[Server], config: ModelConfig) -> list[dict[str, Any]]:
    """A row for each server and load."""
    if args.trace:
        workload = load_trace(args.trace).divided(args.divide).first(args.requests)
    else:
        workload = generate(args.requests, rate=1, cv=4.0, prompt=Zipf(16, 1024), output=Zipf(4, 128), seed=1)
    workload = workload.fitting(config.n_ctx)
    slo, n_vocab = Slo(args.ttft, args.tbt), config.n_vocab

    reached: dict[str, float] = {}
    for server in servers:
        run(server, workload.first(4).at_once(), n_vocab, 0, args.cpu_time)
        if args.capacity is None:
            done = run(server, workload.at_once(), n_vocab, 1, args.cpu_time)
            reached[server.peer] = len(workload) / done.seconds
            say(f"{server.peer}: {reached[server.peer]:.2f} requests/s, all at once")
    capacity, rows = args.capacity or reached[servers[0].peer], []
    for load in args.loads:
        at = workload.at_rate(load * capacity)
        found: dict[str, list[Summary]] = {s.peer: [] for s in servers}
        for turn in range(args.rounds):
            for server in tuple(servers):
                try:
                    done = run(server, at, n_vocab, 2 + turn, args.cpu_time)
                except (RuntimeError, OSError) as error:
                    say(f"{load:.0%}: on without {error}")
                    servers.remove(server)
                    continue
                found[server.peer].append(summarise(done, slo))
                figures = json.dumps(medians(found[server.peer][-1:]))
                say(f"{load:.0%}, round {turn + 1} of {args.rounds}, {server.peer}: {figures}")
        for server in servers:
            row = {"peer": server.peer, "facts": server.facts["facts"], "load": load, "rate": at.rate}
            rows.append(row | {"at_once": reached.get(server.peer)} | medians(found[server.peer]))
    return rows


def run(server: Server, workload: Workload, n_vocab: int, seed: int, cpu_time: bool) -> Replay:
    """`workload` on one server, as a replay of ours would tell it."""
    requests = [
        (float(at), workload.prompt(i, n_vocab, seed), int(n))
        for i, (at, n) in enumerate(zip(workload.arrival_s, workload.n_output, strict=True))
    ]
    token_s = server.ask({"requests": requests, "cpu_time": cpu_time})["token_s"]
    served = [Served(at, len(ids), n, times, times[-1]) for (at, ids, n), times in zip(requests, token_s, strict=True)]
    counts = asdict(Counts(generated_tokens=sum(map(len, token_s))))
    return Replay(served, max(times[-1] for times in token_s), counts)


def medians(found: list[Summary]) -> dict[str, Any]:
    """Of each figure over the rounds."""
    return {
        "ttft_p50_s": median(r["ttft_s"]["p50"] for r in found),
        "ttft_p99_s": median(r["ttft_s"]["p99"] for r in found),
        "tbt_p50_s": median(r["tbt_s"]["p50"] for r in found),
        "tbt_p99_s": median(r["tbt_s"]["p99"] for r in found),
        "tbt_max_s": median(r["tbt_s"]["max"] for r in found),
        "goodput": median(r["goodput"] for r in found),
        "attained": median(r["attained"] for r in found),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """A line a server, those of one load together."""
    lines = [
        "| load | server | at once, req/s | TTFT p50, p99, s | TBT p50, p99, longest, ms | goodput, req/s (of all) |",
        "|" + "---|" * 6,
    ]
    for r in rows:
        cells = [
            f"{r['load']:.0%}, {r['rate']:.2f}/s",
            r["facts"],
            f"{r['at_once']:.2f}" if r["at_once"] else "-",
            f"{r['ttft_p50_s']:.2f}, {r['ttft_p99_s']:.2f}",
            f"{1e3 * r['tbt_p50_s']:.0f}, {1e3 * r['tbt_p99_s']:.0f}, {1e3 * r['tbt_max_s']:.0f}",
            f"{r['goodput']:.2f} ({r['attained']:.0%})",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NearfarError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
