"""`nearfar doctor`: what this installation runs on, how fast the memory is, what is missing and how to get it.

The commonest "extremely slow" is a silent fallback to scalar code: here it is said aloud.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from nearfar import __version__, env
from nearfar.cli.verbs import SHIPPED, Verbs, add_upper_options, model_path, new_parser, shipped_path, upper_of
from nearfar.errors import NearfarError
from nearfar.machine import cpu_name
from nearfar.options import EngineOptions

# What an extra is for.  Extras whose house is not there yet are not offered.
EXTRAS = {
    "schema": "JSON answers that satisfy a schema (`nearfar ask`)",
    "llama": "every other GGUF architecture, through llama.cpp",
    "train": "training a model of one's own (`nearfar train`)",
}


def add_verb(verbs: Verbs) -> None:
    parser = new_parser(
        verbs,
        "doctor",
        "show the kernels in use, the memory bandwidth, and what is missing",
        "nearfar doctor",
        "nearfar doctor --json",
        "nearfar doctor model.gguf",
        "nearfar doctor model-device.gguf --upper grpcs://box.local:9090 --ca ca.pem",
        "NEARFAR_ISA=ref nearfar doctor",
        detail="With --upper, whether that side belongs to this device half: fingerprints, then the self-test that "
        "`nearfar split` wrote down, the whole way and back.",
    )
    parser.add_argument("model", nargs="?", default=SHIPPED, help="whose matrices to show (default: the shipped model)")
    add_upper_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    facts = diagnose(args.model)
    code = 0
    if args.upper:
        facts["upper"], code = upper_facts(args)
    print(json.dumps(facts, ensure_ascii=False) if args.json else report(facts))
    return code


def upper_facts(args: argparse.Namespace) -> tuple[dict[str, Any], int]:
    """The self-test of a device half with the upper side, and the exit code that its failure means."""
    from nearfar.llm import LLM
    from nearfar.share import self_test

    facts: dict[str, Any] = {"addresses": args.upper, "error": ""}
    started = time.perf_counter()
    try:
        options = upper_of(args)
        options["collab"] = replace(options["collab"], self_test="never")  # not twice
        with LLM.open(model_path(args.model), **options) as llm:
            facts["tests"] = self_test(llm)
    except NearfarError as error:
        return facts | {"error": str(error)}, error.exit_code
    return facts | {"seconds": round(time.perf_counter() - started, 3)}, 0


def diagnose(model: str = SHIPPED) -> dict[str, Any]:
    path = shipped_path() if model == SHIPPED else model_path(model)
    return {
        "nearfar": __version__,
        "where": str(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "engine": engine_facts(path),
        "model": model_facts(path),
        "extras": {name: extra_facts(name) for name in EXTRAS},
        "env": {name: os.environ.get(name) for name in env.VARIABLES},
    }


def engine_facts(model: Path) -> dict[str, Any]:
    """The compiled engine's own account, or why it is not there."""
    try:
        from nearfar.lower_native import default_threads, has_lookups, isas_available, read_bandwidth, selected_isa
    except ImportError as error:
        return {"native": False, "why": str(error)}
    threads = env.threads() or default_threads()
    return {
        "native": True,
        "isa": selected_isa(),
        "isas": isas_available(),
        "lookups": has_lookups(),
        "threads": threads,
        **held_facts(model),
        "read_gb_per_s": {n: round(read_bandwidth(n), 1) for n in sorted({1, threads})},
    }


def held_facts(model: Path) -> dict[str, Any]:
    """How the engine holds the matrices of a model: packed kind -> how many and how many bytes; what its store did."""
    from nearfar.lower_native import NativeLower
    from nearfar.weights import Weights

    if not model.is_file():
        return {"kernels": {}, "cache": None}
    kinds: dict[str, dict[str, int]] = {}
    with Weights.open(model) as weights:
        lower = NativeLower(weights, EngineOptions(cache=env.cache()))
        for panel in lower.panels():
            kind = kinds.setdefault(panel.kind, {"matrices": 0, "bytes": 0})
            kind["matrices"] += 1
            kind["bytes"] += panel.n_bytes
    state = lower.cache
    where = None if state.path is None else str(state.path)
    return {
        "kernels": kinds,
        "cache": {"state": state.state, "why": state.why, "path": where, "bytes": state.n_bytes},
    }


def model_facts(path: Path) -> dict[str, Any]:
    from nearfar.cli.show import config_of, half_of
    from nearfar.gguf_reader import GGUFFile

    if not path.is_file():
        return {"path": str(path), "bytes": None, "half": ""}
    with GGUFFile.open(path) as file:
        config = config_of(file)
    half = "" if isinstance(config, str) or config.role == "full" else half_of(config)
    return {"path": str(path), "bytes": path.stat().st_size, "half": half}


