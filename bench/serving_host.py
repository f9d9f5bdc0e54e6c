"""What a step costs besides the model: planning and commit, by the number of sequences that generate.

    python bench/serving_host.py                               nothing is computed: the fastest step, undisturbed
    python bench/serving_host.py --real --threads 2            beside a real step, as a share of it: medians
    python bench/serving_host.py --profile 25                  where it goes: the costliest functions

Without --real the executor draws tokens and takes no part in the time.  With --real a model of random weights runs
between planning and commit, which also empties the caches.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import sys
from statistics import median
from typing import Any

from line import machine, say
from nearfar.cli.roofline import numbers
from nearfar.errors import NearfarError
from nearfar_cloud.clock import VirtualClock
from nearfar_cloud.engine import Engine
from nearfar_cloud.executors.base import Executor
from nearfar_cloud.executors.sim import SimExecutor, facts_of
from nearfar_cloud.kv.pool import n_blocks_of
from nearfar_cloud.planning.roofline import MODELS
from nearfar_cloud.planning.simulate import POLICIES
from nearfar_cloud.scheduling.compose import Composer
from nearfar_cloud.scheduling.cost import CostModel
from nearfar_cloud.types import Request

ROWS = 512  # of a step
WARM_UP = 8  # steps before those that count


def main() -> int:
    args = parse()
    say(machine())
    found = []
    for n in args.sequences:
        executor = real(args, n) if args.real else simulated(args, n)
        for policy in args.policies:
            row = {"policy": policy, "sequences": n, **measure(args, executor, policy, n)}
            found.append(row)
            say(json.dumps(row))
    print(json.dumps({"machine": machine(), "runs": found}) if args.json else table(found))
    return 0


def parse() -> argparse.Namespace:
    summary, examples = (__doc__ or "").split("\n\n")[:2]
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sequences", type=numbers(1, 1024), default=(64, 256), metavar="N,..", help="default 64,256")
    add("--policies", type=lambda text: text.split(","), default=["chunked", "standard"], metavar="NAME,..")
    add("--steps", type=int, default=100, metavar="N", help="that count (default %(default)s)")
    add("--prompt", type=int, default=128, metavar="N", help="ids of a prompt (default %(default)s)")
    add("--model", choices=tuple(MODELS), default="llama-100m", help="sizes; random weights (default %(default)s)")
    add("--real", action="store_true", help="with a model between planning and commit")
    add("--weights", choices=("bf16", "w8", "q8_0", "q4_0"), default="w8", help="of the real model")
    add("--threads", type=int, default=2, help="of the real model (default %(default)s)")
    add("--profile", type=int, metavar="N", help="print the N functions that cost most, of the first measurement")
    add("--json", action="store_true")
    return parser.parse_args()


def n_blocks(args: argparse.Namespace, n: int) -> int:
    return n * n_blocks_of(args.prompt + WARM_UP + args.steps + 2)


def simulated(args: argparse.Namespace, n: int) -> Executor:
    facts = facts_of(MODELS[args.model])
    return SimExecutor(facts, n_blocks(args, n), CostModel(facts.n_layers), VirtualClock())


def real(args: argparse.Namespace, n: int) -> Executor:
    import torch

    from nearfar_cloud.executors.local import LocalExecutor
    from nearfar_cloud.model.packed import pack
    from nearfar_cloud.planning.random_model import random_model

    torch.set_num_threads(args.threads)
    return LocalExecutor(pack(random_model(MODELS[args.model], "fp32"), args.weights), n_blocks(args, n))


def measure(args: argparse.Namespace, executor: Executor, policy: str, n: int) -> dict[str, Any]:
    """Microseconds of a step in which `n` sequences generate; with a real executor their share, too."""
    engine = Engine(executor, Composer(POLICIES[policy](ROWS)))
    most = WARM_UP + args.steps + 1
    for i in range(n):
        ids = tuple((i + j) % executor.facts.n_vocab for j in range(args.prompt))
        engine.submit(Request(ids=ids, max_tokens=most))
    engine.step()
    while any(s.n_out == 0 for s in engine.seqs.values()):
        engine.step()
    # Who came first is some tokens ahead: as many steps as leave all of them with something to do.
    n_steps = min(args.steps, min(most - s.n_out for s in engine.seqs.values()) - WARM_UP)
    if n_steps < 1:
        raise NearfarError(f"{args.steps} steps are too few for {n} prompts of {args.prompt} ids: --steps")
    for _ in range(WARM_UP):
        engine.step()
    plan, run, commit = [], [], []
    with cProfile.Profile() as profile:
        profile.disable()
        if args.profile:
            profile.enable()
        for _ in range(n_steps):
            c = engine.counts
            before = c.plan_s, c.run_s, c.commit_s
            engine.step()
            for what, was, now in zip((plan, run, commit), before, (c.plan_s, c.run_s, c.commit_s), strict=True):
                what.append(now - was)
    if args.profile:
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(args.profile)
        args.profile = None
    for s in list(engine.seqs):
        engine.abort(s)
    engine.step()
    typical = median if args.real else min
    row = {"plan_us": 1e6 * typical(plan), "commit_us": 1e6 * typical(commit)}
    if args.real:
        host = [p + c for p, c in zip(plan, commit, strict=True)]
        row |= {"run_us": 1e6 * median(run)}
        row |= {"share": median(h / (h + r) for h, r in zip(host, run, strict=True))}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| policy | sequences | plan, us | commit, us | together a sequence, us | share of a step |",
        "|" + "---|" * 6,
    ]
    for r in rows:
        both = r["plan_us"] + r["commit_us"]
        share = f"{r['share']:.1%}" if "share" in r else "-"
        cells = r["policy"], r["sequences"], f"{r['plan_us']:,.0f}", f"{r['commit_us']:,.0f}"
        lines.append(f"| {' | '.join(map(str, cells))} | {both / r['sequences']:.1f} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except NearfarError as error:
        sys.exit(f"{sys.argv[0]}: {error}")
