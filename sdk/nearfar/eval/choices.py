"""Negative controls: questions that a few million weights should answer by chance, and grammar, which is within reach.

    arc_easy, piqa   the options of a question, by the summed log-likelihood of the option after "Question: … Answer:";
                     as it is, and over the option's bytes (acc and acc_norm of lm-evaluation-harness)
    winogrande       one ending after a sentence with either name, by the ending's log-likelihood (partial evaluation,
                     Trinh and Le, 1806.02847)
    blimp            67 x 200 pairs: the acceptable sentence is to be the likelier one (1912.00582)
    gsm8k            a written answer, greedy; its last number is to be the right one

The context of a question is run once for all its options.  Beside each stands chance: for the numbers of gsm8k 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nearfar import corpora, forms
from nearfar.errors import DataError
from nearfar.eval.intervals import Interval, wilson
from nearfar.eval.perplexity import losses_after, start_ids
from nearfar.eval.tasks import Figure, Model, Prediction, Row, Task, lower_of
from nearfar.forms import Part, Turn

USUAL_ROWS = 300  # of a question set; the whole of one takes a small model several minutes on one core
USUAL_PAIRS = 67 * 10
GSM8K_ROWS = 100
BY_BYTES = "accuracy, over the option's bytes"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Choice:
    """Option i is `options[i]` after `contexts[i]`; one context may serve all."""

    contexts: tuple[str, ...]
    options: tuple[str, ...]

    @property
    def shared(self) -> bool:
        return len(set(self.contexts)) == 1


# ---------------------------------------------------------------- reading


def arc_easy(folder: Path) -> Task:
    """ARC, the easier questions."""
    return _task("arc_easy", "ARC-easy", list(_questions(folder / "eval" / "arc_easy.jsonl.xz")), by_bytes=True)


def piqa(folder: Path) -> Task:
    """PIQA, everyday physics."""
    return _task("piqa", "PIQA", list(_questions(folder / "eval" / "piqa.jsonl.xz")), by_bytes=True)


def winogrande(folder: Path) -> Task:
    """WinoGrande, whom a pronoun means."""
    rows = []
    for where, line in corpora.json_lines(folder / "eval" / "winogrande.jsonl.xz", "pronouns to resolve"):
        contexts = tuple(_texts(where, line, "context_options"))
        ending = " " + corpora.field(where, line, "continuation", str).strip()
        rows.append(_row(where, line, Choice(contexts, (ending,) * len(contexts))))
    return _task("winogrande", "WinoGrande", rows)


def blimp(folder: Path) -> Task:
    """BLiMP, pairs of sentences of which one is acceptable."""
    rows = []
    for where, line in corpora.json_lines(folder / "eval" / "blimp_200.jsonl.xz", "pairs of sentences"):
        pair = tuple(corpora.field(where, line, key, str) for key in ("good", "bad"))
        rows.append(Row(where, pair[0], {"choice": 0}, context=Choice(("", ""), pair)))
    return _task("blimp", "BLiMP, 67 kinds of pairs", rows, usual=USUAL_PAIRS)


def gsm8k(folder: Path) -> Task:
    """GSM8K's test problems."""
    rows = []
    for where, line in corpora.json_lines(folder / "eval" / "gsm8k_test.jsonl.xz", "word problems"):
        number = last_number(corpora.field(where, line, "answer", str))
        if number is None:
            raise DataError(f"{where}: expected a number at the end of 'answer', found none")
        rows.append(Row(where, corpora.field(where, line, "question", str), {"number": number}))
    return Task(
        name="gsm8k",
        split="GSM8K test",
        rows=rows,
        prompt=lambda row: (*forms.dialogue("", [Turn("u", row.text)]), Part(forms.ASSISTANT, control=True)),
        schema=None,
        score=_score_numbers,
        instruction="Solve the problem step by step. The last thing you write is the answer as a number.",
        max_tokens=200,
        usual_rows=GSM8K_ROWS,
    )


LOADERS: dict[str, Callable[[Path], Task]] = {
    "arc_easy": arc_easy,
    "piqa": piqa,
    "winogrande": winogrande,
    "blimp": blimp,
    "gsm8k": gsm8k,
}


def _questions(path: Path) -> Iterator[Row]:
    for where, line in corpora.json_lines(path, "questions with choices"):
        context = corpora.field(where, line, "query", str).rstrip() + "\nAnswer:"
        options = tuple(f" {text}" for text in _texts(where, line, "choices"))
        yield _row(where, line, Choice((context,) * len(options), options))


