"""The end of an answer that may still be taken back: ids that are not final yet, and the text that they would add.

| final ids ....... | provisional ids ..... |
detokenizer, stops    copies of both, some ids further
"""

from __future__ import annotations

from collections.abc import Collection

from nearfar.detokenize import Detokenizer
from nearfar.stop import StopMatcher


class Provisional:
    """Follows an answer: `push` a draft, `final` for the next token that stays, `retract` what was void.

    `detokenizer` and `stops` are those of the final text; their owner moves them on, here they are copied only.
    `most`: tokens that the answer may have.
    """

    def __init__(self, detokenizer: Detokenizer, stops: StopMatcher, stop_ids: Collection[int], most: int) -> None:
        self._detokenizer, self._stops, self._stop_ids, self._most = detokenizer, stops, stop_ids, most
        self._ahead: tuple[Detokenizer, StopMatcher] | None = None  # behind `_ids`; None: to be made again
        self._ids: list[int] = []
        self.n_final = 0

    @property
    def n(self) -> int:
        """Tokens of the answer, final or not."""
        return self.n_final + len(self._ids)

    def push(self, token: int) -> str | None:
        """The text of a draft, or None behind the end of the answer, where nobody will see it."""
        ends = self.n >= self._most or any(i in self._stop_ids for i in self._ids)
        if self._ahead is None:
            self._ahead = self._detokenizer.fork(), self._stops.fork()
            for i in self._ids:
                self._text(i)
        ends = ends or self._ahead[1].stopped
        text = self._text(token)
        self._ids.append(token)
        return None if ends else text

    def final(self, token: int) -> None:
        """The next token is final, and its text has gone through the detokenizer."""
        if self._ids:
            first = self._ids.pop(0)
            assert first == token, "a draft that was replaced and not retracted"
        if not self._ids:
            self._ahead = None
        self.n_final += 1

    def retract(self, index: int) -> None:
        """Tokens of the answer from `index` on never were."""
        del self._ids[max(0, index - self.n_final) :]
        self._ahead = None

    def _text(self, token: int) -> str:
        assert self._ahead is not None
        detokenizer, stops = self._ahead
        return "" if token in self._stop_ids else stops.push(detokenizer.push(token))
