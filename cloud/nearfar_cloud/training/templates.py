"""Home Assistant's sentence templates and the piles of names, read and parsed: what `homes` draws from."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hassil.expression import Expression, Group, ListReference, RuleReference
from hassil.parse_expression import parse_sentence

from nearfar import forms, home
from nearfar.corpora import tar_texts
from nearfar.errors import DataError
from nearfar.splits import normalise, split_residue
from nearfar_cloud.training import rows
from nearfar_cloud.training.held_out import test_texts
from nearfar_cloud.training.rows import Split

N_HELD_PARTS = 10  # one template in ten, by hash, is never trained on
# Ways to ask for something later that the templates lack.
LATER = (
    "{timer_command:conversation_command} in <timer_duration>",
    "in <timer_duration>[,] {timer_command:conversation_command}",
    "{timer_command:conversation_command} after <timer_duration>",
    "{timer_command:conversation_command} <timer_duration> from now",
    "(after|wait) <timer_duration>[,] [and] [then] {timer_command:conversation_command}",
    "in <timer_duration> (i want you to|could you|please) {timer_command:conversation_command}",
)

# Durations as people give them: mostly whole minutes.  Replaces the templates' rule, whose branches are uniform.
DURATIONS = {
    "minutes": "{timer_minutes:minutes} minute[s]",
    "hours": "{timer_hours:hours} hour[s]",
    "timer_duration": "(<minutes>|<minutes>|<minutes>|<minutes>|<minutes>|<minutes>|<hours>|<timer_duration_seconds>"
    "|<timer_duration_minutes>|<timer_duration_hours>)",
}
# The kind of thing that an intent is about where its template does not say so.
INTENT_DOMAIN = {
    "HassVacuumStart": "vacuum",
    "HassVacuumReturnToBase": "vacuum",
    "HassLightSet": "light",
    "HassGetWeather": "weather",
    "HassMediaPause": "media_player",
    "HassMediaUnpause": "media_player",
    "HassMediaNext": "media_player",
    "HassMediaPrevious": "media_player",
    "HassMediaSearchAndPlay": "media_player",
    "HassSetVolume": "media_player",
    "HassClimateSetTemperature": "climate",
    "HassClimateGetTemperature": "climate",
    "HassListAddItem": "todo",
    "HassListCompleteItem": "todo",
}


@dataclass(frozen=True)
class Template:
    """One sentence template with what its block says about it."""

    intent: str
    text: str
    tree: Expression
    rules: dict[str, Expression]
    slots: dict[str, Any]
    domains: tuple[str, ...]  # that a {name} may have; () for none said
    device_class: str
    lists: frozenset[str]  # the lists it can draw from


@dataclass(frozen=True)
class Corpus:
    """Everything that home rows are drawn from."""

    templates: dict[str, tuple[Template, ...]]  # intent -> templates of one split
    lists: dict[str, Any]
    rules: dict[str, Expression]
    devices: dict[str, tuple[str, ...]]  # domain -> names
    media: tuple[str, ...]
    todos: tuple[str, ...]
    foreign: tuple[str, ...]
    held: frozenset[bytes]


@cache
def parse(text: str) -> Expression:
    """The tree of a template's text."""
    try:
        return parse_sentence(text).expression
    except Exception as error:  # hassil raises several kinds
        raise DataError(f"sentence template {text!r}: {error}") from None


def _lists_of(node: Expression, rules: dict[str, Expression], depth: int = 0) -> Iterator[str]:
    if isinstance(node, ListReference):
        yield node.list_name
    elif isinstance(node, Group):
        for item in node.items:
            yield from _lists_of(item, rules, depth)
    elif isinstance(node, RuleReference) and depth < 12 and node.rule_name in rules:
        yield from _lists_of(rules[node.rule_name], rules, depth + 1)


def _words_of(value: Any) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, list) else (str(value),) if value else ()


def _load(text: str, name: str) -> dict[str, Any]:
    try:
        value = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise DataError(f"{name}: expected YAML, {' '.join(str(error).split())}") from None
    if not isinstance(value, dict):
        raise DataError(f"{name}: expected a YAML mapping, found {type(value).__name__}")
    return value


