"""A data folder of a few rows per source, in the form of the real one: training code runs on it anywhere."""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

ROOMS = ("kitchen", "hall", "attic", "garage", "study", "porch", "cellar", "nursery")
FOODS = ("thai", "greek", "vegan", "sushi", "tapas", "curry", "pizza", "ramen", "pasta", "salad", "soup", "tacos")

COMMON = """
language: en
lists:
  color: {values: [red, blue]}
  brightness: {range: {type: percentage, from: 0, to: 100}}
  timer_seconds: {range: {from: 1, to: 100}}
  timer_minutes: {range: {from: 1, to: 100}}
  timer_hours: {range: {from: 1, to: 100}}
  timer_half: {values: [{in: half, out: 30}]}
  timer_name: {wildcard: true}
  timer_command: {wildcard: true}
  shopping_list_item: {wildcard: true}
expansion_rules:
  the: "(the|my|our)"
  name: "[<the>] {name}"
  area: "[<the>] {area}"
  light: "(light|lights|lamp|lamps)"
  turn: "(turn|switch)"
  timer_duration_seconds: "{timer_seconds:seconds} second[s]"
  timer_duration_minutes: "{timer_minutes:minutes} minute[s] [[and] {timer_seconds:seconds} second[s]]"
  timer_duration_hours: "{timer_hours:hours} hour[s]|({timer_half:minutes} an hour)"
  timer_duration: "<timer_duration_seconds>|<timer_duration_minutes>|<timer_duration_hours>"
"""
TURN = """
language: en
intents:
  HassTurn%(Way)s:
    data:
      - sentences: ["<turn> %(way)s <name>", "<turn> <name> %(way)s", "please <turn> %(way)s <name>"]
        requires_context: {domain: light}
      - sentences:
          - "<turn> %(way)s [all] <area> <light>"
          - "<turn> %(way)s the <light> in <area>"
          - "<area> <light> %(way)s"
        slots: {domain: light}
"""
OTHERS = """
language: en
intents:
  HassLightSet:
    data:
      - sentences:
          - "set <name> to {color}"
          - "set <name> brightness to {brightness}[%]"
          - "make <name> {color}"
          - "dim <name> to {brightness}"
        requires_context: {domain: light}
  HassStartTimer:
    data:
      - sentences: ["timer for <timer_duration>", "start a <timer_duration> timer", "set a timer for <timer_duration>"]
      - sentences:
          - "{timer_command:conversation_command} in <timer_duration>"
          - "in <timer_duration> {timer_command:conversation_command}"
  HassShoppingListAddItem:
    data:
      - sentences:
          - "add {shopping_list_item:item} to my shopping list"
          - "put {shopping_list_item:item} on the shopping list"
          - "buy {shopping_list_item:item}"
"""


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(text.encode()) if path.suffix == ".xz" else text.encode())


def write_tar(path: Path, files: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:xz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))


def dialogue(i: int) -> dict[str, Any]:
    food, args = FOODS[i % len(FOODS)], {"cuisine": FOODS[i % len(FOODS)], "city": "San Jose"}
    call = {
        "service": "Food_1",
        "method": "FindFood",
        "args": args,
        "n": 1,
        "result": {**args, "name": f"{food} house"},
    }
    return {
        "id": f"1_{i:05d}",
        "services": ["Food_1"],
        "turns": [
            {"s": "u", "t": f"I want {food} food in San Jose, number {i}."},
            {"s": "a", "t": f"How about {food} house?", "calls": [call]},
            {"s": "u", "t": "Thanks, that is all."},
            {"s": "a", "t": "Have a nice day."},
        ],
    }


