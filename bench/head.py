"""The head by fewer bytes: what 4.5 bits cost in perplexity, how much of a screened head is read, how long each takes.

python bench/home_requests.py DATA 60 > home.jsonl
python bench/head.py nano --rows home.jsonl --text stories.txt
python bench/head.py bitnet-2b:TQ2_0:Q8_0          # random weights: nothing stands out, the worst there is

A screened choice reads a copy (8.5 bits of a float head, 4.5 of others), then those panels of the head (64 rows each)
that may hold the largest logit.  It pays where that is less than the head; "in vain" counts the choices that read over
half of the head as well.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import numpy as np
from numpy.typing import NDArray
from speculation import parts

from line import show
from nearfar.bench.random_model import Recipe, cached, default_folder
from nearfar.cli.request import stop_ids
from nearfar.cli.verbs import SHIPPED, model_path
from nearfar.eval.perplexity import perplexity, read_text, text_ids
from nearfar.llm import LLM
from nearfar.lower_native import NativeLower
from nearfar.options import EngineOptions
from nearfar.tokenizer import tokenizer_from_metadata
from nearfar.weights import Weights

ANSWER_TOKENS = 64
COSINE = 0.45  # between the row of a choice and the weights of the token: the median of nano's answers
WINDOW = 256  # tokens of running text that see one another
HEADS = ("file", "q4", "screened")

Rows = NDArray[np.float32]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="nano, the path of a GGUF file, or SIZE:TYPE:HEAD for random weights")
    parser.add_argument("--text", type=Path, help="running text")
    parser.add_argument("--tokens", type=int, default=4096, help="of it (default 4096)")
    parser.add_argument("--rows", type=Path, help="prompts, one JSON object a line, as bench/home_requests.py prints")
    parser.add_argument("--limit", type=int, default=60, help="prompts (default 60)")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args()
    drawn = args.model != SHIPPED and not Path(args.model).is_file()
    path = cached(Recipe.parse(args.model), default_folder()) if drawn else model_path(args.model)
    with Weights.open(path) as weights:
        last = 1 if drawn else None  # of random weights the head is all that is asked
        lowers = {
            head: NativeLower(weights, EngineOptions(args.threads, cache="off", head=head), last=last)  # type: ignore[arg-type]
            for head in HEADS
        }
        h = np.random.default_rng(1).normal(0, 1, (64, weights.config.d_model)).astype(np.float32)
        if args.text:
            ids = text_ids(tokenizer_from_metadata(weights.file.metadata), read_text(args.text), args.tokens)
            exact, rough = (perplexity(lowers[head], ids) for head in ("file", "q4"))
            show(f"{path.name}: perplexity of {len(ids)} tokens, head of the file and of 4.5 bits",
                 f"{exact:.3f} -> {rough:.3f} ({rough / exact - 1:+.2%})")  # fmt: skip
            h = text_rows(lowers["file"], ids)
            count(lowers, h, f"{path.name}, running text")
        if args.rows:
            h = answer_rows(path, lowers["file"], args.rows, args.limit)
            count(lowers, h, f"{path.name}, answers to home requests")
        if not args.text and not args.rows:
            count(lowers, h, f"{path.name}, random rows")
            h = clear_rows(lowers["file"], h)
            count(lowers, h, f"{path.name}, rows at {COSINE} to one token's")
        speed(lowers, h, path.name)


def text_rows(lower: NativeLower, ids: NDArray[np.int32]) -> Rows:
    """The last rows of every position of a text."""
    n_layers = lower.config.n_layers
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids), WINDOW)]
    return np.concatenate([lower.forward(lower.embed(w), lower.new_kv(WINDOW), 0, n_layers) for w in windows])


def clear_rows(lower: NativeLower, noise: Rows) -> Rows:
    """Rows to which one token of a tied head is as near as a trained model's."""
    ids = (np.arange(len(noise)) * 1237 % lower.config.n_vocab).astype(np.int32)
    along = lower.embed(ids)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    noise = noise / np.linalg.norm(noise, axis=1, keepdims=True)
    rows: Rows = (COSINE * along + np.sqrt(1 - COSINE**2) * noise).astype(np.float32)
    return rows


def answer_rows(path: Path, lower: NativeLower, prompts: Path, limit: int) -> Rows:
    """The rows that the tokens of greedy answers were chosen from."""
    rows = []
    with LLM.open(path) as llm:
        stops = stop_ids(llm)
        for prompt in parts(prompts, limit):
            before = llm.tokenizer.encode_parts(prompt)
            ids = [*before, *llm.generate(prompt, max_tokens=ANSWER_TOKENS, stop_ids=stops, exits=False).ids][:-1]
            h = lower.embed(np.array(ids, np.int32))
            rows.append(lower.forward(h, lower.new_kv(len(ids)), 0, lower.config.n_layers)[len(before) - 1 :])
    return np.concatenate(rows)


def count(lowers: dict[str, NativeLower], h: Rows, what: str) -> None:
    """What a screened choice reads; it must be the choice of the whole head."""
    if not lowers["screened"].screens:
        show(f"screened head, {what}", "no screen: this head has fewer bits, or blocks with mins")
        return
    ids, _, panels = lowers["screened"].screen(h)
    for start in range(0, len(h), WINDOW):
        part = slice(start, start + WINDOW)
        assert np.array_equal(lowers["file"].logits(h[part]).argmax(1), ids[part])
    head, screen = (p.n_bytes for p in lowers["screened"].panels()[-2:])
    n_panels = -(-lowers["file"].config.n_vocab // 64)
    read = screen + panels.mean() / n_panels * head
    show(
        f"screened head, {what}: {len(h)} choices, all the same",
        f"panels read besides the screen: median {np.median(panels):.0f}, mean {panels.mean():.1f} of {n_panels}; "
        f"in vain {np.mean(panels > n_panels / 2):.1%}; {read / 1e6:.2f} MB a token instead of {head / 1e6:.2f}",
    )


def speed(lowers: dict[str, NativeLower], h: Rows, what: str, n: int = 64) -> None:
    """One row at a time, the heads taking turns."""
    taken: dict[str, list[float]] = {head: [] for head in HEADS}
    for i in range(n):
        row = h[i * len(h) // n][None]
        for head, lower in lowers.items():
            started = time.perf_counter()
            if head == "screened":
                lower.greedy(row)
            else:
                lower.logits(row)[0].argmax()
            taken[head].append(time.perf_counter() - started)
    show(
        f"{what}: one choice, {lowers['file'].n_threads} threads",
        ", ".join(
            f"{head} {1e6 * median(taken[head]):,.0f} µs ({lower.panels()[-1].kind}, "
            f"{median(a / b for a, b in zip(taken['file'], taken[head], strict=True)):.2f}x)"
            for head, lower in lowers.items()
        ),
    )


if __name__ == "__main__":
    main()
