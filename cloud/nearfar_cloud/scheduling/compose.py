"""A plan out of a chain of policies.  Keeps what no policy may break: memory, and that somebody always gets on.

order, rows -> for each: admit? -> the gap -> shape, shape, shape -> blocks, if need be from the last in order -> plan
what is left of rows and blocks -> positions from outside that may run early
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Literal

from nearfar_cloud.kv.pool import BLOCK, Room, n_blocks_of
from nearfar_cloud.scheduling.policy import Policy
from nearfar_cloud.scheduling.view import EngineView
from nearfar_cloud.types import Admit, KVOp, LayerRange, Preempt, Seq, Served, Status, StepPlan, SwapIn, Work

How = Literal["recompute", "swap"]
Preemption = Literal["recompute", "swap", "cheaper"]  # the last: whichever is expected to take less time
RUNNING = Status.RUNNING  # found once: a member is slow to look up
NO_ROOM = Room()


class Composer:
    """Owns the chain.  `plan` is a function of the view and of what the policies have observed."""

    def __init__(self, policies: Sequence[Policy], preemption: Preemption = "recompute") -> None:
        self.policies, self.preemption = tuple(policies), preemption
        self.shapes = [p.shape for p in policies if type(p).shape is not Policy.shape]  # of those who have an opinion

    def plan(self, view: EngineView) -> StepPlan:
        """The next step; empty when nothing can run."""
        return _Planning(self, view).run()

    def observe(self, served: Sequence[Served], view: EngineView) -> None:
        """What the step of a plan came to."""
        for policy in self.policies:
            policy.observe(served, view)


class _Planning:
    """The state of one planning: what is left of rows and blocks."""

    def __init__(self, composer: Composer, view: EngineView) -> None:
        self.policies, self.shapes, self.preemption = composer.policies, composer.shapes, composer.preemption
        self.view = view
        budgets = [b for p in self.policies if (b := p.budget(view)) is not None]
        self.left = min(budgets, default=1 << 30)
        self.room, self.parkable = view.room, view.n_parkable
        self.n_layers = view.cost.n_layers
        self.works: dict[int, Work] = {}  # by sequence
        self.ops: list[KVOp] = []
        self.added: dict[int, int] = {}  # sequence -> blocks that this plan gives it
        self.taken: dict[int, Room] = {}  # and those of them that it has from the room
        self.preempted: set[int] = set()
        self.promised: set[int] = set()  # cached blocks that this plan shares with somebody
        self.is_short = False  # whether somebody waits for whole blocks

    def run(self) -> StepPlan:
        rows = self.view.seqs
        for policy in self.policies:
            rows = policy.rows(rows, self.view)
        closed = False
        for s in rows:
            if self.left <= 0:
                break
            if s.status is RUNNING:
                if s.id not in self.preempted:
                    self._run(s)
            elif not closed and (not self.is_short or self.view.is_upper(s)):
                if self._admit(s):
                    self._run(s)
                else:
                    # Nobody overtakes a waiting sequence by being small: the large ones would wait for ever.
                    # From one that waits for whole blocks, who takes upper ones alone takes nothing.
                    closed, self.is_short = self.view.is_upper(s), True
        if not self.is_short:
            for s in self.view.early:
                self._run_early(s)
        return StepPlan(tuple(self.works.values()), tuple(self.ops))

    @cached_property
    def order(self) -> Sequence[Seq]:
        """Who matters more; asked for only when blocks are short."""
        order = self.view.seqs
        for policy in self.policies:
            order = policy.order(order, self.view)
        return order

    @cached_property
    def place(self) -> dict[int, int]:
        """Sequence -> where it stands in order."""
        return {s.id: i for i, s in enumerate(self.order)}

    @cached_property
    def victims(self) -> list[Seq]:
        """Who gives way first stands last: who is idle, for the longest time first, then the last in order."""
        idle = sorted(self.view.idle, key=lambda s: -s.arrival)
        return [s for s in (*self.order, *idle) if s.status is RUNNING]

    def _admit(self, s: Seq) -> bool:
        """Whether `s` gets memory; then its op is in the plan."""
        if not all(policy.admit(s, self.view) for policy in self.policies):
            return False
        # The known positions and a block more, if it will need one: else it would be the next victim.
        room = min(n_blocks_of(s.n_known) + 1, n_blocks_of(s.n_reserved))
        cached, idle = ((), NO_ROOM) if s.status is Status.SWAPPED else self.view.hit(s)
        if self.preempted:
            idle = self.view.rooms(cached)  # some of them may have been a victim's
        n = room - len(cached)
        if self.is_short and (idle.whole or n > self.room.minus(idle).upper):
            return False
        if n > self._free(s, idle) and not self.preempted and not self._would_do(s, n, cached, idle):
            return False
        while n > self._free(s, idle) and self._preempt(s):
            idle = self.view.rooms(cached)
        if n > self._free(s, idle):
            return False
        if s.status is Status.SWAPPED:
            self._give(s, n_blocks_of(s.reached))
            self.ops.append(SwapIn(s.id))
        else:
            self._share(s, cached, idle)
        return True

    def _free(self, s: Seq, idle: Room = NO_ROOM) -> int:
        """Blocks that `s` could have, once it has shared `idle` ones."""
        return self.room.minus(idle).for_(self.view.is_upper(s))

    def _share(self, s: Seq, cached: tuple[int, ...], idle: Room) -> None:
        """`s` is admitted, with `cached` blocks of which `idle` ones counted as free."""
        self.added[s.id] = len(cached)
        self.room = self.room.minus(idle)
        self.promised.update(cached)
        self.ops.append(Admit(s.id, cached))

    def _give(self, s: Seq, n: int) -> None:
        """`n` blocks for `s`, which are there."""
        taken = self.room.taken(n, self.view.is_upper(s))
        self.room = self.room.minus(taken)
        self.added[s.id] = self.added.get(s.id, 0) + n
        self.taken[s.id] = self.taken.get(s.id, NO_ROOM).plus(taken)

    def _run(self, s: Seq) -> None:
        """Plan a part of the gap of `s`, if there is one, rows are left and blocks can be had."""
        work: Work | None = self._gap(s)
        for shape in self.shapes:
            if work is not None:
                work = shape(work, s, self.left, self.view)
        if work is None or work.n <= 0:
            return
        if self.left < work.rows(self.n_layers):
            work = work.narrowed(s, self.left * self.n_layers // work.layers.n)
        parks = work.layers.last < self.n_layers and work.layers.first == s.req.entry
        if parks:
            work = work.narrowed(s, self.parkable)
        if work.n <= 0:
            return
        have = len(s.blocks) + self.added.get(s.id, 0)
        if work.start + work.n > have * BLOCK:
            fits = self._take(s, n_blocks_of(work.end) - have) + have
            if work.start >= fits * BLOCK:
                return
            work = work.narrowed(s, fits * BLOCK - work.start)
        if parks:
            self.parkable -= work.n
        self.left -= work.rows(self.n_layers)
        self.works[s.id] = work

    def _run_early(self, s: Seq) -> None:
        """Plan positions that nobody has asked about, with rows and blocks that nobody else wants."""
        n = min(s.n_early, self.left * self.n_layers // (s.n_layers - s.req.entry))
        if n <= 0 or s.id in self.preempted:
            return
        if s.status is not RUNNING:
            if self._free(s) <= 0:
                return
            cached, idle = self.view.hit(s)
            idle = self.view.rooms(cached) if self.preempted else idle
            if self._free(s, idle) <= 0:  # what is found would leave no block for the rest
                cached, idle = (), NO_ROOM
            if not all(policy.admit(s, self.view) for policy in self.policies):
                return
            self._share(s, cached, idle)
        start = max(s.computed, BLOCK * self.added.get(s.id, 0))
        end = min(s.computed + s.n_early, start + n)
        have = len(s.blocks) + self.added.get(s.id, 0)
        n_new = max(0, min(n_blocks_of(end) - have, self._free(s)))
        n = min(end, BLOCK * (have + n_new)) - start
        if n <= 0:
            return
        self._give(s, n_new)
        work = Work(s.id, start, n, LayerRange(s.req.entry, s.n_layers), 0)
        self.left -= work.rows(self.n_layers)
        self.works[s.id] = work

    def _take(self, s: Seq, n: int) -> int:
        """Blocks for `s`, if need be from others: `n`, or as many as can be had."""
        while n > self._free(s) and self._preempt(s):
            pass
        n = max(0, min(n, self._free(s)))
        self._give(s, n)
        return n

    def _gap(self, s: Seq) -> Work | None:
        """The gap as it will be once the memory ops of the plan are done."""
        if s.status is not Status.WAITING:
            return s.gap()
        start = BLOCK * self.added[s.id]  # only cached blocks so far
        n = s.n_known + len(s.drafts) - start
        return Work(s.id, start, n, LayerRange(s.req.entry, s.n_layers), 0).with_sample(s)

    def _how(self, victim: Seq) -> How:
        """What its blocks are kept by; swapped where that is asked for, or cheaper, and a tier has room."""
        if self.preemption == "recompute" or not self.view.can_swap(victim):
            return "recompute"
        if self.preemption == "cheaper":
            again = Work(victim.id, 0, victim.reached, LayerRange(victim.req.entry, self.n_layers), 0)
            if self.view.cost.predict([again]) <= self.view.swap_s(victim):
                return "recompute"
        return "swap"

    def _preempt(self, s: Seq) -> bool:
        """Take the memory of the first one who gives way to `s`.  What was planned for the victim is not."""
        victim = next(self._who_gives_way(s), None)
        if victim is None:
            return False
        self.ops.append(Preempt(victim.id, self._how(victim)))
        self.preempted.add(victim.id)
        if (work := self.works.pop(victim.id, None)) is not None:
            self.left += work.rows(self.n_layers)
            self.added.pop(victim.id, None)
            self.room = self.room.plus(self.taken.pop(victim.id, NO_ROOM))
        self.room = self.room.plus(self.view.rooms(self.view.freed((victim,), self.promised)))
        return True

    def _who_gives_way(self, s: Seq) -> Iterator[Seq]:
        """Whoever is idle, then the last in order who stands behind `s`, and so on."""
        for victim in reversed(self.victims):
            if victim is s or victim.id in self.preempted or not self._has(victim, s):
                continue
            if not victim.is_idle and self.place[victim.id] < self.place[s.id]:
                return  # all others stand before it, too
            yield victim

    def _would_do(self, s: Seq, n: int, cached: tuple[int, ...], idle: Room) -> bool:
        """Whether `s` could have `n` blocks beside `cached` ones if all gave way who would: nobody does in vain."""
        victims = tuple(self._who_gives_way(s))
        freed = self.view.freed(victims, self.promised)
        room = self.room.plus(self.view.rooms(freed))
        for victim in victims:
            room = room.plus(self.taken.get(victim.id, NO_ROOM))
        idle = idle.plus(self.view.rooms(set(cached).intersection(freed)))
        return n <= room.minus(idle).for_(self.view.is_upper(s))

    def _has(self, victim: Seq, s: Seq) -> bool:
        """Whether `victim` holds a block that `s` could use."""
        return self.view.rooms(victim.blocks).for_(self.view.is_upper(s)) > 0
