"""What a model must beat, fitted and scored on the split of its line.  The only importer of scikit-learn.

    intents   TF-IDF (words 1-2, characters 2-5) and a linear SVM; no slots; its largest margin as confidence
    calls     the most frequent method of the service (which it is told), arguments by the last value that was mentioned
    home      Home Assistant's own templates through hassil: an upper bound in its language, nothing outside; for the
              device actions too, over the eight things that the model sees
    journal   a template that needs no model
    language  stories260K on stories where the data folder has it; xz on the rest
    choices   chance

A baseline answers in the same JSON as a model and is scored by the same function.  Where its package is missing, the
figures stored in baselines.json stand in and are called stored; `python -m nearfar.eval.baselines DIR` makes that file
(with names of tasks behind it: those tasks anew).
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nearfar import forms
from nearfar.errors import MissingExtraError
from nearfar.eval import calls, choices, home, intents, journal, language
from nearfar.eval.calls import Before, Method
from nearfar.eval.catalog import LOADERS
from nearfar.eval.intervals import Interval
from nearfar.eval.tasks import Figure, Prediction, Row, Task

STORED = Path(__file__).with_suffix(".json")
COMMAND = "python -m nearfar.eval.baselines DIR"

NAMES = {
    "intents": "TF-IDF + linear SVM",
    "sgd": "most frequent method, last values",
    "home": "hassil on its own templates",
    "journal": "a template, no model",
    "language": "stories260K on stories, xz elsewhere",
    "choices": "chance",
}


@dataclass(frozen=True, slots=True)
class Baseline:
    """The figures of one task's baseline; `stored` if they were not made in this run."""

    name: str
    figures: tuple[Figure, ...]
    stored: bool = False


def baseline(task: Task, folder: Path) -> Baseline:
    """Fit and score the baseline of `task`.  Raises MissingExtraError, DataError."""
    if task.name in choices.LOADERS:
        return Baseline(NAMES["choices"], tuple(choices.chance(task)))
    name, answer = _answerer(task.name, folder)
    return Baseline(name, tuple(task.score(task.rows, answer(task.rows))))


def stored_baseline(task_name: str) -> Baseline | None:
    """The figures of baselines.json: of the whole split, whatever part of it a model was asked."""
    entry = json.loads(STORED.read_text(encoding="utf-8"))["tasks"].get(task_name)
    if entry is None:
        return None
    figures = (Figure(metric, Interval(*f["interval"]), f["unit"]) for metric, f in entry["figures"].items())
    return Baseline(entry["name"], tuple(figures), stored=True)


Answerer = Callable[[Sequence[Row]], list[Prediction]]


def _answerer(task_name: str, folder: Path) -> tuple[str, Answerer]:
    if task_name == "sgd":
        return NAMES["sgd"], LastValues(calls.train_rows(folder), folder).answers
    if task_name == "journal":
        return NAMES["journal"], lambda rows: [Prediction(row.id, journal.floor_answer(row.context)) for row in rows]
    if task_name == "language":
        name = NAMES["language"] if language.has_reference(folder) else "xz"
        return name, lambda rows: language.floor(rows, folder)
    if task_name in ("home", "actions"):
        return NAMES["home"], home.Templates(folder).answers
    return NAMES["intents"], LinearIntents(intents.train_rows(task_name, folder)).answers


class LinearIntents:
    """One linear SVM over TF-IDF features."""

    def __init__(self, train: Sequence[Row]) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]
            from sklearn.pipeline import make_union  # type: ignore[import-untyped]
            from sklearn.svm import LinearSVC  # type: ignore[import-untyped]
        except ImportError as error:
            raise MissingExtraError("scikit-learn", "train", "fitting the baselines") from error
        self._features = make_union(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
            TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True),
        )
        x = self._features.fit_transform([row.text for row in train])
        self._svm = LinearSVC(random_state=0).fit(x, [row.gold["intent"] for row in train])

    def answers(self, rows: Sequence[Row]) -> list[Prediction]:
        x = self._features.transform([row.text for row in rows])
        margins = np.asarray(self._svm.decision_function(x))  # [N, labels], or [N] for two labels
        sure = margins.max(1) if margins.ndim == 2 else np.abs(margins)
        labels = self._svm.predict(x)
        return [
            Prediction(row.id, forms.compact({"intent": str(label), "slots": {}}), scores={"margin": float(s)})
            for row, label, s in zip(rows, labels, sure, strict=True)
        ]


class LastValues:
    """Counts of training calls: which method a service is called for, which values an argument takes."""

    def __init__(self, train: Iterable[Row], folder: Path) -> None:
        self._methods: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._values: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for row in train:
            self._methods[row.context.service][row.gold["call"]] += 1
            for slot, value in row.gold["args"].items():
                self._values[slot][value] += 1
        self._services = calls.read_services(folder / "dialogue" / "sgd_dev_schema.json")

    def answers(self, rows: Sequence[Row]) -> list[Prediction]:
        return [Prediction(row.id, self._call(row.context)) for row in rows]

    def _call(self, before: Before) -> str:
        known = self._methods.get(before.service)
        name = known.most_common(1)[0][0] if known else next(iter(self._services[before.service]))
        return forms.call_json(name, self._args(self._services[before.service][name], before))

    def _args(self, method: Method, before: Before) -> dict[str, str]:
        """Each argument's last mention: the latest training value of it in the turns, else its value in an earlier call
        or result; a required argument that was never mentioned gets its most frequent value."""
        text = " ".join(turn.text for turn in before.turns).casefold()
        called: dict[str, str] = {}
        for turn in before.turns:
            for call, result in turn.calls:
                known = forms.tight({**json.loads(result), **json.loads(call)["args"]})
                called |= {k: str(v) for k, v in known.items()}
        args: dict[str, str] = {}
        for slot in sorted({*method.required, *method.optional}):
            value = self._last_mention(slot, text) or called.get(slot)
            if value is None and slot in method.required and self._values[slot]:
                value = self._values[slot].most_common(1)[0][0]
            if value is not None:
                args[slot] = value
        return args

    def _last_mention(self, slot: str, text: str) -> str | None:
        last, found = -1, None
        for value in self._values[slot]:
            at = text.rfind(value.casefold())
            if at > last and re.search(rf"(?<!\w){re.escape(value.casefold())}(?!\w)", text[max(at - 1, 0) :]):
                last, found = at, value
        return found


def make_stored(folder: Path, names: Sequence[str] = ()) -> dict[str, Any]:
    """The content of baselines.json; with `names`, those tasks anew and the others as they are."""
    tasks: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))["tasks"] if names else {}
    for task in (task for name, loader in LOADERS.items() if not names or name in names for task in loader(folder)):
        print(f"{task.name} …", file=sys.stderr, flush=True)
        made = baseline(task, folder)
        figures = {
            f.metric: {"interval": [f.interval.value, f.interval.low, f.interval.high, f.interval.n], "unit": f.unit}
            for f in made.figures
        }
        tasks[task.name] = {"name": made.name, "split": task.split, "figures": figures}
    return {"made_with": COMMAND, "tasks": tasks}


if __name__ == "__main__":
    STORED.write_text(json.dumps(make_stored(Path(sys.argv[1]), sys.argv[2:]), indent=1) + "\n", encoding="utf-8")
