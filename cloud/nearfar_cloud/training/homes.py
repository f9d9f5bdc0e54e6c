"""Home rows without end: Home Assistant's English templates, sampled at random, over invented homes.

`HomeGenerator(data, seed).row(i)` is a pure function of seed and i.  A template is parsed by hassil and its tree walked with
random choices (its own enumeration goes in order and repeats itself).  A tenth of the templates, by hash, is never used in
training ("dev"), and a request that equals a test sentence is drawn again.
"""

from __future__ import annotations

import csv
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hassil.expression import Alternative, Expression, Group, ListReference, Permutation, RuleReference, TextChunk
from hassil.parse_expression import parse_sentence
from nearfar import forms, home
from nearfar.errors import DataError
from nearfar.home import Entity, Home

from nearfar_cloud.training import rows
from nearfar_cloud.training.rows import Row, Split

# Held out of training word for word, so that the README shows a request the model has not seen.
HELD_SENTENCES = ("turn off the kitchen lights in ten minutes", "turn off the kitchen lights in 10 minutes")
N_ENTITIES = home.MAX_CANDIDATES
ABSENT_SHARE = 0.075  # requests for something that this home lacks
FOREIGN_SHARE = 0.025  # requests that no home can meet
INVENTED_SHARE = 0.3  # names of things and areas that nobody has
TYPO_SHARE = 0.02  # of the words outside slots
FILLER_SHARE = 0.3

# Relative frequency of intents; templates count for nothing here, since 194 of 615 ask for states.
WEIGHTS = {
    "HassTurnOn": 7,
    "HassTurnOff": 7,
    "HassLightSet": 5,
    "HassStartTimer": 9,
    "HassGetState": 5,
    "HassSetPosition": 2,
}
WEIGHTS |= {"HassClimateSetTemperature": 2, "HassListAddItem": 1.5, "HassMediaSearchAndPlay": 2, "HassSetVolume": 1.5}
WEIGHTS |= {"HassNevermind": 0.3, "HassRespond": 0.3, "HassGetCurrentDate": 0.4, "HassGetCurrentTime": 0.5}
DELAYED_SHARE = 0.65  # of the HassStartTimer rows carry a command for later
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
# Commands for later as people say them, beside those that the templates give; {} is a name, an area or a number.
COMMANDS = {
    "area": (
        "turn {onoff} the {area} {things}", "switch {onoff} the {area} {things}", "turn the {area} {things} {onoff}",
        "turn {onoff} all the {things} in the {area}", "turn {onoff} the {things} in the {area}", "turn {onoff} {area} {things}",
        "close the blinds in the {area}", "open the {area} blinds", "set the {area} lights to {n} percent", "dim the {area} lights",
        "play some music in the {area}", "set the {area} to {degrees} degrees", "make the {area} lights {color}",
    ),
    "name": (
        "turn {onoff} the {name}", "turn the {name} {onoff}", "switch {onoff} {name}", "turn {onoff} my {name}", "start the {name}",
        "close the {name}", "open the {name}", "lock the {name}", "unlock the {name}", "set the {name} to {n} percent", "stop the {name}",
    ),
    "": (
        "turn {onoff} all the lights", "turn {onoff} everything", "turn {onoff} the {things}", "lock all the doors",
        "start the vacuum", "pause the music", "close all the blinds", "remind me to call {name}", "tell me the weather",
    ),
}  # fmt: skip
THINGS = (
    "lights",
    "lights",
    "lights",
    "light",
    "fans",
    "fan",
    "lamps",
    "lamp",
    "heater",
    "switches",
    "tv",
    "speakers",
    "heating",
)

