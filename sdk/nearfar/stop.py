"""Stop strings in a stream: text that might be the beginning of one is held back until it is decided."""

from __future__ import annotations

from collections.abc import Sequence

from nearfar.errors import UsageError


class StopMatcher:
    """Feed text pieces to `push`; it returns what may be shown.  After a match `stopped` is true, nothing follows."""

    def __init__(self, stops: Sequence[str]) -> None:
        if any(not stop for stop in stops):
            raise UsageError("a stop string is empty: expected at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Text that is certainly before any stop string."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def fork(self) -> StopMatcher:
        """A copy that goes on by itself."""
        other = StopMatcher(self._stops)
        other._held, other.stopped = self._held, self.stopped
        return other

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stops):
                return n
        return 0
