"""Device actions: homes read from system prompts, calls compared by what they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nearfar import forms
from nearfar.errors import DataError
from nearfar.eval import actions
from nearfar.eval.tasks import Figure, Prediction, Row
from tests.paths import SHARED, needs_shared

SYSTEM = """You are a voice assistant.
An overview of the areas and the devices in this smart home:
- names: Porch Light, Outside
  domain: light
  state: 'off'
  areas: Porch
- names: Attic Light
  domain: light
  areas: Attic
- names: "Speaker"
  domain: media_player
  areas: Attic
  attributes:
    device_class: speaker
- names: Odd Thing
  domain: humidifier
"""


def line(text: str, tool: str = "", **arguments: Any) -> dict[str, Any]:
    made = [{"function": {"name": tool, "arguments": arguments}}] if tool else []
    answer = {"role": "assistant", "content": "", "tool_calls": made}
    return {"messages": [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}, answer]}


def read(tmp_path: Path, *lines: dict[str, Any]) -> list[Row | None]:
    path = tmp_path / "actions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return list(actions.read_turns(path))


def value(figures: list[Figure], metric: str) -> float:
    return next(f.interval.value for f in figures if f.metric == metric)


def test_a_described_home_is_read_from_the_system_prompt() -> None:
    found = actions.read_home(SYSTEM)
    assert found.setting() == "porch: light porch light; attic: light attic light, media_player speaker"
    assert [e.device_class for e in found.entities] == ["", "", "speaker"]


def test_actions_count_by_what_they_do(tmp_path: Path) -> None:
    rows = read(
        tmp_path,
        line("porch light off", "HassTurnOff", domain=["light"], name="Porch Light"),
        line("pause", "HassMediaPause", domain=["media_player"], name="Speaker"),
        line("make the attic 50% bright", "HassLightSet", area="Attic", brightness=50.0),
        line("make it quieter"),
        line("polish it", "HassPolish", name="Porch Light"),
        line("open the gate", "HassTurnOn", name="Gate", domain=["cover"]),
    )
    assert [row is None for row in rows] == [False, False, False, False, True, True]  # the last two are n/a
    asked = [row for row in rows if row is not None]
    assert asked[0].context.listed is True
    answers = [
        forms.home_answer("HassTurnOff", {"area": "porch", "domain": "light"}),  # the same thing by another name
        forms.home_answer("HassMediaPause", {"area": "attic"}),
        forms.home_answer("HassLightSet", {"name": "attic light", "brightness": 40}),  # the tool, not the value
        forms.home_answer("none"),
    ]
    figures = actions.score(asked, [Prediction(r.id, a) for r, a in zip(asked, answers, strict=True)])
    assert value(figures, "tool") == 1
    assert value(figures, "tool and arguments") == pytest.approx(2 / 3)
    assert value(figures, "no call where one should ask back") == 1
    refused = forms.home_answer("HassTurnOff", {"area": "cellar", "domain": "light"})
    wrong = actions.score(asked, [Prediction(r.id, refused) for r in asked])
    assert [value(wrong, m) for m in ("tool and arguments", "no call where one should ask back")] == [0, 0]


def test_a_damaged_turn_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 1: expected messages of system, user and assistant, found"):
        read(tmp_path, {"messages": [{"role": "user", "content": "x"}]})
    broken = line("x", "HassTurnOn")
    broken["messages"][2]["tool_calls"] = ["HassTurnOn"]
    with pytest.raises(DataError, match="line 1: expected a tool call with a function"):
        read(tmp_path, broken)


@needs_shared
def test_of_233_device_actions_five_cannot_be_said_in_rows() -> None:
    task = actions.load(SHARED)[0]
    assert len(task.rows) == 228
    assert task.notes(task.rows)[0].startswith("5 of the 233 turns are n/a")
    assert sum(row.kind == "ask back" for row in task.rows) == 29
    figures = task.score(task.rows, [Prediction(r.id, forms.compact(r.gold)) for r in task.rows])
    assert {f.interval.value for f in figures[:4]} == {1.0}
    assert figures[4].interval.value > 0.9  # eight things mostly hold the right one
