"""Requests to a home: the test sentences of Home Assistant (English), as calls with slots.

Metrics: the right tool, tool and all arguments, argument F1.  A slot's value may be one of several that the test files
accept; the area of the voice satellite is not asked of the model, for it stands in no prompt.  The home is that of the
test files, cut to the eight things that share most words with the request; how often the right name is among them is a
figure of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nearfar import corpora, forms
from nearfar import home as house
from nearfar.errors import DataError, MissingExtraError
from nearfar.eval.intervals import bootstrap, wilson
from nearfar.eval.metrics import Overlap, group_sums, micro_f1, normal_value, parse_answer
from nearfar.eval.tasks import Figure, Json, Prediction, Row, Task, prompt_text
from nearfar.home import Entity, Home

ARCHIVE = "smart_home/home_assistant_intents_en.tar.xz"
USE = "the requests to a home"


@dataclass(frozen=True, slots=True)
class Asked:
    """What surrounds a request: the home, cut to what fits a prompt, and slots that its answer may leave out."""

    home: Home
    optional: frozenset[str] = frozenset()
    listed: bool | None = None  # whether what is right is among the home's things; None if nothing is named
    satellite: Mapping[str, Any] | None = None  # the context that hassil is given


def load(folder: Path) -> list[Task]:
    """The English test sentences of Home Assistant.  Raises DataError."""
    rows = list(read_tests(corpora.tar_texts(folder / ARCHIVE, USE, ".yaml")))
    return [home_task("home", "Home Assistant tests, English", rows)]


def home_task(name: str, split: str, rows: Sequence[Row]) -> Task:
    """Requests whose context is an `Asked`."""
    schema = home_schema()
    return Task(
        name=name,
        split=split,
        rows=rows,
        prompt=_prompt,
        schema=lambda row: schema,
        score=score,
        instruction=(
            "You see the things of a home and a request. Write the call for it as one JSON object "
            '{"intent": …, "slots": {…}}, or {"intent": "none"}. Intents and slots: '
            + "; ".join(f"{intent}({', '.join(slots)})" for intent, slots in house.INTENTS.items())
        ),
        shots=[
            (
                "kitchen: light ceiling light, cover blinds\nturn off the kitchen lights",
                forms.home_answer("HassTurnOff", {"area": "kitchen", "domain": "light"}),
            )
        ],
        request=lambda row: prompt_text(_prompt(row)),
        max_tokens=64,
    )


def _prompt(row: Row) -> forms.Parts:
    return forms.home_prompt(row.context.home.setting(), row.text)


def home_schema() -> Json:
    """Any call of the table in nearfar.home, its slots in the order of training rows, or "none"."""
    none = {"type": "object", "properties": {"intent": {"const": house.NO_INTENT}}, "required": ["intent"]}
    return {"anyOf": [*(_call_schema(*one) for one in house.INTENTS.items()), {**none, "additionalProperties": False}]}


def _call_schema(intent: str, slots: Mapping[str, house.Kind]) -> Json:
    properties = {slot: _slot_schema(slots[slot]) for slot in house.SLOT_ORDER if slot in slots}
    required = list(house.REQUIRED.get(intent, ()))
    inner = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {
        "type": "object",
        "properties": {"intent": {"const": intent}, "slots": inner},
        "required": ["intent", "slots"],
        "additionalProperties": False,
    }


def _slot_schema(kind: house.Kind) -> Json:
    if isinstance(kind, str):
        return {"type": "string"}
    if isinstance(kind[0], str):
        return {"enum": [*kind, *forms.spaced(kind)]}
    return {"type": "number", "minimum": kind[0], "maximum": kind[1]}


# ---------------------------------------------------------------- the test files


def read_tests(files: Mapping[str, str]) -> Iterator[Row]:
    """One row for each sentence of tests/en.  Two forms of file: one names its intent inside, one by its folder."""
    base = read_home(_yaml("tests/en/_fixtures.yaml", files))
    for name in files:
        path = PurePosixPath(name)
        if not name.startswith("tests/en/") or path.name == "_fixtures.yaml":
            continue
        content = _yaml(name, files)
        folder_intent = path.parent.name if path.parent.name != "en" else None
        home = base if folder_intent is None else Home((*read_home(content).entities, *base.entities))
        for n, test in enumerate(corpora.field(name, content, "tests", list)):
            yield from _test_rows(f"{name} test {n}", test, folder_intent, home)


def _test_rows(where: str, test: dict[str, Any], folder_intent: str | None, home: Home) -> Iterator[Row]:
    sentences = test.get("sentences")
    sentences = [sentences] if isinstance(sentences, str) else sentences
    inner = test.get("intent", {}) if folder_intent is None else test
    intent = folder_intent or inner.get("name")
    if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
        raise DataError(f"{where}: expected 'sentences' as text, found {str(sentences)[:60]}")
    if not isinstance(intent, str):
        raise DataError(f"{where}: expected the intent's name, found {sorted(test)}")
    slots, context = inner.get("slots") or {}, inner.get("context") or {}
    optional = frozenset(k for k, v in context.items() if k in slots and slots[k] == v)
    for n, sentence in enumerate(sentences):
        near = home.near(sentence)
        names = [forms.home_text(str(v)) for v in _alternatives(slots.get("name", []))]
        known = [name for name in names if home.called(name)]
        listed = any(near.called(name) for name in known) if known else None
        asked = Asked(near, optional, listed, context)
        yield Row(f"{where} sentence {n}", sentence, {"intent": intent, "slots": slots}, "", where, asked)


def _alternatives(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def read_home(content: Mapping[str, Any]) -> Home:
    """The things of a fixtures file; what nano's rows have no word for is left out."""
    areas = {a["id"]: a["name"] for a in content.get("areas", []) if "id" in a}
    entities = []
    for entity in content.get("entities", []):
        domain = entity.get("domain") or str(entity.get("id", "")).split(".")[0]
        if domain in house.DOMAINS:
            area = areas.get(entity.get("area"), entity.get("area", ""))
            kind = (entity.get("attributes") or {}).get("device_class", "")
            name = re.sub(r"\[.*?\]", "", entity["name"])  # a name may hold optional letters: Joe[']s
            entities.append(Entity(forms.home_text(name), forms.home_text(area), domain, kind))
    return Home(tuple(entities))


