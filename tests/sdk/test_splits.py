"""The split is a property of the words: golden values, because a change would move test rows into training."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.splits import normalise, pieces, split_residue


@pytest.mark.parametrize(
    ("text", "words", "residue"),
    [
        ("turn off the kitchen lights", "turn off the kitchen lights", 9),
        ("Turn off,  the kitchen lights!", "turn off the kitchen lights", 9),
        ("what's the weather in Bogotá?", "whats the weather in bogotá", 13),
        ("Straße 12", "strasse 12", 10),
        ("", "", 16),
    ],
)
def test_the_split_of_a_text_never_changes(text: str, words: str, residue: int) -> None:
    assert (normalise(text), split_residue(text)) == (words, residue)


@given(st.text(max_size=40))
def test_spelling_and_punctuation_do_not_move_a_text(text: str) -> None:
    assert split_residue(text) == split_residue(f"  {text} ?!")
    assert normalise(normalise(text)) == normalise(text)
    assert 0 <= split_residue(text) < 20


@given(st.text(alphabet="ab \n", max_size=120), st.integers(5, 30))
def test_pieces_of_a_text_lose_no_word_and_fit(text: str, max_chars: int) -> None:
    found = pieces(text, max_chars)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(piece.strip() and len(piece) <= max_chars + 1 for piece in found)  # and the line break at its end


def test_a_text_is_cut_between_paragraphs() -> None:
    assert pieces("one two\n\nthree\n\nfour five six\n", 16) == ["one two\n\nthree\n\n", "four five six"]
