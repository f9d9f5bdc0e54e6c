"""Ids to text while they come: whole characters only, and nothing lost or added."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.detokenize import Detokenizer
from nearfar.tokenizer import Tokenizer, tokenizer_from_metadata
from tests.sdk.vocabularies import byte_level, nasty_texts, sentence_pieces


@cache
def tokenizers() -> tuple[Tokenizer, ...]:
    metas = (byte_level(), sentence_pieces(), sentence_pieces(add_space_prefix=False, user_defined=(" x", "[T]")))
    return tuple(tokenizer_from_metadata(meta) for meta in metas)


def pieces(tokenizer: Tokenizer, ids: list[int], *, continues: bool = False) -> list[str]:
    detokenizer = Detokenizer(tokenizer, continues=continues)
    return [detokenizer.push(i) for i in ids] + [detokenizer.flush()]


@settings(deadline=None)
@given(st.integers(0, 2), st.lists(st.integers(0, 1 << 16), max_size=40))
def test_the_pieces_joined_are_the_bytes_of_all_tokens_as_text(which: int, numbers: list[int]) -> None:
    tokenizer = tokenizers()[which]
    ids = [n % tokenizer.n_vocab for n in numbers]
    shown = [i for i in ids if not tokenizer.is_control(i)]
    data = b"".join(tokenizer.token_bytes(i) for i in shown)
    if tokenizer.add_space_prefix and shown and not tokenizer.is_special(shown[0]):
        data = data.removeprefix(b" ")
    assert "".join(pieces(tokenizer, ids)) == data.decode("utf-8", "replace") == tokenizer.decode(ids)


def test_a_character_leaves_whole_with_its_last_byte() -> None:
    tokenizer = tokenizer_from_metadata(sentence_pieces(add_space_prefix=False))
    ids = [3 + byte for byte in "é🙂中".encode()]  # byte tokens
    shown = pieces(tokenizer, ids)
    assert "".join(shown) == "é🙂中"
    assert [i for i, text in enumerate(shown) if text] == [1, 5, 8]


def test_a_broken_tail_becomes_one_replacement_character() -> None:
    tokenizer = tokenizer_from_metadata(sentence_pieces(add_space_prefix=False))
    shown = pieces(tokenizer, [3 + byte for byte in "a🙂".encode()[:-1]])
    assert shown == ["a", "", "", "", "\ufffd"]


def test_a_broken_character_in_the_middle_does_not_hold_up_the_text() -> None:
    tokenizer = tokenizer_from_metadata(sentence_pieces(add_space_prefix=False))
    shown = pieces(tokenizer, [3 + byte for byte in b"\xe4\xb8a\xffb"])
    assert shown == ["", "", "\ufffda", "\ufffd", "b", ""]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_texts_come_back_token_by_token(which: int) -> None:
    tokenizer = tokenizers()[which]
    for text in nasty_texts(200, seed=6):
        shown = pieces(tokenizer, tokenizer.encode(text))
        assert "".join(shown) == (text if which == 0 else text.replace("▁", " "))
        assert "\ufffd" in text or "\ufffd" not in "".join(shown)


def test_the_space_before_a_text_is_taken_away_and_the_one_that_goes_on_with_it_stays() -> None:
    tokenizer = tokenizer_from_metadata(sentence_pieces())
    ids = tokenizer.encode("ab a", add_bos=False)
    assert tokenizer.token_bytes(ids[0]) == b" ab"
    assert pieces(tokenizer, ids) == ["ab", " a", ""]
    assert pieces(tokenizer, [1, *ids]) == ["", "ab", " a", ""]
    assert pieces(tokenizer, ids, continues=True) == [" ab", " a", ""]
    assert "".join(pieces(tokenizer, tokenizer.encode("  ab"))) == "  ab"


def test_only_the_space_that_encoding_added_is_taken_away() -> None:
    meta = sentence_pieces(user_defined=(" x",))
    meta["tokenizer.ggml.tokens"] += ["unused"]
    meta["tokenizer.ggml.token_type"] += [5]
    meta["tokenizer.ggml.scores"] += [0.0]
    tokenizer = tokenizer_from_metadata(meta)
    spaced, unused = tokenizer.n_vocab - 2, tokenizer.n_vocab - 1
    first = tokenizer.encode("ab", add_bos=False)[0]
    assert tokenizer.encode(" xab", add_bos=False) == [spaced, first]
    assert pieces(tokenizer, [spaced, first]) == [" x", " ab", ""]
    assert pieces(tokenizer, [unused, first]) == ["", "ab", ""]


def test_control_tokens_leave_no_trace_in_the_middle_of_a_character() -> None:
    tokenizer = tokenizer_from_metadata(sentence_pieces(add_space_prefix=False))
    first, second = (3 + byte for byte in "é".encode())
    assert pieces(tokenizer, [first, 2, second]) == ["", "", "é", ""]
