"""No test sentence is trained on: every row that the mix can emit against every test row of the reference data.

The test sentences are gathered here anew, not with `held_out.test_texts`, so that a gap there shows.
"""

from __future__ import annotations

import csv
import io
import json
import lzma
import re
import tarfile
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from typing import Any

import pytest

from nearfar.splits import normalise, split_residue
from nearfar_cloud.training import rows
from nearfar_cloud.training.homes import HomeGenerator
from nearfar_cloud.training.intents import IntentGenerator
from nearfar_cloud.training.journals import JournalGenerator
from nearfar_cloud.training.skills import SkillGenerator
from tests.paths import SHARED, needs_shared

pytestmark = needs_shared

MIN_WORDS = 3  # "yes" and "the dog" are choices of some test and words of everybody


def fingerprint(text: str) -> bytes:
    return blake2b(normalise(text).encode(), digest_size=8).digest()


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _yaml_strings(text: str) -> Iterator[str]:
    """The items of every list and the values of every key, read line by line: wider than any parser would need."""
    for line in text.splitlines():
        yield re.sub(r"^\s*(- )?(\w+: )?", "", line).strip().strip("\"'")


@cache
def held_out() -> dict[bytes, str]:
    """fingerprint -> sentence of every text in a test file."""
    found: list[str] = []
    files = [*(SHARED / "eval").rglob("*.xz"), *(SHARED / "eval").glob("*.jsonl")]
    files += [SHARED / "intents" / "hwu64_test.jsonl.xz", SHARED / "smart_home" / "device_actions_test.jsonl.xz"]
    for path in files:
        raw = path.read_bytes()
        text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode()
        if ".csv" in path.name:
            found += [cell for row in csv.reader(io.StringIO(text)) for cell in row]
        else:
            found += [s for line in text.splitlines() for s in _strings(json.loads(line))]
    with lzma.open(SHARED / "intents" / "slurp_devel.jsonl.xz", "rt", encoding="utf-8") as lines:
        found += [row["text"] for row in map(json.loads, lines) if not row["in_hwu64_train"]]
    clinc = json.loads(lzma.decompress((SHARED / "intents" / "clinc150_train_val.json.xz").read_bytes()))
    found += [text for part in ("val", "oos_train", "oos_val") for text, _ in clinc[part]]
    found += _strings(json.loads((SHARED / "sensors" / "autolife_journals_reference.json").read_text()))
    found += [text for text, _, _ in rows.snips(SHARED, "test")]
    for name in ("home_assistant_intents_en", "assist_eval"):
        with tarfile.open(SHARED / "smart_home" / f"{name}.tar.xz") as tar:
            for member in tar:
                inside = member.name.removeprefix("./")
                if member.isfile() and (name == "assist_eval" or inside.startswith("tests/")):
                    found += _yaml_strings(tar.extractfile(member).read().decode())  # type: ignore[union-attr]
    return {fingerprint(text): text for text in found if len(normalise(text).split()) >= MIN_WORDS}


def leaks(made: Iterator[rows.Row]) -> list[str]:
    held = held_out()
    return [rows.text_of(row) for row in made if fingerprint(rows.text_of(row)) in held]


@cache
def texts(source: str, split: rows.Split) -> dict[bytes, str]:
    """fingerprint -> what leak checks compare, of every row of a corpus."""
    made = rows.FILE_SOURCES[source](SHARED, split, rows.MAX_ROW_CHARS)
    return {fingerprint(text): text for text in map(rows.text_of, made)}


def test_the_gathered_test_sentences_are_those_of_every_test_file() -> None:
    sentences = set(map(normalise, held_out().values()))
    assert len(sentences) > 20_000
    for known in (
        "turn off all the lights in the kitchen",
        "in 5 minutes open the garage door",
        "timer for 45 seconds",
    ):
        assert known in sentences


@pytest.mark.parametrize("source", list(rows.FILE_SOURCES))
def test_no_row_of_a_corpus_is_a_test_sentence(source: str) -> None:
    assert [text for key, text in texts(source, "train").items() if key in held_out()] == []


def _generated(n: int) -> Iterator[rows.Row]:
    for generator in (
        IntentGenerator(SHARED, 1),
        HomeGenerator(SHARED, 1),
        JournalGenerator(SHARED, 1),
        SkillGenerator(1),
    ):
        yield from (generator.row(i) for i in range(n))


def test_no_generated_row_is_a_test_sentence() -> None:
    assert leaks(_generated(7_000)) == []


@pytest.mark.slow
def test_none_of_200_000_generated_rows_is_a_test_sentence() -> None:
    assert leaks(_generated(50_000)) == []


def test_no_training_dialogue_is_one_of_the_validation_dialogues() -> None:
    def joined(name: str) -> set[bytes]:
        with lzma.open(SHARED / "dialogue" / name, "rt", encoding="utf-8") as lines:
            return {fingerprint(" ".join(t["t"] for t in json.loads(line)["turns"])) for line in lines}

    assert not joined("sgd_train.jsonl.xz") & joined("sgd_dev.jsonl.xz")


@pytest.mark.parametrize("source", ["intents", "support", "gsm8k"])
def test_rows_of_dev_and_train_share_no_text(source: str) -> None:
    dev, train = texts(source, "dev"), texts(source, "train")
    assert len(dev) > 300
    assert not dev.keys() & train.keys()
    assert 0.03 < len(dev) / (len(dev) + len(train)) < 0.07


def test_the_test_part_of_snips_is_its_residue_one() -> None:
    test = [text for text, _, _ in rows.snips(SHARED, "test")]
    assert 600 < len(test) < 780
    assert {split_residue(text) for text in test} == {1}
    assert not set(test) & {text for text, _, _ in rows.snips(SHARED, "train")}


def test_slurp_and_files_marked_test_only_are_no_training_source() -> None:
    from nearfar_cloud.training.mix import FILES

    read = {p.relative_to(SHARED).as_posix() for patterns in FILES.values() for g in patterns for p in SHARED.glob(g)}
    marked = dict(
        re.findall(r"^\| `([^`]+)` .*? \| [^|]+ \| [^|]+ \| ([^|]+) \|", (SHARED / "README.md").read_text(), re.M)
    )
    used = {name: marked[name.split("/", 1)[1]] for name in read}
    assert len(used) == len(read) >= 25
    assert all("train" in use or use.strip() in ("any", "with its split") for use in used.values()), used
    assert not any("slurp" in name or "eval/" in name for name in used)
