"""What a task is, and the plain loop that has a model answer it.

    Task.rows -> prompt -> llm.generate (greedy) -> Prediction -> Task.score -> Figure

A model whose file says `nearfar.rows` is asked in the rows it was trained on; any other model is asked in its chat
template, with the labels named and three examples from the training split, or in plain text where it has no template.
Tasks about likelihoods have their own `ask`: the same text for every model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from nearfar.corpora import json_lines
from nearfar.engine import Engine
from nearfar.errors import ContextError, DataError, FileError, UnsupportedError, UsageError
from nearfar.eval.intervals import Interval
from nearfar.forms import CALL_STOPS, ROWS_VERSION, Part, Parts
from nearfar.lower import Lower

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One question with its right answer."""

    id: str  # unique within the task; predictions are stored under it
    text: str  # the request alone, as a person said it
    gold: Json  # the answer as the model should write it
    kind: str = ""  # the part of the line it counts for: "seen", "out of scope", …
    group: str = ""  # what the bootstrap draws together (a dialogue); "" is the row itself
    context: Any = None  # what else the prompt needs


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a model answered to one row.  `scores`: how sure each head was of the whole decision, 0..1."""

    id: str
    text: str
    finish: str = "stop"  # as Completion.finish_reason; "context" if the prompt did not fit
    n_tokens: int = 0
    seconds: float = 0.0
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of the table.  `unit` is "%" for shares and F1, "" for areas and ratios."""

    metric: str
    interval: Interval
    unit: str = "%"


