"""What a device has told of one answer, and whether it kept its word: indices, order, journal, tokens."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_BOTH = re.compile(r"ours ([0-9a-f]{12})…, theirs ([0-9a-f]{12})…\)")  # fingerprints of models, in a refusal


@dataclass(slots=True)
class Told:
    """One answer, over as many processes as it took.  `wrong`: what must not be, in words without a token.

    A process that takes the answer up tells all of it again; what was told before must come out the same.
    """

    ids: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    end: dict[str, int] | None = None  # counts, when it is over
    n_begun: int = 0
    n_refused: int = 0  # times that the device would not go on with other weights
    _next: int = 0  # index that must come now

    def hear(self, line: dict[str, Any]) -> None:
        """A line of device.py."""
        if "begin" in line:
            self._begin(line["begin"])
        elif "index" in line:
            self._token(line["index"], line["id"], line["source"], line["kept"])
        elif "end" in line:
            self._end(line["end"], line["journal"])
        elif "refused" in line:
            self._refusal(line["refused"], line["kept"])
        else:
            self.wrong.append(f"the answer has failed: {line.get('failed', 'it said something else')}")

    @property
    def is_over(self) -> bool:
        return self.end is not None or bool(self.wrong)

    def compare(self, right: Sequence[int]) -> None:
        """With the oracle's ids."""
        if self.ids == list(right):
            return
        pairs = zip(self.ids, right, strict=False)
        at = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(self.ids), len(right)))
        self.wrong.append(f"token {at} is not the oracle's ({len(self.ids)} tokens, the oracle has {len(right)})")

    def _begin(self, n_kept: int) -> None:
        self.n_begun += 1
        self._next = 0
        self._check_kept(n_kept)

    def _token(self, index: int, token: int, source: str, n_kept: int | None) -> None:
        if index != self._next:
            self.wrong.append(f"index {index} was told where {self._next} was due")
        self._next = index + 1
        if index < len(self.ids):
            if self.ids[index] != token or source != "journal":
                self.wrong.append(f"token {index} was told again as another one, or not out of the journal")
            return
        self.ids.append(token)
        if n_kept is not None and n_kept <= index:
            self.wrong.append(f"token {index} was told before it stood in the journal")

    def _refusal(self, why: str, n_kept: int) -> None:
        """It names both models, and what was told is kept; the same call goes on from there."""
        self.n_refused += 1
        both = _BOTH.search(why)
        if both is None or both[1] == both[2]:
            self.wrong.append(f"refused without the fingerprints of both models: {why}")
        self._check_kept(n_kept)

    def _check_kept(self, n_kept: int) -> None:
        if n_kept < len(self.ids):
            self.wrong.append(f"{len(self.ids)} tokens were told and {n_kept} stand in the journal")

    def _end(self, counts: dict[str, int], journal: list[int] | None) -> None:
        self.end = counts
        if self._next != len(self.ids):
            self.wrong.append(f"the answer ended at index {self._next}, {len(self.ids)} were told before")
        if journal is not None and journal[: len(self.ids)] != self.ids:
            self.wrong.append("the journal holds other tokens than were told")
