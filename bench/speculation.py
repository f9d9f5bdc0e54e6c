"""What drafting by an exit gains: acceptance, tokens a pass and speed; and what several rows cost where memory binds.

python bench/home_requests.py DATA 60 > home.jsonl
python bench/speculation.py --rows home.jsonl --text stories.txt
python bench/speculation.py --rows home.jsonl --cost large.gguf        # any model: only its speed is used

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

import nearfar
from line import show
from nearfar import LLM
from nearfar.cli.request import stop_ids
from nearfar.forms import Part
from nearfar.lower import Lower, open_lower
from nearfar.options import EngineOptions
from nearfar.speculate import MAX_ROWS
from nearfar.weights import Weights

WAYS = {"plain": {"exits": False}, "drafts": {"speculate": True}, "exits": {"exits": True}}
PROMPT_TOKENS, ANSWER_TOKENS = 48, 64  # of running text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="path of a GGUF file with exits (default: the shipped model)")
    parser.add_argument("--rows", type=Path, help="prompts, one JSON object a line, as bench/home_requests.py prints")
    parser.add_argument("--text", type=Path, help="running text, of which pieces are continued")
    parser.add_argument("--cost", type=Path, help="a model whose cost of M rows is measured")
    parser.add_argument("--first", type=float, default=1 / 3, help="share of that model's layers that draft")
    parser.add_argument("--limit", type=int, default=60, help="prompts of each kind (default 60)")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    n_tokens = np.zeros(MAX_ROWS)  # tokens that a pass of 1..MAX_ROWS rows gives, from the last kind of prompt
    with (
        LLM.open(args.model, threads=args.threads) if args.model else nearfar.load("nano", threads=args.threads) as llm
    ):
        if args.text:
            compare(llm, "running text", pieces(llm, args.text, args.limit), [])
        if args.rows:
            n_tokens = compare(llm, "home requests", parts(args.rows, args.limit), stop_ids(llm))
    if args.cost:
        cost(args.cost, args.first, args.threads, n_tokens)


def parts(path: Path, limit: int) -> list[tuple[Part, ...]]:
    rows = [json.loads(line)["prompt"] for line in path.read_text().splitlines()[:limit]]
    return [tuple(Part(text, control) for text, control in row) for row in rows]


def pieces(llm: LLM, path: Path, limit: int) -> list[list[int]]:
    ids = llm.tokenizer.encode(path.read_text()[: 40 * PROMPT_TOKENS * limit])
    return [ids[i : i + PROMPT_TOKENS] for i in range(0, len(ids) - PROMPT_TOKENS, PROMPT_TOKENS)][:limit]


def compare(llm: LLM, what: str, prompts: Sequence[nearfar.llm.Prompt], stops: Sequence[int]) -> np.ndarray:
    """Print a line; returns the mean number of tokens that a pass of 1..MAX_ROWS rows gives."""
    n_right = n_drafted = n_tokens = n_passes = changed = 0
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    runs: list[int] = []  # right drafts in a row
    for i, prompt in enumerate([prompts[0], *prompts]):
        ids = {}
        for way, options in WAYS.items():
            done = llm.generate(prompt, max_tokens=ANSWER_TOKENS, stop_ids=stops, **options)  # type: ignore[arg-type]
            ids[way] = done.ids
            if i and len(done.events) > 1:  # the first prompt is a warm-up; the first token pays for the prompt
                seconds[way].append(sum(e.ms for e in done.events[1:]) / 1000 / (len(done.events) - 1))
            if i and way == "drafts":
                n_drafted += done.stats.n_drafted
                n_tokens += len(done.events)
                right = [e.source != "full" for e in done.events]
                n_right += sum(right)
                n_passes += len(right) - sum(right)
                runs += _runs(right[1:])
        assert ids["plain"] == ids["drafts"], prompt
        changed += ids["plain"] != ids["exits"]
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["drafts"], strict=True)]
    exits = [a / b for a, b in zip(seconds["plain"], seconds["exits"], strict=False)]
    show(
        f"self-speculation, {what}: {len(prompts)} answers, the same tokens",
        f"{n_right / max(n_drafted, 1):.0%} of {n_drafted} drafts right, "
        f"{n_tokens / max(n_passes, 1):.2f} tokens a pass; "
        f"{1 / median(seconds['plain']):,.0f} -> {1 / median(seconds['drafts']):,.0f} tokens/s, "
        f"median ratio {median(ratios):.2f} (exits that decide: {median(exits):.2f}, {changed} answers changed)",
    )
    return np.array([1 + np.mean([min(run, rows) for run in runs] or [0.0]) for rows in range(MAX_ROWS)])


def _runs(right: Sequence[bool]) -> list[int]:
    runs, run = [], 0
    for ok in right:
        if ok:
            run += 1
        else:
            runs.append(run)
            run = 0
    return runs


def cost(path: Path, share: float, threads: int | None, n_tokens: np.ndarray) -> None:
    """Time of the lower layers and of a checking pass with M rows, as multiples of one token at full depth."""
    with Weights.open(path) as weights:
        lower = open_lower(weights, options=EngineOptions(threads=threads))
        e, n_layers = max(1, round(share * lower.config.n_layers)), lower.config.n_layers
        times = {m: (seconds(lower, 0, e, m), seconds(lower, e, n_layers, m)) for m in range(1, MAX_ROWS + 1)}
    whole = sum(times[1])
    table, gains = [], []
    for m, (_, upper) in times.items():
        table.append(f"{m}: {upper / times[1][1]:.2f}")
        spent = m * times[1][0] + upper  # m - 1 drafts and the pending row run the lower layers and a head one by one
        gains.append(f"{m}: {spent / whole:.2f} / {n_tokens[m - 1]:.2f} = {whole * n_tokens[m - 1] / spent:.2f}x")
    show(f"{path.name}: M rows through layers [{e}, {n_layers}) and the head, against one", ", ".join(table))
    show(f"{path.name}: cost of a pass of M rows / tokens it gives at the acceptance above", "; ".join(gains))


def seconds(lower: Lower, first: int, last: int, m: int, n: int = 9) -> float:
    """Median time of `m` rows through layers [first, last) and the head, at position 64."""
    kv = lower.new_kv(128)
    h = lower.embed((np.arange(64) * 37 % lower.config.n_vocab).astype(np.int32))
    lower.forward(h, kv, first, last)
    taken = []
    for _ in range(n):
        started = time.perf_counter()
        lower.logits(lower.forward(h[:m], kv, first, last))
        taken.append(time.perf_counter() - started)
        kv.truncate(64)
    return median(taken)


if __name__ == "__main__":
    main()
