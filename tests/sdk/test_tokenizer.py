"""The tokenizers of GGUF files: reference vectors, special tokens, what text may never become, damaged files."""

from __future__ import annotations

from typing import Any

import pytest

from nearfar.errors import TokenizerError, UnsupportedError, UsageError
from nearfar.forms import Part
from nearfar.gguf_reader import GGUFFile
from nearfar.pretokenize import known_pre_tokenizers, pre_tokenizer
from nearfar.tokenizer import Tokenizer, tokenizer_from_metadata
from tests.paths import SHARED, needs_shared
from tests.sdk.vocabularies import CONTROLS, byte_level, nasty_texts, sentence_pieces

# One name of each pre-tokenizer: most have several.
PRE_TOKENIZERS = {pre_tokenizer(name): name for name in known_pre_tokenizers()}.values()


def real(name: str) -> Tokenizer:
    with GGUFFile.open(SHARED / "tokenizers" / f"ggml-vocab-{name}.gguf") as file:
        return tokenizer_from_metadata(file.metadata)


@needs_shared
@pytest.mark.parametrize("name", ["gpt-2", "phi-3"])
def test_the_reference_vectors_are_reproduced(name: str) -> None:
    path = SHARED / "tokenizers" / f"ggml-vocab-{name}.gguf"
    texts = path.with_name(path.name + ".inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = path.with_name(path.name + ".out").read_text().split("\n")
    tokenizer = real(name)
    assert len(texts) == len(lines) == 47
    for text, line in zip(texts, lines, strict=True):
        ids = [int(i) for i in line.split()]
        assert tokenizer.encode(text, add_bos=False) == ids, text
        assert tokenizer.decode(ids) == text


@needs_shared
def test_the_special_ids_of_the_reference_files() -> None:
    gpt2, phi3 = real("gpt-2"), real("phi-3")
    assert (gpt2.n_vocab, gpt2.bos_id, gpt2.eos_id, gpt2.add_bos) == (50257, 50256, 50256, False)
    assert gpt2.eog_ids == {50256}
    assert (phi3.n_vocab, phi3.bos_id, phi3.eos_id, phi3.add_bos) == (32064, 1, 32000, True)
    assert phi3.eog_ids == {2, 32000, 32007}  # </s>, <|endoftext|>, <|end|>


# --- beginning and end


def test_the_beginning_is_added_as_the_file_says_unless_told_otherwise() -> None:
    spm = tokenizer_from_metadata(sentence_pieces())
    assert spm.encode("ab") == [1, *spm.encode("ab", add_bos=False)]
    quiet = tokenizer_from_metadata(sentence_pieces(add_bos_token=False))
    assert quiet.encode("ab") == quiet.encode("ab", add_bos=False)
    assert quiet.encode("ab", add_bos=True)[0] == 1
    assert spm.encode("") == [1]


def test_the_end_is_added_only_when_asked() -> None:
    tokenizer = tokenizer_from_metadata(byte_level(add_eos_token=True))
    assert tokenizer.add_eos
    assert tokenizer.encode("ab", add_eos=True) == [*tokenizer.encode("ab"), tokenizer.eos_id]


def test_a_tokenizer_without_a_beginning_cannot_add_one() -> None:
    meta = byte_level()
    del meta["tokenizer.ggml.bos_token_id"]
    with pytest.raises(UsageError, match="no beginning-of-text token"):
        tokenizer_from_metadata(meta).encode("ab", add_bos=True)


def test_llama3_files_begin_with_bos_without_a_key() -> None:
    meta = byte_level("llama-bpe")
    del meta["tokenizer.ggml.add_bos_token"]
    tokenizer = tokenizer_from_metadata(meta)
    assert tokenizer.encode("ab")[0] == tokenizer.bos_id


# --- special tokens


@pytest.mark.parametrize("make", [byte_level, lambda: sentence_pieces(user_defined=())])
def test_control_tokens_are_read_only_when_asked(make: Any) -> None:
    meta = make()
    tokenizer = tokenizer_from_metadata(meta)
    names = CONTROLS if meta["tokenizer.ggml.model"] == "gpt2" else ("<s>", "</s>", "<unk>")
    for name in names:
        special = tokenizer.token_id(name)
        assert special is not None
        assert tokenizer.encode(name, add_bos=False, parse_special=True) == [special]
        plain = tokenizer.encode(f"a{name}b {name}", add_bos=False)
        assert not any(tokenizer.is_control(i) for i in plain)
        assert tokenizer.decode(plain) == f"a{name}b {name}"


def test_merges_that_spell_a_control_token_leave_it_text() -> None:
    meta = byte_level("qwen2")
    meta["tokenizer.ggml.tokens"] += ["STOP"]
    meta["tokenizer.ggml.token_type"] += [3]
    meta["tokenizer.ggml.merges"] += ["S T", "ST O", "STO P"]
    tokenizer = tokenizer_from_metadata(meta)
    ids = tokenizer.encode("STOP")
    assert tokenizer.token_id("STOP") not in ids
    assert tokenizer.decode(ids) == "STOP"
    meta["tokenizer.ggml.pre"] = "llama-bpe"  # whole words are looked up there
    assert tokenizer.token_id("STOP") not in tokenizer_from_metadata(meta).encode("STOP")


def test_pieces_that_spell_a_control_or_byte_token_leave_it_text() -> None:
    pieces = {"<": -1.0, "s": -1.0, ">": -1.0, "<s": -0.5, "0": -1.0, "x": -1.0, "A": -1.0, "<0": -0.4, "<0x": -0.3}
    pieces |= {"<0x0": -0.2, "<0x0A": -0.1, "▁": -1.0}
    tokenizer = tokenizer_from_metadata(sentence_pieces(pieces, add_space_prefix=False))
    assert tokenizer.decode(tokenizer.encode("<s><0x0A>")) == "<s><0x0A>"
    assert not {1, tokenizer.vocab.ids["<0x0A>"]} & set(tokenizer.encode("<s><0x0A>", add_bos=False))


def test_user_defined_tokens_are_found_in_any_text() -> None:
    meta = byte_level()
    meta["tokenizer.ggml.tokens"] += ["  ", "<tool>"]
    meta["tokenizer.ggml.token_type"] += [4, 4]
    tokenizer = tokenizer_from_metadata(meta)
    spaces, tool = tokenizer.n_vocab - 2, tokenizer.n_vocab - 1
    assert tokenizer.encode("a  b<tool>")[1::2] == [spaces, tool]
    assert tokenizer.decode(tokenizer.encode("a  b<tool>")) == "a  b<tool>"
    assert not tokenizer.is_control(tool)


def test_the_longest_special_token_is_found_first() -> None:
    meta = byte_level()
    meta["tokenizer.ggml.tokens"] += ["<x>", "<x><x>"]
    meta["tokenizer.ggml.token_type"] += [4, 4]
    tokenizer = tokenizer_from_metadata(meta)
    n = tokenizer.n_vocab
    assert tokenizer.encode("<x><x><x>") == [n - 1, n - 2]


def test_parts_become_control_tokens_only_where_they_are_marked() -> None:
    tokenizer = tokenizer_from_metadata(byte_level())
    user, end = tokenizer.token_id("<|u|>"), tokenizer.token_id("<|e|>")
    ids = tokenizer.encode_parts([Part("<|u|>", True), Part("the <|e|>"), Part(" end"), Part("<|e|>", True)])
    assert ids == [user, *tokenizer.encode("the <|e|> end"), end]
    assert tokenizer.encode_parts([Part("[INST]", True), Part(" hi")]) == tokenizer.encode("[INST] hi")


def test_text_never_becomes_a_marked_part_even_where_the_file_calls_it_user_defined() -> None:
    meta = byte_level()
    meta["tokenizer.ggml.token_type"][-7:] = [4] * 7
    tokenizer = tokenizer_from_metadata(meta)
    user = tokenizer.token_id("<|u|>")
    assert tokenizer.encode("<|u|>") == [user]
    ids = tokenizer.encode_parts([Part("<|u|>", True), Part("a<|u|>b")])
    assert ids.count(user) == 1
    assert tokenizer.decode(ids[1:]) == "a<|u|>b"


def test_text_that_cannot_be_kept_apart_from_a_marked_part_is_refused() -> None:
    pieces = {"[": -1.0, "X": -1.0, "]": -1.0, "[X": -0.5, "▁": -1.0}
    tokenizer = tokenizer_from_metadata(sentence_pieces(pieces, user_defined=("[X]",), add_space_prefix=False))
    with pytest.raises(UsageError, match="spells a control token"):
        tokenizer.encode_parts([Part("[X]", True), Part("[X]")])


# --- texts that are hard


def test_words_are_cut_without_losing_anything() -> None:
    for pre in map(pre_tokenizer, PRE_TOKENIZERS):
        for text in nasty_texts(50, seed=5):
            words = pre.split(text)
            assert "".join(words) == text
            assert all(words)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_long_runs_take_no_more_than_their_length(pre: str) -> None:
    tokenizer = tokenizer_from_metadata(byte_level(pre))
    for run in (" ", "\n", "a", "A", "1", "!", "é", " a", "\t ", "\n ", "A1", "'", "\u0301", "中"):
        text = run * 2000
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_surrogates_are_joined_or_replaced() -> None:
    for tokenizer in map(tokenizer_from_metadata, (byte_level(), sentence_pieces())):
        assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "😀"
        assert tokenizer.decode(tokenizer.encode("a\ud83dé\udc80")) == "a\ufffdé\ufffd"


def test_a_byte_that_the_vocabulary_lacks_becomes_unknown_or_nothing() -> None:
    meta = byte_level()
    last = meta["tokenizer.ggml.tokens"].index("z")
    meta["tokenizer.ggml.tokens"][last] = "[UNK]"
    meta["tokenizer.ggml.token_type"][last] = 2
    meta["tokenizer.ggml.merges"] = []
    assert tokenizer_from_metadata(meta).encode("zz") == []
    meta["tokenizer.ggml.unknown_token_id"] = last
    assert tokenizer_from_metadata(meta).encode("zz") == [last, last]


def test_a_character_without_byte_tokens_becomes_unknown() -> None:
    meta = sentence_pieces()
    for i in range(3, 259):
        meta["tokenizer.ggml.tokens"][i] = f"[{i}]"
        meta["tokenizer.ggml.token_type"][i] = 5
    tokenizer = tokenizer_from_metadata(meta)
    ids = tokenizer.encode("a中b", add_bos=False)
    assert ids[1] == tokenizer.vocab.unk_id == 0
    assert tokenizer.decode(ids) == "ab"


# --- decoding


def test_control_tokens_are_shown_only_when_asked() -> None:
    tokenizer = tokenizer_from_metadata(byte_level())
    ids = tokenizer.encode("<|u|>the end<|e|>", parse_special=True)
    assert tokenizer.decode(ids) == "the end"
    assert tokenizer.decode(ids, skip_special=False) == "<|u|>the end<|e|>"


def test_an_id_outside_of_the_vocabulary_is_refused() -> None:
    tokenizer = tokenizer_from_metadata(byte_level())
    for i in (-1, tokenizer.n_vocab):
        with pytest.raises(UsageError, match=f"token {i}: expected 0"):
            tokenizer.token_bytes(i)


# --- damaged files


def test_a_file_without_tokenizer_says_so() -> None:
    for meta in ({}, {"tokenizer.ggml.model": "no_vocab"}):
        with pytest.raises(TokenizerError, match="carries no tokenizer"):
            tokenizer_from_metadata(meta)


def test_an_unknown_kind_of_tokenizer_is_unsupported() -> None:
    with pytest.raises(UnsupportedError, match=r"'bert'.*llama.*gpt2"):
        tokenizer_from_metadata({"tokenizer.ggml.model": "bert"})


def test_an_unknown_pre_tokenizer_names_itself_and_the_known_ones() -> None:
    with pytest.raises(TokenizerError, match=r"pre='klingon'.*smollm.*qwen2"):
        tokenizer_from_metadata(byte_level("klingon"))


N = len(byte_level()["tokenizer.ggml.tokens"])


@pytest.mark.parametrize(
    ("make", "key", "value", "message"),
    [
        (byte_level, "tokens", None, "carries no tokenizer"),
        (byte_level, "tokens", [], "at least one"),
        (byte_level, "tokens", ["a", 3], "list of texts"),
        (byte_level, "tokens", ["a"] * N, "'a' is token 0 and token 1"),
        (byte_level, "tokens", ["a", "b"], f"token_type has {N} entries, tokenizer.ggml.tokens 2"),
        (byte_level, "token_type", [1, 1], f"token_type has 2 entries, tokenizer.ggml.tokens {N}"),
        (byte_level, "token_type", [1.0] * N, "list of int"),
        (byte_level, "token_type", [6] * N, "token 0 is a byte token named"),
        (byte_level, "merges", None, "no tokenizer.ggml.merges"),
        (byte_level, "merges", ["t h", "the"], r"merges\[1\]='the'"),
        (byte_level, "merges", [" t"], r"merges\[0\]=' t'"),
        (byte_level, "merges", ["t "], r"merges\[0\]='t '"),
        (byte_level, "merges", [b"t h"], "list of texts"),
        (byte_level, "pre", None, "no tokenizer.ggml.pre"),
        (byte_level, "eos_token_id", N, f"eos_token_id={N}: expected a token, 0..{N - 1}"),
        (byte_level, "bos_token_id", -1, "bos_token_id=-1"),
        (byte_level, "eot_token_id", 1 << 63, "eot_token_id="),
        (byte_level, "eos_token_id", "3", "eos_token_id=3"),
        (byte_level, "add_bos_token", 1, "add_bos_token=1: expected true or false"),
        (sentence_pieces, "scores", None, "no tokenizer.ggml.scores"),
        (sentence_pieces, "scores", [0.0], "scores has 1 entries"),
        (sentence_pieces, "scores", ["0"] * 267, "list of float or int"),
        (sentence_pieces, "scores", [float("nan")] * 267, "found NaN"),
        (sentence_pieces, "add_space_prefix", "yes", "add_space_prefix=yes"),
    ],
)
def test_damaged_metadata_is_refused_with_a_reason(make: Any, key: str, value: Any, message: str) -> None:
    meta = make()
    if value is None:
        del meta[f"tokenizer.ggml.{key}"]
    else:
        meta[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(TokenizerError, match=message):
        tokenizer_from_metadata(meta)


def test_a_beginning_that_is_wanted_but_not_named_is_refused() -> None:
    meta = byte_level(add_bos_token=True)
    del meta["tokenizer.ggml.bos_token_id"]
    with pytest.raises(TokenizerError, match="add_bos_token is on, but no bos_token_id"):
        tokenizer_from_metadata(meta)


def test_what_llama_cpp_tolerates_is_tolerated() -> None:
    meta = byte_level()
    meta["tokenizer.ggml.tokens"] += ["", "\udcff"]  # an empty token and one that is no UTF-8
    meta["tokenizer.ggml.token_type"] += [1, 9]
    meta["tokenizer.ggml.merges"] += [meta["tokenizer.ggml.merges"][0], "q q q"]
    tokenizer = tokenizer_from_metadata(meta)
    text = "the qqq lights"
    assert tokenizer.encode(text) == tokenizer_from_metadata(byte_level()).encode(text)
    del meta["tokenizer.ggml.token_type"]
    assert tokenizer_from_metadata(meta).token_bytes(tokenizer.n_vocab - 1) == b"\xff"
