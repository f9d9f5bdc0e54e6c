"""`nearfar cloud simulate | replay | profile | roofline`.  torch is imported when a model runs, never before."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfar import env
from nearfar.arguments import real, whole
from nearfar.errors import FileError, MissingExtraError, UsageError
from nearfar.machine import cpu_name

if TYPE_CHECKING:
    from nearfar.config import ModelConfig
    from nearfar_cloud.engine import Engine
    from nearfar_cloud.executors.local import LocalExecutor
    from nearfar_cloud.planning.profile import Fit
    from nearfar_cloud.planning.replay import Replay
    from nearfar_cloud.planning.workload import Workload

MOST = 10**9 - 1  # of any number that is asked for
MakeEngine = Callable[[str], "Engine"]  # of a policy's name

SHIPPED = "nano"
DTYPES = ("fp32", "bf16")
REAL_MODELS = f"{SHIPPED}, a GGUF file, a folder of safetensors, or sizes by name (llama-100m): random weights"
TRACE_DIVISOR = 8  # of a trace's lengths, for the small models that small machines serve
CAPACITY_REQUESTS = 100
SAY_EVERY_S = 5.0


# ------------------------------------------------------------ parsers


def add_simulate(sub: Any) -> None:
    """Add `simulate` to the subparsers of `nearfar cloud`."""
    parser = _parser(
        sub,
        "simulate",
        "serve a workload on a machine that is only described: real schedules, times of a cost model",
        "nearfar cloud simulate --requests 100 --cv 4 --load 0.6",
        "nearfar cloud simulate --trace azure_code.csv.xz --requests 500 --load 0.9 --json",
        "nearfar cloud simulate nano --fit nano.fit.json --rate 20 --plot latencies.png",
    )
    _add_model(parser)
    machine = parser.add_mutually_exclusive_group()
    machine.add_argument("--fit", metavar="FILE", help="step times that `nearfar cloud profile` measured")
    machine.add_argument(
        "--hardware", metavar="NAME", default="zen5-core", help="a row of roofline (default %(default)s)"
    )
    _add_widths(parser)
    _add_workload(parser)
    parser.set_defaults(run=simulate)


def add_replay(sub: Any) -> None:
    """Add `replay` to the subparsers of `nearfar cloud`."""
    parser = _parser(
        sub,
        "replay",
        "serve a workload in real time with a model on this machine",
        "nearfar cloud replay nano --requests 20 --cv 2 --prompt 8:128 --output 4:16 --rate 5",
        "nearfar cloud replay model.gguf --trace azure_code.csv.xz --requests 300 --load 0.6 --policies chunked",
    )
    parser.add_argument("model", help=REAL_MODELS)
    parser.add_argument("--fit", metavar="FILE", help="step times that the engine knows from the start, of profile")
    _add_engine(parser)
    _add_workload(parser)
    parser.set_defaults(run=replay)


def add_profile(sub: Any) -> None:
    """Add `profile` to the subparsers of `nearfar cloud`."""
    parser = _parser(
        sub,
        "profile",
        "measure steps of a model over a grid of shapes and fit the cost model, for simulate --fit",
        "nearfar cloud profile nano --out nano.fit.json",
        "nearfar cloud profile model.gguf --dtype bf16 --threads 2 --out model.fit.json --json",
    )
    parser.add_argument("model", help=REAL_MODELS)
    parser.add_argument("--out", metavar="FILE", required=True, help="where the coefficients go, as JSON")
    _add_engine(parser)
    parser.add_argument("--blocks", type=whole(1, MOST), default=256, metavar="N", help="of 64 positions (default 256)")
    parser.add_argument("--repeats", type=whole(1, MOST), default=5, metavar="N", help="steps of a shape (default 5)")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: few small shapes, rough")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time, for a busy machine; with one thread")
    parser.set_defaults(run=profile)


def add_roofline(sub: Any) -> None:
    """Add `roofline` to the subparsers of `nearfar cloud`."""
    parser = _parser(
        sub,
        "roofline",
        "operations, bytes and the least time of each operator of a layer, on this machine or a named one",
        "nearfar cloud roofline llama-8b --batch 16 --context 1024 --hardware h100-sxm",
        "nearfar cloud roofline --stage prefill --context 512 --hardware this",
    )
    _add_model(parser)
    parser.add_argument("--stage", choices=("prefill", "decode"), default="decode", help="default: decode")
    parser.add_argument(
        "--batch", type=whole(1, MOST), default=1, metavar="N", help="sequences of the step (default 1)"
    )
    parser.add_argument("--context", type=whole(1, MOST), default=1024, metavar="N", help="positions (default 1024)")
    parser.add_argument(
        "--hardware",
        metavar="NAME",
        default="zen5-core",
        help="a name, a file, or this: measured now (default %(default)s)",
    )
    parser.add_argument("--save", metavar="FILE", help="write the row of the hardware, for --hardware FILE")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the products of --hardware this")
    parser.add_argument("--threads", type=whole(1, MOST), metavar="N", help="of --hardware this")
    _add_widths(parser)
    parser.set_defaults(run=roofline)


def _parser(sub: Any, name: str, summary: str, *examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = sub.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs instead of text for people")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default="llama-100m",
        help=f"llama-100m (default), qwen-0.5b, llama-1b, llama-8b: sizes alone; {SHIPPED}, or a GGUF file",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of weights and products (default bf16)")
    parser.add_argument("--threads", type=whole(1, MOST), metavar="N", help="threads (default: all cores)")


def _add_widths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weight-bits", type=real(1, 64), default=16.0, metavar="B", help="default 16")
    parser.add_argument("--kv-bits", type=real(1, 64), default=16.0, metavar="B", help="default 16")


def _add_workload(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("workload").add_argument
    add("--trace", metavar="FILE", help="Azure or BurstGPT csv, Mooncake jsonl; plain, .gz or .xz (default: generated)")
    add("--requests", type=whole(2, MOST), default=200, metavar="N", help="the first N (default 200)")
    add("--start", type=real(0, 1e9), default=0.0, metavar="S", help="from second S of the trace on")
    add(
        "--divide", type=whole(1, MOST), metavar="N", help=f"lengths by N (default {TRACE_DIVISOR} for a trace, else 1)"
    )
    add("--cv", type=real(0, 100), default=1.0, metavar="C", help="of generated intervals: 1 Poisson, more: bursts")
    add("--prompt", type=_lengths, default=(16, 1024), metavar="A:B", help="generated lengths (default 16:1024)")
    add("--output", type=_lengths, default=(4, 128), metavar="A:B", help="generated lengths (default 4:128)")
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--load", type=real(0.01, 100), default=0.6, metavar="L", help="share of capacity (default 0.6)")
    rate.add_argument("--rate", type=real(1e-6, 1e9), metavar="R", help="requests a second instead")
    add("--seed", type=whole(0, MOST), default=0, metavar="N", help="of all draws")
    add = parser.add_argument_group("engine").add_argument
    add("--policies", default="chunked,prefill-first", metavar="P,..", help="default %(default)s")
    add("--rows", type=whole(1, MOST), default=256, metavar="N", help="of a step, for chunked (default 256)")
    add("--blocks", type=whole(1, MOST), default=256, metavar="N", help="of 64 positions (default 256)")
    add("--ttft", type=real(1e-6, 1e6), default=1.0, metavar="S", help="promised to the first token (default 1 s)")
    add("--tbt", type=real(1e-6, 1e6), default=0.1, metavar="S", help="promised between tokens (default 0.1 s)")
    add("--plot", metavar="FILE", help="draw the latencies: .png, .svg or .pdf (needs matplotlib)")


def _lengths(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    least, most = whole(1, MOST)(low), whole(1, MOST)(high or low)
    if most < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected two rising numbers such as 16:512")
    return least, most


# ------------------------------------------------------------ verbs


def simulate(args: argparse.Namespace) -> int:
    """Replay on a virtual clock."""
    from nearfar_cloud.executors.sim import facts_of
    from nearfar_cloud.planning.roofline import cost_model
    from nearfar_cloud.planning.simulate import POLICIES, simulated

    config = _config(args.model)
    if args.fit:
        fit = _fit(args, config.n_layers)
        cost, machine = fit.cost_model, f"{fit.machine}, {fit.threads} threads, {fit.dtype}"
    else:
        hardware = _hardware(args)
        cost, machine = partial(cost_model, config, hardware, _widths(args)), hardware.name
    facts = facts_of(config)

    def engine(name: str) -> Engine:
        return simulated(facts, cost, POLICIES[name](args.rows), n_blocks=args.blocks)

    return _compare(args, engine, f"simulated {args.model} on {machine}", config.n_ctx)


def replay(args: argparse.Namespace) -> int:
    """Replay on the wall clock."""
    executor, _ = _executor(args)

    from nearfar_cloud.clock import WallClock
    from nearfar_cloud.engine import Engine
    from nearfar_cloud.planning.simulate import POLICIES
    from nearfar_cloud.scheduling.compose import Composer

    fit = _fit(args, executor.facts.n_layers) if args.fit else None

    def engine(name: str) -> Engine:
        made = Engine(executor, Composer(POLICIES[name](args.rows)), clock=WallClock())
        if fit is not None:
            made.cost = fit.cost_model()
        return made

    return _compare(args, engine, f"{args.model} ({args.dtype}) on {cpu_name()}", executor.facts.n_ctx)


def profile(args: argparse.Namespace) -> int:
    """Measure, fit, write."""
    executor, threads = _executor(args)
    if args.cpu_time and threads != 1:
        raise UsageError("--cpu-time counts the time of all threads: it needs --threads 1")

    from nearfar_cloud.planning.profile import fit, grid, measure

    sizes = {"most_batch": 4, "most_rows": 64} if args.quick else {}
    shapes = grid(executor.facts.n_ctx, args.blocks, **sizes)
    clock = time.process_time if args.cpu_time else time.perf_counter
    say, samples = _progress("shapes"), []
    for sample in measure(executor, shapes, repeats=1 if args.quick else args.repeats, clock=clock):
        samples.append(sample)
        say(len(samples), len(shapes), 0.0)
    found = fit(samples, executor.facts.n_layers, model=executor.facts.fingerprint, dtype=args.dtype, threads=threads)
    found.save(args.out)
    if args.json:
        print(Path(args.out).read_text(encoding="utf-8"), end="")
    else:
        print(
            f"{args.out}: {found.n_fitted} shapes fitted, mean error {found.error_fitted:.1%}; {found.n_held_out} held "
            f"out, mean error {found.error_held_out:.1%}, largest {found.worst_held_out:.1%}; knee at {found.knee} rows"
        )
    return 0


def roofline(args: argparse.Namespace) -> int:
    """A table of operators."""
    from nearfar_cloud.planning import roofline as roofs

    config, hardware = _config(args.model), _hardware(args)
    stage = (roofs.Stage.prefill if args.stage == "prefill" else roofs.Stage.decode)(args.batch, args.context)
    found = roofs.operators(config, stage, hardware, _widths(args))
    if args.save:
        hardware.save(args.save)
    if args.json:
        rows = [o._asdict() | {"bytes": o.n_bytes, "intensity": o.intensity} for o in found]
        facts = {"name": hardware.name, "source": hardware.source}
        facts |= {"bandwidth": hardware.bandwidth, "peaks": hardware.peaks}
        print(json.dumps({"hardware": facts, "operators": rows, "step": roofs.totals(found, stage)}))
    else:
        print(roofs.table(found, stage, hardware))
    return 0


# ------------------------------------------------------------ what they share


def _compare(args: argparse.Namespace, engine: MakeEngine, title: str, n_ctx: int) -> int:
    """The same workload through each policy; the table, the JSON and the plot."""
    from nearfar_cloud.kv.pool import BLOCK
    from nearfar_cloud.planning import report
    from nearfar_cloud.planning.replay import capacity
    from nearfar_cloud.planning.replay import replay as run
    from nearfar_cloud.planning.simulate import POLICIES
    from nearfar_cloud.types import Objective

    names = args.policies.split(",")
    if unknown := [name for name in names if name not in POLICIES]:
        raise UsageError(f"--policies {unknown[0]!r}: expected some of {','.join(POLICIES)}")
    slo = report.Slo(args.ttft, args.tbt)
    workload = _workload(args).fitting(min(n_ctx, BLOCK * args.blocks))
    reached = None
    if args.rate is None:
        say("capacity: all requests at once")
        reached = capacity(engine(names[0]), workload.first(CAPACITY_REQUESTS), args.seed)
    workload = workload.at_rate(args.rate or args.load * (reached or 0.0))
    runs: dict[str, Replay] = {
        name: run(
            engine(name),
            workload,
            objective=Objective(ttft_s=args.ttft, tbt_s=args.tbt),
            seed=args.seed,
            on_progress=_progress(name),
        )
        for name in names
    }
    found = {name: report.summarise(done, slo) for name, done in runs.items()}
    if args.plot:
        report.plot(runs, args.plot, title)
    if args.json:
        print(json.dumps({"title": title, "workload": workload.figures(), "capacity": reached, "runs": found}))
        return 0
    w = workload.figures()
    print(
        f"{title}\n{w['name']}: {w['requests']} requests, {w['rate']:.2f} a second, intervals' CV {w['cv']:.1f}, "
        f"prompts {w['prompt']['mean']:.0f} (p99 {w['prompt']['p99']:.0f}), answers {w['output']['mean']:.0f} tokens"
        + (f"; capacity {reached:.2f} requests a second" if reached else "")
        + f"\nkept: first token in {args.ttft:g} s, others in {args.tbt:g} s; milliseconds\n{report.table(found)}"
    )
    return 0


def _workload(args: argparse.Namespace) -> Workload:
    from nearfar_cloud.planning.generate import Zipf, generate
    from nearfar_cloud.planning.traces import load_trace

    if args.trace:
        workload = load_trace(args.trace)
        if args.start:
            workload = workload.window(args.start, float("inf"))
        return workload.divided(args.divide or TRACE_DIVISOR).first(args.requests)
    workload = generate(
        args.requests, rate=1.0, cv=args.cv, prompt=Zipf(*args.prompt), output=Zipf(*args.output), seed=args.seed
    )
    return workload.divided(args.divide or 1)


def _fit(args: argparse.Namespace, n_layers: int) -> Fit:
    from nearfar_cloud.planning.profile import Fit

    fit = Fit.load(args.fit)
    if fit.n_layers != n_layers:
        raise UsageError(f"--fit {args.fit}: measured on {fit.n_layers} layers, {args.model} has {n_layers}")
    return fit


def _widths(args: argparse.Namespace) -> Any:
    from nearfar_cloud.planning.roofline import Widths

    return Widths(args.weight_bits / 8, args.kv_bits / 8)


def _hardware(args: argparse.Namespace) -> Any:
    from nearfar_cloud.planning.roofline import HARDWARE, Hardware, measure_hardware

    if args.hardware == "this":
        return measure_hardware(getattr(args, "dtype", "bf16"), threads=getattr(args, "threads", None))
    if args.hardware in HARDWARE:
        return HARDWARE[args.hardware]
    if not Path(args.hardware).is_file():
        raise UsageError(f"--hardware {args.hardware}: expected {', '.join(HARDWARE)}, this, or a file of --save")
    return Hardware.load(args.hardware)


def _config(model: str) -> ModelConfig:
    """Sizes by name, or of a GGUF file."""
    from nearfar.weights import Weights
    from nearfar_cloud.planning.roofline import MODELS

    if model in MODELS:
        return MODELS[model]
    with Weights.open(_path(model)) as weights:
        return _whole(weights.config, model)


def _whole(config: ModelConfig, model: str) -> ModelConfig:
    """UsageError for a half of a split model: what is planned is a server of texts."""
    if config.role != "full":
        raise UsageError(f"{model} is the {config.role} half of a split model: expected the whole one")
    return config


def _path(model: str) -> Path:
    """The file or folder of a model.  Raises FileError."""
    path = Path(model)
    if model == SHIPPED and (spec := find_spec("nearfar")) is not None and spec.origin:
        path = Path(spec.origin).parent / "models" / f"{SHIPPED}.gguf"
    if not path.exists():
        raise FileError(f"{model}: no such model; expected {SHIPPED}, a GGUF file or a folder")
    return path


def _executor(args: argparse.Namespace) -> tuple[LocalExecutor, int]:
    """The model on this machine, and its threads.  Raises MissingExtraError without torch."""
    if find_spec("torch") is None:
        raise MissingExtraError("torch", "cloud", f"nearfar cloud {args.cloud_verb}")
    import torch

    from nearfar_cloud.executors.local import LocalExecutor
    from nearfar_cloud.model.hf import load_folder
    from nearfar_cloud.model.loader import load_gguf
    from nearfar_cloud.planning.random_model import random_model
    from nearfar_cloud.planning.roofline import MODELS

    torch.set_num_threads(args.threads or env.threads() or torch.get_num_threads())
    if args.model in MODELS:
        loaded = random_model(MODELS[args.model], args.dtype)
    else:
        path = _path(args.model)
        loaded = load_folder(path, args.dtype) if path.is_dir() else load_gguf(path, args.dtype)
    _whole(loaded.config, args.model)
    return LocalExecutor(loaded, args.blocks), torch.get_num_threads()


def say(text: str) -> None:
    print(f"nearfar: {text}", file=sys.stderr, flush=True)


def _progress(what: str) -> Callable[[int, int, float], None]:
    """A line on stderr every few seconds."""
    last = time.monotonic()

    def told(done: int, n: int, clock_s: float) -> None:
        nonlocal last
        if time.monotonic() - last >= SAY_EVERY_S:
            last = time.monotonic()
            say(f"{what}: {done} of {n}" + (f", {clock_s:.1f} s on its clock" if clock_s else ""))

    return told