def _row(where: str, line: dict[str, object], choice: Choice) -> Row:
    gold, n = corpora.field(where, line, "gold", int), len(choice.options)
    if n < 2 or not 0 <= gold < n:
        raise DataError(f"{where}: expected two or more choices and 'gold' as one of 0..{n - 1}, found {gold}")
    return Row(where, choice.contexts[0], {"choice": gold}, context=choice)


def _texts(where: str, line: dict[str, object], key: str) -> list[str]:
    found = corpora.field(where, line, key, list)
    if not all(isinstance(text, str) and text.strip() for text in found):
        raise DataError(f"{where}: expected {key!r} as a list of texts, found {str(found)[:60]}")
    return found


def _task(name: str, split: str, rows: Sequence[Row], *, by_bytes: bool = False, usual: int = USUAL_ROWS) -> Task:
    return Task(
        name=name,
        split=split,
        rows=rows,
        prompt=lambda row: forms.plain(row.text, end=False),
        schema=None,
        score=lambda rows, predictions: score(rows, predictions, by_bytes=by_bytes),
        instruction="",
        usual_rows=usual,
        ask=choose,
    )


# ---------------------------------------------------------------- asking and scoring


def choose(model: Model, row: Row) -> Prediction:
    """The likeliest option's number; `scores`: each option's summed log-likelihood.  Raises ContextError."""
    lower, choice = lower_of(model), row.context
    if choice.shared:
        context, options = option_ids(model, choice.contexts[0], choice.options)
        sums = [-float(x.sum()) for x in losses_after(lower, context, options)]
    else:
        sums = []
        for before, option in zip(choice.contexts, choice.options, strict=True):
            context, options = option_ids(model, before, (option,))
            sums.append(-float(losses_after(lower, context, options)[0].sum()))
    return Prediction(row.id, str(int(np.argmax(sums))), scores={str(i): x for i, x in enumerate(sums)})


def option_ids(model: Model, context: str, options: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """The ids that all of context + option begin with, and each option's own.

    Text is encoded whole, for a token may span the seam: such a token belongs to the options.
    """
    tokenizer = model.tokenizer
    start = start_ids(tokenizer)
    wholes = [[*start, *tokenizer.encode(context + option, add_bos=False)] for option in options]
    alone = [*start, *(tokenizer.encode(context, add_bos=False) if context else [])]
    n = 0
    while all(n < len(whole) - 1 for whole in wholes) and n < len(alone) and all(w[n] == alone[n] for w in wholes):
        n += 1
    n = max(n, 1)  # a tokenizer without a first token: the text's own first token is given
    return wholes[0][:n], [whole[n:] for whole in wholes]


def score(rows: Sequence[Row], predictions: Sequence[Prediction], *, by_bytes: bool = False) -> list[Figure]:
    """Shares of right choices (Wilson)."""
    right = sum(p.text == str(row.gold["choice"]) for row, p in zip(rows, predictions, strict=True))
    figures = [Figure("accuracy", wilson(right, len(rows)))]
    if by_bytes:
        hits = sum(_per_byte(row, p) == row.gold["choice"] for row, p in zip(rows, predictions, strict=True))
        figures.append(Figure(BY_BYTES, wilson(hits, len(rows))))
    return figures


def _per_byte(row: Row, p: Prediction) -> int:
    """The option of the largest log-likelihood per byte; -1 without an answer."""
    lengths = [len(option.strip().encode()) for option in row.context.options]
    means = [p.scores[str(i)] / n for i, n in enumerate(lengths) if str(i) in p.scores]
    return int(np.argmax(means)) if means else -1


def _score_numbers(rows: Sequence[Row], predictions: Sequence[Prediction]) -> list[Figure]:
    right = sum(last_number(p.text) == row.gold["number"] for row, p in zip(rows, predictions, strict=True))
    return [Figure("exact number", wilson(right, len(rows)))]


def last_number(text: str) -> str | None:
    """The last number of a text without separators and trailing zeros: "1,200.50" is "1200.5"."""
    found = _NUMBER.findall(text)
    if not found:
        return None
    number = str(found[-1]).replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number


def chance(task: Task) -> list[Figure]:
    """What guessing gives: the mean of one over the number of options; no number is guessed right."""
    shares = [1 / len(row.context.options) if isinstance(row.context, Choice) else 0.0 for row in task.rows]
    value = float(np.mean(shares)) if shares else float("nan")
    metrics = [f.metric for f in task.score((), ())]
    return [Figure(metric, Interval(value, value, value, len(shares))) for metric in metrics]