def _yaml(name: str, files: Mapping[str, str]) -> dict[str, Any]:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError as error:
        raise MissingExtraError("pyyaml", "train", "reading Home Assistant's test files") from error
    if name not in files:
        raise DataError(f"{ARCHIVE}: expected the member {name}")
    try:
        content = yaml.safe_load(files[name])
    except yaml.YAMLError as error:
        raise DataError(f"{ARCHIVE} {name}: expected YAML, {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{ARCHIVE} {name}: expected a mapping, found {type(content).__name__}")
    return content


# ---------------------------------------------------------------- scoring


def compare(found: object, gold: Mapping[str, Any], optional: frozenset[str]) -> Overlap:
    """Slots found against slots wanted; a list in `gold` accepts any of its values, `optional` ones may be missing."""
    slots = found if isinstance(found, Mapping) else {}
    right = [
        key
        for key, value in gold.items()
        if key in slots and normal_value(slots[key]) in {normal_value(v) for v in _alternatives(value)}
    ]
    wanted = [key for key in gold if key in slots or key not in optional]
    return Overlap(len(right), len(slots), len(wanted))


def score(rows: Sequence[Row], predictions: Sequence[Prediction]) -> list[Figure]:
    """Shares by sentence (Wilson), argument F1 by test block (bootstrap)."""
    found = [parse_answer(p.text) or {} for p in predictions]
    right = [str(f.get("intent")) == r.gold["intent"] for r, f in zip(rows, found, strict=True)]
    meets = [compare(f.get("slots"), r.gold["slots"], r.context.optional) for r, f in zip(rows, found, strict=True)]
    whole = sum(ok and m.exact for ok, m in zip(right, meets, strict=True))
    counts = group_sums([row.group for row in rows], [(m.shared, m.found, m.wanted) for m in meets])
    listed = [row.context.listed for row in rows if row.context.listed is not None]
    return [
        Figure("tool", wilson(sum(right), len(rows))),
        Figure("tool and arguments", wilson(whole, len(rows))),
        Figure("argument F1", bootstrap(counts, micro_f1)),
        Figure("valid JSON", wilson(sum(parse_answer(p.text) is not None for p in predictions), len(rows))),
        Figure("right name among the eight listed", wilson(sum(listed), len(listed))),
    ]


