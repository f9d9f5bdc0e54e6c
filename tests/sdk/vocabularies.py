"""Small tokenizers as GGUF metadata, and nasty texts: the material of the tokenizer tests."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

CONTROLS = ("<|pad|>", "<|e|>", "<|u|>", "<|a|>", "<|c|>", "<|r|>", "<|s|>")

CORPUS = (
    "The kitchen lights go off in ten minutes, and the hall's 25 lamps don't. I'll go, we've been; THEY'RE here!",
    "for i in range(10):\n    if x[i] >= 3.14:\n\t\treturn self.value_of(i)  # no comment\n\n\n",
    "Füße und Straßen, déjà vu, Việt Nam, Ελληνικά, Привет мир, 你好世界，再见。 こんにちは 안녕하세요 ١٢٣ ½ ⅔ x² 🙂🙂",
    "12345 1234567 3.3 3..3 --- ===> <<>> (a) [b] {c} \"quoted\" 'told' `code` $5 + €6 = ~£9 | 50%",
)

# Characters whose class, case or length a tokenizer could get wrong.
ODD_CHARACTERS = (
    " ", "  ", "   ", "\t", "\n", "\n\n", "\r\n", "\v", "\f", "\x00", "\x1c", "\x1f", "\x7f", "\x85", "\xa0", "\xad",
    "\u1680", "\u180e", "\u2003", "\u200b", "\u200d", "\u2028", "\u202f", "\u2060", "\u3000", "\ufeff", "\ufffd",
    "\ue000", "\uffff", "\U0010ffff", "\u0378", "\U000e0041",
    "a", "Z", "the", "THE", "ß", "ǅ", "ʰ", "ª", "İ", "ı", "ſ", "Ω", "ж", "א", "ب", "क", "ि", "ก", "ខ", "가", "ｱ", "中",
    "\u0301", "e\u0301", "\u20e3", "0", "7", "42", "123", "1234", "٣", "²", "½", "Ⅷ", "〇", "𝟗", "々",
    ".", ",", "!", "?", "'", "''", "'s", "'S", "'t", "'re", "'LL", "'ve", "’s", "\"", "`", "-", "_", "/", "//", "@",
    "$", "+", "<", "=", ">", "^", "~", "|", "€", "«", "»", "…", "。", "，", "！", "～", "(", ")", "[", "]", "{", "}",
    "#", "\\", "<|", "|>", "<0x41>", "<s>", "</s>", "▁", "Ġ", "Ċ", "🦙", "😶\u200d🌫\ufe0f", "👩\u200d👩\u200d👧",
)  # fmt: skip


def nasty_texts(n: int, seed: int = 0) -> list[str]:
    """Texts drawn from odd characters and the words of the corpus."""
    rng = random.Random(seed)
    words = " ".join(CORPUS).split()
    pools = (ODD_CHARACTERS, words, [" " + word for word in words])
    return [
        "".join(rng.choice(rng.choices(pools, (5, 1, 2))[0]) for _ in range(rng.choice((1, 2, 3, 5, 8, 20, 60))))
        for _ in range(n)
    ]


@cache
def _trained(vocab_size: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(tokens, merges) learnt without cutting words, so that a wrong cut anywhere shows in the ids."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    # No token spells an end token: llama.cpp would make one of text then, and we never do.
    texts = [text.replace("s>", "") for text in (*CORPUS, *nasty_texts(4000, seed=1))]
    bpe.train_from_iterator(texts, trainer=trainer)
    vocab = bpe.get_vocab()
    merges = json.loads(bpe.to_str())["model"]["merges"]
    lines = tuple(m if isinstance(m, str) else " ".join(m) for m in merges)
    return tuple(sorted(vocab, key=vocab.__getitem__)), lines


def byte_level(pre: str = "gpt-2", vocab_size: int = 1500, **keys: Any) -> dict[str, Any]:
    """Metadata of a byte-level BPE; `keys` are further `tokenizer.ggml` keys."""
    tokens, merges = _trained(vocab_size)
    n = len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [*tokens, *CONTROLS],
        "tokenizer.ggml.token_type": [1] * n + [3] * len(CONTROLS),
        "tokenizer.ggml.merges": list(merges),
        "tokenizer.ggml.eos_token_id": n + CONTROLS.index("<|e|>"),
        "tokenizer.ggml.bos_token_id": n + CONTROLS.index("<|s|>"),
        "tokenizer.ggml.add_bos_token": False,
    } | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def sentence_pieces(
    pieces: dict[str, float] | None = None, user_defined: tuple[str, ...] = (), **keys: Any
) -> dict[str, Any]:
    """Metadata of an SPM tokenizer with byte fallback."""
    if pieces is None:
        pieces = {"▁": -9.0, "a": -8.0, "b": -8.0, "▁a": -1.0, "ab": -2.0, "▁ab": -1.5, "é": -8.0, "éa": -3.0}
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *pieces, *user_defined]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + list(pieces.values()) + [0.0] * len(user_defined),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces) + [4] * len(user_defined),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def random_pieces(seed: int, *, across_words: bool) -> dict[str, float]:
    """Pieces over four characters, with many equal scores; `across_words` allows a space inside a piece."""
    rng = random.Random(seed)
    pieces = dict.fromkeys("ab▁é", -20.0)
    while len(pieces) < 120:
        piece = "".join(rng.choice("ab▁é") for _ in range(rng.randint(2, 6)))
        if across_words or "▁" not in piece.lstrip("▁"):
            pieces[piece] = float(-rng.randint(1, 12))
    return pieces


def write_vocab(path: Path, meta: dict[str, Any]) -> Path:
    """A GGUF file that holds only this tokenizer, for the outside engine."""
    w = gguf.GGUFWriter(str(path), "llama")
    for key, value in (("block_count", 1), ("context_length", 64), ("embedding_length", 8), ("feed_forward_length", 8)):
        w.add_uint32(f"llama.{key}", value)
    w.add_uint32("llama.attention.head_count", 1)
    w.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in meta.items():
        if key.endswith(".token_type"):
            w.add_token_types(value)
        elif isinstance(value, list):
            w.add_array(key, value)
        else:
            {str: w.add_string, bool: w.add_bool, int: w.add_uint32}[type(value)](key, value)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.close()
    return path