def _blocks(name: str, content: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(intent, block) of a sentences file, in its older and its newer form."""
    if "intents" in content:
        for intent, body in content["intents"].items():
            for block in body["data"]:
                yield intent, block
    elif "data" in content:
        for block in content["data"]:
            yield Path(name).parent.name, block


def _templates(name: str, content: dict[str, Any], rules: dict[str, Expression]) -> Iterator[Template]:
    for intent, block in _blocks(name, content):
        if intent not in home.INTENTS or not isinstance(block, dict) or not isinstance(block.get("sentences"), list):
            raise DataError(
                f"{name}: expected blocks of sentences for a known intent, found {intent} {str(block)[:60]}"
            )
        own = {k: parse(f"({v})") for k, v in block.get("expansion_rules", {}).items()}
        slots = dict(block.get("slots", {}))
        if block.get("inferred_domain"):
            slots.setdefault("domain", block["inferred_domain"])
        context = block.get("requires_context", {})
        domains = (
            _words_of(block.get("name_domains")) or _words_of(context.get("domain")) or _words_of(slots.get("domain"))
        )
        domains = domains or _words_of(INTENT_DOMAIN.get(intent))
        device_class = str(context.get("device_class") or slots.get("device_class") or "")
        for text in block["sentences"]:
            tree = parse(text)
            lists = frozenset(_lists_of(tree, {**rules, **own}))
            yield Template(intent, text, tree, own, slots, domains, device_class, lists)


@cache
def read_corpus(data: Path, split: Split) -> Corpus:
    """Templates, lists, names: everything that rows are drawn from."""
    archive = data / "smart_home" / "home_assistant_intents_en.tar.xz"
    files = {k: v for k, v in tar_texts(archive, "home requests", ".yaml").items() if "sentences/en/" in k}
    common_name = next((name for name in files if name.endswith("sentences/en/_common.yaml")), None)
    if common_name is None:
        raise DataError(f"{archive.name}: expected sentences/en/_common.yaml")
    common = _load(files.pop(common_name), common_name)
    rules = {name: parse(f"({body})") for name, body in common["expansion_rules"].items()}
    rules |= {name: parse(body) for name, body in DURATIONS.items()}
    rules["percent"] = parse("([ ]%| percent)")  # a rule of the newer files that this snapshot does not define
    templates: dict[str, list[Template]] = {}
    for name, text in files.items():
        for template in _templates(name, _load(text, name), rules):
            dev = split_residue(f"{template.intent} {template.text}", N_HELD_PARTS) == 0
            if dev == (split != "train"):
                templates.setdefault(template.intent, []).append(template)
    if split == "train":
        for text in LATER:
            tree = parse(text)
            lists = frozenset(_lists_of(tree, rules))
            templates["HassStartTimer"].append(Template("HassStartTimer", text, tree, {}, {}, (), "", lists))
    piles = tar_texts(data / "smart_home" / "home_llm_piles_en.tar.xz", "names of devices", "")
    return Corpus(
        templates={intent: tuple(found) for intent, found in templates.items()},
        lists=common["lists"],
        rules=rules,
        devices=_devices(_pile(piles, "pile_of_device_names.csv")),
        media=_lines(_pile(piles, "pile_of_media_names.txt")),
        todos=_lines(_pile(piles, "pile_of_todo_items.txt")),
        foreign=_foreign_requests(data, split),
        held=test_texts(data),
    )


def _pile(piles: dict[str, str], name: str) -> str:
    for member, text in piles.items():
        if member.endswith(name):
            return text
    raise DataError(f"home_llm_piles_en.tar.xz: expected {name}")


def _lines(text: str) -> tuple[str, ...]:
    return tuple(forms.neutral(line.strip()) for line in text.splitlines() if 0 < len(line.strip()) <= 50)


def _devices(text: str) -> dict[str, tuple[str, ...]]:
    """Domain -> names from the pile of devices."""
    kinds = {"blinds": "cover", "garage_door": "cover", "timer": ""}
    found: dict[str, list[str]] = {}
    for row in csv.DictReader(text.splitlines()):
        if not row.get("device_name") or not row.get("description"):
            raise DataError(f"pile_of_device_names.csv: expected device_name and description, found {str(row)[:60]}")
        kind = row["device_name"].split(".")[0]
        domain, name = kinds.get(kind, kind), normalise(row["description"])
        if domain in home.DOMAINS and 0 < len(name) <= 40:
            found.setdefault(domain, []).append(name)
    return {domain: tuple(names) for domain, names in found.items()}


def _foreign_requests(data: Path, split: Split) -> tuple[str, ...]:
    """Requests that no home can meet: CLINC150's banking, cards, work and travel."""
    domains = rows.clinc_domains(data)
    known = {intent for name in ("banking", "credit_cards", "work", "travel") for intent in domains[name]}
    return tuple(
        text for text, intent in rows.clinc150(data, "dev" if split != "train" else "train") if intent in known
    )