def write(folder: Path, tests: tuple[str, ...] = ("is it raining",)) -> Path:
    """Every source in miniature below `folder`; `tests` are the sentences of tests/en."""
    intents, talk, home = folder / "intents", folder / "dialogue", folder / "smart_home"
    alarm = {"scenario": "alarm", "intent": "set"}
    write_lines(
        intents / "hwu64_train.jsonl.xz",
        [
            {
                "text": f"Wake me at {n} in the {r}",
                "norm": f"wake me at {n} in the {r}",
                "slots": [["time", str(n)], ["house_place", r]],
                **alarm,
            }
            for n, r in enumerate(ROOMS * 3)
        ],
    )
    write_lines(
        intents / "snips_train.jsonl.xz",
        [
            {"text": f"play {f} by Karl {r}", "intent": "PlayMusic", "slots": [["track", f], ["artist", f"Karl {r}"]]}
            for f in FOODS
            for r in ROOMS[:3]
        ],
    )
    clinc = {"train": [[f"what is my balance in {r} {f}", "balance"] for r in ROOMS for f in FOODS[:3]]}
    clinc |= {"val": [["how much money is left", "balance"]], "oos_train": [["can dogs fly", "oos"]], "oos_val": []}
    write_text(intents / "clinc150_train_val.json.xz", json.dumps(clinc))
    domains = {"banking": ["balance"], "credit_cards": [], "work": [], "travel": []}
    write_text(intents / "clinc150_domains.json", json.dumps(domains))
    write_text(
        intents / "banking77_train.csv.xz", "text,category\n" + "".join(f"Where is card {n}?,card\n" for n in range(30))
    )
    write_lines(
        intents / "restaurant8k_train.jsonl.xz",
        [{"text": f"A table for {n}", "slots": [["people", str(n)]]} for n in range(30)],
    )
    write_lines(talk / "sgd_train.jsonl.xz", [dialogue(i) for i in range(40)])
    method = {"name": "FindFood", "required_slots": ["cuisine"], "optional_slots": {"city": "dontcare"}}
    write_text(talk / "sgd_train_schema.json", json.dumps([{"service_name": "Food_1", "intents": [method]}]))
    order = {
        "name": "add_order_item",
        "args": {"menu_item_id": "mocha-38", "order_id": "7"},
        "result": {"order_id": "7"},
    }
    coffee = [
        {
            "id": f"c{n}",
            "turns": [{"s": "u", "t": f"{n} mochas please", "calls": [order]}, {"s": "a", "t": "Anything else?"}],
        }
        for n in range(2, 30)
    ]
    write_lines(talk / "taskmaster4_coffee_train.jsonl.xz", coffee)
    chats = [
        {"p1": ["I sing."], "p2": [f"I like {f}."], "turns": ["User 1: Hi!", f"User 2: Hello {f}!"]} for f in FOODS
    ]
    write_lines(talk / "synthetic_persona_chat_valid.jsonl.xz", chats)
    maths = [{"question": f"What is {n} plus 1?", "answer": f"<<{n}+1={n + 1}>>{n + 1}"} for n in range(30)]
    write_lines(folder / "math" / "gsm8k_train.jsonl.xz", maths)
    tale = "\n\n".join(f"The {r} was {f} and cold." for r in ROOMS for f in FOODS)
    write_text(folder / "text" / "books" / "tale.txt.xz", tale)
    stories = "\n".join(f"Once a {r} ate {f}.\n\nThe end of {r}." for r in ROOMS for f in FOODS[:3])
    write_text(folder / "text" / "tinystories_train_slice.txt.xz", stories)
    files = {"sentences/en/_common.yaml": COMMON, "sentences/en/others.yaml": OTHERS}
    files |= {f"sentences/en/turn_{w}.yaml": TURN % {"way": w, "Way": w.title()} for w in ("on", "off")}
    files["tests/en/light.yaml"] = json.dumps({"language": "en", "tests": [{"sentences": tests, "intent": {}}]})
    write_tar(home / "home_assistant_intents_en.tar.xz", files)
    piles = {
        "piles/english/pile_of_device_names.csv": 'device_name,description\nlight.a,"Corner Glow"\nfan.b,Breezer\n',
        "piles/english/pile_of_media_names.txt": "The Switch\nHatching\nBlue Moon\nLong Road\n",
        "piles/english/pile_of_todo_items.txt": "Water the plants\nCall the bank\n",
    }
    write_tar(home / "home_llm_piles_en.tar.xz", piles)
    return folder
