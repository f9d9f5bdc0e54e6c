"""Intent and slots in one JSON object: HWU64, SNIPS, CLINC150, and SLURP in HWU64's labels.

HWU64 has each request twice: as somebody typed it ("6 AM, Tuesday!") and in the normal form whose words its labels mark
("six am tuesday").  The line of the benchmark asks the normal form; a second one asks what was typed, whose values the
labels spell otherwise in four of ten cases.

Metrics: the intent's accuracy, slot F1 over the multiset of (type, value), and the whole object right.  CLINC150 adds
requests that no intent covers; nothing is trained on them, so a model can only notice them by being unsure.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from nearfar import corpora, forms, splits
from nearfar.errors import DataError
from nearfar.eval.intervals import Interval, bootstrap, wilson
from nearfar.eval.metrics import auroc, micro_f1, overlap, parse_answer, slot_pairs
from nearfar.eval.tasks import Figure, Json, Prediction, Row, Task

OUT = "out of scope"
OUT_RECALL = 0.9  # the share of out-of-scope rows that the second CLINC150 figure turns away


SNIPS_TEST, CLINC_TEST = "snips_test.jsonl.xz", "clinc150_test.json.xz"  # official files, for those who have them


def load(folder: Path) -> list[Task]:
    """All sets; official SNIPS and CLINC150 test files are used beside them where the folder has them."""
    return [task for loader in LOADERS.values() for task in loader(folder)]


LOADERS: dict[str, Callable[[Path], list[Task]]] = {
    "hwu64": lambda folder: [hwu64(folder)],
    "hwu64_typed": lambda folder: [hwu64(folder, typed=True)],
    "snips": lambda folder: [snips(folder), *([snips(folder, official=True)] if _has(folder, SNIPS_TEST) else [])],
    "clinc150": lambda folder: [
        clinc150(folder),
        *([clinc150(folder, official=True)] if _has(folder, CLINC_TEST) else []),
    ],
    "slurp": lambda folder: [slurp(folder)],
}


def _has(folder: Path, name: str) -> bool:
    return (folder / "intents" / name).is_file()


def train_rows(name: str, folder: Path) -> list[Row]:
    """What a baseline of task `name` may learn from: all training rows that are not scored."""
    if name in ("hwu64", "hwu64_typed", "slurp"):
        return list(_lines(folder / "intents" / "hwu64_train.jsonl.xz", typed=name == "hwu64_typed"))
    if name.startswith("snips"):
        rows = _lines(folder / "intents" / "snips_train.jsonl.xz")
        return [r for r in rows if splits.split_residue(r.text) not in (splits.DEV, splits.HELD_OUT)]
    return list(_clinc(folder / "intents" / "clinc150_train_val.json.xz", "train"))


def dev_rows(folder: Path) -> list[Task]:
    """Three sets' held-out twentieths of training data: for calibration and for steering, never for the table."""
    sets = (
        ("hwu64", list(_lines(folder / "intents" / "hwu64_train.jsonl.xz"))),
        ("snips", list(_lines(folder / "intents" / "snips_train.jsonl.xz"))),
        ("clinc150", train_rows("clinc150", folder)),
    )
    return [
        _task(name, name, f"{name} dev", [r for r in rows if splits.split_residue(r.text) == splits.DEV], rows)
        for name, rows in sets
    ]


def hwu64(folder: Path, *, typed: bool = False) -> Task:
    """HWU64's test file; the baseline is fitted on its train file, in the same form."""
    rows = list(_lines(folder / "intents" / "hwu64_test.jsonl.xz", typed=typed))
    name, split = ("hwu64_typed", "HWU64 test, as typed") if typed else ("hwu64", "HWU64 test")
    return _task("hwu64", name, split, rows, train_rows(name, folder))


def snips(folder: Path, *, official: bool = False) -> Task:
    """The held-out twentieth of SNIPS train, or the official test file where somebody has it."""
    train = train_rows("snips", folder)
    if official:
        rows = list(_lines(folder / "intents" / SNIPS_TEST))
        return _task("snips", "snips_test", "SNIPS official test", rows, train)
    rows = list(_lines(folder / "intents" / "snips_train.jsonl.xz"))
    held = [r for r in rows if splits.split_residue(r.text) == splits.HELD_OUT]
    return _task("snips", "snips", "SNIPS, held-out twentieth of train", held, train)


