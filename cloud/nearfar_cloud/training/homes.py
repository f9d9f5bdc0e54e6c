"""Home rows without end: Home Assistant's English templates, sampled at random, over invented homes.

`HomeGenerator(data, seed).row(i)` is a pure function of seed and i.  A template is parsed by hassil and its tree walked
with random choices (its own enumeration goes in order and repeats itself).  A tenth of the templates, by hash, is never
used in training ("dev"), and a request that equals a test sentence is drawn again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hassil.expression import Alternative, Expression, Group, ListReference, Permutation, RuleReference, TextChunk

from nearfar import forms, home
from nearfar.errors import DataError
from nearfar.home import Entity, Home
from nearfar.splits import normalise
from nearfar_cloud.training import lexicon
from nearfar_cloud.training.held_out import text_hash
from nearfar_cloud.training.rows import Row, Split
from nearfar_cloud.training.templates import Template, parse, read_corpus

# Held out of training word for word, so that the README shows a request the model has not seen.
HELD_SENTENCES = ("turn off the kitchen lights in ten minutes", "turn off the kitchen lights in 10 minutes")
N_ENTITIES = home.MAX_CANDIDATES
ABSENT_SHARE = 0.075  # requests for something that this home lacks
FOREIGN_SHARE = 0.025  # requests that no home can meet
INVENTED_SHARE = 0.3  # names of things and areas that nobody has
TYPO_SHARE = 0.02  # of the words outside slots
FILLER_SHARE = 0.3

# Relative frequency of intents, 1 where none is said; not their number of templates, since 194 of 615 ask for states.
WEIGHTS: dict[str, float] = {
    "HassTurnOn": 5,
    "HassTurnOff": 5,
    "HassLightSet": 4,
    "HassStartTimer": 7,
    "HassGetState": 8,
    "HassSetPosition": 2,
}
WEIGHTS |= {"HassClimateSetTemperature": 2, "HassListAddItem": 1.5, "HassMediaSearchAndPlay": 2, "HassSetVolume": 1.5}
WEIGHTS |= {"HassNevermind": 0.5, "HassRespond": 0.5, "HassGetCurrentDate": 0.5, "HassGetCurrentTime": 0.6}
UNKNOWN_SHARE = 0.03  # of the questions: the home does not know
STATES = {
    "lock": ("locked", "unlocked", "locked", "unlocked", "jammed"),
    "cover": ("open", "closed"),
    "valve": ("open", "closed"),
    "vacuum": ("docked", "cleaning", "paused", "returning"),
    "media_player": ("playing", "paused", "off", "idle"),
    "climate": ("on", "off", "heating", "cooling"),
    "binary_sensor": ("on", "off", "open", "closed", "wet", "dry"),
    "person": ("home", "away", *lexicon.ZONES),
}
DELAYED_SHARE = 0.65  # of the HassStartTimer rows carry a command for later
HERE_DOMAINS = ("light", "switch", "fan", "media_player", "input_boolean", "climate")  # what a plain name may be
# A home has more than its prompt lists, and of all domains: what is listed shares words with the request.
N_HOME = (12, 24)  # things of a home that is cut to its prompt
SMALL_SHARE = 0.3  # homes that fit whole
OTHER_DOMAINS = (*home.DOMAINS, "light", "light", "switch", "sensor", "sensor", "binary_sensor")
NEAR_SHARE = 0.25  # of the other things: named after the one that is meant, or after its area
PLACELESS = ("scene", "script", "person", "weather", "todo", "input_boolean")
COVER_OF = {noun: kind for kind in home.COVER_CLASSES for noun in (kind, kind + "s")} | {"garage door": "garage"}
LATER_INTENTS = {"HassTurnOff": 8, "HassTurnOn": 6, "HassLightSet": 2, "HassSetPosition": 1, "HassVacuumStart": 1}
ROUND_NUMBERS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 30, 40, 45, 50, 60, 90)
UNITS = re.compile(r"\b([\w/]+) (second|minute|hour|degree)s?\b(?! floor)")

COUNTING = frozenset((*lexicon.ONES, *lexicon.TENS, "hundred", "half", "a", "an", "the"))


@dataclass
class _Draw:
    """One walk through a tree: the target it is about, the pieces said and the slots filled."""

    rng: random.Random
    target: Entity
    floor: str
    home: list[Entity]
    pieces: list[tuple[str, bool]] = field(default_factory=list)  # (text, is a slot's)
    slots: dict[str, Any] = field(default_factory=dict)


class HomeGenerator:
    """`row(i)` for every i, the same for the same seed and i.  DataError when templates or piles are missing."""

    def __init__(self, data: Path, seed: int, split: Split = "train") -> None:
        self.corpus, self.seed, self.split = read_corpus(data, split), seed, split
        self.intents = tuple(self.corpus.templates)
        self.weights = tuple(WEIGHTS.get(intent, 1.0) for intent in self.intents)

    def row(self, i: int) -> Row:
        """The i-th row."""
        made, text, answer, said, result = self.example(i)
        prompt = forms.home_prompt(made.setting(), text)
        return Row("home", forms.home_reply_prompt(prompt, answer, result) + forms.reply(said))

    def example(self, i: int) -> tuple[Home, str, str, str, str]:
        """(home, request, call JSON, reply, result) of row i."""
        rng = random.Random(f"{self.seed} {self.split} {i}")
        while True:
            made = self._foreign(rng) if rng.random() < FOREIGN_SHARE else self._sampled(rng)
            text = normalise(made[1])
            if text_hash(made[1]) not in self.corpus.held and not any(held in text for held in HELD_SENTENCES):
                return made

    # ------------------------------------------------------------ requests

    def _foreign(self, rng: random.Random) -> tuple[Home, str, str, str, str]:
        entities = self._entities(rng, self._entity(rng, rng.choice(HERE_DOMAINS)), [])
        text = rng.choice(self.corpus.foreign)
        return (
            Home(tuple(entities)).near(text),
            text,
            forms.home_answer(home.NO_INTENT),
            home.reply(home.NO_INTENT, {}),
            home.NO_INTENT,
        )

    def _sampled(self, rng: random.Random) -> tuple[Home, str, str, str, str]:
        template = self._template(rng)
        domain = rng.choice(template.domains) if template.domains else rng.choice(HERE_DOMAINS)
        absent = rng.random() < ABSENT_SHARE
        target = self._target(rng, template, domain)
        entities = self._entities(rng, target, [target])
        draw = _Draw(rng, target, rng.choice(lexicon.FLOORS), entities)
        self._walk(template.tree, draw, template)
        if "floor" in draw.slots:
            on_floor = replace(target, floor=draw.floor)
            entities[entities.index(target)] = target = on_floor
        slots = {**{k: v for k, v in template.slots.items() if k in home.INTENTS[template.intent]}, **draw.slots}
        text = self._noise(rng, draw.pieces, plain="conversation_command" in slots or "message" in slots)
        in_home = ("name" in slots and "name" in template.lists) or "area" in slots
        if "name" not in slots:  # a thing whose whole name is said would be meant by it
            if in_home and _says(text, target):
                return self._sampled(rng)
            entities = [e for e in entities if e is target or not _says(text, e)]
        if absent and in_home:
            others = [e for e in entities if e is not target and not _same(e, target, slots)]
            spare = [self._entity(rng, rng.choice(("light", "switch", "cover", "fan"))) for _ in range(12)]
            others += [e for e in spare if not _same(e, target, slots)]
            rng.shuffle(others)
            made = Home(tuple(others[: max(len(entities), N_ENTITIES // 2)])).near(text)
            return made, text, forms.home_answer(home.NO_INTENT), home.reply(home.NO_INTENT, {}), home.NO_INTENT
        ordered = {k: slots[k] for k in home.SLOT_ORDER if k in slots}
        result = self._result(rng, template.intent, ordered, target.domain)
        said = home.reply(template.intent, ordered, target.domain, result)
        made = _listed(entities, target, text)
        return made, text, forms.home_answer(template.intent, ordered), said, result

    def _target(self, rng: random.Random, template: Template, domain: str) -> Entity:
        """The entity that a request made from `template` is about."""
        device_class = rng.choice(home.COVER_CLASSES) if "cover_classes" in template.lists else template.device_class
        return self._entity(rng, domain, device_class, need_area="area" in template.lists)

    def _template(self, rng: random.Random) -> Template:
        intent = rng.choices(self.intents, self.weights)[0]
        templates = self.corpus.templates[intent]
        if intent == "HassStartTimer":
            delayed = rng.random() < DELAYED_SHARE
            templates = tuple(t for t in templates if ("timer_command" in t.lists) == delayed) or templates
        return rng.choice(templates)

    def _walk(self, node: Expression, draw: _Draw, template: Template) -> None:
        """Add what `node` says to `draw`: alternatives uniform by branch, options at one half."""
        rng = draw.rng
        if isinstance(node, TextChunk):
            draw.pieces.append((node.original_text, False))
        elif isinstance(node, Alternative):
            if node.items:
                options = [x for x in node.items if not (isinstance(x, TextChunk) and x.is_empty)]
                if node.is_optional and rng.random() < 0.5:
                    return
                self._walk(rng.choice(options or node.items), draw, template)
        elif isinstance(node, Permutation):
            for item in rng.sample(node.items, len(node.items)):
                draw.pieces.append((" ", False))
                self._walk(item, draw, template)
        elif isinstance(node, Group):
            for item in node.items:
                self._walk(item, draw, template)
        elif isinstance(node, RuleReference):
            body = template.rules.get(node.rule_name) or self.corpus.rules.get(node.rule_name)
            if body is None:
                raise DataError(f"template {template.text!r}: expected a rule <{node.rule_name}>")
            self._walk(body, draw, template)
        elif isinstance(node, ListReference):
            self._list(node.list_name, node.slot_name, draw, template)

    def _list(self, name: str, slot: str, draw: _Draw, template: Template) -> None:
        """Say one value of a list and put it into its slot."""
        rng, target = draw.rng, draw.target
        if name in ("name", "area", "floor"):
            value = {"name": target.name, "area": target.area, "floor": draw.floor}[name]
            draw.pieces.append((value, True))
            draw.slots[slot] = value
            return
        text = self._words(name, draw)
        if text is not None:
            draw.pieces.append((text, True))
            draw.slots[slot] = " ".join(text.lower().split())
            return
        spec = self.corpus.lists.get(name)
        if not isinstance(spec, dict) or not ({"range", "values"} & set(spec)):
            raise DataError(f"template {template.text!r}: expected a list {{{name}}} with range or values")
        if "range" in spec:
            self._number(name, slot, spec["range"], draw)
            return
        choices = spec["values"]
        if name == "cover_classes":
            choices = [c for c in choices if c["out"] == target.device_class] or choices
        choice = rng.choice(choices)
        if isinstance(choice, dict):
            said = _Draw(rng, target, draw.floor, draw.home)
            self._walk(parse(str(choice["in"])), said, template)
            draw.pieces.append(("".join(text for text, _ in said.pieces), True))
            draw.slots[slot] = choice["out"]
        else:
            draw.pieces.append((str(choice), True))
            draw.slots[slot] = choice

    def _number(self, name: str, slot: str, span: dict[str, Any], draw: _Draw) -> None:
        rng, low, high = draw.rng, int(span["from"]), int(span["to"])
        value: float = rng.randint(low, high)
        if name.startswith("timer") and rng.random() < 0.6:  # what people say: round and small numbers
            value = rng.choice(ROUND_NUMBERS)
        elif name == "temperature":
            value = rng.choice((rng.randint(15, 30), rng.randint(55, 85), value))
            if span.get("fractions") == "halves" and value < high and rng.random() < 0.1:
                value += 0.5
        elif rng.random() < 0.4:
            value = min(high, max(low, 10 * round(value / 10)))
        if isinstance(value, float):
            text = str(value)
        elif value == 1 and name in ("timer_minutes", "timer_hours") and rng.random() < 0.4:
            text = "a" if name == "timer_minutes" else "an"
        else:
            text = str(value) if rng.random() < 0.5 else lexicon.number_words(int(value), rng)
        draw.pieces.append((text, True))
        draw.slots[slot] = value

    def _words(self, name: str, draw: _Draw) -> str | None:
        """A value for a list that takes any words."""
        rng = draw.rng
        if name == "timer_command":
            return self._command(draw)
        if name in ("shopping_list_item", "todo_list_item"):
            food = name == "shopping_list_item" or rng.random() < 0.3
            return rng.choice(lexicon.FOODS) if food and rng.random() < 0.7 else self._rare(rng, self.corpus.todos)
        if name == "timer_name":
            return self._rare(rng, lexicon.TIMER_NAMES)
        if name == "message":
            return self._rare(rng, lexicon.MESSAGES)
        if name == "search_query":
            return self._rare(rng, self.corpus.media)
        if name == "zone":
            return rng.choice(lexicon.ZONES)
        return None

    def _rare(self, rng: random.Random, common: Sequence[str]) -> str:
        return lexicon.invented_name(rng) if rng.random() < 0.2 else rng.choice(common)

    def _command(self, draw: _Draw) -> str:
        """A command to give later: another row's request, without what makes requests long."""
        rng = draw.rng
        if rng.random() < 0.5:
            target = draw.target if rng.random() < 0.5 else self._entity(rng, rng.choice(HERE_DOMAINS))
            pattern = rng.choice(lexicon.COMMANDS[rng.choice(("area", "area", "area", "name", "name", ""))])
            said = pattern.format(
                onoff=rng.choice(("off", "off", "on")),
                area=target.area or rng.choice(lexicon.AREAS),
                name=target.name,
                things=rng.choice(lexicon.THINGS),
                n=rng.randint(0, 100) if rng.random() < 0.5 else lexicon.number_words(rng.randint(0, 100), rng),
                degrees=rng.randint(15, 30),
                color=rng.choice(home.COLORS),
            )
            return _tidy(said)
        known = {intent: n for intent, n in LATER_INTENTS.items() if intent in self.corpus.templates}
        intent = rng.choices(tuple(known), tuple(known.values()))[0]
        template = rng.choice(self.corpus.templates[intent])
        target = draw.target
        if rng.random() < 0.5 or (template.domains and target.domain not in template.domains):
            domain = rng.choice(template.domains) if template.domains else rng.choice(HERE_DOMAINS)
            target = self._target(rng, template, domain)
        inner = _Draw(rng, target, draw.floor, draw.home)
        if "area" in template.lists and not target.area:
            return rng.choice(("turn off the ", "turn on the ")) + target.name
        self._walk(template.tree, inner, template)
        return _tidy("".join(text for text, _ in inner.pieces).lower())

    def _noise(self, rng: random.Random, pieces: list[tuple[str, bool]], *, plain: bool) -> str:
        """The request as somebody might type it: fillers, a slip of the finger, a mark at the end."""
        text = "".join(part if said or rng.random() > 0.5 else _slip(rng, part) for part, said in pieces)
        text = _tidy(text)
        if rng.random() < 0.9:
            text = UNITS.sub(_agree, text)
        if rng.random() < FILLER_SHARE:
            text = rng.choice(lexicon.BEFORE) + text
        if rng.random() < FILLER_SHARE / 2 and not plain:
            text += rng.choice(lexicon.AFTER)
        if rng.random() < 0.2:
            text += rng.choice((".", ".", "!", "?"))
        return text

    def _result(self, rng: random.Random, intent: str, slots: dict[str, Any], domain: str) -> str:
        """What the home answers to a call: ok, or a value."""
        if intent in home.ASKING and rng.random() < UNKNOWN_SHARE:
            return home.UNKNOWN
        if intent == "HassGetState":
            if "state" in slots:
                return rng.choice(("yes", "no"))
            states = STATES.get(str(slots.get("domain", domain)), ("on", "off"))
            number = rng.choice((f"{rng.randint(0, 99)}", f"{rng.randint(10, 30)}.{rng.randint(0, 9)}"))
            return number if domain == "sensor" or rng.random() < 0.1 else rng.choice(states)
        if intent == "HassClimateGetTemperature":
            return str(rng.randint(15, 30))
        if intent == "HassGetWeather":
            return (
                rng.choice(("sunny", "cloudy", "rainy", "windy", "foggy", "snowy"))
                + f" at {rng.randint(-5, 35)} degrees"
            )
        if intent == "HassGetCurrentTime":
            return f"{rng.randint(0, 23)}:{rng.randint(0, 59):02d}"
        if intent == "HassGetCurrentDate":
            return f"{rng.choice(lexicon.DAYS)}, {rng.randint(1, 28)} {rng.choice(lexicon.MONTHS)}"
        if intent == "HassTimerStatus":
            return home.spoken_duration({"minutes": rng.randint(0, 40), "seconds": rng.randint(1, 59)})
        return "ok"

    # ------------------------------------------------------------ homes

    def _area(self, rng: random.Random) -> str:
        return (
            lexicon.invented_name(rng)
            if rng.random() < INVENTED_SHARE / 2
            else rng.choice(lexicon.AREAS[: lexicon.N_COMMON_AREAS] if rng.random() < 0.5 else lexicon.AREAS)
        )

    def _entity(self, rng: random.Random, domain: str, device_class: str = "", *, need_area: bool = False) -> Entity:
        area = "" if domain in PLACELESS and not need_area else self._area(rng)
        noun = (
            lexicon.CLASS_NOUNS.get(device_class, device_class)
            if domain == "cover" and device_class
            else rng.choice(lexicon.NOUNS[domain])
        )
        roll = rng.random()
        if domain in PLACELESS:
            name = lexicon.invented_name(rng) if roll < INVENTED_SHARE else noun
        elif roll < INVENTED_SHARE:
            name = f"{lexicon.invented_name(rng)} {noun}" if rng.random() < 0.6 else lexicon.invented_name(rng)
        elif roll < 0.6 and domain in self.corpus.devices and not device_class:
            name = rng.choice(self.corpus.devices[domain])
        elif roll < 0.75 and area:
            name = f"{area} {noun}"
        elif domain in ("sensor", "binary_sensor"):
            name = rng.choice(
                (
                    f"{area} {noun}",
                    f"{rng.choice(lexicon.AREAS)} {device_class.replace('_', ' ')} {noun}".replace("  ", " "),
                    noun,
                )
            )
        else:
            name = noun
        if domain == "cover" and not device_class:
            device_class = next((kind for word, kind in COVER_OF.items() if name.endswith(word)), "")
        return Entity(_tidy(name.lower()), area.lower(), domain, device_class)

    def _entities(self, rng: random.Random, target: Entity, wanted: list[Entity]) -> list[Entity]:
        """The things of a home, the wanted ones at random places; a few areas shared by several."""
        n = rng.randint(3, N_ENTITIES) if rng.random() < SMALL_SHARE else rng.randint(*N_HOME)
        found = list(wanted)
        names = {e.name.removesuffix("s") for e in wanted}
        areas = [target.area] if target.area else []
        while len(found) < n:
            domain = target.domain if rng.random() < 0.15 else rng.choice(OTHER_DOMAINS)
            entity = self._beside(rng, target, domain) if rng.random() < NEAR_SHARE else self._entity(rng, domain)
            if entity.area and areas and rng.random() < 0.4:
                entity = replace(entity, area=rng.choice(areas))
            plain = entity.name.removesuffix("s")
            clash = target.area and plain == f"{target.area} {target.domain}"
            if plain not in names and not clash:
                found.append(entity)
                names.add(plain)
                areas.append(entity.area) if entity.area else None
        rng.shuffle(found)
        return found

    def _beside(self, rng: random.Random, target: Entity, domain: str) -> Entity:
        """A thing that shares words with `target`: named after it or its area, in that area."""
        if domain in PLACELESS:
            return self._entity(rng, domain)
        stem = target.area if target.area and rng.random() < 0.6 else target.name
        return Entity(_tidy(f"{stem} {rng.choice(lexicon.NOUNS[domain])}"), target.area, domain)


