"""The model card: what a model is, what it was made from, what it can do.  JSON in the GGUF, Markdown beside it.

`card` collects facts of the run; `markdown` prints them.  Figures of `nearfar eval` are added under "evaluation" by
`with_evaluation`; without them the card only shows the trainer's own held-out figures, and says so.

    python -m nearfar_cloud.training.card nano.gguf eval.json > nano.md      the page again, with evaluated figures
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nearfar.errors import UsageError, WeightsError
from nearfar.gguf_reader import GGUFFile
from nearfar_cloud.training.recipe import Recipe

FOR = (
    "turn a short request into one JSON call (intent and slots), in the label sets it was trained on",
    "turn a request to a smart home into a call, given the names and areas of the home",
    "write the next API call of a booking dialogue; a journal sentence from listed facts; short template-like replies",
    "give the other parts of nearfar trained early exits to run",
)
NOT_FOR = (
    "open questions, facts about the world, arithmetic, stories, advice of any kind",
    "languages other than English; label sets it has not seen",
    "acting without a check: its calls are guesses, a program has to look at them before something happens",
)
KNOWN_FAILURES = (
    "rare names are copied with errors: they are spelled from several tokens",
    "requests that combine several actions: it writes one call",
    "a request far from its training rows still gets a confident call; exits make this no better",
)
SHARE_ALIKE = (
    "Whether share-alike data (the Schema-Guided Dialogue corpus, CC BY-SA 4.0) binds the weights trained on it is an "
    "unsettled question. `nearfar train nano --without sgd` builds the model without it."
)


def card(
    recipe: Recipe,
    *,
    facts: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any]],
    held_out: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """The card of a finished run.

    `facts`: how it was trained (tokens, steps, seconds, machine, hashes); `sources`: mix.description();
    `held_out`: source -> figures of dev.evaluate.
    """
    shape = recipe.shape
    return {
        "name": recipe.name,
        "for": list(FOR),
        "not_for": list(NOT_FOR),
        "sizes": {
            "vocabulary": shape.n_vocab,
            "width": shape.d_model,
            "layers": shape.n_layers,
            "heads": shape.n_heads,
            "kv_heads": shape.n_kv_heads,
            "feed_forward": shape.d_ff,
            "context": shape.n_ctx,
            "exits": list(shape.exits),
            "ternary_weights": shape.n_linear,
            "embedding_weights": shape.n_embedding,
        },
        "train": {"recipe": recipe.name, "seed": recipe.seed, "recipe_sha256": recipe.sha256, **facts},
        "sources": [dict(s) for s in sources],
        "held_out": {name: dict(f) for name, f in held_out.items()},
        "known_failures": list(KNOWN_FAILURES),
        "licence": "Apache-2.0 (weights and card); the sources keep theirs",
        "share_alike": SHARE_ALIKE,
    }


def with_evaluation(made: Mapping[str, Any], evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The card with the figures of `nearfar eval --json` on the shipped file."""
    return {**made, "evaluation": dict(evaluation)}


def markdown(made: Mapping[str, Any]) -> str:
    """The card as a page."""
    parts = [
        f"# {made['name']}",
        "A ternary decoder with early exits, trained and shipped by nearfar. Written by the training run.",
        "## For",
        _bullets(made["for"]),
        "## Not for",
        _bullets(made["not_for"]),
        "## Sizes",
        ", ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in made["sizes"].items()) + ".",
        "## Training",
        _table(("fact", "value"), [(k.replace("_", " "), _number(v)) for k, v in made["train"].items()]),
        "## Sources",
        _sources(made["sources"]),
        made["share_alike"],
        "## Figures",
    ]
    if "evaluation" in made:
        parts += ["Of the shipped file, by `nearfar eval`:", _evaluation(made["evaluation"])]
    parts += [
        "Of the last weights on held-out rows of the training files, greedy, without grammar, by the trainer itself "
        "(`exact`: the whole answer token for token; `label`: up to the end of the intent; `agree`: the exit's token "
        "is that of full depth, given the right tokens before it). These rows steered the training; they are no test.",
        _held_out(made["held_out"], made["sizes"]["exits"]),
        "## Known failures",
        _bullets(made["known_failures"]),
        "## Licence",
        made["licence"],
    ]
    return "\n\n".join(parts) + "\n"


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for s in sources:
        seen = s["tokens_seen"]
        there = s["tokens_there_are"]
        rows.append(
            (
                s["source"],
                s["licence"],
                s["credit"],
                "no end" if there is None else _number(there),
                _number(sum(seen.values())),
                " / ".join(f"{100 * share:.0f} %" for share in s["share"].values()),
            )
        )
    return _table(("source", "licence", "credit", "tokens there are", "tokens seen", "stable / decay"), rows)


def _held_out(held_out: Mapping[str, Mapping[str, float]], exits: Sequence[int]) -> str:
    rows = []
    for name, f in held_out.items():
        for head in ("final", *(f"exit.{e}" for e in reversed(exits))):
            figures = (
                f"{f[f'loss.{head}']:.3f}",
                *(f"{100 * f[f'{k}.{head}']:.1f} %" for k in ("exact", "label", "agree")),
            )
            rows.append((name, f"{f['rows']:.0f}", head, *figures))
    return _table(("rows of", "n", "head", "loss (nats a token)", "exact", "label", "agree"), rows)


def _evaluation(evaluation: Mapping[str, Any]) -> str:
    """The tasks of `nearfar eval --json`: a figure of each mode of decoding, the baseline's beside it."""
    modes = sorted(
        {key for t in evaluation["tasks"] for f in t["figures"] for key in f} - {"metric", "unit", "baseline"}
    )
    rows = []
    for task in evaluation["tasks"]:
        baseline = (task.get("baseline") or {}).get("name", "")
        for figure in task["figures"]:
            cells = [_interval(figure.get(mode), figure["unit"]) for mode in modes]
            beside = _interval(figure.get("baseline"), figure["unit"])
            named = f"{beside} ({baseline})" if "baseline" in figure else "-"
            rows.append((f"{task['task']}, {task['split']}", figure["metric"], *cells, named))
    return _table(("task", "metric", *modes, "baseline"), rows)


def _interval(interval: Mapping[str, Any] | None, unit: str) -> str:
    if not interval or interval["value"] is None:
        return "n/a"
    scale, digits, mark = (100, 1, " %") if unit == "%" else (1, 3, "")
    value, low, high = (f"{scale * interval[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value}{mark} [{low}, {high}] n {interval['n']}"


def page(model: Path, evaluation: Path | None = None) -> str:
    """The card in a GGUF file as Markdown, with the figures of `nearfar eval --json` where they are given.

    Raises WeightsError for a file without a card.
    """
    with GGUFFile.open(model) as file:
        text = file.metadata.get("nearfar.card")
    if not isinstance(text, str):
        raise WeightsError(f"{model} carries no card (key nearfar.card): expected a file of `nearfar train`")
    made = json.loads(text)
    if evaluation is not None:
        made = with_evaluation(made, json.loads(evaluation.read_text(encoding="utf-8")))
    return markdown(made)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 3:
        raise UsageError("expected: MODEL.gguf [EVAL.json]")
    sys.stdout.write(page(*map(Path, sys.argv[1:])))