def slurp(folder: Path) -> Task:
    """SLURP's validation sentences that HWU64's train file does not have, in the labels that they share."""
    train = train_rows("slurp", folder)
    labels = {r.gold["intent"] for r in train}
    unmarked = list(_lines(folder / "intents" / "slurp_devel.jsonl.xz", unmarked=True))
    rows = [r for r in unmarked if r.gold["intent"] in labels]
    split = f"SLURP devel, {len(rows):,} of {len(unmarked):,} unmarked rows, whose labels HWU64 has"
    return _task("hwu64", "slurp", split, rows, train)


def clinc150(folder: Path, *, official: bool = False) -> Task:
    """CLINC150's validation rows and the out-of-scope rows, or the official test file where somebody has it."""
    file = folder / "intents" / "clinc150_train_val.json.xz"
    train, outside = train_rows("clinc150", folder), list(_clinc(file, "oos_train"))
    if official:
        test = folder / "intents" / CLINC_TEST
        rows = [*_clinc(test, "test"), *_clinc(test, "oos_test")]
        return _task("clinc150", "clinc150_test", "CLINC150 official test", rows, train)
    rows = [*_clinc(file, "val"), *outside, *_clinc(file, "oos_val")]
    return _task("clinc150", "clinc150", "CLINC150 validation", rows, train)


def _lines(path: Path, *, unmarked: bool = False, typed: bool = False) -> Iterator[Row]:
    """`unmarked`: only rows that HWU64's train file does not have, which SLURP's files say of each.

    `typed`: HWU64's requests as they were typed instead of their normal form, whose words the slots are.
    """
    for where, row in corpora.json_lines(path, "intents"):
        if unmarked and corpora.field(where, row, "in_hwu64_train", bool):
            continue
        intent = corpora.field(where, row, "intent", str)
        if "scenario" in row:  # HWU64's label is both
            intent = f"{corpora.field(where, row, 'scenario', str)}_{intent}"
        gold = {"intent": intent, "slots": forms.group_slots(corpora.pairs(where, row, "slots"))}
        yield Row(where, corpora.field(where, row, "norm" if "norm" in row and not typed else "text", str), gold)


def _clinc(path: Path, part: str) -> Iterator[Row]:
    rows = corpora.field(path.name, corpora.json_file(path, "intents", dict), part, list)
    for n, row in enumerate(rows):
        if not (isinstance(row, list) and len(row) == 2 and all(isinstance(x, str) for x in row)):
            raise DataError(f"{path.name} {part} row {n}: expected [text, intent], found {str(row)[:60]}")
        yield Row(f"{path.name} {part} {n}", row[0], {"intent": row[1], "slots": {}}, OUT if row[1] == "oos" else "")


def _task(space: str, name: str, split: str, rows: Sequence[Row], train: Sequence[Row]) -> Task:
    """`space` is the label set as nano's rows name it; labels and examples come from `train`."""
    labels = sorted({str(r.gold["intent"]) for r in train})
    kinds = sorted({kind for r in train for kind in r.gold["slots"]})
    # What was typed is not what the labels spell: there a value may be any text.
    marked = name != "hwu64_typed"
    shots = [(r.text, forms.compact(r.gold)) for r in _spread(train, 3)]
    slot_line = f"Slot types: {', '.join(kinds)}.\n" if kinds else ""
    return Task(
        name=name,
        split=split,
        rows=rows,
        prompt=lambda row: forms.intent_prompt(space, row.text),
        schema=lambda row: intent_schema(labels, kinds, row.text if marked else None),
        score=score,
        instruction=(
            'Name the intent of the request and its slots as one JSON object {"intent": …, "slots": {type: value}}; '
            f"values are words of the request.\nIntents: {', '.join(labels)}.\n{slot_line}"
        ),
        shots=shots,
    )


