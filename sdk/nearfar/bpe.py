"""Byte-level BPE (tokenizer.ggml.model = "gpt2"): words become bytes, bytes become tokens by merges, lowest rank first.

Third stop of text -> ids: tokenizer -> pretokenize -> bpe.  The algorithm is that of Sennrich, Haddow and Birch
(2016, 1508.07909) over bytes written as 256 printable characters (Radford et al., GPT-2).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from heapq import heapify, heappop, heappush
from typing import Any

from nearfar.errors import TokenizerError
from nearfar.pretokenize import PreTokenizer, pre_tokenizer
from nearfar.text_table import TextIndex, TextTable
from nearfar.vocab import Vocab, utf8

_CACHED_WORDS = 1 << 14
_CACHED_LENGTH = 64  # longer words are merged each time, so the cache stays small


def _byte_alphabet() -> dict[int, str]:
    """byte -> its character: printable Latin-1 stands for itself, the others take U+0100, U+0101, ... in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + k) for k, b in enumerate(others)}


_CHARS = _byte_alphabet()
_BYTES = {char: byte for byte, char in _CHARS.items()}


class ByteLevelBPE:
    """Text to ids by merges.  `ranks` maps "left right" to the line of the merge."""

    add_space_prefix = False

    def __init__(self, vocab: Vocab, ranks: Mapping[str, int], pre: PreTokenizer) -> None:
        self._vocab, self._ranks, self._pre = vocab, ranks, pre
        self._cached = lru_cache(_CACHED_WORDS)(self._encode_word)

    @classmethod
    def from_metadata(cls, meta: Mapping[str, Any]) -> tuple[Vocab, ByteLevelBPE]:
        """Read the keys of a file.  Raises TokenizerError."""
        name = meta.get("tokenizer.ggml.pre")
        if not isinstance(name, str) or not name:
            raise TokenizerError(
                "the file has no tokenizer.ggml.pre, which says how its BPE cuts words: convert the model again"
            )
        pre = pre_tokenizer(name)
        vocab = Vocab.from_metadata(meta, bos=None, eos=None, unk=None, add_bos=pre.add_bos)
        return vocab, cls(vocab, _ranks(meta), pre)

    def encode(self, text: str, *, after_special: bool) -> list[int]:
        """Ids of text that holds no special token.  A byte that the vocabulary lacks becomes `unk_id`, or nothing."""
        ids: list[int] = []
        for word in self._pre.split(text):
            ids += self._cached(word) if len(word) <= _CACHED_LENGTH else self._encode_word(word)
        return ids

    def text_bytes(self, token: str) -> bytes:
        """The bytes that a normal token's text stands for; characters outside of the byte alphabet are themselves."""
        try:
            return bytes([_BYTES[char] for char in token])
        except KeyError:
            return b"".join(bytes([_BYTES[char]]) if char in _BYTES else utf8(char) for char in token)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        written = self._vocab.written
        text = word.encode().decode("latin-1").translate(_CHARS)
        if self._pre.ignore_merges and text in written:
            return (written[text],)
        ids: list[int | None] = []
        for symbol in merge_pairs(list(text), self._rank):
            found = written.get(symbol)
            ids += [found] if found is not None else [written.get(char, self._vocab.unk_id) for char in symbol]
        return tuple(i for i in ids if i is not None)

    def _rank(self, left: str, right: str) -> int | None:
        return self._ranks.get(f"{left} {right}")


def merge_pairs(symbols: list[str], rank: Callable[[str, str], float | None]) -> list[str]:
    """Join neighbours until no pair has a rank: the lowest rank first, the leftmost among equals.  O(n log n).

    A pair in the heap is (rank, left index, joined length).  It is stale if either side has changed since, and symbols
    only grow or vanish, so the joined length tells.
    """
    n = len(symbols)
    symbols, before, after = list(symbols), list(range(-1, n - 1)), list(range(1, n + 1))

    def pair(left: int, right: int) -> tuple[float, int, int] | None:
        found = rank(symbols[left], symbols[right])
        return None if found is None else (found, left, len(symbols[left]) + len(symbols[right]))

    heap = [p for p in (pair(i, i + 1) for i in range(n - 1)) if p is not None]
    heapify(heap)
    while heap:
        _, left, length = heappop(heap)
        right = after[left]
        if not symbols[left] or right == n or len(symbols[left]) + len(symbols[right]) != length:
            continue
        symbols[left], symbols[right] = symbols[left] + symbols[right], ""
        after[left] = after[right]
        if after[left] < n:
            before[after[left]] = left
        for i, j in ((before[left], left), (left, after[left])):
            new = pair(i, j) if i >= 0 and j < n else None
            if new is not None:
                heappush(heap, new)
    return [symbol for symbol in symbols if symbol]


def _ranks(meta: Mapping[str, Any]) -> Mapping[str, int]:
    """The merge lines with their numbers; a line that occurs twice has its first number."""
    merges = meta.get("tokenizer.ggml.merges")
    if merges is None:
        raise TokenizerError("the file has no tokenizer.ggml.merges, which byte-level BPE needs")
    if isinstance(merges, TextTable):
        wrong = merges.without_inner(ord(" "))
        if wrong is not None:
            raise _no_pair(wrong, merges[wrong])
        return TextIndex(merges)
    if not isinstance(merges, (list, tuple)) or not set(map(type, merges)) <= {str}:
        raise TokenizerError("tokenizer.ggml.merges: expected a list of texts")
    for i, merge in enumerate(merges):
        if " " not in merge[1:-1]:
            raise _no_pair(i, merge)
    n = len(merges)
    return dict(zip(reversed(merges), range(n - 1, -1, -1), strict=True))


def _no_pair(i: int, merge: str) -> TokenizerError:
    return TokenizerError(f"tokenizer.ggml.merges[{i}]={merge[:40]!r}: expected two symbols with a space between")
