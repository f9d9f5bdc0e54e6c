"""Readers: each corpus of the data folder as `Row`s.  First stop of training: rows -> tokenizer -> mix -> trainer.

Every reader checks what it reads and names file and line of what it cannot use.  Rows whose request is a sentence of a
test file (held_out.py) are left out.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nearfar import forms
from nearfar.corpora import README, field, json_file, json_lines, open_text, pairs
from nearfar.errors import DataError
from nearfar.forms import Parts, Turn
from nearfar.splits import PIECE_CHARS, RESIDUES, pieces, split_residue
from nearfar_cloud.training.held_out import test_texts, text_hash

Split = Literal["train", "dev", "test"]

VERSION = 5  # of the rows that these readers make; part of the data hash
MAX_ROW_CHARS = PIECE_CHARS  # of a dialogue or a book
DIALOGUE_DAY = "2019-03-01"  # the day on which SGD's speakers say "today"
RESULT_FIELDS = 6  # of a call's first result


@dataclass(frozen=True, slots=True)
class Row:
    """One training example: where it came from and its text in parts."""

    source: str
    parts: Parts


def text_of(row: Row) -> str:
    """What leak checks compare: the request of a one-turn row, otherwise all text of the row."""
    users = [after.text for before, after in zip(row.parts, row.parts[1:], strict=False) if before.text == forms.USER]
    if len(users) == 1:
        return users[0]
    return " ".join(part.text for part in row.parts if not part.control)


def _held(text: str, split: Split) -> bool:
    """Whether a text of a training file belongs to `split`."""
    return (split_residue(text) == 0) == (split == "dev") and split != "test"


# ---------------------------------------------------------------- intents


def hwu64(data: Path, split: Split = "train") -> Iterator[tuple[str, str, str, list[tuple[str, str]]]]:
    """(text, normal form, intent, slots) of HWU64; test is its own file.  The label is scenario_intent.

    The slots are words of the normal form ("six am"), not of what was typed ("6 AM").
    """
    name = "hwu64_test" if split == "test" else "hwu64_train"
    for where, row in json_lines(data / "intents" / f"{name}.jsonl.xz", "intents"):
        text, scenario, intent = (field(where, row, key, str) for key in ("text", "scenario", "intent"))
        norm = field(where, row, "norm", str)
        if split == "test" or _held(norm, split):
            yield text, norm, f"{scenario}_{intent}", pairs(where, row, "slots")


def snips(data: Path, split: Split = "train") -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
    """(text, intent, slots) of SNIPS; residue 0 is dev and residue 1 test, for lack of its test file."""
    wanted = {"dev": {0}, "test": {1}, "train": set(range(2, RESIDUES))}[split]
    for where, row in json_lines(data / "intents" / "snips_train.jsonl.xz", "intents"):
        text = field(where, row, "text", str)
        if split_residue(text) in wanted:
            yield text, field(where, row, "intent", str), pairs(where, row, "slots")


def clinc150(data: Path, split: Split = "train") -> Iterator[tuple[str, str]]:
    """(text, intent) of CLINC150 in scope; its own validation rows are the test part.  Out-of-scope rows stay out."""
    file = data / "intents" / "clinc150_train_val.json.xz"
    part = "val" if split == "test" else "train"
    rows = field(file.name, json_file(file, "intents", dict), part, list)
    for n, row in enumerate(rows):
        if not (isinstance(row, list) and len(row) == 2 and all(isinstance(x, str) for x in row)):
            raise DataError(f"{file.name} {part} row {n}: expected [text, intent], found {str(row)[:60]}")
        if split == "test" or _held(row[0], split):
            yield row[0], row[1]


def clinc_domains(data: Path) -> dict[str, list[str]]:
    """CLINC150's ten domains, each with its intents."""
    found: dict[str, list[str]] = json_file(data / "intents" / "clinc150_domains.json", "intents", dict)
    return found


@dataclass(frozen=True, slots=True)
class Labelled:
    """A request with its intent and the typed spans in it."""

    space: str  # the data set, whose labels these are
    text: str
    intent: str
    slots: tuple[tuple[str, str], ...] = ()

    def parts(self) -> Parts:
        """The request as a row."""
        return forms.intent_prompt(self.space, self.text) + forms.intent_answer(self.intent, self.slots)


