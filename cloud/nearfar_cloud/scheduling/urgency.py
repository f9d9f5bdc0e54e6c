"""Who has the least time to spare goes first: deadlines and times to the first token.

    slack = deadline - now - predicted time to get there         (urgency, HexGen-Text2SQL, arXiv 2505.05286)

    longest first    who has been here for `patience_s`, by arrival: nobody waits for ever
    then             who was promised a time and can still make it, by slack
    last             who was promised nothing, and who cannot make it any more: its promise is broken either way

All are served, none is refused.  Loses where predictions are wrong: a cost model that knows little, answers of other
lengths than those before; and whoever asks for a deadline goes before those of its priority that do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nearfar_cloud.scheduling.budget import gaps, generating, n_missing
from nearfar_cloud.scheduling.policy import Policy
from nearfar_cloud.scheduling.view import EngineView
from nearfar_cloud.types import LayerRange, Seq, Served, Status, Work

Place = tuple[int, float]  # class as above, and the order within
LEARN = 0.05  # weight of one more answer in what is known of their lengths


class Urgency(Policy):
    """Orders by slack; takes memory only from a lower class, so that two of one class never take turns at it."""

    def __init__(self, patience_s: float = 60.0) -> None:
        self.patience_s = patience_s
        self.used = 1.0  # share of `max_tokens` that answers have come to

    def order(self, seqs: Sequence[Seq], view: EngineView) -> Sequence[Seq]:
        places = self._places(seqs, view)

        def key(s: Seq) -> tuple[int, bool, float]:
            kind, within = places[s.id]
            return kind, kind == 1 and s.status is not Status.RUNNING, within

        return sorted(seqs, key=key)

    def rows(self, seqs: Sequence[Seq], view: EngineView) -> Sequence[Seq]:
        places = self._places(seqs, view)
        return sorted(seqs, key=lambda s: places[s.id])

    def observe(self, served: Sequence[Served], view: EngineView) -> None:
        """Learn how long answers are, as a share of the longest that was asked for."""
        for x in served:
            if x.seq.status is Status.DONE and x.seq.outside is None:
                self.used += LEARN * (x.seq.n_out / x.seq.req.max_tokens - self.used)

    def slacks(self, seqs: Sequence[Seq], view: EngineView) -> list[float]:
        """Seconds to spare for the nearest promise that each was given and that is still open; negative: too late."""
        if not seqs:
            return []
        cost = view.cost
        prompts = [
            Work(s.id, s.computed, max(1, n_missing(s)), LayerRange(s.req.entry, cost.n_layers), 0) for s in seqs
        ]
        until_first = cost.of_many(np.stack([cost.features([w]) for w in prompts]))
        others = gaps(generating(view.seqs))
        a_token = cost.predict([*others, prompts[0]._replace(n=1)])
        slacks = []
        for s, first in zip(seqs, until_first.tolist(), strict=True):
            promise, ends = s.req.objective, []
            if promise.ttft_s is not None and s.first_token is None:
                ends.append(s.arrival + promise.ttft_s - first)
            if promise.deadline_s is not None:
                left = 0.0 if s.outside else self.used * s.req.max_tokens - s.n_out - 1
                ends.append(s.arrival + promise.deadline_s - first - max(0.0, left) * a_token)
            slacks.append(min(ends, default=np.inf) - view.now)
        return slacks

    def _places(self, seqs: Sequence[Seq], view: EngineView) -> dict[int, Place]:
        places: dict[int, Place] = {}
        promised = []
        for s in seqs:
            if view.now - s.arrival >= self.patience_s:
                places[s.id] = 0, s.arrival
                continue
            places[s.id] = 2, 0.0
            if s.req.objective.ttft_s is not None or s.req.objective.deadline_s is not None:
                promised.append(s)
        for s, slack in zip(promised, self.slacks(promised, view), strict=True):
            if 0 <= slack < np.inf:
                places[s.id] = 1, slack
        return places
