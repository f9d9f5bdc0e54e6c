"""Our tokenizers against llama.cpp's on the same files: ids of nasty texts, ids that end an answer, bytes of tokens."""

from __future__ import annotations

import ctypes
import random
from pathlib import Path
from typing import Any

import pytest

from nearfar.gguf_reader import GGUFFile
from nearfar.pretokenize import known_pre_tokenizers
from nearfar.tokenizer import Tokenizer, tokenizer_from_metadata
from tests.paths import SHARED, needs_shared
from tests.sdk.vocabularies import (
    byte_level,
    nasty_texts,
    random_pieces,
    sentence_pieces,
    write_vocab,
)

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra [llama])")

# llama.cpp writes these patterns for a regex engine without \p{Lu}: it takes every non-ASCII letter as upper and lower
# case.  Ours are the models' own patterns (test_tokenizer_hf.py), so only ASCII texts can agree.
CASED = ("tekken", "gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2")
# And it hides non-ASCII spaces from patterns that name characters, although these patterns name U+2000..U+3000.
SPACED = ("deepseek-llm", "deepseek-coder")


def both(path: Path) -> tuple[Tokenizer, Any]:
    with GGUFFile.open(path) as file:
        ours = tokenizer_from_metadata(file.metadata)
    return ours, llama_cpp.Llama(str(path), vocab_only=True, verbose=False)


def outside_ids(llama: Any, text: str, *, special: bool = False, bos: bool = False) -> list[int]:
    return llama.tokenize(text.encode(), add_bos=bos, special=special)


def made(tmp_path: Path, meta: dict[str, Any]) -> tuple[Tokenizer, Any]:
    return both(write_vocab(tmp_path / "vocab.gguf", meta))


@pytest.mark.parametrize("pre", known_pre_tokenizers())
def test_every_pre_tokenizer_gives_llama_cpps_ids(tmp_path: Path, pre: str) -> None:
    ours, llama = made(tmp_path, byte_level(pre))
    texts = nasty_texts(120, seed=2)
    if pre in CASED:
        texts = [t for t in (text.encode("ascii", "ignore").decode() for text in texts) if t]
    if pre in SPACED:
        texts = ["".join(" " if char.isspace() and char > "\x7f" else char for char in text) for text in texts]
    for text in texts:
        assert ours.encode(text, add_bos=False) == outside_ids(llama, text), text


@needs_shared
@pytest.mark.parametrize("name", ["gpt-2", "phi-3"])
def test_real_vocabularies_give_llama_cpps_ids(name: str) -> None:
    ours, llama = both(SHARED / "tokenizers" / f"ggml-vocab-{name}.gguf")
    for text in nasty_texts(600, seed=3):
        assert ours.encode(text) == outside_ids(llama, text, bos=ours.add_bos), text
        assert ours.encode(text, add_bos=False, parse_special=True) == outside_ids(llama, text, special=True), text


@pytest.mark.parametrize("across_words", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_random_sentence_pieces_give_llama_cpps_ids(
    tmp_path: Path, seed: int, prefix: bool, across_words: bool
) -> None:
    pieces = random_pieces(seed, across_words=across_words)
    ours, llama = made(tmp_path, sentence_pieces(pieces, add_space_prefix=prefix))
    for text in nasty_texts(40, seed) + ["".join(c) for c in _abc_texts(seed)]:
        assert ours.encode(text) == outside_ids(llama, text, bos=True), text


def _abc_texts(seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choice("aabbb  é") for _ in range(rng.randint(1, 200))) for _ in range(100)]


def test_special_tokens_in_text_give_llama_cpps_ids(tmp_path: Path) -> None:
    meta = sentence_pieces(user_defined=("[IMG]", "[IMG][IMG]", "▁▁", "ab ab"))
    ours, llama = made(tmp_path, meta)
    texts = [
        "<s>a</s>",
        " <s> a </s> ab",
        "a[IMG][IMG][IMG]b",
        "ab ab ab",
        "a  b",
        "<s",
        "<s><s>",
        "[IMG]a",
        "</s></s> ",
    ]
    for text in texts:
        for special in (False, True):
            want = outside_ids(llama, text, special=special)
            assert ours.encode(text, add_bos=False, parse_special=special) == want, text


@needs_shared
def test_phi3_control_tokens_swallow_whitespace_as_in_llama_cpp() -> None:
    ours, llama = both(SHARED / "tokenizers" / "ggml-vocab-phi-3.gguf")
    for text in (
        "<|user|>\nHi <|end|>\n <|assistant|>\n  ok",
        "<s>  a",
        "<|end|> \t\v\n",
        "<|end|><|end|>  x",
        "</s>  y",
    ):
        assert ours.encode(text, add_bos=False, parse_special=True) == outside_ids(llama, text, special=True)
        assert ours.encode(text, add_bos=False) == outside_ids(llama, text)


@pytest.mark.parametrize(
    "names",
    [
        ("<|im_end|>", "<|im_start|>"),
        ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|start_header_id|>"),
        ("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>"),
        ("<end_of_turn>", "<start_of_turn>", "<eos>"),
        ("</s>", "[PAD]", "<unused0>"),
    ],
)
@pytest.mark.parametrize("kind", [1, 3, 4])
def test_the_ids_that_end_an_answer_are_llama_cpps(tmp_path: Path, names: tuple[str, ...], kind: int) -> None:
    meta = byte_level()
    meta["tokenizer.ggml.tokens"] += names
    meta["tokenizer.ggml.token_type"] += [kind] * len(names)
    ours, llama = made(tmp_path, meta)
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    ends = {i for i in range(ours.n_vocab) if llama_cpp.llama_vocab_is_eog(vocab, i)}
    control = {i for i in range(ours.n_vocab) if llama_cpp.llama_vocab_is_control(vocab, i)}
    assert ours.eog_ids == ends
    assert {i for i in range(ours.n_vocab) if ours.is_control(i)} == control


@needs_shared
@pytest.mark.parametrize("name", ["gpt-2", "phi-3"])
def test_every_tokens_bytes_are_llama_cpps(name: str) -> None:
    ours, llama = both(SHARED / "tokenizers" / f"ggml-vocab-{name}.gguf")
    vocab = llama_cpp.llama_model_get_vocab(llama.model)
    buffer = ctypes.create_string_buffer(1024)
    for i in range(ours.n_vocab):
        n = llama_cpp.llama_token_to_piece(vocab, i, buffer, len(buffer), 0, True)
        assert ours.token_bytes(i) == buffer.raw[:n], i
