"""Readers: each corpus of the data folder as `Row`s.  First stop of training: rows -> tokenizer -> mix -> trainer.

Every reader checks what it reads and names file and line of what it cannot use.  Rows whose request is a sentence of a
test file (held_out.py) are left out.
"""

from __future__ import annotations

import csv
import random
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
from nearfar_cloud.training import lexicon
from nearfar_cloud.training.held_out import test_texts, text_hash
from nearfar_cloud.training.lexicon import listed

Split = Literal["train", "dev", "test"]

VERSION = 1  # of the rows that these readers make; part of the data hash
MAX_ROW_CHARS = PIECE_CHARS  # of a dialogue or a book
N_VARIANTS = 3  # each intent row is kept once as written and twice changed (names swapped, case, punctuation)
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
    """(text, normal text, intent, slots) of HWU64; test is its own file.  The label is scenario_intent."""
    name = "hwu64_test" if split == "test" else "hwu64_train"
    for where, row in json_lines(data / "intents" / f"{name}.jsonl.xz", "intents"):
        text, scenario, intent = (field(where, row, key, str) for key in ("text", "scenario", "intent"))
        if split == "test" or _held(text, split):
            yield text, field(where, row, "norm", str), f"{scenario}_{intent}", pairs(where, row, "slots")


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


NAMED_SLOTS = listed(
    "artist|name|person|playlist|album|track|song|place|city|state|restaurant|poi|podcast|radio|entity|movie|game|"
    "business|device|list"
)  # a slot whose type contains one of these holds a name


def swap_names(text: str, slots: list[tuple[str, str]], rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """The same request about invented names: spans stay spans, which teaches copying instead of recalling."""
    changed = []
    for kind, value in slots:
        named = any(word in kind for word in NAMED_SLOTS) and not value.isdigit()
        pattern = rf"(?<!\w){re.escape(value)}(?!\w)"
        if named and value and len(re.findall(pattern, text)) == 1 and rng.random() < 0.7:
            new = lexicon.invented_name(rng)
            new = new.title() if value[:1].isupper() else new
            text = re.sub(pattern, new, text)
            changed.append((kind, new))
        else:
            changed.append((kind, value))
    if all(value in text for _, value in changed):
        return text, changed
    return text, []


def restyle(text: str, slots: list[tuple[str, str]], rng: random.Random) -> tuple[str, list[tuple[str, str]]]:
    """The same request in another case, with or without its last mark; values change with the text."""
    roll = rng.random()
    if roll < 0.5:
        text, slots = text.lower(), [(kind, value.lower()) for kind, value in slots]
    elif roll < 0.65 and not any(text.startswith(value) for _, value in slots):
        text = text[:1].upper() + text[1:]
    ended = text.rstrip(".?! ") + rng.choice(("", ".", "?", "!"))
    if rng.random() < 0.5 and all(value in ended for _, value in slots):
        text = ended
    return text, slots


def _variants(space: str, text: str, intent: str, slots: list[tuple[str, str]], first: Parts) -> Iterator[Row]:
    yield Row("intents", first)
    rng = random.Random(f"{space}|{text}")
    for n in range(1, N_VARIANTS):
        new_text, new_slots = text, slots
        if n % 2 == 1:
            new_text, new_slots = swap_names(text, slots, rng)
            if slots and not new_slots:
                new_text, new_slots = text, slots
        new_text, new_slots = restyle(new_text, new_slots, rng)
        yield Row("intents", forms.intent_prompt(space, new_text) + forms.intent_answer(intent, new_slots))


def intents(data: Path, split: Split = "train", max_chars: int = MAX_ROW_CHARS) -> Iterator[Row]:
    """HWU64, SNIPS and CLINC150; training has each row `N_VARIANTS` times, every one a little different."""
    known = test_texts(data) if split == "train" else frozenset()
    rows = [("hwu64", text, intent, slots) for text, _, intent, slots in hwu64(data, split)]
    rows += [("snips", text, intent, slots) for text, intent, slots in snips(data, split)]
    rows += [("clinc150", text, intent, []) for text, intent in clinc150(data, split)]
    for space, text, intent, slots in rows:
        if text_hash(text) in known:
            continue
        first = forms.intent_prompt(space, text) + forms.intent_answer(intent, slots)
        if split == "train":
            yield from _variants(space, text, intent, slots, first)
        else:
            yield Row("intents", first)


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


def sgd_setting(services: list[str], methods: dict[str, dict[str, list[str]]], *, with_schema: bool) -> str:
    """The setting of an SGD dialogue: its day and, in half of the rows, what its services can do."""
    if not with_schema:
        return DIALOGUE_DAY
    return "; ".join([DIALOGUE_DAY, *(forms.service_line(name, methods[name]) for name in services)])


def sgd(data: Path, split: Split = "train", max_chars: int = MAX_ROW_CHARS) -> Iterator[Row]:
    """Schema-guided dialogues with their API calls; split "test" is sgd_dev."""
    path = data / "dialogue" / ("sgd_train.jsonl.xz" if split != "test" else "sgd_dev.jsonl.xz")
    methods = schema(data, split)
    for where, row in json_lines(path, "dialogues with API calls"):
        name, services = field(where, row, "id", str), field(where, row, "services", list)
        missing = [s for s in services if s not in methods]
        if missing:
            raise DataError(f"{where}: expected services of the schema, found {missing[0]!r}")
        turns = []
        for turn in field(where, row, "turns", list):
            if not isinstance(turn, dict):
                raise DataError(f"{where}: expected a turn as an object, found {str(turn)[:40]!r}")
            calls = []
            for call in turn.get("calls", []):
                args, result = field(where, call, "args", dict), call.get("result") or {}
                first = dict(list(result.items())[:RESULT_FIELDS])
                calls.append((forms.call_json(field(where, call, "method", str), args), forms.compact(first)))
            turns.append(Turn(field(where, turn, "s", str), field(where, turn, "t", str), tuple(calls)))
        key = " ".join(turn.text for turn in turns)
        if split == "test" or _held(key, split):
            setting = sgd_setting(services, methods, with_schema=split_residue(name, 2) == 0)
            if len(setting) > max_chars // 2:
                setting = DIALOGUE_DAY  # short sequences have no room for what several services can do
            yield from _windows(turns, setting, "sgd", max_chars)


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
                    args = forms.compact({"call": method, "args": _trim(call.get("args") or {})})
                    calls.append((args, forms.compact(_trim(call.get("result") or {}))))
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
