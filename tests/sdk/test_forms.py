"""Row forms: golden texts, what counts as written by the model, and that user text never becomes a control token."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar import forms
from nearfar.forms import Part, Turn


def test_an_intent_row() -> None:
    row = forms.intent_prompt("hwu64", "Wake me at six, ann") + forms.intent_answer(
        "alarm_set", [("time", "six"), ("person", "ann"), ("person", "bo")]
    )
    call = '{"intent":"alarm_set","slots":{"time":" six","person":[" ann"," bo"]}}'
    assert forms.show(row) == f"<|s|>hwu64<|u|> Wake me at six, ann<|c|>{call}<|e|>"
    assert forms.show(p for p in row if p.answer) == f"{call}<|e|>"


def test_a_dialogue_with_a_call() -> None:
    turns = [
        Turn("u", "A bus to Oslo."),
        Turn("a", "It leaves at 9.", ((forms.call_json("FindBus", {"to": "Oslo"}), forms.result_json({"time": "9"})),)),
    ]
    setting = forms.service_line("Buses_1", {"FindBus": ["to", "from"], "BuyTicket": ["to"]})
    row = forms.dialogue(setting, turns)
    assert forms.show(row) == (
        "<|s|>Buses_1: FindBus(to, from) BuyTicket(to)<|u|> A bus to Oslo."
        '<|c|>{"call":"FindBus","args":{"to":" Oslo"}}<|r|>{"time":" 9"}<|a|> It leaves at 9.'
    )
    written = '<|c|>{"call":"FindBus","args":{"to":" Oslo"}}<|r|><|a|> It leaves at 9.'
    assert forms.show(p for p in row if p.answer) == written
    assert forms.show(forms.dialogue("", turns[:1])) == "<|u|> A bus to Oslo."


def test_a_home_row_is_read_in_lower_case() -> None:
    prompt = forms.home_prompt("Kitchen: light Ceiling Light", "  Turn OFF  the lights. ")
    call = forms.home_answer("HassTurnOff", {"area": "kitchen", "domain": "light"})
    row = forms.home_reply_prompt(prompt, call, "ok") + forms.reply("Turned off the lights in the kitchen.")
    assert forms.show(row) == (
        "<|s|> kitchen: light ceiling light<|u|> turn off the lights."
        '<|c|>{"intent":"HassTurnOff","slots":{"area":" kitchen","domain":" light"}}<|r|>ok'
        "<|a|>Turned off the lights in the kitchen.<|e|>"
    )
    assert forms.show(p for p in row if p.answer) == f"{call}<|r|>Turned off the lights in the kitchen.<|e|>"
    assert forms.home_answer("none") == '{"intent":"none"}'


def test_a_journal_row() -> None:
    entries = [
        forms.JournalEntry("office", "stationary", 29, "Hasvar Tower"),
        forms.JournalEntry("station", "stairs", 2, steps=80, floors=-3),
    ]
    facts = forms.journal_facts("late afternoon", entries)
    row = forms.journal_prompt(facts) + forms.journal_answer("In the late afternoon, the user works.", [1])
    assert forms.show(row) == (
        "<|s|>journal: late afternoon; 1 office [ Hasvar Tower] stationary 29 min; "
        "2 station stairs 2 min 80 steps -3 floors<|c|>"
        '{"journal":"In the late afternoon, the user works.","evidence":[1]}<|e|>'
    )


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(JSON_VALUES)
def test_spaced_values_mean_what_they_meant(value: object) -> None:
    assert forms.tight(forms.spaced(value)) == forms.tight(value)


def test_every_text_of_a_value_is_spaced_and_no_key_or_number() -> None:
    value = {"a b": "c", "n": 3, "many": ["d", " e", ""], "inner": {"k": "v"}}
    assert forms.spaced(value) == {"a b": " c", "n": 3, "many": [" d", " e", ""], "inner": {"k": " v"}}


def test_running_text_ends_once() -> None:
    assert forms.show(forms.plain("a tale", end=True)) == "a tale<|e|>"
    assert forms.show(forms.plain("a tale", end=False)) == "a tale"


FORMS = {
    "intent": lambda t: forms.intent_prompt(t, t) + forms.intent_answer(t, [(t, t)]),
    "dialogue": lambda t: forms.dialogue(t, [Turn("u", t), Turn("a", t, ((t, t),))]),
    "home": lambda t: forms.home_reply_prompt(forms.home_prompt(t, t), forms.home_answer("x"), t) + forms.reply(t),
    "journal": lambda t: forms.journal_prompt(t) + forms.journal_answer(t, [1]),
    "plain": lambda t: forms.plain(t, end=True),
}


@pytest.mark.parametrize("form", FORMS)
@given(text=st.text(alphabet="<|uaecrspd>x \n", max_size=30))
def test_text_never_looks_like_a_control_token(form: str, text: str) -> None:
    for part in FORMS[form](text):
        assert part.control == (part.text in forms.CONTROLS)
        assert part.control or "<|" not in part.text


class Bytes:
    """A tokenizer of bytes in which control tokens are parsed only when asked for."""

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        assert add_bos is False
        if parse_special:
            return [1000 + forms.CONTROLS.index(text)]
        return list(text.encode())


def test_only_control_parts_are_encoded_as_control_tokens() -> None:
    ids = forms.encode([Part("<|u|>", control=True), Part("say <|e|>"), Part("<|a|>", control=True)], Bytes())
    assert ids == [1002, *b"say <|e|>", 1003]


def test_the_last_turns_that_fit_begin_with_the_user() -> None:
    turns = [Turn("ua"[i % 2], f"{i:02d}" * 5) for i in range(10)]  # ten characters each
    assert forms.last_turns(turns, 1_000) == turns
    kept = forms.last_turns(turns, 50)
    assert list(kept) == turns[-4:]
    assert kept[0].speaker == "u"
    assert list(forms.last_turns(turns, 1)) == turns[-1:]
    assert list(forms.last_turns([], 10)) == []


@given(st.lists(st.tuples(st.sampled_from("abc"), st.text(min_size=1, max_size=3)), max_size=8))
def test_grouped_slots_keep_every_value_in_order(slots: list[tuple[str, str]]) -> None:
    grouped = forms.group_slots(slots)
    for kind in dict(slots):
        found = grouped[kind]
        assert (found if isinstance(found, list) else [found]) == [v for k, v in slots if k == kind]
    assert json.loads(forms.compact(grouped)) == grouped