def labelled(data: Path, split: Split = "train") -> Iterator[Labelled]:
    """The requests of HWU64, SNIPS and CLINC150; training leaves out what a test file repeats.

    Training also sees HWU64's requests as they were typed, where the values are words of that.
    """
    known = test_texts(data) if split == "train" else frozenset()
    found = []
    for text, norm, intent, slots in hwu64(data, split):
        found.append(Labelled("hwu64", norm, intent, tuple(slots)))
        if split == "train" and text != norm and (spans := _spans(text, slots)) is not None:
            found.append(Labelled("hwu64", text, intent, spans))
    found += [Labelled("snips", text, intent, tuple(slots)) for text, intent, slots in snips(data, split)]
    found += [Labelled("clinc150", text, intent) for text, intent in clinc150(data, split)]
    yield from (request for request in found if text_hash(request.text) not in known)


def _spans(text: str, slots: list[tuple[str, str]]) -> tuple[tuple[str, str], ...] | None:
    """The values as `text` spells them, or None where it has others than their words."""
    spans = []
    for kind, value in slots:
        at = text.lower().find(value.lower())
        if at < 0 or len(text.lower()) != len(text):  # a letter that is two in lower case would move what follows
            return None
        spans.append((kind, text[at : at + len(value)]))
    return tuple(spans)


def intents(data: Path, split: Split = "train", max_chars: int = MAX_ROW_CHARS) -> Iterator[Row]:
    """HWU64, SNIPS and CLINC150, as written; training changes them (intents.py)."""
    for request in labelled(data, split):
        yield Row("intents", request.parts())


def support(data: Path, split: Split = "train", max_chars: int = MAX_ROW_CHARS) -> Iterator[Row]:
    """banking77 (intents) and restaurant8k (slots): narrow domains, surface only."""
    known = test_texts(data) if split == "train" else frozenset()
    path = data / "intents" / "banking77_train.csv.xz"
    with open_text(path, "banking questions") as file:
        for n, row in enumerate(csv.DictReader(file), 2):
            if not row.get("text") or not row.get("category"):
                raise DataError(
                    f"{path.name} line {n}: expected columns text and category, found {sorted(map(str, row))}"
                )
            if _held(row["text"], split) and text_hash(row["text"]) not in known:
                parts = forms.intent_prompt("banking77", row["text"]) + forms.intent_answer(row["category"])
                yield Row("support", parts)
    for where, item in json_lines(data / "intents" / "restaurant8k_train.jsonl.xz", "restaurant slots"):
        text = field(where, item, "text", str)
        if _held(text, split) and text_hash(text) not in known:
            answer = forms.intent_answer("book_table", pairs(where, item, "slots"))
            yield Row("support", forms.intent_prompt("restaurant8k", text) + answer)


# ---------------------------------------------------------------- dialogues


def _windows(turns: list[Turn], setting: str, source: str, max_chars: int) -> Iterator[Row]:
    """A dialogue as rows of about `max_chars`; a later row begins with the last turns of the one before."""
    first = 0
    while first < len(turns):
        used, last = len(setting), first
        while last < len(turns):
            used += len(turns[last].text) + sum(len(a) + len(b) for a, b in turns[last].calls)
            if used > max_chars and last > first + 1:
                break
            last += 1
        parts = forms.dialogue(setting, turns[first:last])
        if last == len(turns):
            yield Row(source, (*parts, forms.Part(forms.END, control=True, answer=True)))
            return
        yield Row(source, parts)
        first = max(first + 1, last - 4)
        if turns[first].speaker == "a":
            first += 1


def schema(data: Path, split: Split = "train") -> dict[str, dict[str, list[str]]]:
    """service -> method -> argument names, of one split of SGD."""
    path = data / "dialogue" / ("sgd_train_schema.json" if split != "test" else "sgd_dev_schema.json")
    services: dict[str, dict[str, list[str]]] = {}
    for n, service in enumerate(json_file(path, "SGD's services", list)):
        where = f"{path.name} service {n}"
        methods = {}
        for intent in field(where, service, "intents", list):
            required = field(where, intent, "required_slots", list)
            methods[field(where, intent, "name", str)] = [*required, *field(where, intent, "optional_slots", dict)]
        services[field(where, service, "service_name", str)] = methods
    return services


def sgd_setting(services: list[str], methods: dict[str, dict[str, list[str]]]) -> str:
    """The setting of an SGD dialogue: its day and what its services can do."""
    return "; ".join([DIALOGUE_DAY, *(forms.service_line(name, methods[name]) for name in services)])


