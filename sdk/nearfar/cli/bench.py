"""`nearfar bench`: prefill and decode speed of a model, engines taking turns on the same file.

Engines alternate, so that a busy spell of the machine hits all of them; medians and ratios are what counts.  Every
token is computed at full depth: exits are a property of the text, `nearfar run` shows them.
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from statistics import median
from typing import TYPE_CHECKING, Any

from nearfar.arguments import whole
from nearfar.bench.turn import Turn, measure
from nearfar.cli import bench_collab, roofline
from nearfar.cli.verbs import SHIPPED, Verbs, model_path, new_parser
from nearfar.errors import MissingExtraError, NearfarError, UnsupportedError, UsageError
from nearfar.machine import cpu_name

if TYPE_CHECKING:
    from nearfar.llm import LLM

ENGINES = ("native", "numpy", "llama")
LARGE = 64 << 20  # bytes; above it the reference would take minutes


def add_verb(verbs: Verbs) -> None:
    parser = new_parser(
        verbs,
        "bench",
        "measure prefill and decode speed against the reference and llama.cpp",
        "nearfar bench",
        "nearfar bench model.gguf --engines native,llama --threads 1",
        "nearfar bench --rounds 9 --json",
        "nearfar bench roofline --help",
        "nearfar bench collab --help",
    )
    parser.add_argument("model", nargs="?", default=SHIPPED, help="path of a GGUF file (default: the shipped model)")
    parser.add_argument("--engines", help="some of native,numpy,llama (default: all there are; numpy for small files)")
    parser.add_argument("--rounds", type=whole(1, 1000), default=5, metavar="N", help="turns of each (default 5)")
    parser.add_argument("--prompt", type=whole(1, 1 << 20), default=128, metavar="N", help="tokens of the prompt")
    parser.add_argument("--tokens", type=whole(2, 1 << 20), default=64, metavar="N", help="tokens to decode")
    parser.add_argument("--threads", type=whole(1, 256), metavar="N", help="threads of each engine")
    parser.add_argument("--cpu-time", action="store_true", help="per CPU second, for a busy machine")
    parser.set_defaults(run=run)
    roofline.add_verb(parser)
    bench_collab.add_verb(parser)


def run(args: argparse.Namespace) -> int:
    path = model_path(args.model)
    wanted = list(ENGINES) if args.engines is None else args.engines.split(",")
    if unknown := set(wanted) - set(ENGINES):
        raise UsageError(f"--engines {','.join(sorted(unknown))}: expected some of {','.join(ENGINES)}")
    too_large = args.engines is None and path.stat().st_size > LARGE
    if too_large:
        wanted.remove("numpy")
    engines, absent = open_engines(args, str(path), wanted)
    if too_large:
        absent["numpy"] = "too slow for a file of this size; --engines numpy asks for it"
    turns: dict[str, list[Turn]] = {name: [] for name in engines}
    try:
        for llm in engines.values():
            measure(llm, 8, 3, cpu_time=args.cpu_time)  # warm-up: pages, threads
            if args.prompt + args.tokens > llm.max_len:
                raise UsageError(f"--prompt {args.prompt} --tokens {args.tokens}: the context holds {llm.max_len}")
        for _ in range(args.rounds):
            for name, llm in engines.items():
                turns[name].append(measure(llm, args.prompt, args.tokens - 1, cpu_time=args.cpu_time))
    finally:
        for llm in engines.values():
            llm.close()
    result = summary(args, turns, absent)
    print(json.dumps(result) if args.json else report(result))
    return 0


def open_engines(args: argparse.Namespace, path: str, wanted: list[str]) -> tuple[dict[str, LLM], dict[str, str]]:
    """The engines that can run this file, and why the others cannot."""
    from nearfar.llm import LLM

    found: dict[str, LLM] = {}
    absent: dict[str, str] = {}
    for name in wanted:
        try:
            if name == "llama" and find_spec("llama_cpp") is None:
                raise MissingExtraError("llama-cpp-python", "llama", "the comparison with llama.cpp")
            found[name] = LLM.open(path, backend=name, threads=args.threads)
        except (MissingExtraError, UnsupportedError) as error:
            absent[name] = str(error)
    if not found:
        raise NearfarError(f"no engine can run {path}: {'; '.join(absent.values())}")
    return found, absent


def summary(args: argparse.Namespace, turns: dict[str, list[Turn]], absent: dict[str, str]) -> dict[str, Any]:
    engines = {
        name: {
            "prefill": median(t.prefill for t in found),
            "decode": median(t.decode for t in found),
            "turns": [{"prefill": t.prefill, "decode": t.decode} for t in found],
        }
        for name, found in turns.items()
    }
    return {
        "model": args.model,
        "cpu": cpu_name(),
        "rounds": args.rounds,
        "prompt": args.prompt,
        "tokens": args.tokens,
        "per": "CPU second" if args.cpu_time else "second",
        "engines": engines,
        "absent": absent,
    }


def report(result: dict[str, Any]) -> str:
    lines = [
        f"{result['model']} on {result['cpu']}: {result['prompt']} tokens prefilled, {result['tokens']} decoded, "
        f"median of {result['rounds']}, tokens per {result['per']}",
        f"  {'engine':<8} {'prefill':>10} {'decode':>10}",
    ]
    first_name, first = next(iter(result["engines"].items()))
    for name, found in result["engines"].items():
        ratio = ""
        if name != first_name:
            ratio = (
                f"   {first_name} is {first['prefill'] / found['prefill']:.3g}x and "
                f"{first['decode'] / found['decode']:.3g}x as fast"
            )
        lines.append(f"  {name:<8} {found['prefill']:>10,.0f} {found['decode']:>10,.0f}{ratio}")
    return "\n".join([*lines, *(f"  {name:<8} absent: {why}" for name, why in result["absent"].items())])