def extra_facts(extra: str) -> dict[str, Any]:
    """The packages of one extra with the versions found (None: missing)."""
    found = {name: version_of(name) for name in packages_of(extra)}
    return {"packages": found, "installed": bool(found) and all(found.values()), "purpose": EXTRAS[extra]}


def packages_of(extra: str) -> list[str]:
    """As the installed metadata of nearfar lists them."""
    try:
        required = metadata.requires("nearfar") or []
    except metadata.PackageNotFoundError:  # run from a source tree that was never installed
        return []
    mark = re.compile(rf"extra\s*==\s*['\"]{extra}['\"]")
    return [re.match(r"[\w.-]+", line)[0] for line in required if mark.search(line)]  # type: ignore[index]


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def report(facts: dict[str, Any]) -> str:
    lines = [
        f"nearfar   {facts['nearfar']} in {facts['where']}",
        f"python    {facts['python']} on {facts['system']}",
        f"cpu       {facts['cpu']}, {facts['cores']} cores for this process",
        *engine_lines(facts["engine"]),
        model_line(facts["model"]),
        *upper_lines(facts.get("upper")),
        "",
        *extra_lines(facts["extras"]),
        "",
        "environment",
    ]
    lines += [f"  {name:<16} {facts['env'][name] or '-':<8} {what}" for name, what in env.VARIABLES.items()]
    return "\n".join(lines)


def engine_lines(engine: dict[str, Any]) -> list[str]:
    if not engine["native"]:
        return [
            f"engine    numpy only, slowly: the compiled engine is missing ({engine['why']})",
            "          get it: pip install --force-reinstall nearfar, with a C++20 compiler",
        ]
    best = engine["isas"][-1]
    lines = [
        f"engine    native, {engine['isa']} kernels (this CPU has: {', '.join(engine['isas'])}), "
        f"{engine['threads']} threads"
    ]
    if engine["isa"] != best:
        lines.append(f"          NEARFAR_ISA={engine['isa']} holds it back: {best} is faster")
    held = [f"{k['matrices']} as {kind} ({k['bytes'] / 1e6:.2f} MB)" for kind, k in engine["kernels"].items()]
    if held:
        lines.append(f"          the model's matrices: {', '.join(held)}, each with a kernel of that set")
        lines.append(f"cache     {cache_text(engine['cache'])}")
    lookups = "has lookups (--lut fast)" if engine["lookups"] else "has no lookups: --lut fast is refused"
    lines.append(f"          this set {lookups}")
    speeds = [f"{gbs:.1f} GB/s with {n} thread{'s' * (n > 1)}" for n, gbs in engine["read_gb_per_s"].items()]
    return [*lines, f"memory    reads {', '.join(speeds)}"]


def cache_text(cache: dict[str, Any]) -> str:
    """What the store of packed matrices did for the model."""
    if cache["path"] is None:
        return f"off: {cache['why']}"
    done = "mapped as packed before" if cache["state"] == "hit" else f"packed now ({cache['why']}), mapped from now on"
    return f"{cache['state']}: {done}, {cache['bytes'] / 1e6:.1f} MB: {cache['path']}"


def model_line(model: dict[str, Any]) -> str:
    if model["bytes"] is None:
        return f"model     missing: {model['path']}"
    half = f", {model['half']}" if model["half"] else ""
    return f"model     {Path(model['path']).stem}, {model['bytes'] / 1e6:.2f} MB{half}: {model['path']}"


def upper_lines(upper: dict[str, Any] | None) -> list[str]:
    """Whether the upper side belongs to the model and computes what it should."""
    if upper is None:
        return []
    where = ", ".join(upper["addresses"])
    if upper["error"]:
        return [f"upper     {where}: does not do: {upper['error']}"]
    tests = f"{upper['tests']} prompts of the self-test go on as they should" if upper["tests"] else "no self-test"
    return [f"upper     {where}: belongs to this model; {tests}, {upper['seconds']:.2f} s with the way there"]


def extra_lines(extras: dict[str, dict[str, Any]]) -> list[str]:
    lines = ["extras"]
    for name, extra in extras.items():
        missing = [package for package, version in extra["packages"].items() if version is None]
        if extra["installed"]:
            state = " ".join(f"{p} {v}" for p, v in extra["packages"].items())
        else:
            state = f"missing{' ' * bool(missing)}{' '.join(missing)}: pip install 'nearfar[{name}]'"
        lines += [f"  {name:<8} {extra['purpose']}", f"           {state}"]
    return lines
