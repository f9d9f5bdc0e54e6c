"""Journal and skill rows: pure functions, no fact that was not given, held-out combinations and names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from nearfar import forms
from nearfar.splits import split_residue
from nearfar_cloud.training.journals import HOSTILE, KINDS, OPENINGS, JournalGenerator
from nearfar_cloud.training.skills import SkillGenerator
from tests.cloud import mini_data
from tests.paths import SHARED, needs_shared

ENTRY = re.compile(r"(\d+) (\w+)(?: \[ (.*?)\])? (\w+) (\d+) min")


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
                assert (name if name and name not in HOSTILE else KINDS[kind][0]) in journal
            elif name:
                assert name not in journal


def test_a_hostile_name_is_data_and_never_said(data: Path) -> None:
    generator = JournalGenerator(data, 1)
    rows = [generator.example(i) for i in range(1_500)]
    hostile = [(facts, journal) for facts, journal, _ in rows if any(name in facts for name in HOSTILE)]
    assert len(hostile) > 20
    assert not any(name in journal for _, journal in hostile for name in HOSTILE)


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
                assert not name or name in HOSTILE or (split_residue(name, 10) == 0) == held


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
