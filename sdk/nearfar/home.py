"""A home, the calls that nano may make in it, and the check between the two.

Walk: request -> forms.home_prompt(home.setting(), request) -> the model's JSON -> `check` -> `HomeState.execute` ->
`reply`.  Nothing that the model writes is done before `check` has found its intent, slots, names and numbers to be
possible here.  The intents are those of Home Assistant; the table is ours, complete for the calls that training shows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from nearfar.errors import NearfarError, UsageError
from nearfar.forms import home_text, tight
from nearfar.splits import normalise

MAX_CANDIDATES = 8  # entities that a prompt lists; more do not fit the context
UNKNOWN = "unknown"  # what a home answers to a question that it cannot answer
NO_INTENT = "none"  # what the model answers when the home has nothing of the kind

COLORS = ("white", "black", "red", "orange", "yellow", "green", "blue", "purple", "brown", "pink", "turquoise")
_DEVICES = ("light", "switch", "fan", "cover", "lock", "media_player", "climate", "vacuum", "valve", "scene", "script")
DOMAINS = (*_DEVICES, "sensor", "binary_sensor", "person", "weather", "todo", "input_boolean")
COVER_CLASSES = ("awning", "blind", "curtain", "door", "garage", "gate", "shade", "shutter", "window")

# What a slot may hold: a name or area of the home, words of the request, one of a list, or a number from..to.
Kind = str | tuple[str, ...] | tuple[float, float]
_TIME: dict[str, Kind] = {"hours": (0, 100), "minutes": (0, 100), "seconds": (0, 100)}
_START: dict[str, Kind] = {f"start_{unit}": span for unit, span in _TIME.items()}
_PLACE: dict[str, Kind] = {"name": "name", "area": "area"}
_FLOOR: dict[str, Kind] = {**_PLACE, "floor": "text"}
_THINGS: dict[str, Kind] = {**_FLOOR, "domain": DOMAINS, "device_class": "word"}
_TIMER: dict[str, Kind] = {**_START, "name": "text", "area": "area"}

# intent -> slot -> what it may hold
INTENTS: dict[str, dict[str, Kind]] = {
    "HassTurnOn": _THINGS,
    "HassTurnOff": _THINGS,
    "HassGetState": {**_THINGS, "state": "word"},
    "HassLightSet": {**_FLOOR, "brightness": (0, 100), "color": COLORS},
    "HassSetPosition": {**_THINGS, "position": (0, 100)},
    "HassClimateSetTemperature": {**_FLOOR, "temperature": (0, 100)},
    "HassClimateGetTemperature": _FLOOR,
    "HassGetWeather": {"name": "name"},
    "HassGetCurrentDate": {},
    "HassGetCurrentTime": {},
    "HassVacuumStart": _FLOOR,
    "HassVacuumReturnToBase": _PLACE,
    "HassMediaPause": _PLACE,
    "HassMediaUnpause": _PLACE,
    "HassMediaNext": _PLACE,
    "HassMediaPrevious": _PLACE,
    "HassMediaSearchAndPlay": {**_PLACE, "search_query": "text", "media_class": "word"},
    "HassSetVolume": {**_PLACE, "volume_level": (0, 100)},
    "HassShoppingListAddItem": {"item": "text"},
    "HassShoppingListCompleteItem": {"item": "text"},
    "HassListAddItem": {"item": "text", "name": "name"},
    "HassListCompleteItem": {"item": "text", "name": "name"},
    "HassBroadcast": {"message": "text"},
    "HassNevermind": {},
    "HassRespond": {},
    "HassStartTimer": {**_TIME, "name": "text", "conversation_command": "text"},
    "HassIncreaseTimer": {**_TIME, **_TIMER},
    "HassDecreaseTimer": {**_TIME, **_TIMER},
    "HassCancelTimer": _TIMER,
    "HassCancelAllTimers": {"area": "area"},
    "HassPauseTimer": _TIMER,
    "HassUnpauseTimer": _TIMER,
    "HassTimerStatus": _TIMER,
}
REQUIRED: dict[str, tuple[str, ...]] = {  # without these a call says nothing
    "HassSetPosition": ("position",),
    "HassClimateSetTemperature": ("temperature",),
    "HassMediaSearchAndPlay": ("search_query",),
    "HassSetVolume": ("volume_level",),
    "HassShoppingListAddItem": ("item",),
    "HassShoppingListCompleteItem": ("item",),
    "HassListAddItem": ("item",),
    "HassListCompleteItem": ("item",),
    "HassBroadcast": ("message",),
}
SLOT_ORDER = tuple(dict.fromkeys(slot for slots in INTENTS.values() for slot in slots))  # the order in a call's JSON
DELAYED = ("HassStartTimer", "conversation_command")  # the slot whose words are asked again when the time has come


class BadCall(NearfarError):
    """A call that is not done: what the model wrote does not fit the home, the request or the table of intents."""


@dataclass(frozen=True, slots=True)
class Entity:
    """A thing of the home: what people call it, where it is ("" for nowhere), what it is."""

    name: str
    area: str
    domain: str
    device_class: str = ""
    floor: str = ""

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UsageError("an entity needs a name")
        if self.domain not in DOMAINS:
            raise UsageError(f"{self.name}: domain {self.domain!r}, expected one of {', '.join(DOMAINS)}")


@dataclass(frozen=True, slots=True)
class Home:
    """The entities that a request may be about."""

    entities: tuple[Entity, ...]

    @property
    def areas(self) -> tuple[str, ...]:
        """Each area once, in order."""
        return tuple(dict.fromkeys(e.area for e in self.entities if e.area))

    def setting(self) -> str:
        """The home as a prompt lists it: `kitchen: light ceiling light, cover blinds; bedroom: fan fan`."""
        groups: dict[str, list[str]] = {}
        for entity in self.entities:
            groups.setdefault(entity.area, []).append(f"{entity.domain} {entity.name}")
        return "; ".join((f"{area}: " if area else "") + ", ".join(things) for area, things in groups.items())

    def near(self, request: str, n: int = MAX_CANDIDATES) -> Home:
        """The `n` entities whose names, areas and kinds share most with the request's words, in the home's order."""
        words = _stems(request)
        scores = [
            (2 * len(words & _stems(e.name)) + len(words & _stems(f"{e.area} {e.domain} {e.device_class}")), -i)
            for i, e in enumerate(self.entities)
        ]
        best = sorted(range(len(self.entities)), key=lambda i: scores[i], reverse=True)[:n]
        return Home(tuple(self.entities[i] for i in sorted(best)))

    def called(self, name: str) -> tuple[Entity, ...]:
        """The entities of this name; case and a plural's s do not matter."""
        wanted = _plain(name)
        return tuple(e for e in self.entities if _plain(e.name) == wanted)


