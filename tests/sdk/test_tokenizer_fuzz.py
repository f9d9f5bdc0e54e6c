"""Any text can be encoded and comes back; any metadata gives a tokenizer or one of our errors."""

from __future__ import annotations

from functools import cache
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar.errors import TokenizerError, UnsupportedError
from nearfar.tokenizer import Tokenizer, tokenizer_from_metadata
from tests.sdk.vocabularies import ODD_CHARACTERS, byte_level, random_pieces, sentence_pieces

PRES = ("gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "deepseek-llm", "default", "falcon", "bloom", "deepseek-v3")
BPE = {pre: tokenizer_from_metadata(byte_level(pre)) for pre in PRES}

any_text = st.text(st.characters(exclude_categories=()))  # surrogates too
odd_text = st.lists(st.sampled_from(ODD_CHARACTERS)).map("".join)


@cache
def spm(across_words: bool, prefix: bool) -> Tokenizer:
    meta = sentence_pieces(random_pieces(7, across_words=across_words), add_space_prefix=prefix)
    return tokenizer_from_metadata(meta)


@given(st.sampled_from(PRES), st.text() | odd_text)
@settings(max_examples=200, deadline=None)
def test_byte_level_bpe_gives_every_text_back(pre: str, text: str) -> None:
    assert BPE[pre].decode(BPE[pre].encode(text)) == text


@given(st.booleans(), st.booleans(), st.text() | odd_text | st.text("ab é▁"))
@settings(max_examples=200, deadline=None)
def test_sentence_pieces_give_every_text_back_with_their_blanks_as_spaces(
    across_words: bool, prefix: bool, text: str
) -> None:
    tokenizer = spm(across_words, prefix)
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


@given(st.sampled_from(PRES), any_text, st.booleans())
@settings(max_examples=150, deadline=None)
def test_no_text_is_refused(pre: str, text: str, parse_special: bool) -> None:
    for tokenizer in (BPE[pre], spm(False, True)):
        ids = tokenizer.encode(text, parse_special=parse_special)
        assert all(0 <= i < tokenizer.n_vocab for i in ids)


@given(st.sampled_from(PRES), st.lists(st.sampled_from([*ODD_CHARACTERS, "<|e|>", "<|u|>", "<", "|", "e", ">"])))
@settings(max_examples=200, deadline=None)
def test_no_text_becomes_a_control_token(pre: str, parts: list[str]) -> None:
    text = "".join(parts)
    for tokenizer in (BPE[pre], spm(True, False)):
        assert not any(tokenizer.is_control(i) for i in tokenizer.encode(text, add_bos=False))


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64) | st.floats() | st.text(max_size=8)
values = scalars | st.lists(scalars, max_size=6)
KEYS = (
    "model", "pre", "tokens", "scores", "token_type", "merges", "bos_token_id", "eos_token_id", "eot_token_id",
    "unknown_token_id", "padding_token_id", "add_bos_token", "add_eos_token", "add_space_prefix",
)  # fmt: skip


@given(
    st.sampled_from(["gpt2", "llama"]),
    st.dictionaries(st.sampled_from(KEYS), values, max_size=4),
    st.lists(st.sampled_from(KEYS), max_size=2),
    st.lists(st.tuples(st.sampled_from(["tokens", "scores", "token_type", "merges"]), st.integers(0, 200), scalars)),
)
@settings(max_examples=200, deadline=None)
def test_any_metadata_gives_a_tokenizer_or_a_reason(
    kind: str, changed: dict[str, Any], dropped: list[str], edits: list[tuple[str, int, Any]]
) -> None:
    meta = byte_level(vocab_size=300) if kind == "gpt2" else sentence_pieces()
    for key, i, value in edits:
        entries = meta.get(f"tokenizer.ggml.{key}")
        if entries:
            entries[i % len(entries)] = value
    meta |= {f"tokenizer.ggml.{key}": value for key, value in changed.items()}
    for key in dropped:
        meta.pop(f"tokenizer.ggml.{key}", None)
    try:
        tokenizer = tokenizer_from_metadata(meta)
    except (TokenizerError, UnsupportedError):
        return
    tokenizer.decode(tokenizer.encode("the <s> 中\n"))
