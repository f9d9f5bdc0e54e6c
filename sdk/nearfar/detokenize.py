"""Ids to text while they come: only whole characters leave.

Last stop of the walk, after the sampler.  A token may end in the middle of a character; its bytes wait here for the
rest, and `flush` gives U+FFFD for what never came.
"""

from __future__ import annotations

from codecs import getincrementaldecoder
from typing import Protocol


class TokenBytes(Protocol):
    """What the detokenizer needs of a tokenizer."""

    @property
    def add_space_prefix(self) -> bool: ...

    def token_bytes(self, i: int) -> bytes: ...

    def is_control(self, i: int) -> bool: ...

    def is_special(self, i: int) -> bool: ...


class Detokenizer:
    """The pieces of `push` and `flush`, joined, are `tokenizer.decode` of the ids pushed."""

    def __init__(self, tokenizer: TokenBytes, *, skip_special: bool = True, continues: bool = False) -> None:
        """`continues=True`: the ids go on with a text, so a space at their beginning belongs to the text.

        Otherwise they are a text of their own, and the space that SentencePiece models put before one is taken away.
        """
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._decoder = getincrementaldecoder("utf-8")("replace")
        self._strip = tokenizer.add_space_prefix and not continues

    def push(self, i: int) -> str:
        """The characters that token `i` completes."""
        if self._skip_special and self._tokenizer.is_control(i):
            return ""
        data = self._tokenizer.token_bytes(i)
        if self._strip and data:
            self._strip = False
            if not self._tokenizer.is_special(i):
                data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def fork(self) -> Detokenizer:
        """A copy that goes on by itself."""
        other = Detokenizer(self._tokenizer, skip_special=self._skip_special)
        other._strip = self._strip
        other._decoder.setstate(self._decoder.getstate())
        return other

    def flush(self) -> str:
        """U+FFFD if the ids ended in the middle of a character, else nothing."""
        return self._decoder.decode(b"", final=True)