AREAS = tuple(
    "kitchen|living room|bedroom|bathroom|garage|hallway|office|dining room|basement|garden|guest room|kids room|laundry room|"
    "pantry|study|library|porch|patio|attic|balcony|entrance|entryway|den|playroom|master bedroom|nursery|front yard|"
    "back yard|driveway|shed|workshop|studio|utility room|conservatory|sunroom|mudroom|gym|media room|wine cellar|greenhouse|"
    "terrace|loft|landing|cloakroom|stairwell|family room|breakfast room|music room|sewing room|barn|pool house|sauna|"
    "guest bathroom|front porch|closet|foyer|home office|lounge|bar|chapel|kitchenette|corridor|storage room".split("|")
)
FLOORS = (
    "upstairs",
    "downstairs",
    "first floor",
    "second floor",
    "ground floor",
    "top floor",
    "basement",
    "third floor",
    "attic",
)
NOUNS = {
    "light": "light|lights|lamp|ceiling light|floor lamp|desk lamp|chandelier|spotlight|led strip|pendant|night light|"
    "bedside lamp|reading light|wall light|strip light|counter lights|main light|overhead light|mood light|side lamp",
    "switch": "outlet|plug|coffee maker|kettle|heater|fountain|string lights|pump|toaster|christmas tree|humidifier|charger",
    "fan": "fan|ceiling fan|extractor fan|tower fan|desk fan|ventilation|exhaust fan",
    "cover": "blinds|curtain|shade|shutter|awning|garage door|gate|window|left blind|roller blind|skylight|sliding door",
    "lock": "door|lock|front door|back door|side door|gate lock|patio door|cellar door",
    "media_player": "tv|speaker|soundbar|radio|stereo|projector|record player|sonos|echo|music box",
    "climate": "thermostat|air conditioner|heating|radiator|heat pump|climate control",
    "vacuum": "vacuum|robot|roomba|sweeper|robot vacuum|hoover",
    "valve": "water valve|sprinkler|irrigation valve|gas valve|drip line|garden tap",
    "scene": "movie night|party time|romantic|good night|morning|dinner|relax|bedtime|reading time|focus|sunset|cinema",
    "script": "stealth mode|goodbye|coffee routine|wake up|leave home|clean up|alarm test|start the day",
    "input_boolean": "guest mode|vacation mode|away mode|night mode|holiday mode",
    "sensor": "sensor|meter|probe|station|monitor|tracker|phone",
    "binary_sensor": "sensor|detector|door|window|phone|pump|monitor",
    "person": "anna|ben|carla|david|ella|frank|grace|henry|iris|jack|karin|leo|mona|nils|olga|paul|rosa|sam|tina|victor",
    "weather": "berlin|london|oslo|new york|paris|tokyo|lisbon|home|prague|denver|madrid|sydney|vienna|dublin",
    "todo": "groceries|chores|packing|work|to do|weekend|errands|gift ideas|garden jobs|reading",
}
CLASS_NOUNS = {"garage": "garage door", "blind": "blinds", "curtain": "curtains", "shade": "shades"}
COVER_OF = {noun: kind for kind in home.COVER_CLASSES for noun in (kind, kind + "s")} | {"garage door": "garage"}
HERE_DOMAINS = ("light", "switch", "fan", "media_player", "input_boolean", "climate")  # what a plain name may be
INTENT_DOMAIN = {
    "HassVacuumStart": "vacuum",
    "HassVacuumReturnToBase": "vacuum",
    "HassLightSet": "light",
    "HassGetWeather": "weather",
}
INTENT_DOMAIN |= {f"HassMedia{x}": "media_player" for x in ("Pause", "Unpause", "Next", "Previous", "SearchAndPlay")}
INTENT_DOMAIN |= {
    "HassSetVolume": "media_player",
    "HassClimateSetTemperature": "climate",
    "HassClimateGetTemperature": "climate",
}
INTENT_DOMAIN |= {"HassListAddItem": "todo", "HassListCompleteItem": "todo"}
PLACELESS = ("scene", "script", "person", "weather", "todo", "input_boolean")

BEFORE = ("please ", "hey, ", "can you ", "could you ", "would you ", "ok, ", "um, ", "i'd like you to ", "hey ", "now ", "can you please ", "so ", "i want you to ", "uh ", "go ahead and ")  # fmt: skip
AFTER = (" please", " for me", " now", " thanks", ", please", " right now", " will you", " thank you")
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()  # fmt: skip
TENS = "zero ten twenty thirty forty fifty sixty seventy eighty ninety".split()
FOODS = "milk eggs bread butter apples rice coffee tea oranges soap batteries flour cheese onions pasta bananas sugar yoghurt".split()
MESSAGES = (
    "dinner is ready", "the bus is here", "time for bed", "we leave in five minutes", "breakfast is on the table",
    "somebody is at the door", "please come down", "the movie starts now", "your homework is due", "lunch time",
)  # fmt: skip
ZONES = ("home", "work", "school", "the gym", "the office", "the park", "the beach")
TIMER_NAMES = "pizza|pasta|eggs|laundry|tea|bread|workout|nap|homework|cookies|rice|oven|break|meeting|bath|cake".split(
    "|"
)