@dataclass(frozen=True, slots=True)
class Action:
    """A checked call: every value is one that this home and this request allow."""

    intent: str
    slots: Mapping[str, Any]
    targets: tuple[Entity, ...] = ()

    @property
    def delay_s(self) -> int | None:
        """Seconds to wait before the command, for a command that is to be given later; None for other calls."""
        if self.intent != DELAYED[0] or DELAYED[1] not in self.slots:
            return None
        return duration_s(self.slots)


def duration_s(slots: Mapping[str, Any]) -> int:
    """Seconds in the slots hours, minutes and seconds."""
    return int(3600 * slots.get("hours", 0) + 60 * slots.get("minutes", 0) + slots.get("seconds", 0))


def split_seconds(seconds: int) -> dict[str, int]:
    """3700 as {"hours": 1, "minutes": 1, "seconds": 40}."""
    return {"hours": seconds // 3600, "minutes": seconds // 60 % 60, "seconds": seconds % 60}


def _plain(text: str) -> str:
    return " ".join(word.removesuffix("s") for word in normalise(text).split())


def _stems(text: str) -> set[str]:
    return {word.removesuffix("s") for word in normalise(text.replace("_", " ")).split()}


# ---------------------------------------------------------------- the check


def check(call: str, home: Home, request: str) -> Action | None:
    """The action that the model's JSON asks for, or None when it says that the home has nothing of the kind.

    Raises BadCall, with a reason, for anything that cannot be done: no JSON, an unknown intent or slot, a name that
    neither home nor request knows, a number out of range, nothing to act on.
    """
    try:
        value = tight(json.loads(call))
    except (ValueError, RecursionError):
        raise BadCall(f"not JSON: {call[:80]}") from None
    if not isinstance(value, dict) or not isinstance(value.get("intent"), str):
        raise BadCall(f"no intent in {call[:80]}")
    intent, slots = value["intent"], value.get("slots", {})
    if intent == NO_INTENT:
        return None
    if intent not in INTENTS:
        raise BadCall(f"unknown intent {intent!r}")
    if not isinstance(slots, dict):
        raise BadCall(f"{intent}: slots are {type(slots).__name__}, expected an object")
    for slot, found in slots.items():
        if slot not in INTENTS[intent]:
            raise BadCall(f"{intent} has no slot {slot!r}")
        _check_value(f"{intent}.{slot}", INTENTS[intent][slot], found, home, request)
    missing = [slot for slot in REQUIRED.get(intent, ()) if slot not in slots]
    if missing:
        raise BadCall(f"{intent} without {', '.join(missing)}")
    if intent in ("HassStartTimer", "HassIncreaseTimer", "HassDecreaseTimer") and not duration_s(slots):
        raise BadCall(f"{intent} without a duration")
    if intent == "HassLightSet" and not {"brightness", "color"} & set(slots):
        raise BadCall("HassLightSet without brightness or color")
    return Action(intent, slots, _targets(intent, slots, home))


def _check_value(where: str, kind: Kind, value: Any, home: Home, request: str) -> None:
    if isinstance(kind, tuple) and not isinstance(kind[0], str):
        low, high = kind[0], kind[1]
        if isinstance(value, bool) or not isinstance(value, int | float) or not float(low) <= value <= float(high):
            raise BadCall(f"{where} is {value!r}, expected a number {low}..{high}")
        return
    if not isinstance(value, str) or not value.strip():
        raise BadCall(f"{where} is {value!r}, expected text")
    if isinstance(kind, tuple):
        if value not in kind:
            raise BadCall(f"{where} is {value!r}, expected one of {', '.join(map(str, kind))}")
        return
    said = f" {normalise(value)} " in f" {normalise(request)} " or (kind == "text" and value in home_text(request))
    if kind == "name" and not (said or home.called(value) or value == "all"):
        raise BadCall(f"{where} is {value!r}: neither the home nor the request has it")
    if kind == "area" and not (said or _plain(value) in map(_plain, home.areas)):
        raise BadCall(f"{where} is {value!r}: neither the home nor the request has it")
    if kind == "text" and not said:
        raise BadCall(f"{where} is {value!r}: not in the request")
    if kind == "word" and not re.fullmatch(r"[a-z][a-z0-9_ -]{0,40}", value):
        raise BadCall(f"{where} is {value!r}, expected one word")


# Intents that are about entities -> the domains they fit; the first is meant when a call names no thing.
_ABOUT: dict[str, tuple[str, ...]] = {
    "HassLightSet": ("light",),
    "HassSetPosition": ("cover", "valve"),
    "HassClimateSetTemperature": ("climate",),
    "HassClimateGetTemperature": ("climate",),
    "HassVacuumStart": ("vacuum",),
    "HassVacuumReturnToBase": ("vacuum",),
    "HassMediaPause": ("media_player",),
    "HassMediaUnpause": ("media_player",),
    "HassMediaNext": ("media_player",),
    "HassMediaPrevious": ("media_player",),
    "HassMediaSearchAndPlay": ("media_player",),
    "HassSetVolume": ("media_player",),
}
_ON_AND_OFF = ("HassTurnOn", "HassTurnOff")
ASKING = ("HassGetState", "HassClimateGetTemperature", "HassGetWeather")
_SENSING = ("sensor", "binary_sensor", "person", "weather", "todo")  # nothing to switch
_GUARDED = ("lock", "cover", "valve", "scene", "script", "vacuum")  # never meant by "everything"


def _targets(intent: str, slots: Mapping[str, Any], home: Home) -> tuple[Entity, ...]:
    """The entities that a call is about; BadCall when it acts on none."""
    if intent not in (*_ABOUT, *_ON_AND_OFF, *ASKING):
        return ()
    found = home.entities
    named = slots.get("name") not in (None, "all")
    if named:
        found = home.called(slots["name"])
    if "area" in slots:
        found = tuple(e for e in found if _plain(e.area) == _plain(slots["area"]))
    if "floor" in slots:
        found = tuple(e for e in found if _plain(slots["floor"]) in (_plain(e.floor), _plain(e.area)))
    for slot in ("domain", "device_class"):
        if slot in slots:
            found = tuple(e for e in found if getattr(e, slot) == slots[slot])
    if intent in _ABOUT:
        found = tuple(e for e in found if e.domain in _ABOUT[intent])
        if not named and "domain" not in slots:
            found = tuple(e for e in found if e.domain == _ABOUT[intent][0])
    if intent in _ON_AND_OFF:
        if not named and not {"area", "floor", "domain", "device_class"} & set(slots):
            raise BadCall(f"{intent} without a thing to switch")
        found = tuple(e for e in found if e.domain not in _SENSING)
        if not named and not {"domain", "device_class"} & set(slots):
            found = tuple(e for e in found if e.domain not in _GUARDED)
    if not found and intent not in ASKING:
        kind = "" if "domain" in slots else " or ".join(_ABOUT.get(intent, ()))
        wanted = [str(slots[k]) for k in ("name", "device_class", "domain") if k in slots] or [kind or "thing"]
        where = [f"{word} {slots[k]}" for word, k in (("in", "area"), ("on", "floor")) if k in slots]
        raise BadCall(f"{intent}: this home has no {' '.join([*wanted, *where])} to do that with")
    return found


# ---------------------------------------------------------------- doing it


@dataclass
class Timer:
    """A running timer: its length and what is left of it in seconds, its name, the command to give when it ends."""

    length: int
    seconds: int
    name: str = ""
    command: str = ""
    paused: bool = False


@dataclass
class HomeState:
    """What the home's things are doing, in memory: enough to show what a call changes."""

    home: Home
    states: dict[Entity, dict[str, Any]] = field(default_factory=dict)
    timers: list[Timer] = field(default_factory=list)
    lists: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for entity in self.home.entities:
            self.states.setdefault(entity, dict(_FIRST_STATE.get(entity.domain, {"state": "off"})))

    def execute(self, action: Action) -> list[str]:
        """Do a checked call; one line per change, `ceiling light (kitchen): off -> on`."""
        changes: list[str] = []
        for entity in action.targets:
            now = self.states.setdefault(entity, {})
            for key, value in _wanted(action, entity).items():
                if now.get(key) != value:
                    what = f"{entity.name} ({entity.area})" if entity.area else entity.name
                    what = what if key == "state" else f"{what} {key.replace('_level', '')}"
                    changes.append(f"{what}: {now.get(key, 'not set')} -> {value}")
                    now[key] = value
        return changes + self._timers_and_lists(action)

    def answer(self, action: Action) -> str:
        """What the home answers to a checked call: the value that was asked for, or "ok"."""
        intent, slots = action.intent, action.slots
        if intent == "HassGetState":
            states = [str(self.states[e]["state"]) for e in action.targets if e in self.states]
            if not states:
                return UNKNOWN
            if "state" in slots:
                return "yes" if slots["state"] in states else "no"
            return ", ".join(dict.fromkeys(states))
        if intent == "HassClimateGetTemperature":
            return next((str(self.states[e].get("temperature")) for e in action.targets), UNKNOWN)
        if intent == "HassGetWeather":
            return UNKNOWN
        if intent == "HassGetCurrentTime":
            return datetime.now().strftime("%H:%M").removeprefix("0")
        if intent == "HassGetCurrentDate":
            now = datetime.now()
            return f"{now:%A}, {now.day} {now:%B}".lower()
        if intent == "HassTimerStatus":
            left = [timer.seconds for timer in self._chosen(action)]
            return spoken_duration(split_seconds(left[-1])) if left else "no time"
        return "ok"

    def _timers_and_lists(self, action: Action) -> list[str]:
        intent, slots = action.intent, action.slots
        if intent == "HassStartTimer":
            seconds = duration_s(slots)
            timer = Timer(seconds, seconds, slots.get("name", ""), slots.get("conversation_command", ""))
            self.timers.append(timer)
            return [f"in {spoken_duration(slots)}: {timer.command or timer.name or 'timer'}"]
        if intent in ("HassListAddItem", "HassShoppingListAddItem"):
            name = slots.get("name", "shopping list")
            self.lists.setdefault(name, []).append(slots["item"])
            return [f"{name}: + {slots['item']}"]
        if intent in ("HassListCompleteItem", "HassShoppingListCompleteItem"):
            name = slots.get("name", "shopping list")
            kept = [item for item in self.lists.get(name, []) if _plain(item) != _plain(slots["item"])]
            changed = len(kept) < len(self.lists.get(name, []))
            self.lists[name] = kept
            return [f"{name}: - {slots['item']}"] if changed else []
        return self._change_timers(action) if intent in _TIMER_CHANGES else []

    def _chosen(self, action: Action) -> list[Timer]:
        """The timers that a call is about, by their name and the length they started with."""
        slots, chosen = action.slots, self.timers
        if "name" in slots:
            chosen = [t for t in chosen if _plain(t.name) == _plain(slots["name"])]
        started = {k.removeprefix("start_"): v for k, v in slots.items() if k.startswith("start_")}
        if started:
            chosen = [t for t in chosen if t.length == duration_s(started)]
        return list(chosen)

    def _change_timers(self, action: Action) -> list[str]:
        chosen = self._chosen(action)
        if action.intent != "HassCancelAllTimers":
            chosen = chosen[-1:]
        for timer in chosen:
            if action.intent in ("HassCancelTimer", "HassCancelAllTimers"):
                self.timers.remove(timer)
            elif action.intent == "HassIncreaseTimer":
                timer.seconds += duration_s(action.slots)
            elif action.intent == "HassDecreaseTimer":
                timer.seconds = max(0, timer.seconds - duration_s(action.slots))
            else:
                timer.paused = action.intent == "HassPauseTimer"
        return [f"timer {_TIMER_CHANGES[action.intent]}" for _ in chosen]


_FIRST_STATE: dict[str, dict[str, Any]] = {
    "cover": {"state": "closed"},
    "lock": {"state": "locked"},
    "valve": {"state": "closed"},
    "vacuum": {"state": "docked"},
    "media_player": {"state": "paused"},
    "climate": {"state": "on", "temperature": 21},
}
_TIMER_CHANGES = {
    "HassCancelTimer": "cancelled",
    "HassCancelAllTimers": "cancelled",
    "HassIncreaseTimer": "longer",
    "HassDecreaseTimer": "shorter",
    "HassPauseTimer": "paused",
    "HassUnpauseTimer": "running",
}
_ON_OFF = {  # Home Assistant's lock is turned on when locked, its cover when open
    "cover": ("open", "closed"),
    "valve": ("open", "closed"),
    "lock": ("locked", "unlocked"),
    "scene": ("active", "off"),
}


def _wanted(action: Action, entity: Entity) -> dict[str, Any]:
    """The state that an action asks of one entity."""
    intent, slots = action.intent, action.slots
    if intent in ("HassTurnOn", "HassTurnOff"):
        return {"state": _ON_OFF.get(entity.domain, ("on", "off"))[intent == "HassTurnOff"]}
    if intent == "HassLightSet":
        return {"state": "on"} | {k: slots[k] for k in ("brightness", "color") if k in slots}
    if intent == "HassSetPosition":
        return {"state": "open" if slots["position"] else "closed", "position": slots["position"]}
    if intent == "HassMediaSearchAndPlay":
        return {"state": "playing", "media": slots["search_query"]}
    fixed = {
        "HassVacuumStart": "cleaning",
        "HassVacuumReturnToBase": "docked",
        "HassMediaPause": "paused",
        "HassMediaUnpause": "playing",
    }
    if intent in fixed:
        return {"state": fixed[intent]}
    if intent in ("HassClimateSetTemperature", "HassSetVolume"):
        return {k: slots[k] for k in ("temperature", "volume_level") if k in slots}
    return {}


# ---------------------------------------------------------------- saying it


def spoken_duration(slots: Mapping[str, Any]) -> str:
    """`1 hour and 5 minutes`"""
    parts = [
        f"{slots[unit]} {unit.removesuffix('s') if slots[unit] == 1 else unit}"
        for unit in ("hours", "minutes", "seconds")
        if slots.get(unit)
    ]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


_ON_WORDS = {
    "cover": ("Opened", "Closed"),
    "valve": ("Opened", "Closed"),
    "lock": ("Locked", "Unlocked"),
    "scene": ("Activated", "Stopped"),
    "script": ("Started", "Stopped"),
}
_PLURALS = {"switch": "switches", "media_player": "players", "blind": "blinds", "garage": "garage door"}


def _what(slots: Mapping[str, Any], default: str = "") -> str:
    """The things of a call in words: `the lights in the kitchen`."""
    if slots.get("name") not in (None, "all"):
        return f"the {slots['name']}"
    kind = slots.get("device_class") or slots.get("domain") or default
    words = "everything" if not kind else f"the {_PLURALS.get(kind, kind + 's')}"
    if "area" in slots:
        return f"{words} in the {slots['area']}"
    return f"{words} on the {slots['floor']}" if "floor" in slots else words


def reply(intent: str, slots: Mapping[str, Any], domain: str = "", result: str = "ok") -> str:
    """What is said after a call: the sentence that training teaches, and the floor for a reply that the model spoils.

    `domain` is that of the target, where the call names only the target; `result` is "ok" or a value asked for.
    """
    if result == UNKNOWN:
        return "I do not know."
    what, domain = _what(slots, _ABOUT.get(intent, ("",))[0]), slots.get("domain", domain)
    if intent in ("HassTurnOn", "HassTurnOff"):
        return f"{_ON_WORDS.get(domain, ('Turned on', 'Turned off'))[intent == 'HassTurnOff']} {what}."
    if intent == "HassStartTimer":
        wait = spoken_duration(slots)
        if "conversation_command" in slots:
            return f"I will do that in {wait}."
        return f"Timer set for {wait}{', ' + slots['name'] if 'name' in slots else ''}."
    if intent in ("HassIncreaseTimer", "HassDecreaseTimer"):
        return f"{spoken_duration(slots)} {'added to' if intent == 'HassIncreaseTimer' else 'taken off'} the timer."
    if intent == "HassLightSet":
        setting = (
            f"brightness to {slots['brightness']} percent" if "brightness" in slots else f"color to {slots['color']}"
        )
        return f"Set the {setting}."
    said = {
        NO_INTENT: "Sorry, I cannot do that here.",
        "HassSetPosition": f"Moved {what} to {slots.get('position')} percent.",
        "HassClimateSetTemperature": f"Temperature set to {slots.get('temperature')} degrees.",
        "HassClimateGetTemperature": f"It is {result} degrees.",
        "HassGetWeather": f"The weather is {result}.",
        "HassGetCurrentDate": f"Today is {result}.",
        "HassGetCurrentTime": f"It is {result}.",
        "HassVacuumStart": "The vacuum has started.",
        "HassVacuumReturnToBase": "The vacuum is going home.",
        "HassMediaPause": "Paused.",
        "HassMediaUnpause": "Playing again.",
        "HassMediaNext": "Playing the next one.",
        "HassMediaPrevious": "Playing the one before.",
        "HassMediaSearchAndPlay": f"Playing {slots.get('search_query')}.",
        "HassSetVolume": f"Volume set to {slots.get('volume_level')} percent.",
        "HassShoppingListAddItem": f"Added {slots.get('item')} to the shopping list.",
        "HassListAddItem": f"Added {slots.get('item')} to {what}.",
        "HassShoppingListCompleteItem": f"Ticked off {slots.get('item')}.",
        "HassListCompleteItem": f"Ticked off {slots.get('item')}.",
        "HassBroadcast": "Announced.",
        "HassNevermind": "All right.",
        "HassRespond": "Hello, I can switch things in this home.",
        "HassCancelTimer": "Timer cancelled.",
        "HassCancelAllTimers": "All timers cancelled.",
        "HassPauseTimer": "Timer paused.",
        "HassUnpauseTimer": "Timer running again.",
        "HassTimerStatus": f"{result} left.",
        "HassGetState": f"{result[:1].upper()}{result[1:]}.",
    }
    return said[intent]


def demo_home() -> Home:
    """A small home for the README and for trying things out."""
    rows: Iterable[tuple[str, str, str, str]] = (
        ("ceiling light", "kitchen", "light", ""),
        ("blinds", "kitchen", "cover", "blind"),
        ("coffee maker", "kitchen", "switch", ""),
        ("floor lamp", "living room", "light", ""),
        ("tv", "living room", "media_player", ""),
        ("bedside lamp", "bedroom", "light", ""),
        ("fan", "bedroom", "fan", ""),
        ("thermostat", "hallway", "climate", ""),
    )
    return Home(tuple(Entity(*row) for row in rows))