def sgd(data: Path, split: Split = "train", max_chars: int = MAX_ROW_CHARS) -> Iterator[Row]:
    """Schema-guided dialogues with their API calls; split "test" is sgd_dev.

    What is learned is the calls.  A dialogue gives its beginning, as far as it fits, and a row for each later call with
    the turns before it, as evaluation asks: a call in the middle of a window would want values that are out of sight.
    """
    path = data / "dialogue" / ("sgd_train.jsonl.xz" if split != "test" else "sgd_dev.jsonl.xz")
    methods = schema(data, split)
    for where, row in json_lines(path, "dialogues with API calls"):
        services = field(where, row, "services", list)
        missing = [s for s in services if s not in methods]
        if missing:
            raise DataError(f"{where}: expected services of the schema, found {missing[0]!r}")
        turns = list(_sgd_turns(where, row))
        if split == "test" or _held(" ".join(turn.text for turn in turns), split):
            setting = sgd_setting(services, methods)
            if len(setting) > max_chars // 2:
                setting = DIALOGUE_DAY  # short sequences have no room for what several services can do
            yield from _dialogue_rows(turns, setting, max_chars)


def _sgd_turns(where: str, row: dict[str, Any]) -> Iterator[Turn]:
    for turn in field(where, row, "turns", list):
        if not isinstance(turn, dict):
            raise DataError(f"{where}: expected a turn as an object, found {str(turn)[:40]!r}")
        calls = []
        for call in turn.get("calls", []):
            args, result = field(where, call, "args", dict), call.get("result") or {}
            first = dict(list(result.items())[:RESULT_FIELDS])
            calls.append((forms.call_json(field(where, call, "method", str), args), forms.result_json(first)))
        yield Turn(field(where, turn, "s", str), field(where, turn, "t", str), tuple(calls))


