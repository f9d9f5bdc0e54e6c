"""`nearfar fit-exit`: options in, figures out.  Nothing heavy is imported before the verb runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from nearfar.arguments import real, whole
from nearfar.cli.verbs import Verbs, add_engine_options, model_path, new_parser, open_model
from nearfar.config import MAX_RANK
from nearfar.errors import UsageError

if TYPE_CHECKING:
    from nearfar.llm import LLM

ANSWERS, TOKENS, RANK, EPOCHS = 800, 64, 64, 4


def add_verb(verbs: Verbs) -> None:
    parser = new_parser(
        verbs,
        "fit-exit",
        "fit an exit to texts, so that it drafts better, and write it into a copy of the file",
        "nearfar fit-exit nano --text stories.txt --rows requests.jsonl -o fitted.gguf",
        "nearfar fit-exit model.gguf --at 16 --text book.txt --text letters.txt --rank 128 --minutes 60 -o fitted.gguf",
        detail="Full depth goes on from sentences of the texts and from the prompts of --rows; the exit learns its "
        "tokens. A copy is not calibrated: `nearfar calibrate` chooses its threshold, then `nearfar split` cuts it. "
        "llama.cpp opens no file with such an exit.",
    )
    parser.add_argument("model", help="nano, or the path of a whole GGUF file")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the copy with the fitted exit")
    parser.add_argument(
        "--at", type=whole(1, 1024), metavar="K", help="after layer K (default: the last exit there is)"
    )
    parser.add_argument(
        "--text", action="append", required=True, metavar="FILE", help="UTF-8, plain or .xz (repeatable)"
    )
    parser.add_argument("--rows", metavar="FILE", help='prompts, JSON lines {"prompt": [[text, is_control], …]}')
    parser.add_argument("--rank", type=whole(1, MAX_RANK), default=RANK, metavar="R", help="default: %(default)s")
    parser.add_argument(
        "--answers", type=whole(10, 1 << 20), default=ANSWERS, metavar="N", help="of all texts (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=whole(1, 1 << 16), default=TOKENS, metavar="N", help="of an answer at most")
    parser.add_argument(
        "--epochs", type=real(0.01, 1000), default=EPOCHS, metavar="N", help="passes over the answers (%(default)s)"
    )
    parser.add_argument("--minutes", type=real(0.01, 1e5), default=15, metavar="N", help="of fitting at most (15)")
    parser.add_argument("--seed", type=whole(0, 1 << 31), default=0)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Fit, write the copy, and say how often the exit was right before and after."""
    from nearfar.eval import fit_exit as fe
    from nearfar.eval.progress import progress
    from nearfar.weights import Weights

    started, out, source = time.perf_counter(), Path(args.output), model_path(args.model)
    if out.exists() and out.samefile(source):
        raise UsageError(f"{out}: expected another name than the model's; the exit goes into a copy")
    with open_model(args, args.model) as llm, Weights.open(source) as weights:
        if llm.config is None:
            raise UsageError("exits live in nearfar's own engine: open the model with --backend native or numpy")
        layer = args.at or (llm.config.exits[-1].layer if llm.config.exits else 0)
        if not layer:
            raise UsageError("this model has no exit yet: expected --at K, the layer after which it is to stand")
        found = prompts(llm, args)
        begun = progress(found, len(found), "answers at full depth")
        train, held = fe.gather(llm, layer, begun, args.tokens, args.seed)
        print(f"{len(train)} positions to fit, {len(held)} held out", file=sys.stderr, flush=True)
        table, eps = weights.f32(weights.head_name), llm.config.norm_eps
        has_exit = layer in [e.layer for e in llm.config.exits]
        gain = weights.norm_gain(f"exit.{layer}" if has_exit else "final")
        steps = max(1, round(args.epochs * len(train) / fe.BATCH))
        start = fe.Head.start(gain, args.rank, args.seed)
        limits = {"steps": steps, "seconds": 60 * args.minutes}
        fitted = fe.fit(start, train, held, table, eps, **limits, seed=args.seed, progress=partial(_tell, steps))
        fe.write_exit(weights.file, out, layer, fitted.head)
    facts = {
        "output": str(out),
        "layer": layer,
        "rank": args.rank,
        "positions": fitted.n_trained,
        "held_out": fitted.n_held_out,
        "epochs": round(fitted.epochs, 2),
        "agrees_before": round(fitted.before, 4),
        "agrees_after": round(fitted.after, 4),
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(facts) if args.json else as_text(facts))
    return 0


def _tell(steps: int, done: int, loss: float) -> None:
    """On a terminal, where the fit is."""
    if sys.stderr.isatty() and done % 10 == 0:
        print(f"\rstep {done}/{steps}, loss {loss:.3f}", end="", file=sys.stderr, flush=True)


def prompts(llm: LLM, args: argparse.Namespace) -> list[list[int]]:
    """Openings of the texts, as many of each, and the prompts of --rows."""
    from nearfar.eval.fit_exit import openings
    from nearfar.eval.perplexity import read_text
    from nearfar.eval.tasks import prompts_task
    from nearfar.forms import encode

    n = -(-args.answers // len(args.text))
    texts = chain.from_iterable(openings(read_text(Path(t)), n, args.seed + i) for i, t in enumerate(args.text))
    found = [llm.tokenizer.encode(text) for text in texts]
    if args.rows:
        task = prompts_task(Path(args.rows))
        found += [encode(task.prompt(row), llm.tokenizer) for row in task.rows]
    return found


def as_text(facts: dict[str, object]) -> str:
    return (
        "{output}: the exit after layer {layer}, rank {rank}, fitted on {positions} positions in {epochs} passes\n"
        "its likeliest token is full depth's at {agrees_before:.1%} before, {agrees_after:.1%} after "
        "({held_out} positions held out), {seconds} s\n"
        "its exits never fire: `nearfar calibrate` chooses thresholds"
    ).format_map(facts)
