"""An engine that has work does it, and no plan counts on memory that is not there: by chance, in virtual time."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nearfar_cloud.engine import Engine
from nearfar_cloud.executors.base import BatchWork, Result, Uppers
from nearfar_cloud.kv.pool import BLOCK
from nearfar_cloud.outside import ArrayRows, Question
from nearfar_cloud.scheduling.budget import Arrival
from nearfar_cloud.scheduling.compose import Composer
from nearfar_cloud.scheduling.standard import standard
from nearfar_cloud.types import Objective, Request
from tests.cloud.virtual import Virtual, linear, taught

COST = taught(linear)
K = 2  # upper blocks have no memory below it
PATIENCE = 20  # steps in which nothing may run though there is work


class TwoGroups(Virtual):
    def __init__(self, n_whole: int, n_upper: int) -> None:
        super().__init__(linear, n_whole + n_upper)
        self.uppers = Uppers(n_upper, K)

    def run(self, batch: Sequence[BatchWork]) -> list[Result]:
        for w in batch:
            assert w.layers.first >= K or w.blocks.max() < self.n_blocks - self.uppers.n
        return super().run(batch)


class Crowd:
    """Requests and devices that come, ask, take back and leave by chance; few texts, so that many begin alike."""

    def __init__(self, rng: random.Random) -> None:
        self.rng, self.n_whole = rng, rng.randint(3, 8)
        executor = TwoGroups(self.n_whole, rng.choice((0, 1, 2, 4)))
        policies = rng.choice(((Arrival(),), standard(rng.choice((64, 256)))))
        self.e = Engine(
            executor,
            Composer(policies, rng.choice(("recompute", "swap", "cheaper"))),
            prefix_cache=rng.random() < 0.8,
            cost=COST,
            clock=lambda: executor.now,
        )
        self.n_sent: dict[int, int] = {}  # by device
        self.asked: set[int] = set()

    def act(self) -> None:
        kind, rng = self.rng.random(), self.rng
        objective = Objective(tenant=rng.choice("ab"))
        most = BLOCK * self.n_whole - 20
        if kind < 0.1:
            ids = (rng.randrange(2),) * rng.randrange(1, most)
            self.e.submit(Request(ids=ids, max_tokens=rng.randint(1, 20), objective=objective))
        elif kind < 0.2 and len(self.n_sent) < 8:
            entry = rng.choice((0, 1, K, K, 3))
            self.n_sent[self.e.submit(Request(entry=entry, outside=True, objective=objective))] = 0
        elif kind < 0.6 and (free := sorted((self.n_sent.keys() - self.asked) & self.e.seqs.keys())):
            self._send(rng.choice(free), most)
        elif kind < 0.7 and self.n_sent:
            self._take_back(rng.choice(list(self.n_sent)))

    def _send(self, device: int, most: int) -> None:
        entry, before = self.e.seqs[device].req.entry, self.n_sent[device]
        n = min(self.rng.choice((1, 3, 20, 64, 130, 200)), most - before)
        early = self.rng.random() < 0.5
        if n > 0 and entry:
            self.e.append(device, rows=ArrayRows(np.full((n, 8), device % 3, np.float32)), early=early)
        elif n > 0:
            self.e.append(device, ids=[device % 3] * n, early=early)
        n_sent = self.n_sent[device] = before + max(0, n)
        if self.rng.random() < 0.5:
            pos = self.rng.choice((n_sent - 1, self.rng.randrange(n_sent)))
            first = max(0, pos - self.rng.choice((0, 0, 3)))
            self.e.ask(device, Question(1, pos, first, draft=(1,) * (pos - first) if entry else ()))
            self.asked.add(device)

    def _take_back(self, device: int) -> None:
        self.asked.discard(device)
        if self.rng.random() < 0.3:
            self.e.abort(device)
            del self.n_sent[device]
        else:
            self.n_sent[device] = self.rng.randrange(self.n_sent[device] + 1)
            self.e.cut(device, self.n_sent[device])

    def step(self) -> None:
        for out in self.e.step():
            assert not out.error, out
            if out.answer is not None:
                self.asked.discard(out.seq)
        self.e.pool.check([s.blocks for s in self.e.seqs.values()])

    def rest(self) -> None:
        """Until all that can be done is done."""
        n_steps, n_idle = self.e.counts.steps, 0
        while self.e.has_work:
            self.step()
            n_idle = 0 if self.e.counts.steps > n_steps else n_idle + 1
            n_steps = self.e.counts.steps
            assert n_idle < PATIENCE, "it has work and does none"
        assert not self.asked


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_whatever_comes_all_of_it_gets_done(seed: int) -> None:
    crowd = Crowd(random.Random(seed))
    for _ in range(60):
        for _ in range(crowd.rng.choice((1, 3, 12))):
            crowd.act()
        for _ in range(crowd.rng.choice((0, 1, 3))):
            crowd.step()
        if crowd.rng.random() < 0.1:
            crowd.rest()
    crowd.rest()
    for seq in list(crowd.e.seqs):
        crowd.e.abort(seq)
    crowd.step()
    crowd.e.pool.check([])