# ---------------------------------------------------------------- the baseline


_MISSING_RULES = {"percent": "([ ]%)|( percent)"}  # used by the newer files, defined in none


class Templates:
    """Home Assistant's own sentence templates over the test home, matched by hassil."""

    def __init__(self, folder: Path) -> None:
        try:
            from hassil import Intents, TextSlotList
        except ImportError as error:
            raise MissingExtraError("hassil", "train", "the templates that are the home's baseline") from error
        files = corpora.tar_texts(folder / ARCHIVE, USE, ".yaml")
        merged: dict[str, Any] = {
            "language": "en",
            "intents": {},
            "lists": {},
            "expansion_rules": dict(_MISSING_RULES),
            "skip_words": [],
        }
        for name in files:
            if name.startswith("sentences/en/"):
                _merge(merged, name, _yaml(name, files))
        self._intents = Intents.from_dict(merged)
        fixtures = _yaml("tests/en/_fixtures.yaml", files)
        self._areas = [e["name"] for e in fixtures.get("areas", [])]
        floors = [(e["name"], e["name"]) for e in fixtures.get("floors", [])]
        self._floors = TextSlotList.from_tuples(floors, name="floor")
        self._names = fixtures.get("entities", [])

    def answers(self, rows: Sequence[Row]) -> list[Prediction]:
        return [Prediction(row.id, self._call(row)) for row in rows]

    def _call(self, row: Row) -> str:
        from hassil import SlotList, TextSlotList
        from hassil.recognize import recognize_best

        things = [
            (e.name, e.name, {"domain": e.domain, "device_class": e.device_class}) for e in row.context.home.entities
        ]
        areas: Sequence[str] = row.context.home.areas
        if row.context.satellite is not None:  # a request of the test files: about the home of their fixtures
            things += [(e["name"], e["name"], {"domain": str(e.get("id", "")).split(".")[0]}) for e in self._names]
            areas = self._areas
        lists: dict[str, SlotList] = {
            "name": TextSlotList.from_tuples(things, name="name"),
            "area": TextSlotList.from_tuples([(area, area) for area in areas], name="area"),
            "floor": self._floors,
        }
        context = dict(row.context.satellite or {})
        found = recognize_best(
            row.text,
            self._intents,
            slot_lists=lists,
            intent_context=context,
            best_slot_name="name",
        )
        if found is None:
            return forms.home_answer(house.NO_INTENT)
        slots = {key: entity.value for key, entity in found.entities.items()}
        return forms.home_answer(found.intent.name, slots)


def _merge(merged: dict[str, Any], name: str, content: Mapping[str, Any]) -> None:
    """Add one sentence file; those in a folder hold one intent's data in a newer form."""
    path = PurePosixPath(name)
    if "data" in content:
        blocks = [_old_form(block) for block in content["data"]]
        merged["intents"].setdefault(path.parent.name, {"data": []})["data"] += blocks
    for intent, body in content.get("intents", {}).items():
        merged["intents"].setdefault(intent, {"data": []})["data"] += body["data"]
    merged["lists"] |= content.get("lists", {})
    merged["expansion_rules"] |= content.get("expansion_rules", {})
    merged["skip_words"] += content.get("skip_words", [])


def _old_form(block: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in block.items() if key in ("sentences", "slots", "expansion_rules", "lists")}
    if "inferred_domain" in block:
        kept["slots"] = {**kept.get("slots", {}), "domain": block["inferred_domain"]}
    if "name_domains" in block:
        kept["requires_context"] = {"domain": block["name_domains"]}
    return kept
