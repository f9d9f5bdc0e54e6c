"""`nearfar bench roofline`: the machine's read bandwidth and int8 peak, then kernels and models as shares of them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nearfar.arguments import whole
from nearfar.cli.verbs import VerbParser, model_path, new_inner_parser
from nearfar.errors import MissingExtraError, UsageError
from nearfar.kv_cache import check_dtype
from nearfar.options import EngineOptions

PARTS = ("machine", "kernels", "models")
MODELS = ("bitnet-2b:TQ2_0", "llama-1b:Q4_0", "qwen-0.5b:Q4_0")


def add_verb(bench: VerbParser) -> None:
    parser = new_inner_parser(
        bench,
        "roofline",
        "measure the machine, then every kernel and whole models as a share of what the machine allows",
        "nearfar bench roofline",
        "nearfar bench roofline --random bitnet-2b:TQ1_0 --threads 1 --parts machine,models",
        "nearfar bench roofline model.gguf --set head=q4 --json > roofline.jsonl",
        detail="A share is the part of min(int8 peak, read bandwidth x operations a byte) that was reached. Random "
        "models have a tied head of 4.5 bits (Q4_0) unless SIZE:TYPE:HEAD names another type, and are kept in a "
        "temporary folder.  Packed matrices are not kept (--set cache=auto keeps them).",
    )
    parser.add_argument("model", nargs="*", help="GGUF files (default: the random models)")
    parser.add_argument(
        "--random", action="append", default=[], metavar="SIZE:TYPE", help="a random model (repeatable)"
    )
    parser.add_argument("--parts", default=",".join(PARTS), metavar="P,..", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--kinds", metavar="K,..", help="kinds of packed matrices (default: all)")
    parser.add_argument(
        "--rows", type=numbers(1, 4096), metavar="M,..", help="rows of the kernels (default 1,2,4,8,128)"
    )
    parser.add_argument("--threads", type=numbers(1, 256), metavar="N,..", help="default: 1 and every core")
    parser.add_argument("--prompts", type=numbers(2, 1 << 16), metavar="N,..", help="of the models (default 128,512)")
    parser.add_argument("--rounds", type=whole(1, 1000), metavar="N", help="turns of a model (default 5)")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="an option of LLM.open")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time instead of the wall's, for a busy machine")
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes: rough, less memory")
    parser.add_argument("--folder", type=Path, help="where random models are kept (default: a temporary one)")
    parser.add_argument("--delete", action="store_true", help="delete the random models afterwards")
    parser.set_defaults(run=run)


def numbers(low: int, high: int) -> Any:
    """An argparse type: whole numbers in low..high, with commas between."""
    one = whole(low, high)
    return lambda text: tuple(one(word) for word in text.split(","))


def run(args: argparse.Namespace) -> int:
    args.parts = chosen(args.parts, PARTS, "--parts")
    try:
        import nearfar.lower_native  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("nearfar_native", "dev", f"the roofline ({error})") from error
    found = list(models(args)) if "models" in args.parts else []
    for record in records(args, [(name, path) for name, path, _ in found]):
        print(json.dumps(record) if args.json else line(record), flush=True)
    for _, path, is_random in found:
        if args.delete and is_random:
            path.unlink()
    return 0


def records(args: argparse.Namespace, found: list[tuple[str, Path]]) -> Iterator[dict[str, Any]]:
    from nearfar.bench import roofline
    from nearfar.lower_native import default_threads, panel_kinds, selected_isa
    from nearfar.machine import cpu_name

    parts = args.parts
    kinds = chosen(args.kinds or ",".join(panel_kinds()), panel_kinds(), "--kinds")
    rows = args.rows or ((1, 8) if args.quick else roofline.ROWS)
    threads = args.threads or tuple(sorted({1, default_threads()}))
    prompts = args.prompts or ((16,) if args.quick else (128, 512))
    options = settings(args.set)
    caches = roofline.caches()
    yield {
        "what": "machine",
        "cpu": cpu_name(),
        "cores": default_threads(),
        "isa": selected_isa(),
        "l2": caches.l2,
        "last_cache": caches.last,
        "clock": "cpu" if args.cpu_time else "wall",
        "date": time.strftime("%Y-%m-%d"),
    }
    for n in threads:
        say(f"{n} threads: the machine")
        roofs, measured = roofline.measure_roofs(n, roofline.LEVELS, cpu_time=args.cpu_time, quick=args.quick)
        yield from measured
        if "kernels" in parts:
            say(f"{n} threads: {len(kinds)} kinds of matrices")
            seconds = 0.02 if args.quick else 0.3
            yield from roofline.measure_kernels(
                roofs, kinds, rows, seconds=seconds, cpu_time=args.cpu_time, quick=args.quick
            )
        for name, path in found:
            say(f"{n} threads: {name}")
            yield from roofline.measure_model(
                roofs,
                path,
                name,
                options=options,
                prompts=prompts,
                n_tokens=4 if args.quick else 24,
                rounds=args.rounds or (2 if args.quick else 5),
                cpu_time=args.cpu_time,
            )


def models(args: argparse.Namespace) -> Iterator[tuple[str, Path, bool]]:
    """Name, file, and whether it is a random one of each model; those are written where they are missing."""
    from nearfar.bench.random_model import Recipe, cached, default_folder

    for model in args.model:
        yield model, model_path(model), False
    wanted = args.random or ([] if args.model else ["tiny:TQ2_0"] if args.quick else MODELS)
    for recipe in [Recipe.parse(text) for text in wanted]:
        say(recipe.name)
        yield recipe.name, cached(recipe, args.folder or default_folder()), True


def chosen(text: str, known: Any, option: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"{option} {unknown[0]!r}: expected some of {','.join(known)}")
    return names


def settings(words: list[str]) -> dict[str, Any]:
    """NAME=VALUE words as keyword arguments of LLM.open.  Raises UsageError."""
    options = {"cache": "off"}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in ("lut", "head", "cache", "kv_dtype"):
            raise UsageError(f"--set {word!r}: expected lut=, head=, cache= or kv_dtype= and a value")
        options[name] = value
    wanted: dict[str, Any] = {name: value for name, value in options.items() if name != "kv_dtype"}
    EngineOptions(**wanted)  # a wrong value is refused before anything is measured
    check_dtype(options.get("kv_dtype", "f16"))
    return options


def line(r: dict[str, Any]) -> str:
    """A record for people."""
    if r["what"] == "machine":
        return (
            f"{r['cpu']}, {r['cores']} cores, kernels {r['isa']}, L2 {r['l2'] >> 10} KiB, last cache "
            f"{r['last_cache'] >> 20} MiB, {r['clock']} time"
        )
    start = f"{r['threads']:>2} threads  "
    if r["what"] == "read":
        return f"{start}read from {r['from']:<5} {r['gb_s']:>8.1f} GB/s"
    if r["what"] == "int8":
        return f"{start}{r['instruction']:<15} {r['gops']:>8.0f} GOPS"
    if r["what"] == "kernel":
        return (
            f"{start}{r['kind']:<9} {r['from']:<5} m={r['m']:<4} {r['gb_s']:>8.1f} GB/s {r['gops']:>8.0f} GOPS "
            f"{r['share']:>5.0%} of the limit"
        )
    mb, start = r["bytes_a_token"] / 1e6, f"{start}{r['model']}: "
    if r["what"] == "decode":
        return f"{start}decode {r['tokens_s']:.1f} tokens/s x {mb:.0f} MB = {r['share_of_read']:.0%} of the bandwidth"
    return f"{start}prefill of {r['m']}: {r['tokens_s']:.0f} tokens/s, {r['share_of_int8']:.0%} of the int8 peak"


def say(text: str) -> None:
    print(f"nearfar: {text}", file=sys.stderr, flush=True)
