"""Journal and skill rows: pure functions, no fact that was not given, held-out combinations and names."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from nearfar import forms
from nearfar.eval import journal as evaluation
from nearfar.splits import split_residue
from nearfar_cloud.training import journals
from nearfar_cloud.training.journals import KINDS, OPENINGS, JournalGenerator, is_hostile
from nearfar_cloud.training.skills import SkillGenerator
from tests.cloud import mini_data
from tests.paths import SHARED, needs_shared

ENTRY = re.compile(r"(\d+) (\w+)(?: \[ (.*?)\])? (\w+) (\d+) min")
FULL_ENTRY = re.compile(r"\d+ (\w+)(?: \[ (.*?)\])? (\w+) (\d+) min(?: (\d+) steps)?(?: ([+-]\d+) floors)?")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mini_data.write(tmp_path_factory.mktemp("data"))


def test_a_journal_depends_on_seed_and_number_alone(data: Path) -> None:
    one, two = JournalGenerator(data, 3), JournalGenerator(data, 3)
    assert [one.row(i) for i in range(30)] == [two.row(i) for i in reversed(range(30))][::-1]
    assert one.row(1) != JournalGenerator(data, 4).row(1)


def test_a_journal_adds_no_number_and_no_name(data: Path) -> None:
    generator = JournalGenerator(data, 1)
    for i in range(600):
        facts, journal, evidence = generator.example(i)
        entries = ENTRY.findall(facts)
        assert evidence == sorted(set(evidence))
        assert set(evidence) <= {int(entry[0]) for entry in entries}
        assert set(re.findall(r"\d+", journal)) <= set(re.findall(r"\d+", facts))
        openings = {word for texts in OPENINGS.values() for text in texts for word in text.rstrip(",").split()}
        named = " ".join(entry[2] for entry in entries)
        for word in re.findall(r"\b[A-Z][\w]+", journal):
            assert word in named or word in openings or word == "Afterwards"


def test_a_journal_names_each_place_it_uses_and_no_other(data: Path) -> None:
    generator = JournalGenerator(data, 1)
    for i in range(600):
        facts, journal, evidence = generator.example(i)
        for number, kind, name, _, _ in ENTRY.findall(facts):
            if int(number) in evidence:
                assert (name if name and not is_hostile(name) else KINDS[kind][0]) in journal
            elif name:
                assert name not in journal


def test_every_journal_of_training_fits_the_schema_of_evaluation(data: Path) -> None:
    generator = JournalGenerator(data, 1)
    for i in range(300):
        facts, journal, _ = generator.example(i)
        entries = [
            forms.JournalEntry(kind, motion, int(minutes), name.strip(), int(steps or 0), int(floors or 0))
            for kind, name, motion, minutes, steps, floors in FULL_ENTRY.findall(facts)
        ]
        pattern = evaluation.journal_schema(entries)["properties"]["journal"]["pattern"]
        assert re.fullmatch(pattern, journal), (facts, journal)


def test_a_hostile_name_is_data_and_never_said(data: Path) -> None:
    generator = JournalGenerator(data, 1)
    names = set()
    for i in range(1_500):
        facts, journal, _ = generator.example(i)
        for _, _, name, _, _ in ENTRY.findall(facts):
            if is_hostile(name):
                names.add(name)
                assert name.lower() not in journal.lower()
    assert len(names) > 80


def test_hostile_names_of_the_evaluation_are_not_those_of_training() -> None:
    rng = random.Random(1)
    drawn = {journals._hostile_name(rng).lower() for _ in range(5_000)}
    assert not drawn & {*evaluation.HOSTILE}
    assert all(is_hostile(name) for name in drawn)


def test_a_journal_is_one_or_two_sentences_about_the_user(data: Path) -> None:
    generator = JournalGenerator(data, 1)
    for i in range(300):
        _, journal, _ = generator.example(i)
        assert "the user" in journal
        assert len(re.findall(r"[.!?](?: |$)", journal)) in (1, 2)


def test_combinations_and_names_of_dev_never_train(data: Path) -> None:
    for split, held in (("train", False), ("dev", True)):
        generator = JournalGenerator(data, 1, split)
        for i in range(300):
            facts, _, _ = generator.example(i)
            part = facts.removeprefix("journal: ").split(";")[0]
            for _, kind, name, motion, _ in ENTRY.findall(facts):
                assert (split_residue(f"{kind} {motion} {part}", 10) == 0) == held
                assert not name or is_hostile(name) or (split_residue(name, 10) == 0) == held


def test_the_row_is_the_prompt_and_one_json_object(data: Path) -> None:
    row = JournalGenerator(data, 1).row(0)
    assert [p.text for p in row.parts if p.control] == ["<|s|>", "<|c|>", "<|e|>"]
    value = json.loads(next(p.text for p in row.parts if p.answer and not p.control))
    assert list(value) == ["journal", "evidence"]


@needs_shared
def test_no_reference_journal_is_a_row() -> None:
    path = SHARED / "sensors" / "autolife_journals_reference.json"
    references = {j for v in json.loads(path.read_text()).values() for j in v["reference_journals"]}
    generator = JournalGenerator(SHARED, 1)
    assert len(references) > 300
    assert not references & {generator.example(i)[1] for i in range(3_000)}


def test_a_skill_depends_on_seed_and_number_alone() -> None:
    one = SkillGenerator(3)
    assert [one.row(i) for i in range(50)] == [SkillGenerator(3).row(i) for i in range(50)]
    assert one.row(1) != SkillGenerator(4).row(1)


def test_skills_are_answered_rightly() -> None:
    generator, sums = SkillGenerator(1), 0
    for i in range(1_500):
        shown = forms.show(generator.row(i).parts)
        asked, answer = re.match(r"<\|u\|> (.*?)<\|a\|> (.*?)<\|", shown).groups()  # type: ignore[union-attr]
        plus = re.fullmatch(r"(?:what is )?(\d+) plus (\d+)\??|add (\d+) and (\d+)", asked)
        if plus:
            sums += 1
            assert int(answer) == sum(int(n) for n in plus.groups() if n)
            assert int(answer) <= 99
        if asked.startswith("repeat after me: "):
            assert asked.removeprefix("repeat after me: ") == answer
        if asked.startswith("spell the word "):
            assert answer.replace(" ", "") == asked.removeprefix("spell the word ")
    assert sums > 50


def test_names_and_kinds_of_one_journal_are_often_alike(data: Path) -> None:
    """Otherwise the first letters of a name, or a kind, say which entry is meant."""
    generator, same_kind, same_start, several = JournalGenerator(data, 1), 0, 0, 0
    for i in range(1_500):
        entries = ENTRY.findall(generator.example(i)[0])
        if len(entries) > 1:
            several += 1
            kinds = [kind for _, kind, _, _, _ in entries]
            starts = [word[:3] for _, _, name, _, _ in entries for word in name.split() if word.istitle()]
            same_kind += len(set(kinds)) < len(kinds)
            same_start += len(set(starts)) < len(starts)
    assert same_kind > 0.35 * several
    assert same_start > 0.15 * several
