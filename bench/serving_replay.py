"""What chunked prefill buys against prefill-first: arrivals of a code service, bursts, Poisson, one long prompt.

python bench/serving_replay.py --trace azure_llm_2023_code_first70.csv.xz
python bench/serving_replay.py --trace azure_llm_2023_code_first70.csv.xz --real --threads 1 --requests 150

Simulated: the real engine and policies, times of a cost model (of `--fit FILE`, or of the roofline of a core).
--real: first steps of the model are measured and the cost model fitted, and its error on held-out shapes is told; then
the same workloads run on this machine in real time, and again in a simulation by that fit, which is compared.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from line import machine, say
from nearfar.errors import NearfarError
from nearfar_cloud.clock import WallClock
from nearfar_cloud.engine import Engine
from nearfar_cloud.executors.sim import facts_of
from nearfar_cloud.planning.generate import Zipf, generate, injection
from nearfar_cloud.planning.profile import Fit, fit, grid, measure
from nearfar_cloud.planning.replay import capacity, replay
from nearfar_cloud.planning.report import Slo, Summary, summarise, table
from nearfar_cloud.planning.roofline import HARDWARE, MODELS, cost_model
from nearfar_cloud.planning.simulate import POLICIES, simulated
from nearfar_cloud.planning.traces import load_trace
from nearfar_cloud.planning.workload import Workload
from nearfar_cloud.scheduling.compose import Composer
from nearfar_cloud.types import Objective

MakeEngine = Callable[[str], Engine]  # of a policy's name

BASE = "prefill-first"
BLOCKS = 512
LONG = 2048  # tokens of the prompt that comes among running answers
GOAL_TBT = 1 / 5  # of the base's longest interval then
GOAL_ERROR = 0.15  # of step times on held-out shapes


def main() -> int:
    args = parse()
    say(machine())
    config, slo = MODELS[args.model], Slo(args.ttft, args.tbt)
    engines: dict[str, MakeEngine] = {}
    if args.real:
        found, engines["real"] = real(args)
        make_cost = found.cost_model
    else:
        hardware = HARDWARE["zen5-core"]
        make_cost = Fit.load(args.fit).cost_model if args.fit else partial(cost_model, config, hardware)
    facts = facts_of(config)
    engines["simulated"] = lambda name: simulated(facts, make_cost, POLICIES[name](args.rows), n_blocks=BLOCKS)

    rows: dict[str, dict[str, Summary]] = {}
    planned = list(workloads(args, engines.get("real", engines["simulated"])))  # the same for both
    for where, engine in engines.items():
        for what, workload in planned:
            for policy in POLICIES:
                say(f"{where}: {what}, {policy}")
                promise = Objective(ttft_s=slo.ttft_s, tbt_s=slo.tbt_s) if args.promise else Objective()
                done = replay(engine(policy), workload, objective=promise)
                rows.setdefault(f"{where}, {what}", {})[policy] = summarise(done, slo)
    if args.json:
        print(json.dumps({"machine": machine(), "model": args.model, "runs": rows}))
        return 0
    for title, runs in rows.items():
        print(f"\n{title}\n{table(runs)}\n{against_base(runs)}")
    if args.real:
        print(f"\n{simulation_errors(rows)}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--trace", type=Path, help="whose arrivals and lengths are replayed (without: generated ones alone)")
    add("--model", choices=tuple(MODELS), default="llama-100m", help="sizes; random weights (default %(default)s)")
    add("--real", action="store_true", help="on this machine as well")
    add("--fit", help="step times that `nearfar cloud profile` measured")
    add("--loads", default="0.3,0.6,0.9", help="shares of capacity (default %(default)s)")
    add("--requests", type=int, default=600, metavar="N", help="of each workload (default %(default)s)")
    add("--divide", type=int, default=8, metavar="N", help="lengths of the trace by N (default 8)")
    add("--rows", type=int, default=256, metavar="N", help="of a step, for chunks (default 256)")
    add("--promise", action="store_true", help="requests tell the engine the limits below: chunks shrink to keep them")
    add("--ttft", type=float, default=1.0, metavar="S", help="limit of goodput (default 1 s)")
    add("--tbt", type=float, default=0.15, metavar="S", help="limit of goodput (default 0.15 s)")
    add("--threads", type=int, default=1, help="of the real model (default 1)")
    add("--weights", choices=("bf16", "w8", "q8_0", "q4_0", "fp32"), default="bf16")
    add("--json", action="store_true")
    args = parser.parse_args()
    args.loads = [float(x) for x in args.loads.split(",")]
    return args


def real(args: argparse.Namespace) -> tuple[Fit, MakeEngine]:
    """The fit of the model on this machine, and how its engines are made."""
    import torch

    from nearfar_cloud.executors.local import LocalExecutor
    from nearfar_cloud.model.packed import FORMS, pack
    from nearfar_cloud.planning.random_model import random_model

    torch.set_num_threads(args.threads)
    model = random_model(MODELS[args.model], "fp32")
    executor = LocalExecutor(pack(model, args.weights) if args.weights in FORMS else model, BLOCKS)
    shapes = grid(executor.facts.n_ctx, BLOCKS)
    say(f"{len(shapes)} shapes of steps")
    samples = list(measure(executor, shapes))
    found = fit(
        samples, executor.facts.n_layers, model=executor.facts.fingerprint, dtype=args.weights, threads=args.threads
    )
    met = "met" if found.error_held_out <= GOAL_ERROR else "MISSED"
    say(
        f"step time: mean error {found.error_held_out:.1%} on {found.n_held_out} held-out shapes (largest "
        f"{found.worst_held_out:.1%}), goal {GOAL_ERROR:.0%} {met}; {found.error_fitted:.1%} on {found.n_fitted} fitted"
    )

    def engine(name: str) -> Engine:
        made = Engine(executor, Composer(POLICIES[name](args.rows)), clock=WallClock())
        made.cost = found.cost_model()
        return made

    return found, engine


def workloads(args: argparse.Namespace, make: MakeEngine) -> Iterator[tuple[str, Workload]]:
    """Each shape of arrivals at each load, then the long prompt."""
    shapes = [
        generate(args.requests, rate=1, cv=cv, prompt=Zipf(16, 1024), output=Zipf(4, 128), seed=1) for cv in (1.0, 4.0)
    ]
    if args.trace:
        shapes.insert(0, load_trace(args.trace).divided(args.divide).first(args.requests))
    for workload in shapes:
        workload = workload.fitting(MODELS[args.model].n_ctx)
        reached = capacity(make("chunked"), workload.first(100))
        for load in args.loads:
            name = f"{workload.name} at {load:.0%} of {reached:.1f} requests/s"
            yield name, workload.at_rate(load * reached)
    yield f"16 answers and a prompt of {LONG}", injection(2.0, n_output=400, long=LONG)


def against_base(runs: dict[str, Summary]) -> str:
    """Each other policy's figures by those of the base."""
    base, lines = runs[BASE], []
    for name, r in runs.items():
        if name == BASE:
            continue
        parts = [
            f"{what} {_ratio(r[kind][p], base[kind][p])}"
            for what, kind, p in (
                ("TTFT p99", "ttft_s", "p99"),
                ("TBT p99", "tbt_s", "p99"),
                ("longest TBT", "tbt_s", "max"),
            )
        ]
        lines.append(f"{name} / {BASE}: {', '.join(parts)}, goodput {_ratio(r['goodput'], base['goodput'])}")
    return "\n".join(lines)


def _ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}x" if a is not None and b else "-"


def simulation_errors(rows: dict[str, dict[str, Summary]]) -> str:
    """How far simulated figures are from those measured."""
    lines = ["simulated / measured"]
    for title, runs in rows.items():
        if not title.startswith("real, "):
            continue
        other = rows[title.replace("real, ", "simulated, ")]
        for name, r in runs.items():
            parts = _pairs(r, other[name])
            lines.append(f"{title.removeprefix('real, ')}, {name}: {', '.join(parts)}")
    return "\n".join(lines)


def _pairs(measured: Summary, guessed: Summary) -> Sequence[str]:
    kinds: Sequence[tuple[str, str, str]] = (
        ("TTFT p50", "ttft_s", "p50"),
        ("TTFT p99", "ttft_s", "p99"),
        ("TBT p50", "tbt_s", "p50"),
        ("TBT p99", "tbt_s", "p99"),
        ("E2E p50", "e2e_s", "p50"),
    )
    found: list[Any] = [f"{what} {_ratio(guessed[k][p], measured[k][p])}" for what, k, p in kinds]
    return [*found, f"planning and commit {measured['host_share']:.1%} of steps"]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NearfarError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
