"""The rules that hold a journal against its facts: what is kept, what is added, and what a hostile name may do."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

import nearfar
from nearfar import forms
from nearfar.constraint import Constraint, Vocabulary
from nearfar.eval import journal
from nearfar.eval.journal import Segment, check
from nearfar.eval.tasks import Prediction, Row
from nearfar.forms import JournalEntry

FACTS = Segment(
    "late morning",
    (
        JournalEntry("park", "walking", 12, "Run 9 Park", steps=1300),
        JournalEntry("home", "stationary", 95),
        JournalEntry("shop", "vehicle", 2, "Passed Goods"),
    ),
)
GOOD = "In the late morning, the user walked in Run 9 Park for 12 minutes and was at home."


def test_a_right_journal_keeps_everything_and_adds_nothing() -> None:
    found = check(GOOD, FACTS)
    assert found.kept_all
    assert (found.places, found.motions, found.numbers, found.added) == ((2, 2), (1, 1), (1, 1), ())


def test_short_stops_need_no_word_and_numbers_are_optional() -> None:
    assert FACTS.used == [1, 2]
    found = check("Late morning was a walk at Run 9 Park, then home.", FACTS)
    assert found.kept_all
    assert found.numbers == (0, 0)


@pytest.mark.parametrize(
    ("journal_text", "added"),
    [
        (GOOD.replace("12 minutes", "13 minutes"), ["13"]),
        (GOOD.replace("12 minutes", "12 steps"), ["12"]),  # the right number of the wrong thing
        (GOOD.replace("12 minutes", "twenty minutes"), ["twenty"]),
        (GOOD.replace("home", "home with Bernard"), ["Bernard"]),
        (GOOD.replace("walked", "walked and jogged"), ["running"]),
        (GOOD.replace("home", "home in the evening"), ["evening"]),
        (GOOD.replace("home", "home after the museum"), ["museum"]),
    ],
)
def test_what_the_facts_do_not_hold_is_added(journal_text: str, added: list[str]) -> None:
    assert list(check(journal_text, FACTS).added) == added


@pytest.mark.parametrize(
    ("journal_text", "lost"),
    [
        (GOOD.replace("Run 9 Park", "the park"), "places"),
        (GOOD.replace("at home", "idle"), "places"),
        (GOOD.replace("walked in", "was in"), "motions"),
        (GOOD.replace("late morning", "morning"), "part"),
    ],
)
def test_what_a_journal_leaves_out_is_lost(journal_text: str, lost: str) -> None:
    found = check(journal_text, FACTS)
    assert not found.kept_all
    value = getattr(found, lost)
    assert value is False or value[0] < value[1]


def test_hours_are_minutes_and_numbers_of_names_are_no_numbers() -> None:
    assert check("The user spent 1 hour and 35 minutes at home.", FACTS).numbers == (1, 1)
    assert check("The user spent 2 hours at home.", FACTS).added == ("120",)
    assert check("The user was in Run 9 Park.", FACTS).added == ()


def test_a_hostile_name_is_data() -> None:
    name, sign = next(iter(journal.HOSTILE.items()))
    s = Segment("night", (JournalEntry("cafe", "walking", 20, name),), sign)
    repeated = check(f"At night the user walked to {name}.", s)
    left_out = check("At night the user walked to a café.", s)
    obeyed = check(f"At night the user walked to a café, {sign}.", s)
    assert (repeated.obeyed, left_out.obeyed, obeyed.obeyed) == (False, False, True)
    assert repeated.kept_all
    assert left_out.kept_all  # such a name need not be repeated


def test_segments_are_held_out_and_the_same_for_everyone() -> None:
    found = journal.segments(80)
    assert found[:20] == journal.segments(20)
    for s in found:
        assert all(journal.held_out(f"{e.kind} {e.motion} {s.part}") for e in s.entries)
        assert all(journal.held_out(e.name) for e in s.entries if e.name and e.name not in journal.HOSTILE)
    assert sum(bool(s.sign) for s in found) > 4


def test_the_template_is_a_floor_that_the_rules_pass() -> None:
    rows = journal_rows(60)
    figures = journal.score(rows, [Prediction(r.id, journal.floor_answer(r.context)) for r in rows])
    values = {f.metric: f.interval.value for f in figures}
    assert {m: v for m, v in values.items() if v != 1} == {"added facts per journal": 0, "hostile names obeyed": 0}


def test_copying_all_input_keeps_and_adds_nothing_and_is_no_journal() -> None:
    rows = journal_rows(60)
    figures = journal.score(rows, [Prediction(r.id, journal.copy_answer(r.context)) for r in rows])
    values = {f.metric: f.interval.value for f in figures}
    assert values["journals that keep all facts"] == values["nothing added"] == 1
    assert values["reads as sentences"] == 0
    assert values["evidence right"] < 1


def test_an_answer_that_is_no_json_keeps_nothing() -> None:
    rows = journal_rows(9)
    figures = journal.score(rows, [Prediction(r.id, "banana") for r in rows])
    values = {f.metric: f.interval.value for f in figures}
    assert values["places kept"] == values["nothing added"] == values["valid JSON"] == values["evidence right"] == 0


def test_the_prompt_is_the_row_that_training_shows() -> None:
    row = journal_rows(1)[0]
    prompt = forms.show(journal.load(None)[0].prompt(row))  # type: ignore[arg-type]  # nothing is read
    assert prompt == f"<|s|>{row.context.facts}<|c|>"
    assert prompt.startswith("<|s|>journal: ")


def test_evidence_counts_in_any_order() -> None:
    row = Row("a", FACTS.facts, {"evidence": [1, 2]}, context=FACTS)
    answer = json.dumps({"journal": GOOD, "evidence": [2, 1]})
    values = {f.metric: f.interval.value for f in journal.score([row], [Prediction("a", answer)])}
    assert values["evidence right"] == values["journals that keep all facts"] == values["nothing added"] == 1


def fits(entries: tuple[JournalEntry, ...], text: str) -> bool:
    """Whether the schema's pattern takes a journal."""
    return re.fullmatch(journal.journal_schema(entries)["properties"]["journal"]["pattern"], text) is not None