def _dialogue_rows(turns: list[Turn], setting: str, max_chars: int) -> Iterator[Row]:
    """The beginning of a dialogue, then one row a call."""
    used, last = len(setting), 0
    while last < len(turns) and (used := used + _chars(turns[last])) <= max_chars:
        last += 1
    last = max(last, 1)
    end = (forms.Part(forms.END, control=True, answer=True),) if last == len(turns) else ()
    yield Row("sgd", _calls_only(forms.dialogue(setting, turns[:last])) + end)
    for n in range(last, len(turns)):
        for call, _ in turns[n].calls[:1]:
            before = forms.last_turns(turns[:n], max(max_chars - len(setting) - len(call), max_chars // 4))
            asked = _calls_only(forms.dialogue(setting, before), nothing=True)
            yield Row(
                "sgd",
                (
                    *asked,
                    forms.Part(forms.CALL, control=True, answer=True),
                    forms.Part(forms.neutral(call), answer=True),
                    forms.Part(forms.RESULT, control=True, answer=True),
                ),
            )


def _chars(turn: Turn) -> int:
    return len(turn.text) + sum(len(call) + len(result) for call, result in turn.calls)


def _calls_only(parts: Parts, *, nothing: bool = False) -> Parts:
    """The parts with what the assistant says as mere context (`nothing`: all of it is)."""
    said = {i + 1 for i, part in enumerate(parts) if part.text == forms.ASSISTANT and part.control}
    return tuple(part._replace(answer=False) if nothing or i in said else part for i, part in enumerate(parts))


def _trim(value: Any) -> Any:
    """A menu or order without its numbers: ids dropped, names and at most three choices kept."""
    if isinstance(value, dict):
        kept = {}
        for key, item in value.items():
            if key == "menu_item_id":
                kept["item"] = re.sub(r"-\d+$", "", str(item))
            elif not key.endswith("_id"):
                kept[key] = _trim(item)
        return dict(list(kept.items())[:RESULT_FIELDS])
    return [_trim(item) for item in value[:3]] if isinstance(value, list) else value


def coffee(data: Path, split: Split = "train", max_chars: int = MAX_ROW_CHARS) -> Iterator[Row]:
    """Taskmaster-4's coffee orders; calls and results, over 80 % of the text, are trimmed."""
    path = data / "dialogue" / "taskmaster4_coffee_train.jsonl.xz"
    for where, row in json_lines(path, "coffee orders"):
        turns: list[Turn] = []
        for turn in field(where, row, "turns", list):
            calls = []
            for call in turn.get("calls", []):
                method = field(where, call, "name", str)
                if method != "get_order_details":  # repeats what the dialogue just built
                    args = forms.call_json(method, _trim(call.get("args") or {}))
                    calls.append((args, forms.result_json(_trim(call.get("result") or {}))))
            turns.append(Turn(field(where, turn, "s", str), field(where, turn, "t", str)))
            if calls and turns[-1].speaker == "u":  # made after the user spoke, before the answer
                turns.append(Turn("a", "", tuple(calls)))
            elif len(turns) > 1 and turns[-2].calls and not turns[-2].text:
                turns[-2:] = [Turn("a", turns[-1].text, turns[-2].calls)]
        turns = [turn for turn in turns if turn.text]
        if turns and _held(" ".join(turn.text for turn in turns), split):
            yield from _windows(turns, "coffee bar", "coffee", max_chars)


def persona(data: Path, split: Split = "train", max_chars: int = MAX_ROW_CHARS) -> Iterator[Row]:
    """Persona chats: the second speaker's persona is the setting, the second speaker is the assistant."""
    path = data / "dialogue" / "synthetic_persona_chat_valid.jsonl.xz"
    for where, row in json_lines(path, "persona chats"):
        setting = " ".join(str(line) for line in field(where, row, "p2", list))
        turns: list[Turn] = []
        for line in field(where, row, "turns", list):
            match = re.match(r"User ([12]): ?(.*)", str(line), re.DOTALL)
            if match is None:
                continue  # a line break inside an utterance: the rest of it adds nothing
            speaker = "u" if match[1] == "1" else "a"
            if turns and turns[-1].speaker == speaker:
                turns[-1] = Turn(speaker, f"{turns[-1].text} {match[2]}")
            else:
                turns.append(Turn(speaker, match[2]))
        if _held(" ".join(turn.text for turn in turns), split):
            yield from _windows(turns, setting, "persona", max_chars)


def gsm8k(data: Path, split: Split = "train", max_chars: int = MAX_ROW_CHARS) -> Iterator[Row]:
    """Word problems, for their surface: a model of this size does not do maths."""
    known = test_texts(data) if split == "train" else frozenset()
    for where, row in json_lines(data / "math" / "gsm8k_train.jsonl.xz", "word problems"):
        question, answer = field(where, row, "question", str), field(where, row, "answer", str)
        if _held(question, split) and text_hash(question) not in known:
            turns = [Turn("u", question), Turn("a", re.sub(r"<<.*?>>", "", answer))]
            yield Row("gsm8k", (*forms.dialogue("", turns), forms.Part(forms.END, control=True, answer=True)))


# ---------------------------------------------------------------- running text


def _documents(text: str, source: str, split: Split, separator: str, max_chars: int) -> Iterator[Row]:
    """Pieces of at most `max_chars`, cut between paragraphs; one piece in twenty is dev."""
    for document in re.split(separator, text):
        found = pieces(document, max_chars)
        for n, p in enumerate(found):
            if _held(p, split):
                yield Row(source, forms.plain(p, end=n == len(found) - 1))


def books(data: Path, split: Split = "train", max_chars: int = MAX_ROW_CHARS) -> Iterator[Row]:
    """Fourteen children's books in the public domain."""
    folder = data / "text" / "books"
    paths = sorted(folder.glob("*.txt.xz"))
    if not paths:
        raise DataError(f"{folder}: expected books as .txt.xz, found none; {README}, or train --without books")
    for path in paths:
        with open_text(path, "running text") as file:
            yield from _documents(file.read(), "books", split, r"\Z(?!)", max_chars)


def stories(data: Path, split: Split = "train", max_chars: int = MAX_ROW_CHARS) -> Iterator[Row]:
    """A slice of TinyStories; a single line break separates two stories, an empty line two paragraphs."""
    with open_text(data / "text" / "tinystories_train_slice.txt.xz", "short stories") as file:
        yield from _documents(file.read(), "stories", split, r"(?<!\n)\n(?!\n)", max_chars)


# Every reader: (data folder, split, about how many characters a row may have) -> rows.
Reader = Callable[[Path, Split, int], Iterator[Row]]
FILE_SOURCES: dict[str, Reader] = {
    "intents": intents,
    "sgd": sgd,
    "books": books,
    "stories": stories,
    "coffee": coffee,
    "persona": persona,
    "gsm8k": gsm8k,
    "support": support,
}
