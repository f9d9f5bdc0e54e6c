"""Our byte-level BPE against Hugging Face `tokenizers` on the same vocabulary, with the patterns of the models."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from nearfar.tokenizer import tokenizer_from_metadata
from tests.sdk.vocabularies import CONTROLS, byte_level, nasty_texts

SUFFIXES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
WORD = r"[^\r\n\p{L}\p{N}]?"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
)

# As in the tokenizer.json files of GPT-2, SmolLM, Llama 3, Qwen2, Mistral Nemo, GPT-4o, DeepSeek-Coder and -V3.
PATTERNS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [rf"{SUFFIXES}|{WORD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BLANKS}"],
    "qwen2": [rf"{SUFFIXES}|{WORD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{BLANKS}"],
    "tekken": [rf"{WORD}{UPPER}*{LOWER}+|{WORD}{UPPER}+{LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}"],
    "gpt-4o": [
        rf"{WORD}{UPPER}*{LOWER}+{SUFFIXES}?|{WORD}{UPPER}+{LOWER}*{SUFFIXES}?|\p{{N}}{{1,3}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{BLANKS}"
    ],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+", r"\p{N}"],
    "deepseek-v3": [r"\p{N}{1,3}", "[一-龥\u3040-ゟ゠-ヿ]+", DEEPSEEK3 + BLANKS],
}
IGNORE_MERGES = ("llama-bpe", "tekken")


def outside(pre: str, meta: dict[str, Any]) -> Tokenizer:
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ", 1)) for line in meta["tokenizer.ggml.merges"]]
    bpe = Tokenizer(BPE({t: i for i, t in enumerate(tokens)}, merges, ignore_merges=pre in IGNORE_MERGES))
    cuts = [pre_tokenizers.Split(Regex(p), "isolated") if isinstance(p, str) else p for p in PATTERNS[pre]]
    if isinstance(PATTERNS[pre][-1], str):
        cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROLS])
    return bpe


@pytest.mark.parametrize("pre", PATTERNS)
def test_ids_and_texts_are_those_of_hugging_face(pre: str) -> None:
    meta = byte_level(pre)
    ours, theirs = tokenizer_from_metadata(meta), outside(pre, meta)
    for text in nasty_texts(500, seed=4):
        # (?i) also takes the long s for an s; llama.cpp and we do not.
        text = text.replace("ſ", "")
        ids = ours.encode(text, add_bos=False)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert ours.decode(ids) == theirs.decode(ids) == text


def test_control_tokens_are_those_of_hugging_face() -> None:
    meta = byte_level("smollm")
    ours, theirs = tokenizer_from_metadata(meta), outside("smollm", meta)
    text = '<|s|>hwu64<|u|>wake me at 6<|c|>{"intent":"alarm_set"} <|e|> <|e|><|pad|>'
    assert ours.encode(text, add_bos=False, parse_special=True) == theirs.encode(text, add_special_tokens=False).ids