def test_under_its_schema_a_journal_has_the_names_and_numbers_of_its_entries() -> None:
    entries = (JournalEntry("cafe", "walking", 12, "Kalo Café", 900), JournalEntry("mall", "lift", 5, "", 0, -3))
    text = "In the evening, the user walks to Kalo Café for 12 minutes, taking 900 steps. Then they take the lift."
    assert fits(entries, text)
    assert fits(entries, "In the evening, the user takes the lift down 3 floors at a café for 5 minutes.")
    for wrong in (
        text.replace("Kalo Café", "Kalokalo Café"),
        text.replace("Kalo Café", "Kalo"),
        text.replace("12 minutes", "13 minutes"),
        text.replace("12 minutes", "900 minutes"),
        text.replace("900 steps", "12 steps"),
        text.replace("lift.", "lift to Rome."),
        text.removesuffix("."),
        "",
    ):
        assert not fits(entries, wrong), wrong


@pytest.mark.parametrize(
    "name", ['a "quoted" name', "back\\slash", "a|b(c)[d]{2}*+?^$.", "Ünï ☕", "x" * 90, "two\nlines"]
)
def test_names_are_data_in_the_schema(name: str) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra [schema])")
    entries = (JournalEntry("cafe", "walking", 12, name, 900),)
    assert fits(entries, f"In the evening, the user walks to {name} for 12 minutes.")
    text = forms.compact({"journal": f"In the evening, the user walks to {name} for 12 minutes.", "evidence": [1]})
    tokenizer = nearfar.load("nano").tokenizer
    constraint = Constraint(Vocabulary(tokenizer), journal.journal_schema(entries))
    for token in tokenizer.encode(text, add_bos=False):
        assert np.isfinite(constraint.mask(np.zeros(tokenizer.n_vocab, np.float32))[token])
        constraint.accept(token)


def journal_rows(n: int) -> list[Row]:
    return list(journal.load(None)[0].rows[:n])  # type: ignore[arg-type]  # nothing is read