def number_words(n: int, rng: random.Random) -> str:
    """0..100 in words: `twenty five` or `twenty-five`."""
    if n < 20:
        return ONES[n]
    if n == 100:
        return rng.choice(("one hundred", "a hundred"))
    ten, one = divmod(n, 10)
    return TENS[ten] + (rng.choice((" ", "-")) + ONES[one] if one else "")


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


@dataclass
class _Draw:
    """One walk through a tree: the target it is about, the pieces said and the slots filled."""

    rng: random.Random
    target: Entity
    floor: str
    home: list[Entity]
    pieces: list[tuple[str, bool]] = field(default_factory=list)  # (text, is a slot's)
    slots: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Corpus:
    templates: dict[str, tuple[Template, ...]]  # intent -> templates of one split
    lists: dict[str, Any]
    rules: dict[str, Expression]
    devices: dict[str, tuple[str, ...]]  # domain -> names
    media: tuple[str, ...]
    todos: tuple[str, ...]
    foreign: tuple[str, ...]
    held: frozenset[bytes]


class HomeGenerator:
    """`row(i)` for every i; the same seed and i give the same row.  Raises DataError when templates or piles are missing."""

    def __init__(self, data: Path, seed: int, split: Split = "train") -> None:
        self.corpus, self.seed, self.split = _corpus(data, split), seed, split
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
            text = forms.normalise(made[1])
            if rows.text_hash(made[1]) not in self.corpus.held and not any(held in text for held in HELD_SENTENCES):
                return made

    # ------------------------------------------------------------ requests

    def _foreign(self, rng: random.Random) -> tuple[Home, str, str, str, str]:
        entities = self._entities(rng, self._entity(rng, rng.choice(HERE_DOMAINS)), [])
        text = rng.choice(self.corpus.foreign)
        return (
            Home(tuple(entities)),
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
        draw = _Draw(rng, target, rng.choice(FLOORS), entities)
        self._walk(template.tree, draw, template)
        slots = {**{k: v for k, v in template.slots.items() if k in home.INTENTS[template.intent]}, **draw.slots}
        text = self._noise(rng, draw.pieces, plain="conversation_command" in slots or "message" in slots)
        in_home = "name" in slots and "name" in template.lists or "area" in slots
        if absent and in_home:
            others = [e for e in entities if e is not target and not _same(e, target, slots)]
            spare = [self._entity(rng, rng.choice(("light", "switch", "cover", "fan"))) for _ in range(12)]
            others += [e for e in spare if not _same(e, target, slots)]
            rng.shuffle(others)
            made = Home(tuple(others[: len(entities)]))
            return made, text, forms.home_answer(home.NO_INTENT), home.reply(home.NO_INTENT, {}), home.NO_INTENT
        ordered = {k: slots[k] for k in home.SLOT_ORDER if k in slots}
        result = self._result(rng, template.intent, ordered)
        said = home.reply(template.intent, ordered, target.domain, result)
        return Home(tuple(entities)), text, forms.home_answer(template.intent, ordered), said, result

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
            self._walk(_parse(str(choice["in"])), said, template)
            draw.pieces.append(("".join(text for text, _ in said.pieces), True))
            draw.slots[slot] = choice["out"]
        else:
            draw.pieces.append((str(choice), True))
            draw.slots[slot] = choice

    def _number(self, name: str, slot: str, span: dict[str, Any], draw: _Draw) -> None:
        rng, low, high = draw.rng, int(span["from"]), int(span["to"])
        value: float = rng.randint(low, high)
        if name.startswith("timer") and rng.random() < 0.6:  # what people say: round and small numbers
            value = rng.choice((1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 25, 30, 40, 45, 50, 60, 90))
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
            text = str(value) if rng.random() < 0.5 else number_words(int(value), rng)
        draw.pieces.append((text, True))
        draw.slots[slot] = value

    def _words(self, name: str, draw: _Draw) -> str | None:
        """A value for a list that takes any words."""
        rng = draw.rng
        if name == "timer_command":
            return self._command(draw)
        if name in ("shopping_list_item", "todo_list_item"):
            food = name == "shopping_list_item" or rng.random() < 0.3
            return rng.choice(FOODS) if food and rng.random() < 0.7 else self._rare(rng, self.corpus.todos)
        if name == "timer_name":
            return self._rare(rng, TIMER_NAMES)
        if name == "message":
            return self._rare(rng, MESSAGES)
        if name == "search_query":
            return self._rare(rng, self.corpus.media)
        if name == "zone":
            return rng.choice(ZONES).removeprefix("the ")
        return None

    def _rare(self, rng: random.Random, common: Sequence[str]) -> str:
        return rows.invented_name(rng) if rng.random() < 0.2 else rng.choice(common)

    def _command(self, draw: _Draw) -> str:
        """A command to give later: another row's request, without what makes requests long."""
        rng = draw.rng
        if rng.random() < 0.5:
            target = draw.target if rng.random() < 0.5 else self._entity(rng, rng.choice(HERE_DOMAINS))
            pattern = rng.choice(COMMANDS[rng.choice(("area", "area", "area", "name", "name", ""))])
            return pattern.format(
                onoff=rng.choice(("off", "off", "on")),
                area=target.area or rng.choice(AREAS),
                name=target.name,
                things=rng.choice(THINGS),
                n=rng.randint(0, 100) if rng.random() < 0.5 else number_words(rng.randint(0, 100), rng),
                degrees=rng.randint(15, 30),
                color=rng.choice(home.COLORS),
            )
        intent = rng.choices(("HassTurnOff", "HassTurnOn", "HassLightSet", "HassSetPosition", "HassVacuumStart", "HassMediaPause"), (8, 6, 2, 1, 1, 1))[0]  # fmt: skip
        template = rng.choice(self.corpus.templates[intent])
        target = draw.target
        if rng.random() < 0.5 or (template.domains and target.domain not in template.domains):
            domain = rng.choice(template.domains) if template.domains else rng.choice(HERE_DOMAINS)
            target = self._target(rng, template, domain)
        inner = _Draw(rng, target, draw.floor, draw.home)
        if "area" in template.lists and not target.area:
            return rng.choice(("turn off the ", "turn on the ")) + target.name
        self._walk(template.tree, inner, template)
        return _tidy("".join(text for text, _ in inner.pieces))

    def _noise(self, rng: random.Random, pieces: list[tuple[str, bool]], *, plain: bool) -> str:
        """The request as somebody might type it: fillers, a slip of the finger, a mark at the end."""
        text = "".join(part if said or rng.random() > 0.5 else _slip(rng, part) for part, said in pieces)
        text = _tidy(text)
        if rng.random() < 0.9:
            text = UNITS.sub(_agree, text)
        if rng.random() < FILLER_SHARE:
            text = rng.choice(BEFORE) + text
        if rng.random() < FILLER_SHARE / 2 and not plain:
            text += rng.choice(AFTER)
        if rng.random() < 0.2:
            text += rng.choice((".", ".", "!", "?"))
        return text

    def _result(self, rng: random.Random, intent: str, slots: dict[str, Any]) -> str:
        """What the home answers to a call: ok, or a value."""
        if intent == "HassGetState":
            if "state" in slots:
                return rng.choice(("yes", "no"))
            return rng.choice(
                ("on", "off", "open", "closed", f"{rng.randint(0, 99)}", f"{rng.randint(10, 30)}.{rng.randint(0, 9)}")
            )
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
            return f"{rng.choice(('monday', 'tuesday', 'wednesday', 'thursday', 'friday', 'saturday', 'sunday'))} the {rng.randint(1, 28)}th"
        if intent == "HassTimerStatus":
            return home.spoken_duration({"minutes": rng.randint(0, 40), "seconds": rng.randint(1, 59)})
        return "ok"

    # ------------------------------------------------------------ homes

    def _area(self, rng: random.Random) -> str:
        return (
            rows.invented_name(rng)
            if rng.random() < INVENTED_SHARE / 2
            else rng.choice(AREAS[:12] if rng.random() < 0.5 else AREAS)
        )

    def _entity(self, rng: random.Random, domain: str, device_class: str = "", *, need_area: bool = False) -> Entity:
        area = "" if domain in PLACELESS and not need_area else self._area(rng)
        noun = (
            CLASS_NOUNS.get(device_class, device_class)
            if domain == "cover" and device_class
            else rng.choice(NOUNS[domain].split("|"))
        )
        roll = rng.random()
        if domain in PLACELESS:
            name = rows.invented_name(rng) if roll < INVENTED_SHARE else noun
        elif roll < INVENTED_SHARE:
            name = f"{rows.invented_name(rng)} {noun}" if rng.random() < 0.6 else rows.invented_name(rng)
        elif roll < 0.6 and domain in self.corpus.devices and not device_class:
            name = rng.choice(self.corpus.devices[domain])
        elif roll < 0.75 and area:
            name = f"{area} {noun}"
        elif domain in ("sensor", "binary_sensor"):
            name = rng.choice(
                (
                    f"{area} {noun}",
                    f"{rng.choice(AREAS)} {device_class.replace('_', ' ')} {noun}".replace("  ", " "),
                    noun,
                )
            )
        else:
            name = noun
        if domain == "cover" and not device_class:
            device_class = next((kind for word, kind in COVER_OF.items() if name.endswith(word)), "")
        return Entity(" ".join(name.lower().split()), area.lower(), domain, device_class)

    def _entities(self, rng: random.Random, target: Entity, wanted: list[Entity]) -> list[Entity]:
        """Eight entities, the wanted ones at random places; a few areas shared by several."""
        domains = (
            "light",
            "light",
            "light",
            "switch",
            "fan",
            "cover",
            "lock",
            "media_player",
            "climate",
            "vacuum",
            "sensor",
            "scene",
            "todo",
        )
        n = N_ENTITIES if rng.random() < 0.8 else rng.randint(3, N_ENTITIES)
        found = list(wanted)
        names = {e.name for e in wanted}
        areas = [target.area] if target.area else []
        while len(found) < n:
            domain = target.domain if rng.random() < 0.15 else rng.choice(domains)
            entity = self._entity(rng, domain)
            if entity.area and areas and rng.random() < 0.4:
                entity = Entity(entity.name, rng.choice(areas), entity.domain, entity.device_class)
            clash = target.area and entity.name.removesuffix("s") == f"{target.area} {target.domain}"
            if entity.name not in names and not clash:
                found.append(entity)
                names.add(entity.name)
                areas.append(entity.area) if entity.area else None
        rng.shuffle(found)
        return found


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
    return re.sub(r" ([,.%°'])", r"\1", text)


UNITS = re.compile(r"\b([\w/]+) (second|minute|hour|degree)s?\b(?! floor)")


def _agree(match: re.Match[str]) -> str:
    """`one minutes` as `one minute`, `nine minute` as `nine minutes`."""
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


# ---------------------------------------------------------------- templates and piles


@cache
def _parse(text: str) -> Expression:
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
        own = {k: _parse(f"({v})") for k, v in block.get("expansion_rules", {}).items()}
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
            tree = _parse(text)
            lists = frozenset(_lists_of(tree, {**rules, **own}))
            yield Template(intent, text, tree, own, slots, domains, device_class, lists)


@cache
def _corpus(data: Path, split: Split) -> _Corpus:
    """Templates, lists, names: everything that rows are drawn from."""
    archive = data / "smart_home" / "home_assistant_intents_en.tar.xz"
    files = {k: v for k, v in rows.tar_members(archive, "home requests", ".yaml").items() if "sentences/en/" in k}
    common_name = next((name for name in files if name.endswith("sentences/en/_common.yaml")), None)
    if common_name is None:
        raise DataError(f"{archive.name}: expected sentences/en/_common.yaml")
    common = _load(files.pop(common_name), common_name)
    rules = {name: _parse(f"({body})") for name, body in common["expansion_rules"].items()}
    rules |= {name: _parse(body) for name, body in DURATIONS.items()}
    rules["percent"] = _parse("([ ]%| percent)")  # a rule of the newer files that this snapshot does not define
    templates: dict[str, list[Template]] = {}
    for name, text in files.items():
        for template in _templates(name, _load(text, name), rules):
            dev = forms.residue(f"{template.intent} {template.text}", 10) == 0
            if dev == (split != "train"):
                templates.setdefault(template.intent, []).append(template)
    if split == "train":
        for text in LATER:
            tree = _parse(text)
            lists = frozenset(_lists_of(tree, rules))
            templates["HassStartTimer"].append(Template("HassStartTimer", text, tree, {}, {}, (), "", lists))
    piles = rows.tar_members(data / "smart_home" / "home_llm_piles_en.tar.xz", "names of devices", "")
    return _Corpus(
        templates={intent: tuple(found) for intent, found in templates.items()},
        lists=common["lists"],
        rules=rules,
        devices=_devices(_pile(piles, "pile_of_device_names.csv")),
        media=_lines(_pile(piles, "pile_of_media_names.txt")),
        todos=_lines(_pile(piles, "pile_of_todo_items.txt")),
        foreign=_foreign_requests(data, split),
        held=rows.test_texts(data),
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
        domain, name = kinds.get(kind, kind), forms.normalise(row["description"])
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