def _spread(rows: Sequence[Row], n: int) -> list[Row]:
    return [rows[(2 * i + 1) * len(rows) // (2 * n)] for i in range(n)] if rows else []


def intent_schema(labels: Sequence[str], slot_types: Sequence[str], request: str | None = None) -> Json:
    """One object of an intent and slots in any order; a repeated slot is a list.

    With `request` values are runs of its words: the grammar copies them.
    """
    text: Json = {"type": "string"} if request is None else {"type": "string", "pattern": f"^ ?(?:{_runs(request)})$"}
    value = {"anyOf": [text, {"type": "array", "items": text}]}
    slots: dict[str, object] = {"type": "object", "additionalProperties": False}
    if slot_types:
        slots["patternProperties"] = {f"^({'|'.join(slot_types)})$": value}
    return {
        "type": "object",
        "properties": {"intent": {"enum": list(labels)}, "slots": slots},
        "required": ["intent", "slots"],
        "additionalProperties": False,
    }


MOST_WORDS = 24  # of a value: as many as the longest in the training files


def _runs(request: str) -> str:
    """A pattern of all runs of words and marks in a request."""
    words = [m.span() for m in re.finditer(r"\w+|[^\w\s]", request)]
    runs = {request[a:b] for i, (a, _) in enumerate(words) for _, b in words[i : i + MOST_WORDS]}
    return "|".join(re.escape(run) for run in sorted(runs))


def score(rows: Sequence[Row], predictions: Sequence[Prediction]) -> list[Figure]:
    """The figures of one line; out-of-scope rows count only for the two figures about them."""
    inside = [(r, p) for r, p in zip(rows, predictions, strict=True) if r.kind != OUT]
    answers = [(r.gold, parse_answer(p.text) or {}) for r, p in inside]
    right = [str(found.get("intent")) == gold["intent"] for gold, found in answers]
    meets = [overlap(slot_pairs(found.get("slots")), slot_pairs(gold["slots"])) for gold, found in answers]
    figures = [Figure("intent", wilson(sum(right), len(inside)))]
    if any(m.wanted for m in meets):
        counts = np.array([(m.shared, m.found, m.wanted) for m in meets])
        whole = sum(ok and m.exact for ok, m in zip(right, meets, strict=True))
        figures += [Figure("slot F1", bootstrap(counts, micro_f1)), Figure("exact JSON", wilson(whole, len(inside)))]
    figures.append(Figure("valid JSON", wilson(sum(parse_answer(p.text) is not None for _, p in inside), len(inside))))
    outside = [p for r, p in zip(rows, predictions, strict=True) if r.kind == OUT]
    if outside:
        for head in sorted(set.intersection(*(set(p.scores) for p in predictions))):
            figures += _scope_figures(head, [p for _, p in inside], right, outside)
    return figures


def _scope_figures(
    head: str, inside: Sequence[Prediction], right: Sequence[bool], outside: Sequence[Prediction]
) -> list[Figure]:
    """How well a head's confidence tells in scope from out, and what turning 90 % of the latter away costs."""
    sure_in, sure_out = (np.array([p.scores[head] for p in ps]) for ps in (inside, outside))
    area = auroc(sure_in, sure_out)
    threshold = np.quantile(sure_out, OUT_RECALL, method="higher")
    kept = int((np.array(right) & (sure_in > threshold)).sum())
    return [
        Figure(f"out-of-scope AUROC by {head}", _area_interval(area, len(inside), len(outside)), unit=""),
        Figure(f"intent at 90 % out-of-scope recall by {head}", wilson(kept, len(inside))),
    ]


def _area_interval(area: float, n_in: int, n_out: int) -> Interval:
    """Hanley and McNeil (1982), equation 2."""
    if math.isnan(area):
        return Interval(area, area, area, n_in + n_out)
    q1, q2 = area / (2 - area), 2 * area * area / (1 + area)
    spread = area * (1 - area) + (n_out - 1) * (q1 - area * area) + (n_in - 1) * (q2 - area * area)
    half = 1.96 * math.sqrt(max(spread, 0.0) / (n_in * n_out))
    return Interval(area, max(0.0, area - half), min(1.0, area + half), n_in + n_out)
