"""What must never train: the sentences of every test file.  The only reader of files that are marked *test only*.

Training never sees what is read here, only hashes to leave rows out by.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from nearfar.corpora import field, json_file, json_lines, open_text, tar_texts
from nearfar.splits import HELD_OUT, normalise, split_residue

USE = "leak checks"
MIN_WORDS = 3  # of a string in eval/ that counts: "yes" is one choice there, and a word of everybody


def text_hash(text: str) -> bytes:
    """What leak checks compare."""
    return blake2b(normalise(text).encode(), digest_size=8).digest()


@cache
def test_texts(data: Path) -> frozenset[bytes]:
    """Hashes of every test sentence that a training row could repeat; files that are not there are passed over."""
    return frozenset(text_hash(text) for text in _sentences(data) if normalise(text))


def _sentences(data: Path) -> Iterator[str]:
    for path in sorted((data / "eval").rglob("*")):
        yield from (text for text in _texts_of(path) if len(normalise(text).split()) >= MIN_WORDS)
    yield from _intent_sentences(data / "intents")
    yield from _home_sentences(data / "smart_home")


def _texts_of(path: Path) -> Iterator[str]:
    if ".jsonl" in path.name:
        yield from (text for _, row in json_lines(path, USE) for text in _strings(row))
    elif ".csv" in path.name:
        with open_text(path, USE) as file:
            yield from (cell for row in csv.reader(file) for cell in row)


def _intent_sentences(folder: Path) -> Iterator[str]:
    if (folder / "hwu64_test.jsonl.xz").is_file():
        for _, row in json_lines(folder / "hwu64_test.jsonl.xz", USE):
            yield from _strings(row)
    if (folder / "slurp_devel.jsonl.xz").is_file():
        for where, row in json_lines(folder / "slurp_devel.jsonl.xz", USE):
            if not row.get("in_hwu64_train"):  # marked rows are not reported
                yield field(where, row, "text", str)
    if (folder / "snips_train.jsonl.xz").is_file():  # one twentieth stands in for its test file
        for where, row in json_lines(folder / "snips_train.jsonl.xz", USE):
            text = field(where, row, "text", str)
            if split_residue(text) == HELD_OUT:
                yield text
    if (folder / "clinc150_train_val.json.xz").is_file():
        clinc = json_file(folder / "clinc150_train_val.json.xz", USE, dict)
        yield from (str(row[0]) for part in ("val", "oos_train", "oos_val") for row in clinc.get(part, []))


def _home_sentences(folder: Path) -> Iterator[str]:
    path = folder / "device_actions_test.jsonl.xz"
    if path.is_file():
        for _, row in json_lines(path, USE):
            yield from (str(m["content"]) for m in row.get("messages", []) if m.get("role") == "user")
    for name in ("home_assistant_intents_en", "assist_eval"):
        path = folder / f"{name}.tar.xz"
        if path.is_file():
            for member, text in tar_texts(path, USE, ".yaml").items():
                if name == "assist_eval" or member.startswith("tests/"):
                    yield from _strings(yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def _strings(value: Any) -> Iterator[str]:
    """Every text in a JSON or YAML value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