def _listed(entities: list[Entity], target: Entity, text: str) -> Home:
    """The home as the prompt of a request lists it, cut as `Home.near` cuts it; `target` stays in any case."""
    near = Home(tuple(entities)).near(text)
    if target in near.entities:
        return near
    others = Home(tuple(e for e in entities if e is not target)).near(text, N_ENTITIES - 1)
    return Home(tuple(e for e in entities if e is target or e in others.entities))


def _says(text: str, entity: Entity) -> bool:
    """Whether a request holds the whole name of a thing; a plural's s does not matter."""
    words, name = (f" {' '.join(w.removesuffix('s') for w in normalise(t).split())} " for t in (text, entity.name))
    return name in words


def _same(entity: Entity, target: Entity, slots: dict[str, Any]) -> bool:
    """Whether `entity` would still answer a request about `target`."""
    if "name" in slots and (entity.name in target.name or target.name in entity.name):
        return True
    return bool(target.area) and entity.area == target.area


def _tidy(text: str) -> str:
    """Single spaces, and no word twice where a name brings its own noun (`ceiling light light`)."""
    text = " ".join(text.split())
    text = re.sub(r"\b(lights?|lamps?|lighting) (lights?|lamps?|lighting)\b", r"\1", text)
    text = re.sub(r"\b(floor|door|list|scene|script|fans?|valve) \1s?\b", r"\1", text)
    return re.sub(r" (?=[,.%°]|'s\b)", "", text)


def _agree(match: re.Match[str]) -> str:
    """`one minutes` as `one minute`, `nine minute` as `nine minutes`; what no number precedes stays as it is."""
    if not (match[1] in COUNTING or match[1][0].isdigit()):
        return match[0]
    single = match[1] in ("1", "one", "a", "an", "the")
    return f"{match[1]} {match[2]}" if single else f"{match[1]} {match[2]}s"


def _slip(rng: random.Random, text: str) -> str:
    """`text` with about two words in a hundred mistyped (half of the pieces are asked, hence the factor)."""
    words = text.split(" ")
    for i, word in enumerate(words):
        if len(word) > 3 and rng.random() < 2 * TYPO_SHARE:
            at = rng.randrange(1, len(word) - 1)
            swapped = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
            words[i] = rng.choice((swapped, word[:at] + word[at + 1 :], word[:at] + word[at] + word[at:]))
    return " ".join(words)
