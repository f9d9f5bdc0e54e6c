"""Drafts from the text itself: what followed the same words earlier (prompt lookup; the n-gram form of speculation)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LONGEST, SHORTEST = 4, 2  # ids that have to repeat
LOOK_BACK = 8192  # positions that are searched


class NGram:
    """Proposes what followed the last occurrence of the longest suffix that has occurred before: the readable form."""

    def propose(self, ids: Sequence[int], n: int) -> list[int]:
        """At most `n` ids; none where nothing repeats."""
        text = np.asarray(ids[-LOOK_BACK:], np.int32)
        for length in range(min(LONGEST, len(text) - 1), SHORTEST - 1, -1):
            suffix = text[-length:]
            windows = np.lib.stride_tricks.sliding_window_view(text[:-1], length)
            places = np.flatnonzero((windows == suffix).all(axis=1))
            if len(places):
                after = int(places[-1]) + length
                return [int(i) for i in text[after : after + n]]
        return []


class NGramIndex:
    """The same for one text that only grows: each id is looked at once, and then only places that fit.

    The latest end of each pair of ids is known, and for each end the one before it with the same pair.
    """

    def __init__(self) -> None:
        self._last: dict[tuple[int, int], int] = {}
        self._before: list[int] = [0, 0]  # end -> an earlier end of the same pair of ids, 0: none

    def propose(self, ids: Sequence[int], n: int) -> list[int]:
        """At most `n` ids; none where nothing repeats."""
        for end in range(len(self._before), len(ids)):  # not the end of the text: that is what is looked for
            pair = ids[end - 2], ids[end - 1]
            self._before.append(self._last.get(pair, 0))
            self._last[pair] = end
        n_ids, best, longest = len(ids), 0, SHORTEST - 1
        at = self._last.get((ids[-2], ids[-1]), 0) if n_ids > SHORTEST else 0
        while at and longest < LONGEST:
            start = max(0, n_ids - LOOK_BACK)
            length = SHORTEST
            while length < LONGEST and at - length > start and ids[at - length - 1] == ids[n_ids - length - 1]:
                length += 1
            if at - length < start:
                break
            if length > longest:
                best, longest = at, length
            at = self._before[at]
        return [int(i) for i in ids[best : best + n]] if best else []