@dataclass(frozen=True)
class Task:
    """Rows of one split, how to ask them and how to score the answers."""

    name: str  # short, for files and options: "hwu64"
    split: str  # for people: "HWU64 test"
    rows: Sequence[Row]
    prompt: Callable[[Row], Parts]
    schema: Callable[[Row], Json] | None  # None: no grammar helps
    score: Callable[[Sequence[Row], Sequence[Prediction]], list[Figure]]
    instruction: str  # for chat models
    shots: Sequence[tuple[str, str]] = ()  # (request, answer), from the training split
    request: Callable[[Row], str] = lambda row: row.text  # for chat models
    max_tokens: int = 96
    usual_rows: int | None = None  # what a run without --limit asks, where the whole split takes too long
    ask: Callable[[Model, Row], Prediction] | None = None  # instead of a greedy answer: likelihoods
    notes: Callable[[Sequence[Row]], list[str]] = lambda rows: []  # what the table says below the figures

    def first(self, n: int | None) -> Task:
        """The same task with at most `n` rows, spread evenly: files are sorted by label or service."""
        if n is None or n >= len(self.rows):
            return self
        return self.only([self.rows[i * len(self.rows) // n] for i in range(n)])

    def only(self, rows: Sequence[Row]) -> Task:
        """The same task with other rows."""
        return replace(self, rows=rows)

    def messages(self, row: Row) -> list[dict[str, str]]:
        """The conversation that asks a chat model for `row`."""
        turns = [{"role": "system", "content": self.instruction}]
        for request, answer in self.shots:
            turns += [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
        return [*turns, {"role": "user", "content": self.request(row)}]


class Model(Protocol):
    """What this package needs of `nearfar.LLM`."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def generate(self) -> Callable[..., Any]: ...
    @property
    def chat(self) -> Callable[..., Any]: ...
    @property
    def stepper(self) -> Any: ...


def speaks_rows(model: Model) -> bool:
    """Whether the model was trained on the rows of nearfar.forms."""
    return bool(model.metadata.get("nearfar.rows") == ROWS_VERSION)


def lower_of(model: Model) -> Lower:
    """The layers behind a model, for what needs probabilities of given text.  Raises UsageError for other engines."""
    if not isinstance(model.stepper, Engine):
        raise UsageError("likelihoods come from nearfar's own engine: open the model with --backend native or numpy")
    return model.stepper.lower


def stop_ids(model: Model) -> tuple[int, ...]:
    """The control tokens that end a call."""
    if not speaks_rows(model):
        return ()
    found = (model.tokenizer.encode(stop, add_bos=False, parse_special=True) for stop in CALL_STOPS)
    return tuple(ids[0] for ids in found if len(ids) == 1)


def answer(model: Model, task: Task, row: Row, *, constrained: bool, exits: bool = False) -> Any:
    """The Completion of one row, greedy.  Raises ContextError where the prompt does not fit."""
    options: dict[str, Any] = {"max_tokens": task.max_tokens, "exits": exits}
    if constrained:
        assert task.schema is not None
        options["schema"] = task.schema(row)
    if speaks_rows(model):
        return model.generate(task.prompt(row), stop_ids=stop_ids(model), **options)
    messages = task.messages(row)
    try:
        return model.chat(messages, **options)
    except UnsupportedError:  # no chat form, or none that is known: a base model goes on from examples
        return model.generate(examples_text(messages), stop=("\n",), **options)


def examples_text(messages: Sequence[Mapping[str, str]]) -> str:
    """A conversation as text to go on with: the instruction, requests with their answers, the open answer."""
    marks = {"system": "", "user": "Request: ", "assistant": "Answer: "}
    return "\n\n".join(marks[m["role"]] + m["content"] for m in messages) + "\n\nAnswer:"


def predict(
    model: Model,
    task: Task,
    *,
    constrained: bool = False,
    exits: bool = False,
    scores: Callable[[Parts, Sequence[int]], Mapping[str, float]] | None = None,
) -> Iterator[Prediction]:
    """An answer for each row, in order.  `scores` looks at (prompt, answer ids) and says how sure each head was."""
    for row in task.rows:
        started = time.perf_counter()
        try:
            if task.ask is not None:
                yield replace(task.ask(model, row), seconds=time.perf_counter() - started)
                continue
            completion = answer(model, task, row, constrained=constrained, exits=exits)
        except ContextError:
            yield Prediction(row.id, "", "context")
            continue
        seconds = time.perf_counter() - started
        sure = scores(task.prompt(row), completion.ids) if scores else {}
        yield Prediction(row.id, completion.text, completion.finish_reason, len(completion.ids), seconds, sure)


def prompt_text(parts: Sequence[Part]) -> str:
    """The parts without control tokens, for models that know none."""
    return "\n".join(part.text for part in parts if not part.control)


def save_predictions(
    path: Path, by_task: Mapping[tuple[str, str], Sequence[Prediction]], *, append: bool = False
) -> None:
    """JSON lines: {"task", "mode", and the fields of Prediction}; the table can be made again from them."""
    with path.open("a" if append else "w", encoding="utf-8") as file:
        for (task, mode), predictions in by_task.items():
            for p in predictions:
                file.write(json.dumps({"task": task, "mode": mode, **asdict(p)}, ensure_ascii=False) + "\n")


def load_predictions(path: Path) -> dict[tuple[str, str], list[Prediction]]:
    """What `save_predictions` wrote, by (task, mode).  Raises FileError, DataError."""
    found: dict[tuple[str, str], list[Prediction]] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: expected JSON lines in UTF-8") from None
    for n, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            task, mode = values.pop("task"), values.pop("mode")
            found.setdefault((task, mode), []).append(Prediction(**values))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{path} line {n}: expected a stored prediction, {error!r}") from None
    return found


def in_order(rows: Sequence[Row], predictions: Sequence[Prediction]) -> tuple[list[Row], list[Prediction]]:
    """The rows that were answered, with their answers, in the order of the rows."""
    by_id = {p.id: p for p in predictions}
    both = [(row, by_id[row.id]) for row in rows if row.id in by_id]
    return [row for row, _ in both], [p for _, p in both]


def prompts_task(path: Path) -> Task:
    """Rows without right answers from JSON lines {"prompt": [[text, is_control], …]}: for what only needs answers."""
    rows = []
    for where, line in json_lines(path, "more prompts"):
        parts = line.get("prompt")
        if not isinstance(parts, list) or not all(
            isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) and isinstance(p[1], bool) for p in parts
        ):
            raise DataError(f"{where}: expected 'prompt' as a list of [text, is_control], found {str(parts)[:60]}")
        rows.append(Row(where, "", {}, context=tuple(Part(text, control=control) for text, control in parts)))
    return _unscored(path, rows)


def openings_task(path: Path, n: int, seed: int = 0) -> Task:
    """`n` rows without right answers: first words of sentences of a text, UTF-8, plain or .xz.

    Of those that `nearfar fit-exit` leaves alone: thresholds chosen on answers that a head has learnt promise nothing.
    Raises DataError.
    """
    from nearfar.eval.fit_exit import openings
    from nearfar.eval.perplexity import read_text

    found = enumerate(openings(read_text(path), n, seed, held_out=True))
    return _unscored(path, [Row(f"{path.name}:{i}", "", {}, context=(Part(text),)) for i, text in found])


def _unscored(path: Path, rows: Sequence[Row]) -> Task:
    """Rows whose context is the prompt."""
    return Task(
        name=path.stem,
        split=path.name,
        rows=rows,
        prompt=lambda row: tuple(row.context),
        schema=None,
        score=lambda rows, predictions: [],
        instruction="",
    )
