"""SentencePiece's BPE (tokenizer.ggml.model = "llama"): characters become tokens, the pair with the best score first.

Third stop of text -> ids: tokenizer -> spm.  Spaces are written U+2581; a character that is no token is written as its
UTF-8 bytes, <0xXX> each (Kudo and Richardson, 2018, 1808.06226).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from math import isnan
from typing import Any

from nearfar.bpe import merge_pairs
from nearfar.errors import TokenizerError
from nearfar.vocab import Vocab, numbers, utf8

_BLANK = "\u2581"
_WORDS = re.compile(f"{_BLANK}*[^{_BLANK}]+|{_BLANK}+")
_CROSSES_WORDS = re.compile(f"[^{_BLANK}]{_BLANK}").search
_CACHED_WORDS = 1 << 14
_CACHED_LENGTH = 64


class SentencePieces:
    """Text to ids by scores.  With `add_space_prefix` a space is put before the text and after each special token."""

    def __init__(self, vocab: Vocab, scores: list[float], *, add_space_prefix: bool) -> None:
        self.add_space_prefix = add_space_prefix
        self._vocab, self._scores = vocab, scores
        self._byte_ids = [vocab.ids.get(f"<0x{byte:02X}>") for byte in range(256)]
        # Where no token holds a space behind something else, nothing is merged across the beginning of a word.
        self._merges_words = any(map(_CROSSES_WORDS, vocab.written))
        self._cached = lru_cache(_CACHED_WORDS)(self._encode_word)

    @classmethod
    def from_metadata(cls, meta: Mapping[str, Any]) -> tuple[Vocab, SentencePieces]:
        """Read the keys of a file.  Raises TokenizerError."""
        vocab = Vocab.from_metadata(meta, bos=1, eos=2, unk=0, add_bos=True)
        scores = numbers(meta, "scores", len(vocab.tokens), (float, int))
        if scores is None:
            raise TokenizerError("the file has no tokenizer.ggml.scores, which say what a SentencePiece model joins")
        if any(map(isnan, scores)):
            raise TokenizerError("tokenizer.ggml.scores: expected numbers, found NaN")
        prefix = meta.get("tokenizer.ggml.add_space_prefix", True)
        if not isinstance(prefix, bool):
            raise TokenizerError(f"tokenizer.ggml.add_space_prefix={str(prefix)[:40]}: expected true or false")
        return vocab, cls(vocab, scores, add_space_prefix=prefix)

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        """Ids of text that holds no special token; `after_special`: the text begins here, or a special token did."""
        if self.add_space_prefix and after_special:
            text = " " + text
        text = text.replace(" ", _BLANK)
        ids: list[int] = []
        for word in [text] if self._merges_words else _WORDS.findall(text):
            ids += self._cached(word) if len(word) <= _CACHED_LENGTH else self._encode_word(word)
        return ids

    def text_bytes(self, token: str) -> bytes:
        """The bytes that a normal token's text stands for."""
        return utf8(token.replace(_BLANK, " "))

    def _encode_word(self, word: str) -> tuple[int, ...]:
        ids: list[int] = []
        for symbol in merge_pairs(list(word), self._rank):
            found = self._vocab.written.get(symbol)
            ids += [found] if found is not None else self._byte_fallback(symbol)
        return tuple(ids)

    def _rank(self, left: str, right: str) -> float | None:
        found = self._vocab.written.get(left + right)
        return None if found is None else -self._scores[found]

    def _byte_fallback(self, char: str) -> list[int]:
        """The bytes of a character that is no token; without all of them one `unk_id`, or nothing."""
        ids = [i for i in (self._byte_ids[byte] for byte in char.encode()) if i is not None]
        if len(ids) == len(char.encode()):
            return ids
        return [] if self._vocab.unk_id is None else [self._vocab.unk_id]
