"""Evaluation asks what training holds out: journals of one vocabulary and no common row, the same pieces of books."""

from __future__ import annotations

import re
from pathlib import Path

from nearfar import forms
from nearfar.eval import journal, language
from nearfar_cloud.training import journals, rows
from tests.cloud import mini_data
from tests.paths import SHARED, needs_shared


def test_training_and_evaluation_know_the_same_kinds_motions_and_parts_of_the_day() -> None:
    assert set(journal.KINDS) == set(journals.KINDS)
    assert set(journal.MOTIONS) == set(journals.MOVES)
    assert journal.PARTS_OF_DAY == journals.PARTS_OF_DAY


def test_training_never_shows_what_evaluation_asks(tmp_path: Path) -> None:
    training = journals.JournalGenerator(mini_data.write(tmp_path), seed=0)
    shown = {training.example(i)[0] for i in range(300)}
    asked = journal.segments(300)
    assert not shown & {s.facts for s in asked}
    names = {e.name for s in asked for e in s.entries if e.name}
    assert not [name for name in names for facts in shown if f"[ {name}]" in facts]


def test_the_rules_pass_the_journals_that_training_shows(tmp_path: Path) -> None:
    """Otherwise a model that learned its rows perfectly would be blamed."""
    training = journals.JournalGenerator(mini_data.write(tmp_path), seed=0)
    for i in range(300):
        facts, text, evidence = training.example(i)
        s = parsed(facts)
        if any(journals.is_hostile(e.name) for e in s.entries):
            continue  # whose sentences leave such a name out; evaluation has hostile names of its own
        found = journal.check(text, s)
        assert (found.kept_all, found.added, evidence) == (True, (), s.used), (facts, text, found)
        assert journal.reads_as_sentences(text)


def parsed(facts: str) -> journal.Segment:
    """The segment behind a line of facts."""
    part, *lines = facts.removeprefix("journal: ").split("; ")
    entries = []
    for line in lines:
        m = re.match(r"\d+ (\w+)(?: \[ (.*)\])? (\w+) (\d+) min(?: (\d+) steps)?(?: ([+-]\d+) floors)?$", line)
        assert m is not None, line
        entries.append(
            journal.JournalEntry(m[1], m[3], int(m[4]), m[2] or "", steps=int(m[5] or 0), floors=int(m[6] or 0))
        )
    return journal.Segment(part, tuple(entries))


@needs_shared
def test_the_books_of_evaluation_are_the_pieces_that_training_holds_out() -> None:
    held_out = [forms.show(row.parts).removesuffix(forms.END).strip() for row in rows.books(SHARED, "dev")]
    assert [passage.text for passage in language.books(SHARED)] == held_out
