"""Tenants get equal service, whoever sends more: the Virtual Token Counter (Sheng et al., OSDI 2024, arXiv 2401.00588).

    counter of a tenant += (INPUT * prompt rows + OUTPUT * tokens) / its share

Who has the smallest counter goes first.  A tenant that was away is lifted to the smallest counter of those that were
not: nobody saves up for later.  Between two tenants that always have something waiting, service differs by no more than
2 max(INPUT * longest prompt, OUTPUT * positions that fit into memory), however long that goes on.

Prompt rows count when they are computed for the first time: what the prefix cache had costs nothing, and neither does
what a preemption throws away.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nearfar.errors import UsageError
from nearfar_cloud.scheduling.budget import RUNNING
from nearfar_cloud.scheduling.policy import Policy
from nearfar_cloud.scheduling.view import EngineView
from nearfar_cloud.types import Seq, Served

INPUT, OUTPUT = 1.0, 2.0  # what a row of a prompt and a token cost, as in the paper


class FairShare(Policy):
    """The tenant that had the least goes first; a weight in `shares` other than 1 entitles to more or less.

    Takes no memory away from who runs: a tenant that comes back waits until somebody is done.
    """

    def __init__(self, shares: Mapping[str, float] | None = None) -> None:
        self.shares = dict(shares or {})
        if bad := {tenant: share for tenant, share in self.shares.items() if not share > 0}:
            raise UsageError(f"shares {bad}: expected more than 0")
        self.counters: dict[str, float] = {}
        self.active: frozenset[str] = frozenset()  # tenants that had something here after the last step
        self.floor = 0.0  # the smallest counter of those that were active last

    def order(self, seqs: Sequence[Seq], view: EngineView) -> Sequence[Seq]:
        level = self._levels(seqs)
        return sorted(seqs, key=lambda s: (s.status is not RUNNING, level[s.id]))

    def rows(self, seqs: Sequence[Seq], view: EngineView) -> Sequence[Seq]:
        """Rows go by the counters alone: a prompt that has begun need not be finished first."""
        level = self._levels(seqs)
        return sorted(seqs, key=lambda s: level[s.id])

    def observe(self, served: Sequence[Served], view: EngineView) -> None:
        """Charge what the step did."""
        active = frozenset(map(_tenant, view.seqs))
        here = active.union(_tenant(x.seq) for x in served)
        for tenant in here:
            self.counters[tenant] = self._counter(tenant)
        for x in served:
            tenant = _tenant(x.seq)
            self.counters[tenant] += (INPUT * x.n_prompt + OUTPUT * x.n_decided) / self._share(tenant)
        self.active = active
        self.floor = min((self.counters[tenant] for tenant in self.active or here), default=self.floor)
        # Who is away and would be lifted when it comes back need not be remembered.
        self.counters = {t: c for t, c in self.counters.items() if t in self.active or c > self.floor}

    def _counter(self, tenant: str) -> float:
        counter = self.counters.get(tenant, 0.0)
        return counter if tenant in self.active else max(counter, self.floor)

    def _share(self, tenant: str) -> float:
        return self.shares.get(tenant, 1.0)

    def _levels(self, seqs: Sequence[Seq]) -> dict[int, float]:
        """Sequence -> what its tenant's counter will be by its turn, if those before it get their prompts computed."""
        ahead: dict[str, float] = {}
        levels = {}
        for s in sorted(seqs, key=lambda s: s.status is not RUNNING):
            tenant = _tenant(s)
            if tenant not in ahead:
                ahead[tenant] = self._counter(tenant)
            levels[s.id] = ahead[tenant]
            if n := s.n_prompt - s.n_begun:
                ahead[tenant] += INPUT * n / self._share(tenant)
        return levels


def _tenant(s: Seq) -> str:
    return s.req.objective.tenant
