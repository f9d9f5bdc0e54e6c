"""The next API call of a dialogue: SGD dev, services that training has seen and services that it has not.

Each call of the corpus is one row: the turns before it, its services with their methods, and the question which method
with which arguments.  Metrics: the method's accuracy (all, seen, unseen), argument F1, the whole call right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nearfar import corpora, forms, splits
from nearfar.errors import DataError
from nearfar.eval.intervals import bootstrap, wilson
from nearfar.eval.metrics import group_sums, micro_f1, overlap, parse_answer, slot_pairs
from nearfar.eval.tasks import Figure, Json, Prediction, Row, Task, prompt_text
from nearfar.forms import Part, Parts, Turn

DAY = "2019-03-01"  # on which SGD's speakers say "today"
RESULT_FIELDS = 6  # of a call's first result, as in training rows
MAX_CHARS = 1_200  # of setting and turns: with the answer it fits a context of 512 tokens
SEEN, UNSEEN = "seen services", "unseen services"


@dataclass(frozen=True, slots=True)
class Method:
    """One API method of a service."""

    required: tuple[str, ...]
    optional: tuple[str, ...]


Services = Mapping[str, Mapping[str, Method]]


@dataclass(frozen=True, slots=True)
class Before:
    """What is known before a call: the dialogue's services and turns, and the service that will be called.

    `service` is for the baseline only; the model has to choose among `services`.
    """

    services: tuple[str, ...]
    turns: tuple[Turn, ...]
    service: str


def load(folder: Path) -> list[Task]:
    """The next calls of the SGD dev dialogues.  Raises DataError."""
    train = set(read_services(folder / "dialogue" / "sgd_train_schema.json"))
    services = read_services(folder / "dialogue" / "sgd_dev_schema.json")
    rows = list(read_calls(folder / "dialogue" / "sgd_dev.jsonl.xz", services, train))
    return [_task("sgd", "SGD dev, next call", rows, services, folder)]


def dev_rows(folder: Path) -> list[Task]:
    """Calls of the training dialogues' held-out twentieth: for calibration and steering, never for the table."""
    rows = list(train_rows(folder, residues={splits.DEV}))
    return [_task("sgd", "SGD dialogues, dev twentieth", rows, _train_services(folder), folder)]


def train_rows(folder: Path, residues: set[int] | None = None) -> Iterator[Row]:
    """The calls of training dialogues (those outside dev, unless `residues` names others)."""
    services = _train_services(folder)
    wanted = set(range(splits.RESIDUES)) - {splits.DEV} if residues is None else residues
    return read_calls(folder / "dialogue" / "sgd_train.jsonl.xz", services, set(services), wanted)


def _train_services(folder: Path) -> Services:
    return read_services(folder / "dialogue" / "sgd_train_schema.json")


def read_services(path: Path) -> Services:
    """service -> method -> its arguments."""
    services: dict[str, dict[str, Method]] = {}
    for n, service in enumerate(corpora.json_file(path, "the services of SGD", list)):
        where = f"{path.name} service {n}"
        methods = {}
        for intent in corpora.field(where, service, "intents", list):
            required = corpora.field(where, intent, "required_slots", list)
            optional = corpora.field(where, intent, "optional_slots", dict)
            methods[corpora.field(where, intent, "name", str)] = Method(tuple(required), tuple(optional))
        services[corpora.field(where, service, "service_name", str)] = methods
    return services


def read_calls(path: Path, services: Services, seen: set[str], residues: set[int] | None = None) -> Iterator[Row]:
    """One row for each call.  `residues` keeps dialogues by the split of their joined turns."""
    for where, dialogue in corpora.json_lines(path, "dialogues with API calls"):
        names = tuple(corpora.field(where, dialogue, "services", list))
        unknown = [name for name in names if name not in services]
        if unknown:
            raise DataError(f"{where}: expected services of the schema, found {unknown[0]!r}")
        turns = corpora.field(where, dialogue, "turns", list)
        texts = [corpora.field(where, turn, "t", str) for turn in turns]
        if residues is not None and splits.split_residue(" ".join(texts)) not in residues:
            continue
        yield from _calls(where, corpora.field(where, dialogue, "id", str), names, turns, seen)


