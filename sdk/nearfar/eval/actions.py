"""Actions on described homes: 233 turns for Home Assistant, each with its own home in the system prompt.

    system prompt -> Home -> the eight things nearest to the request -> home row -> call -> what it would do there

A system prompt of about 900 tokens is over nano's context, hence the eight; how often the right thing is among them is
a figure of its own.  The corpus' calls are compared by what they do in the whole home, not by letter: the right call
may name a thing, its area or its domain.  So "tool and arguments" means: the same intent, on the same things, with the
same values.  Where the right answer is to ask back, a call of any kind is wrong and "none" is right; right calls that
nano's table of intents cannot express are "n/a", counted in a note and left out of the figures.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nearfar import corpora, forms
from nearfar import home as house
from nearfar.errors import DataError
from nearfar.eval import home
from nearfar.eval.intervals import wilson
from nearfar.eval.metrics import parse_answer
from nearfar.eval.tasks import Figure, Prediction, Row, Task
from nearfar.home import Action, BadCall, Entity, Home

FILE = "smart_home/device_actions_test.jsonl.xz"
RENAMED = {"HassSetTemperature": "HassClimateSetTemperature"}  # the corpus' name -> that of the table in nearfar.home
VALUES = ("brightness", "color", "position", "temperature", "volume_level")  # slots that say how, not what
EMPTY = Home(())
_FIELD = re.compile(r"^(?:- | {2}| {4})(names|domain|areas|device_class): (.*)$")


@dataclass(frozen=True, slots=True)
class Described(home.Asked):
    """A request's surroundings: `home` is the eight things of the prompt, `whole` all that the system prompt lists."""

    whole: Home = EMPTY
    action: Action | None = None  # the right one; None where the answer is to ask back


def load(folder: Path) -> list[Task]:
    """The device actions.  Raises DataError."""
    found = list(read_turns(folder / FILE))
    rows = [row for row in found if row is not None]
    note = f"{len(found) - len(rows)} of the {len(found)} turns are n/a: their right call is none that the rows can say"
    task = home.home_task("actions", "Device actions over described homes", rows)
    return [replace(task, score=score, notes=lambda rows: [note])]


def read_turns(path: Path) -> Iterator[Row | None]:
    """One row for each turn; None for a right call that the table of intents cannot express."""
    for where, line in corpora.json_lines(path, "device actions"):
        by_role = {str(m.get("role")): m for m in corpora.field(where, line, "messages", list) if isinstance(m, dict)}
        if not {"system", "user", "assistant"} <= set(by_role):
            raise DataError(f"{where}: expected messages of system, user and assistant, found {sorted(by_role)}")
        text = corpora.field(where, by_role["user"], "content", str)
        whole = read_home(corpora.field(where, by_role["system"], "content", str))
        calls = by_role["assistant"].get("tool_calls") or []
        near = whole.near(text)
        if not calls:
            yield Row(where, text, {"intent": house.NO_INTENT}, "ask back", context=Described(near, whole=whole))
            continue
        intent, slots = _row_form(where, calls[0])
        try:
            action = house.check(forms.home_answer(intent, slots), whole, text)
        except BadCall:
            action = None
        if action is None or not action.targets:
            yield None
            continue
        listed = any(target in near.entities for target in action.targets)
        asked = Described(near, listed=listed, whole=whole, action=action)
        yield Row(where, text, {"intent": intent, "slots": slots}, context=asked)


def read_home(prompt: str) -> Home:
    """The things that a system prompt lists, in the YAML of Home Assistant; other kinds than nano's are left out."""
    things: list[dict[str, str]] = []
    for line in prompt.splitlines():
        match = _FIELD.match(line)
        if match is None:
            continue
        if match[1] == "names":
            things.append({})
        if things:
            things[-1][match[1]] = match[2].strip("'\" ")
    return Home(
        tuple(
            Entity(
                forms.home_text(thing["names"].split(",")[0]),
                forms.home_text(thing.get("areas", "")),
                thing["domain"],
                thing.get("device_class", ""),
            )
            for thing in things
            if thing["names"].strip() and thing.get("domain") in house.DOMAINS
        )
    )


def _row_form(where: str, call: Any) -> tuple[str, dict[str, Any]]:
    """A call of the corpus as the rows write it: lists of one are their item, names in lower case, whole numbers.

    A kind of thing that the intent implies (media players to pause) is no slot in the rows.
    """
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise DataError(f"{where}: expected a tool call with a function, found {str(call)[:60]}")
    intent = corpora.field(where, function, "name", str)
    intent = RENAMED.get(intent, intent)
    slots: dict[str, Any] = {}
    for key, value in corpora.field(where, function, "arguments", dict).items():
        one = value[0] if isinstance(value, list) and len(value) == 1 else value
        if key in ("domain", "device_class") and key not in house.INTENTS.get(intent, {}):
            continue
        slots[key] = forms.home_text(one) if isinstance(one, str) else int(one) if _whole(one) else one
    return intent, slots


def _whole(value: object) -> bool:
    return isinstance(value, float) and value.is_integer()


def does(text: str, row: Row) -> Action | None:
    """What an answer would do in the whole home; None for nothing, be it "none" or a call that is refused."""
    try:
        return house.check(text, row.context.whole, row.text)
    except BadCall:
        return None


def same(a: Action, b: Action) -> bool:
    """The same intent, things and values."""
    return a.intent == b.intent and set(a.targets) == set(b.targets) and _values(a.slots) == _values(b.slots)


def _values(slots: Mapping[str, Any]) -> dict[str, Any]:
    return {key: slots[key] for key in VALUES if key in slots}


def score(rows: Sequence[Row], predictions: Sequence[Prediction]) -> list[Figure]:
    """Shares by request (Wilson): of requests that are due a call, and of those to ask back about."""
    tools, wholes, listed, silent = [], [], [], []
    for row, p in zip(rows, predictions, strict=True):
        found, wanted = parse_answer(p.text) or {}, row.context.action
        if wanted is None:
            silent.append(found.get("intent") == house.NO_INTENT)
            continue
        done = does(p.text, row)
        tools.append(found.get("intent") == wanted.intent)
        wholes.append(done is not None and same(done, wanted))
        listed.append(bool(row.context.listed))
    return [
        Figure("tool", wilson(sum(tools), len(tools))),
        Figure("tool and arguments", wilson(sum(wholes), len(wholes))),
        Figure("no call where one should ask back", wilson(sum(silent), len(silent))),
        Figure("valid JSON", wilson(sum(parse_answer(p.text) is not None for p in predictions), len(rows))),
        Figure("right thing among the eight listed", wilson(sum(listed), len(listed))),
    ]
