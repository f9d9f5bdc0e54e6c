"""From a started interpreter to the first token of a 2B model whose matrices lie packed in the store, and the memory.

    python bench/start_up_large.py [--runs N] [--threads N] [--model model.gguf] [--json]

Without --model a random BitNet of 2B dimensions is written once, with a vocabulary and merges of Llama 3's size.  Each
run is a fresh process with a warm page cache; nearfar, nearfar without a store and llama-cpp-python take turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from line import plain_env, show, spread
from nearfar.bench.random_model import Recipe, cached, default_folder
from nearfar.bpe import _CHARS
from nearfar.gguf_reader import GGUFFile
from nearfar.gguf_writer import GGUFWriter

# Children get the moment of their start (one clock for all processes), the file, threads, the store.
PACKED = "nearfar, packed before"
_MEMORY = """
def memory():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {key: int(status[key].split()[0]) / 1024 for key in ("VmHWM", "RssAnon", "RssFile")}
"""
OURS = (
    _MEMORY
    + """
import json, sys, time
started, path, threads, cache = float(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
at = [time.monotonic()]
parts = {"interpreter": at[0] - started}
def lap(name):
    at.append(time.monotonic())
    parts[name] = at[-1] - at[-2]
import numpy; lap("numpy")
import nearfar, nearfar.llm, nearfar.lower_native; lap("nearfar's modules")
from nearfar.engine import Engine
from nearfar.lower import open_lower
from nearfar.options import EngineOptions
from nearfar.panel_store import vouches_for
from nearfar.tokenizer import tokenizer_from_metadata
from nearfar.weights import Weights
weights = Weights.open(path, vouched=lambda file: vouches_for(file, cache)); lap("header, keys, vectors")
tokenizer = tokenizer_from_metadata(weights.file.metadata); lap("tokenizer")
lower = open_lower(weights, "native", EngineOptions(threads=threads, cache=cache)); lap("matrices")
engine = Engine(lower, 4096, "f16")
llm = nearfar.LLM(engine, tokenizer, weights.file.metadata, max_len=4096, backend="native", config=weights.config)
ready = time.monotonic() - started
stream = llm.stream("The")
next(stream); lap("first token")
weights, kv = (n / 2**20 for n in (sum(p.n_bytes for p in lower.panels()), stream._sequence.kv.n_bytes))
print(json.dumps({"state": lower.cache.state, "ready": ready, "first": at[-1] - started, "parts": parts,
                  "weights": weights, "kv": kv, **memory()}))
"""
)
LLAMA = (
    _MEMORY
    + """
import json, sys, time
started, path, threads = float(sys.argv[1]), sys.argv[2], int(sys.argv[3])
import llama_cpp
llm = llama_cpp.Llama(path, n_ctx=4096, n_threads=threads, n_threads_batch=threads, verbose=False)
ready = time.monotonic() - started
ids = llm.tokenize(b"The")
llm.eval(ids); llm.sample(temp=0)
print(json.dumps({"ready": ready, "first": time.monotonic() - started, **memory()}))
"""
)


Run = dict[str, Any]


def child(code: str, *args: object) -> Run:
    """What a fresh process that runs `code` says of itself."""
    command = [sys.executable, "-c", code, str(time.monotonic()), *map(str, args)]
    done = subprocess.run(command, check=True, env=plain_env(), capture_output=True, text=True)
    result: Run = json.loads(done.stdout.splitlines()[-1])
    return result


def large_vocabulary(n_tokens: int, n_merges: int) -> tuple[list[str], list[int], list[str]]:
    """Tokens, their types and merges of Llama 3's number: random pairs of what is there already."""
    rng = np.random.default_rng(0)
    tokens = list(_CHARS.values())
    known, merges, n_special = set(tokens), {}, 256
    while len(tokens) < n_tokens - n_special:
        a, b = (tokens[int(i)] for i in (rng.integers(len(tokens)), rng.integers(256)))
        if len(a + b) <= 12 and a + b not in known:
            merges[f"{a} {b}"] = None
            known.add(a + b)
            tokens.append(a + b)
    while len(merges) < n_merges:  # other ways to the same tokens
        text = tokens[int(rng.integers(256, len(tokens)))]
        at = int(rng.integers(1, len(text)))
        merges[f"{text[:at]} {text[at:]}"] = None
    special = [f"<|reserved_{i}|>" for i in range(n_special)]
    return tokens + special, [1] * len(tokens) + [3] * n_special, list(merges)


def random_2b() -> Path:
    """The random model of the other benchmarks with a vocabulary of real size, written once."""
    plain = cached(Recipe.parse("bitnet-2b:TQ2_0"), default_folder())
    path = plain.with_name("start_up_2b.gguf")
    if path.is_file():
        return path
    w = GGUFWriter(path)
    with GGUFFile.open(plain) as file:
        tokens, types, merges = large_vocabulary(len(file.metadata["tokenizer.ggml.tokens"]), 280_000)
        for key in file.metadata:
            if key.rpartition(".")[2] not in ("tokens", "token_type", "merges", "eos_token_id"):
                w.add_encoded(key, file.encoded(key))
        w.add("tokenizer.ggml.tokens", tokens)
        w.add("tokenizer.ggml.token_type", types)
        w.add("tokenizer.ggml.merges", merges)
        w.add("tokenizer.ggml.eos_token_id", len(tokens) - 1)
        for name, t in file.tensors.items():
            w.add_tensor(name, file.raw(name), t.type, t.shape)
        return w.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON object with every run")
    args = parser.parse_args()
    path = args.model or random_2b()
    ways: dict[str, tuple[str, Path, int, str]] = {
        PACKED: (OURS, path, args.threads, "auto"),
        "nearfar, no store": (OURS, path, args.threads, "off"),
    }
    if find_spec("llama_cpp") is not None:
        ways["llama-cpp-python"] = (LLAMA, path, args.threads, "")
    built = child(*ways[PACKED])  # packs, and warms the page cache for all
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for _ in range(args.runs):
        for name, way in ways.items():
            runs[name].append(child(*way))
    if args.json:
        print(json.dumps({"model": str(path), "built": built, "runs": runs}))
    else:
        report(runs)


def report(runs: dict[str, list[Run]]) -> None:
    assert all(r["state"] == "hit" for r in runs[PACKED])
    for name, found in runs.items():
        goal = "under 1 s" if name == PACKED else ""
        show(f"interpreter to a ready 2B model, {name}", spread([1000 * r["ready"] for r in found], "ms", 0), goal)
        show(f"... and its first token, {name}", spread([1000 * r["first"] for r in found], "ms", 0), goal)
    ours = runs[PACKED]
    parts = {part: 1000 * median(r["parts"][part] for r in ours) for part in ours[0]["parts"]}
    show(f"the parts of that, {PACKED}", ", ".join(f"{part} {ms:.0f}" for part, ms in parts.items()) + " ms")
    for name, found in runs.items():
        peak, anonymous, mapped = (median(r[key] for r in found) for key in ("VmHWM", "RssAnon", "RssFile"))
        figure, goal = f"peak {peak:.0f} MiB; then {anonymous:.0f} anonymous, {mapped:.0f} mapped", ""
        if "weights" in found[0]:
            weights, kv = found[0]["weights"], found[0]["kv"]
            figure += f"; weights {weights:.0f}, cache {kv:.0f}, all else {anonymous + mapped - weights - kv:.0f}"
            goal = f"weights + cache + 40 MiB = {weights + kv + 40:.0f} MiB" if name == PACKED else ""
        show(f"memory, {name}", figure, goal)


if __name__ == "__main__":
    main()
