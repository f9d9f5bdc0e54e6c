"""What drafting by an exit gains: acceptance, tokens a pass and speed; and what several rows cost where memory binds.

python bench/home_requests.py DATA 60 > home.jsonl
python bench/speculation.py --rows home.jsonl --text stories.txt
python bench/speculation.py --rows home.jsonl --cost bitnet-2b:TQ2_0   # or any file: only its speed is used

Answers with drafts, without, and with exits that decide take turns on each prompt; drafts must not change a token.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray

import nearfar
from line import show
from nearfar import LLM
from nearfar.bench.random_model import Recipe, cached, default_folder
from nearfar.cli.request import stop_ids
from nearfar.engine import Engine
from nearfar.forms import Part
from nearfar.lower import Lower, open_lower
from nearfar.options import EngineOptions
from nearfar.sampling import Sampling
from nearfar.speculate import MAX_ROWS, Speculative
from nearfar.weights import Weights

WAYS = {"plain": {"exits": False}, "drafts": {"speculate": True}, "exits": {"exits": True}}
PROMPT_TOKENS, ANSWER_TOKENS = 48, 64  # of running text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="path of a GGUF file with exits (default: the shipped model)")
    parser.add_argument("--rows", type=Path, help="prompts, one JSON object a line, as bench/home_requests.py prints")
    parser.add_argument("--text", type=Path, help="running text, of which pieces are continued")
    parser.add_argument(
        "--cost", help="a model whose cost of M rows is measured: a file, or SIZE:TYPE of random weights"
    )
    parser.add_argument("--first", type=float, default=1 / 3, help="share of that model's layers that draft")
    parser.add_argument("--limit", type=int, default=60, help="prompts of each kind (default 60)")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    found: list[tuple[int, int]] = []
    with (
        LLM.open(args.model, threads=args.threads) if args.model else nearfar.load("nano", threads=args.threads) as llm
    ):
        if args.text:
            found = compare(llm, "running text", pieces(llm, args.text, args.limit), [])
        if args.rows:
            found = compare(llm, "home requests", parts(args.rows, args.limit), stop_ids(llm))
    if args.cost:
        path = Path(args.cost)
        path = path if path.is_file() else cached(Recipe.parse(args.cost), default_folder())
        cost(path, args.first, args.threads, found)


def parts(path: Path, limit: int) -> list[tuple[Part, ...]]:
    rows = [json.loads(line)["prompt"] for line in path.read_text().splitlines()[:limit]]
    return [tuple(Part(text, control) for text, control in row) for row in rows]


def pieces(llm: LLM, path: Path, limit: int) -> list[list[int]]:
    ids = llm.tokenizer.encode(path.read_text()[: 40 * PROMPT_TOKENS * limit])
    return [ids[i : i + PROMPT_TOKENS] for i in range(0, len(ids) - PROMPT_TOKENS, PROMPT_TOKENS)][:limit]


def compare(llm: LLM, what: str, prompts: Sequence[nearfar.llm.Prompt], stops: Sequence[int]) -> list[tuple[int, int]]:
    """Print a line; returns (drafted, right) of every pass."""
    changed = 0
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    found: list[tuple[int, int]] = []
    for i, prompt in enumerate([prompts[0], *prompts]):
        ids = {}
        for way, options in WAYS.items():
            done = llm.generate(prompt, max_tokens=ANSWER_TOKENS, stop_ids=stops, **options)  # type: ignore[arg-type]
            ids[way] = done.ids
            if i and len(done.events) > 1:  # the first prompt is a warm-up; the first token pays for the prompt
                times[way].append(sum(e.ms for e in done.events[1:]) / 1000 / (len(done.events) - 1))
        assert ids["plain"] == ids["drafts"], prompt
        changed += ids["plain"] != ids["exits"]
        found += passes(llm, llm._ids(prompt), len(ids["plain"]), stops) if i else []
    n_drafted, n_right = (sum(column) for column in zip(*found, strict=True))
    drafts, exits = (median(a / b for a, b in zip(times["plain"], times[w], strict=False)) for w in ("drafts", "exits"))
    show(
        f"self-speculation, {what}: {len(prompts)} answers, the same tokens",
        f"{n_right / max(n_drafted, 1):.0%} of {n_drafted} drafts right, {1 + n_right / len(found):.2f} tokens a pass; "
        f"{1 / median(times['plain']):,.0f} -> {1 / median(times['drafts']):,.0f} tokens/s, median ratio {drafts:.2f} "
        f"(exits that decide: {exits:.2f}, {changed} answers changed)",
    )
    return found


def passes(llm: LLM, prompt: list[int], n_tokens: int, stops: Sequence[int]) -> list[tuple[int, int]]:
    """(drafted, right) of each pass behind that of the prompt, along the first tokens of an answer."""
    assert isinstance(llm.stepper, Engine)
    stepper = Speculative(llm.stepper, ends=frozenset(stops) | llm.tokenizer.eog_ids)
    s = stepper.new_sequence(Sampling())
    s.ids = list(prompt)
    found: list[tuple[int, int]] = []
    for i in range(n_tokens):
        starts = not s.ahead
        token = stepper.step(s)
        if starts and i:
            found.append((token.n_drafted, 0))
        if found and token.source != "full":
            found[-1] = (found[-1][0], found[-1][1] + 1)
    return found


def cost(path: Path, share: float, threads: int | None, found: list[tuple[int, int]]) -> None:
    """What M rows cost, and what drafting would gain if an exit of this model were right as often as above."""
    with Weights.open(path) as weights:
        lower = open_lower(weights, options=EngineOptions(threads=threads, cache="off"))
        e, n_layers = max(1, round(share * lower.config.n_layers)), lower.config.n_layers
        h = lower.embed((np.arange(64) * 37 % lower.config.n_vocab).astype(np.int32))
        below, head = seconds(lower, h, 1, 0, e), seconds(lower, h, 1, 0, 0)
        above = [seconds(lower, h, m, e, n_layers) + seconds(lower, h, m, 0, 0) for m in range(1, MAX_ROWS + 1)]
    plain = below + above[0]
    show(
        f"{path.name}: M rows through layers [{e}, {n_layers}) and the head, against one",
        ", ".join(f"{m}: {t / above[0]:.2f}" for m, t in enumerate(above, 1)),
    )
    gains = []
    for cap in range(1, MAX_ROWS):
        drafted = [min(n, cap) for n, _ in found]
        spent = sum((n + 1) * below + min(n + 1, cap) * head + above[n] for n in drafted)  # the last head may be unsure
        n_tokens = sum(1 + min(right, cap) for _, right in found)
        gains.append(f"{cap}: {n_tokens * plain / spent:.2f}x")
    show(f"{path.name}: speed with at most so many drafts of such an exit, against none", ", ".join(gains))


def seconds(lower: Lower, h: NDArray[np.float32], m: int, first: int, last: int, n: int = 9) -> float:
    """Median time of `m` rows through layers [first, last) at position 64; through the head, where there are none."""
    kv = lower.new_kv(128)
    if first < last:
        lower.forward(h, kv, first, last)
    taken = []
    for _ in range(n):
        started = time.perf_counter()
        if first < last:
            lower.forward(h[:m], kv, first, last)
        else:
            lower.logits(h[:m])
        taken.append(time.perf_counter() - started)
        kv.truncate(64)
    return median(taken)


if __name__ == "__main__":
    main()
