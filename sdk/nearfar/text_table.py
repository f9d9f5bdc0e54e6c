"""Very many short texts without an object for each: the vocabulary of a large model.  The ground floor.

128,000 tokens and 280,000 merges are 6 MB in a file and were 75 MB as lists and dicts of str.  Here a text is read from
the file's map when somebody asks for it, and an index is one sorted array of hashes, 12 bytes a text.
"""

from __future__ import annotations

import mmap
import os
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import overload

import numpy as np
from numpy.typing import NDArray

LARGE = 1 << 16  # texts; smaller lists are faster as they are and cost little

_BLOCK = 1 << 14
_LENGTH = 8  # bytes before each text, which say how long it is


class TextTable(Sequence[str]):
    """Texts that lie in a map one after the other, each behind its length (u64).

    `starts` holds where each text begins, counted from `base`, and one more: where the one behind the last would.
    """

    def __init__(self, data: mmap.mmap | bytes, starts: array[int], base: int = 0) -> None:
        self._data, self._starts, self._base = data, starts, base

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return _text(self.raw(i))

    def __iter__(self) -> Iterator[str]:
        return map(_text, self.raws())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (list, TextTable)) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def raw(self, i: int) -> bytes:
        """The bytes of text `i`."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"text {i}: there are {len(self)}")
        i %= len(self)
        return self._data[self._base + self._starts[i] : self._base + self._starts[i + 1] - _LENGTH]

    def raws(self) -> Iterator[bytes]:
        """The bytes of each text."""
        first = self._starts[0]
        whole = self._data[self._base + first : self._base + self._starts[-1]]
        return (whole[a - first : b - first - _LENGTH] for a, b in pairwise(self._starts))

    def blocks(self) -> Iterator[tuple[int, NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]]:
        """The texts, some thousands at a time: number of the first, bytes, where each begins in them, how long it is.

        The lengths stand between the texts' bytes.  Blocks keep what is made of them small.
        """
        for first in range(0, len(self), _BLOCK):
            starts = np.array(self._starts[first : first + _BLOCK + 1], np.int64)
            whole = np.frombuffer(self._data[self._base + starts[0] : self._base + starts[-1]], np.uint8)
            yield first, whole, starts[:-1] - starts[0], np.diff(starts) - _LENGTH

    @property
    def has_empty(self) -> bool:
        return any(bool((lengths == 0).any()) for _, _, _, lengths in self.blocks())

    def without_inner(self, byte: int) -> int | None:
        """The first text that does not have `byte` between its first and its last byte."""
        for first, whole, starts, lengths in self.blocks():
            places = np.append(np.flatnonzero(whole == byte), len(whole) + 1)
            following = places[np.searchsorted(places, starts + 1)]
            wrong = np.flatnonzero(following > starts + lengths - 2)
            if wrong.size:
                return first + int(wrong[0])
        return None


# Hashes are keyed anew in each process: nobody can prepare texts that collide.
_KEY = int.from_bytes(os.urandom(8), "little")
_FACTOR = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1
_FEW = 256  # texts of a block; fewer long ones are hashed one by one


def text_hash(raw: bytes) -> int:
    """64 bits: h = key xor length; for each 8 bytes, filled up with zeros, h = (h xor them) * factor, h ^= h >> 32."""
    h = _KEY ^ len(raw)
    for i in range(0, len(raw), 8):
        h = (h ^ int.from_bytes(raw[i : i + 8], "little")) * _FACTOR & _WORD
        h ^= h >> 32
    return h


def text_hashes(table: TextTable) -> NDArray[np.uint64]:
    """`text_hash` of each text: their first 8 bytes at once, then the next 8 of those that have more."""
    found = np.empty(len(table), np.uint64)
    masks = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)
    for first, whole, starts, lengths in table.blocks():
        padded = np.append(whole, np.zeros(8, np.uint8))
        words = np.lib.stride_tricks.as_strided(padded, (len(whole) + 1, 8), (1, 1))
        h = np.uint64(_KEY) ^ lengths.astype(np.uint64)
        at, left = np.flatnonzero(lengths), 0
        while at.size > _FEW:
            word = words[starts[at] + left].view("<u8")[:, 0] & masks[np.minimum(lengths[at] - left, 8)]
            x = (h[at] ^ word) * np.uint64(_FACTOR)
            h[at] = x ^ x >> np.uint64(32)
            left += 8
            at = at[lengths[at] > left]
        for i in at.tolist():
            h[i] = text_hash(table.raw(first + i))
        found[first : first + len(h)] = h
    return found


class TextIndex(Mapping[str, int]):
    """text -> its first place in a table: a search in sorted hashes, then the text itself is compared."""

    def __init__(self, table: TextTable) -> None:
        hashes = text_hashes(table)
        order = np.argsort(hashes)
        if (np.diff(hashes[order]) == 0).any():
            order = np.argsort(hashes, kind="stable")  # three times as long; of equal texts the first one counts
        self._table = table
        self._hashes, self._places = array("Q", hashes[order].tobytes()), array("I", order.astype("u4").tobytes())

    def doubles(self) -> tuple[int, int] | None:
        """The places of two equal texts, if there are any."""
        hashes = np.frombuffer(self._hashes, np.uint64)
        for i in np.flatnonzero(hashes[1:] == hashes[:-1]):
            a, b = self._places[i], self._places[i + 1]
            if self._table.raw(a) == self._table.raw(b):
                return a, b
        return None

    def __getitem__(self, text: str) -> int:
        try:
            raw = text.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:  # a lone surrogate is in no file
            raise KeyError(text) from None
        wanted = text_hash(raw)
        i = bisect_left(self._hashes, wanted)
        while i < len(self._hashes) and self._hashes[i] == wanted:
            if self._table.raw(self._places[i]) == raw:
                return self._places[i]
            i += 1
        raise KeyError(text)

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)


class Without(Mapping[str, int]):
    """A mapping less some of its values."""

    def __init__(self, inner: Mapping[str, int], hidden: frozenset[int]) -> None:
        self._inner, self._hidden = inner, hidden

    def __getitem__(self, text: str) -> int:
        found = self._inner[text]
        if found in self._hidden:
            raise KeyError(text)
        return found

    def __iter__(self) -> Iterator[str]:
        return (text for text in self._inner if self._inner[text] not in self._hidden)

    def __len__(self) -> int:
        return len(self._inner) - len(self._hidden)


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
