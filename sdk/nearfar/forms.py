"""The rows that nano reads and writes, as parts of text: one place for training, evaluation and the product.

A part says whether its text is a control token and whether the model is asked to write it.  Text that comes from people
or corpora never becomes a control token, because only parts marked `control` are encoded as such.

    intents     <|s|>hwu64<|u|> text<|c|>{"intent":…,"slots":{…}}<|e|>
    dialogue    <|s|>setting<|u|> …<|c|>{"call":…,"args":{…}}<|r|>{…}<|a|> …<|e|>
    home        <|s|> kitchen: light ceiling light, …<|u|> text<|c|>{"intent":…,"slots":{…}}<|r|>ok<|a|>reply<|e|>
    journal     <|s|>facts<|c|>{"journal":…,"evidence":[…]}<|e|>
    plain       text<|e|>

Texts begin with a space, and so does every value in the JSON between `<|c|>` and `<|a|>`: a word and the same word
after a space are different tokens, and copying is what a small model can do.  `tight` takes the spaces away.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

ROWS_VERSION = 2  # the key `nearfar.rows` of a GGUF file
PAD, END, USER, ASSISTANT, CALL, RESULT, SETTING = CONTROLS = (
    "<|pad|>",
    "<|e|>",
    "<|u|>",
    "<|a|>",
    "<|c|>",
    "<|r|>",
    "<|s|>",
)
CALL_STOPS = (RESULT, END)  # a call ends where its result would begin, or with the row
# The file's `tokenizer.chat_template`, for engines that run templates; ours never does.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}<|s|>{% elif message['role'] == 'user' %}<|u|> "
    "{% elif message['role'] == 'call' %}<|c|>{% elif message['role'] == 'tool' %}<|r|>{% else %}<|a|> {% endif %}"
    "{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}"
)


class Part(NamedTuple):
    """A piece of a row: its text, whether that is one control token, whether the model writes it."""

    text: str
    control: bool = False
    answer: bool = False


Parts = tuple[Part, ...]


class Encoder(Protocol):
    """What `encode` needs of a tokenizer (nearfar.tokenizer.Tokenizer has it)."""

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]: ...


@dataclass(frozen=True)
class Turn:
    """One utterance of a dialogue; `calls` are (call JSON, result JSON) made before an assistant's text."""

    speaker: str  # "u" or "a"
    text: str
    calls: tuple[tuple[str, str], ...] = ()


def encode(parts: Iterable[Part], tokenizer: Encoder) -> list[int]:
    """The token ids of `parts`, each encoded alone: user text can never form a control token."""
    return [i for part in parts for i in tokenizer.encode(part.text, add_bos=False, parse_special=part.control)]


def show(parts: Iterable[Part]) -> str:
    """The parts as one string, for reading."""
    return "".join(part.text for part in parts)


def compact(value: Any) -> str:
    """JSON without spaces, characters as they are."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def neutral(text: str) -> str:
    """Text in which nothing looks like a control token."""
    return text.replace("<|", "< |")


def said(text: str) -> str:
    """`text` as rows hold what somebody says: after a space, and nothing in it looks like a control token."""
    return " " + neutral(text).lstrip()


def spaced(value: Any) -> Any:
    """A JSON value with a space before every text in it; keys and numbers as they are."""
    if isinstance(value, str):
        return " " + value.lstrip() if value.strip() else value
    if isinstance(value, Mapping):
        return {key: spaced(item) for key, item in value.items()}
    return [spaced(item) for item in value] if isinstance(value, list | tuple) else value


def tight(value: Any) -> Any:
    """A JSON value without spaces around the texts in it: what an answer means."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, Mapping):
        return {key: tight(item) for key, item in value.items()}
    return [tight(item) for item in value] if isinstance(value, list | tuple) else value


def group_slots(slots: Iterable[tuple[str, str]]) -> dict[str, str | list[str]]:
    """(type, value) pairs as a mapping; a type that occurs twice holds the list of its values."""
    grouped: dict[str, str | list[str]] = {}
    for kind, value in slots:
        before = grouped.get(kind)
        if before is None:
            grouped[kind] = value
        elif isinstance(before, list):
            before.append(value)
        else:
            grouped[kind] = [before, value]
    return grouped


def intent_prompt(label_space: str, text: str) -> Parts:
    """Ask for intent and slots in the labels of one data set: "hwu64", "snips", "clinc150", …"""
    return (
        Part(SETTING, control=True),
        Part(neutral(label_space)),
        Part(USER, control=True),
        Part(said(text)),
        Part(CALL, control=True),
    )


def intent_answer(intent: str, slots: Iterable[tuple[str, str]] = ()) -> Parts:
    """The answer to `intent_prompt`."""
    return (
        Part(neutral(compact({"intent": intent, "slots": spaced(group_slots(slots))})), answer=True),
        Part(END, control=True, answer=True),
    )


