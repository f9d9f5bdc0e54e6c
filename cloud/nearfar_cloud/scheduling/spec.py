"""How many drafts are worth checking: as many as bring the most tokens a second (SmartSpec, arXiv 2406.14066).

    goodput = sum over sequences of (1 + a + a^2 + ... + a^k)  /  t(their 1 + k rows)

`a` is how likely the next draft of a sequence holds, given that those before it did: a moving average of its own
luck, beginning with that of all.  Each further draft adds a^k; the drafts of all sequences are sorted by that, and the
best of all beginnings of the list is taken.  Rows are nearly free while few sequences generate, and cost their full
time when the batch is full: then no draft is checked, but for one now and then that renews `a`.

Tokens never depend on it: a draft holds if and only if it is what would have been chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nearfar_cloud.scheduling.budget import MARGIN, gaps, generating, n_missing, shortest_interval
from nearfar_cloud.scheduling.propose import NGramIndex
from nearfar_cloud.scheduling.view import EngineView
from nearfar_cloud.types import Proposer, Seq, Served, Work

DECAY, DECAY_OF_ALL = 0.9, 0.99  # weight of what was seen a check ago
PRIOR = 4.0  # drafts that count as if seen before
TRY = 64  # steps without a draft until one is tried


@dataclass(slots=True)
class Luck:
    """Of drafts that were checked: how many, and how many held; decaying."""

    tried: float = 0.0
    held: float = 0.0

    def saw(self, drafted: int, accepted: int, decay: float) -> None:
        # Drafts behind the first wrong one tell nothing.
        self.tried = decay * self.tried + accepted + (accepted < drafted)
        self.held = decay * self.held + accepted

    def rate(self, before: float) -> float:
        """How likely a draft holds; `before` is what is thought without having seen any."""
        return (self.held + PRIOR * before) / (self.tried + PRIOR)


@dataclass(slots=True)
class Guesser:
    """Of one sequence."""

    proposer: Proposer
    luck: Luck
    n_idle: int = 0  # steps since a draft of it was checked


class Speculation:
    """Owns a proposer for each sequence that runs, and what is known of their luck.

    `proposer`: makes one; it sees the ids of one sequence, which only grow.  `most`: drafts of a sequence in a step.
    """

    def __init__(self, proposer: Callable[[], Proposer] = NGramIndex, most: int = 8) -> None:
        self.new, self.most = proposer, most
        self.of_all = Luck()
        self._guessers: dict[int, Guesser] = {}
        self._prompts: tuple[Work, ...] = ()  # what the last step did besides next tokens

    def propose(self, view: EngineView) -> dict[int, list[int]]:
        """Drafts for the next step, by sequence: for those that only wait for their next token."""
        running = generating(view.seqs)
        known = self._guessers
        self._guessers = {s.id: known.get(s.id) or Guesser(self.new(), Luck()) for s in running}
        able = [s for s in running if not (s.outside or s.drafts or s.n_parked) and n_missing(s) == 1]
        drafts = {}
        for s in able:
            n = min(self.most, s.req.max_tokens - s.n_out - 1)
            if n > 0 and (found := self._guessers[s.id].proposer.propose(s.ids, n)):
                drafts[s.id] = found
        guessing = [s for s in able if s.id in drafts]
        lengths = self.lengths(guessing, [len(drafts[s.id]) for s in guessing], view)
        return {s.id: drafts[s.id][:n] for s, n in zip(guessing, lengths, strict=True) if n}

    def lengths(self, seqs: Sequence[Seq], most: Sequence[int], view: EngineView) -> list[int]:
        """How many of at most most[i] drafts of seqs[i] to check."""
        if not seqs:
            return []
        # [a^k, k, sequence, position of the draft], what brings the most first
        drafts = []
        for i, (s, n) in enumerate(zip(seqs, most, strict=True)):
            rate = self.acceptance(s)
            drafts += [(rate**k, k, i, s.n_known + k - 1) for k in range(1, n + 1)]
        drafts.sort(key=lambda d: (-d[0], d[1]))
        gain = np.cumsum([0.0, *(d[0] for d in drafts)])
        tokens = generating(view.seqs)
        works, interval = gaps(tokens), shortest_interval(tokens)
        seconds = self._seconds(works, np.array([d[3] for d in drafts], float), view)
        # What prompts take of the step is not the tokens' to answer for, but drafts cost what they cost beside them.
        of_tokens = view.cost.predict(works) + seconds - seconds[0]
        goodput = (len(works) + gain) / np.maximum(of_tokens, 1e-9)
        if interval is not None:
            goodput[1:][seconds[1:] > MARGIN * interval] = 0.0
        lengths = [0] * len(seqs)
        for _, k, i, _ in drafts[: int(goodput.argmax())]:
            lengths[i] = max(lengths[i], k)
        for i, s in enumerate(seqs):
            guesser = self._guessers[s.id]
            guesser.n_idle = 0 if lengths[i] else guesser.n_idle + 1
            if guesser.n_idle >= TRY:
                lengths[i], guesser.n_idle = 1, 0
        return lengths

    def _seconds(self, works: Sequence[Work], positions: NDArray[np.float64], view: EngineView) -> NDArray[np.float64]:
        """Of the step without drafts, with the first, with the first two, ...: positions f64 [N] -> [N + 1]"""
        cost = view.cost
        if any(n_missing(s) > 1 for s in view.seqs):  # prompts will take about what they took in the last step
            works = [*works, *self._prompts]
        n = np.arange(len(positions) + 1.0)
        x = cost.with_rows(cost.features(works), n, np.zeros(len(n)))
        # A further row of a sequence reads no key twice; it looks at as many as stand before it.
        x[:, 3] += np.concatenate([[0.0], np.cumsum(positions)]) - n * n / 2
        return cost.of_many(x)

    def acceptance(self, s: Seq) -> float:
        """How likely the next draft of `s` holds."""
        return self._guessers[s.id].luck.rate(self.of_all.rate(0.5))

    def observe(self, served: Sequence[Served]) -> None:
        """A step has been done."""
        self._prompts = tuple(x.work for x in served if x.work.n > x.work.sample)
        for x in served:
            if x.work.sample > 1 and x.seq.outside is None:
                self.of_all.saw(x.work.sample - 1, x.n_accepted, DECAY_OF_ALL)
                if (guesser := self._guessers.get(x.seq.id)) is not None:
                    guesser.luck.saw(x.work.sample - 1, x.n_accepted, DECAY)