def _calls(where: str, name: str, services: tuple[str, ...], turns: list[Any], seen: set[str]) -> Iterator[Row]:
    before: list[Turn] = []
    for n, turn in enumerate(turns):
        made: list[tuple[str, str]] = []
        for call in turn.get("calls", []):
            method, args = corpora.field(where, call, "method", str), corpora.field(where, call, "args", dict)
            service = corpora.field(where, call, "service", str)
            kind = SEEN if service in seen else UNSEEN
            gold = {"call": method, "args": args}
            context = Before(services, tuple(before), service)
            yield Row(f"{name} turn {n}", before[-1].text if before else "", gold, kind, name, context)
            first = dict(list((call.get("result") or {}).items())[:RESULT_FIELDS])
            made.append((forms.call_json(method, args), forms.result_json(first)))
        before.append(Turn(corpora.field(where, turn, "s", str), corpora.field(where, turn, "t", str), tuple(made)))


def setting(names: Sequence[str], services: Services) -> str:
    """The day and what the services can do: unseen ones need something to be read."""
    lines = (
        forms.service_line(name, {m: (*args.required, *args.optional) for m, args in services[name].items()})
        for name in names
    )
    return "; ".join([DAY, *lines])


def call_prompt(row: Row, services: Services) -> Parts:
    """The dialogue before the call, its last turns first kept, up to `<|c|>`."""
    before: Before = row.context
    first = setting(before.services, services)
    turns = forms.last_turns(before.turns, max(MAX_CHARS - len(first), 200))
    return (*forms.dialogue(first, turns), Part(forms.CALL, control=True))


def call_schema(names: Sequence[str], services: Services) -> Json:
    """Any method of the dialogue's services with its arguments, which the corpus writes in alphabetical order."""
    return {"anyOf": [_method_schema(m, args) for name in names for m, args in services[name].items()]}


def _method_schema(name: str, method: Method) -> Json:
    args = {
        "type": "object",
        "properties": {slot: {"type": "string"} for slot in sorted({*method.required, *method.optional})},
        "required": sorted(method.required),
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"call": {"const": name}, "args": args},
        "required": ["call", "args"],
        "additionalProperties": False,
    }


def _task(name: str, split: str, rows: Sequence[Row], services: Services, folder: Path) -> Task:
    return Task(
        name=name,
        split=split,
        rows=rows,
        prompt=lambda row: call_prompt(row, services),
        schema=lambda row: call_schema(row.context.services, services),
        score=score,
        instruction=(
            "You see the day, the methods of some services and a dialogue. Write the API call that is due now as one "
            'JSON object {"call": method, "args": {name: value}}; dates are YYYY-MM-DD, times HH:MM, all values text.'
        ),
        shots=_shots(folder),
        request=lambda row: prompt_text(call_prompt(row, services)),
        max_tokens=128,
    )


def _shots(folder: Path) -> list[tuple[str, str]]:
    """The first calls of three training dialogues about different services."""
    services, shots, used = _train_services(folder), [], set()
    for row in train_rows(folder):
        if row.context.service not in used:
            used.add(row.context.service)
            shots.append((prompt_text(call_prompt(row, services)), forms.compact(row.gold)))
        if len(shots) == 3:
            break
    return shots


def score(rows: Sequence[Row], predictions: Sequence[Prediction]) -> list[Figure]:
    """Shares by call (Wilson), argument F1 by dialogue (bootstrap)."""
    found = [parse_answer(p.text) or {} for p in predictions]
    right = [str(f.get("call")) == r.gold["call"] for r, f in zip(rows, found, strict=True)]
    meets = [overlap(slot_pairs(f.get("args")), slot_pairs(r.gold["args"])) for r, f in zip(rows, found, strict=True)]
    figures = [Figure("method", wilson(sum(right), len(rows)))]
    for kind in (SEEN, UNSEEN):
        part = [ok for ok, r in zip(right, rows, strict=True) if r.kind == kind]
        if part and len(part) < len(rows):
            figures.append(Figure(f"method, {kind}", wilson(sum(part), len(part))))
    whole = sum(ok and m.exact for ok, m in zip(right, meets, strict=True))
    counts = group_sums([row.group for row in rows], [(m.shared, m.found, m.wanted) for m in meets])
    figures += [
        Figure("argument F1", bootstrap(counts, micro_f1)),
        Figure("whole call", wilson(whole, len(rows))),
        Figure("valid JSON", wilson(sum(parse_answer(p.text) is not None for p in predictions), len(rows))),
    ]
    return figures