def service_line(service: str, methods: Mapping[str, Sequence[str]]) -> str:
    """One service of a dialogue's setting: `Buses_1: FindBus(from_location, …) BuyBusTicket(…)`."""
    return f"{service}: " + " ".join(f"{name}({', '.join(args)})" for name, args in methods.items())


def call_json(call: str, args: Mapping[str, Any]) -> str:
    """One API call of a dialogue."""
    return compact({"call": call, "args": spaced(args)})


def result_json(values: Mapping[str, Any]) -> str:
    """What an API call of a dialogue gave back."""
    return compact(spaced(values))


def dialogue(setting: str, turns: Iterable[Turn]) -> Parts:
    """A dialogue without its end; a prompt for the next call is this plus `Part(CALL, control=True)`."""
    parts: list[Part] = []
    if setting:
        parts += [Part(SETTING, control=True), Part(neutral(setting))]
    for turn in turns:
        for call, result in turn.calls:
            parts += [
                Part(CALL, control=True, answer=True),
                Part(neutral(call), answer=True),
                Part(RESULT, control=True, answer=True),
                Part(neutral(result)),
            ]
        written = turn.speaker == "a"
        parts += [
            Part(ASSISTANT if written else USER, control=True, answer=written),
            Part(said(turn.text), answer=written),
        ]
    return tuple(parts)


def last_turns(turns: Sequence[Turn], max_chars: int) -> Sequence[Turn]:
    """As many turns from the end as fit `max_chars`, at least one, beginning with the user where possible."""
    used, first = 0, len(turns)
    while first > 0:
        turn = turns[first - 1]
        used += len(turn.text) + sum(len(a) + len(b) for a, b in turn.calls)
        if used > max_chars and first < len(turns):
            break
        first -= 1
    if first < len(turns) - 1 and turns[first].speaker == "a":
        first += 1
    return turns[first:]


def home_text(text: str) -> str:
    """A request to the home as the model reads it: lower case, single spaces.  Values of its call are spans of this."""
    return " ".join(neutral(text).lower().split())


def home_prompt(setting: str, text: str) -> Parts:
    """Ask for the call that `text` wants in the home described by `setting` (`Home.setting()`)."""
    return (
        Part(SETTING, control=True),
        Part(said(home_text(setting))),
        Part(USER, control=True),
        Part(said(home_text(text))),
        Part(CALL, control=True),
    )


def home_answer(intent: str, slots: Mapping[str, Any] | None = None) -> str:
    """The call of a home row; `none` has no slots."""
    return compact({"intent": intent} if slots is None else {"intent": intent, "slots": spaced(slots)})


def home_reply_prompt(prompt: Parts, call: str, result: str) -> Parts:
    """Continue `prompt` with the call made and its result, and ask for the reply."""
    return (
        *prompt,
        Part(neutral(call), answer=True),
        Part(RESULT, control=True, answer=True),
        Part(home_text(result)),
        Part(ASSISTANT, control=True),
    )


def reply(text: str) -> Parts:
    """An assistant's text that ends the row."""
    return (Part(neutral(text), answer=True), Part(END, control=True, answer=True))


@dataclass(frozen=True)
class JournalEntry:
    """One stretch of a segment: what the phone's sensors support about it."""

    kind: str  # of place: home, office, cafe, …
    motion: str  # stationary, walking, running, cycling, vehicle, lift, stairs
    minutes: int
    name: str = ""  # of the place; "" when unknown
    steps: int = 0
    floors: int = 0  # climbed; negative for down


def journal_facts(part_of_day: str, entries: Sequence[JournalEntry]) -> str:
    """The facts of a segment as a journal prompt lists them; entries count from 1."""
    lines = []
    for n, e in enumerate(entries, 1):
        more = [
            f"{e.minutes} min",
            *([f"{e.steps} steps"] * bool(e.steps)),
            *([f"{e.floors:+d} floors"] * bool(e.floors)),
        ]
        lines.append(f"{n} {e.kind}{f' [ {e.name}]' if e.name else ''} {e.motion} {' '.join(more)}")
    return f"journal: {part_of_day}; " + "; ".join(lines)


def journal_prompt(facts: str) -> Parts:
    """Ask for the journal of one segment, described by the facts that the phone may share."""
    return (Part(SETTING, control=True), Part(neutral(facts)), Part(CALL, control=True))


def journal_answer(journal: str, evidence: Sequence[int]) -> Parts:
    """The answer to `journal_prompt`."""
    return (
        Part(neutral(compact({"journal": journal, "evidence": list(evidence)})), answer=True),
        Part(END, control=True, answer=True),
    )


def plain(text: str, *, end: bool) -> Parts:
    """Running text, with the end token where the document ends."""
    parts = (Part(neutral(text), answer=True),)
    return (*parts, Part(END, control=True, answer=True)) if end else parts
