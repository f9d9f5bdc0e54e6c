"""The loop of the core: drain, plan, apply, run, commit.  One thread calls `step`; everything else is an inbox.

submit, append, ask, cut, abort ──> inbox ──> step ──> plan ──> pool ──> executor.run ──> commit ──> outputs
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from itertools import count, takewhile
from queue import Empty, SimpleQueue

import numpy as np

from nearfar.errors import UsageError
from nearfar_cloud.asks import Asks, Complaint
from nearfar_cloud.branches import branches_of, n_shareable
from nearfar_cloud.counts import Counts
from nearfar_cloud.executors.base import Executor, Ids, Result, batch_of, run_or_find
from nearfar_cloud.kv import prefix
from nearfar_cloud.kv.pool import BLOCK, KVPool, Room, n_blocks_of
from nearfar_cloud.outside import Question, RowStore
from nearfar_cloud.scheduling.compose import Composer
from nearfar_cloud.scheduling.cost import CostModel
from nearfar_cloud.scheduling.queue import Waiting
from nearfar_cloud.scheduling.spec import Speculation
from nearfar_cloud.scheduling.view import EngineView
from nearfar_cloud.types import (
    Admit,
    Early,
    Finish,
    LogitsHook,
    Output,
    Preempt,
    Request,
    Seq,
    Served,
    Status,
    StepPlan,
    SwapIn,
    Work,
)


class Engine:
    """Serves sequences on one executor.

    `speculation`: who guesses, and how much of it is worth checking; None: nobody.
    `prefix_cache`: full blocks serve later requests of a tenant that begin alike; None: as the facts of the model say.
    `cost`: what was learned earlier about the time of a step; None: nothing.
    `parked_rows`: how many rows may wait between two layers, of `d_model` numbers each.
    `clock`: seconds; a simulator brings its own.
    """

    def __init__(
        self,
        executor: Executor,
        composer: Composer,
        *,
        speculation: Speculation | None = None,
        prefix_cache: bool | None = None,
        cost: CostModel | None = None,
        parked_rows: int = 1 << 14,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.executor, self.composer, self.speculation = executor, composer, speculation
        self.facts = executor.facts
        self.prefix_cache = self.facts.prefix_cache if prefix_cache is None else prefix_cache
        self.parked_rows, self.clock = parked_rows, clock
        self.pool = KVPool(executor.n_blocks, executor.uppers.n)
        self.counts, self.cost = Counts(), cost or CostModel(self.facts.n_layers, experts=self.facts.experts)
        self.copy_s = 2e-4  # of one block to another place: a guess until some have been copied
        self.seqs: dict[int, Seq] = {}  # all of them; each one holds memory, waits for some, or is to be a branch
        self.holding: dict[int, Seq] = {}
        self.waiting = Waiting()
        self.branches: dict[int, list[Seq]] = {}  # sequence -> those that begin with its prompt once that is computed
        self._chains: dict[int, prefix.Chain] = {}
        limit = self.facts.limit(self.n_blocks)
        self._asks = Asks(limit, self.pool, self.waiting, self._chains, self.counts, self.clock)
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._numbers = count(1)
        self._outputs: list[Output] = []

    @property
    def n_blocks(self) -> int:
        """What one sequence may hold at most."""
        return self.pool.n_whole

    # ------------------------------------------------------------ what other threads may call

    def submit(self, req: Request, hook: LogitsHook | None = None) -> int:
        """Queue a request; returns the number of its sequence.  UsageError, ContextError: it can never be served."""
        self.facts.check(req, self.n_blocks)
        if req.outside and hook is not None:
            raise UsageError("an outside sequence has no hook")
        s = self._new(req, hook)
        self._inbox.put(lambda: self._arrive([s]))
        return s.id

    def submit_branches(self, req: Request, n: int, hooks: Sequence[LogitsHook | None] | None = None) -> list[int]:
        """`n` answers to one prompt, each as a request alone with the seed `seed + i` would get it.

        The prompt is computed once.  Its full blocks are shared; what lies in the block that it does not fill is
        computed by each, at most 64 rows: no block is then ever written by two, and nothing has to be copied.
        Raises as `submit` does, and UsageError for rows from outside and for several means of one prompt.
        """
        hooks = [None] * n if hooks is None else hooks
        requests = branches_of(req, n, len(hooks))
        self.facts.check(req, self.n_blocks)
        seqs = [self._new(r, hook) for r, hook in zip(requests, hooks, strict=True)]
        self._inbox.put(lambda: self._arrive(seqs))
        return [s.id for s in seqs]

    def abort(self, seq: int) -> None:
        """Stop a sequence; its blocks are free after the next step.  One that is done already stays done."""
        n_steps = self.counts.steps
        self._inbox.put(lambda: self._cancel(seq, n_steps))

    def append(self, seq: int, *, ids: Sequence[int] = (), rows: RowStore | None = None, early: bool = False) -> None:
        """Further positions of an outside sequence; nothing runs.  UsageError: they are not this model's.

        `early`: all but the last of its positions so far run as soon as a step has rows and blocks left that nobody
        else wants, each once; an output with `early` tells.  Answers are the same; some rows will have run in vain.
        This and the two below end a sequence that they do not fit with an error, and do nothing to one that is gone.
        """
        ids = tuple(ids)
        self.facts.check_ids(ids)
        if rows is not None:
            self.facts.check_rows(rows)
        self._inbox.put(lambda: self._to(seq, lambda s: self._asks.append(s, ids, rows, early)))

    def ask(self, seq: int, question: Question) -> None:
        """Answer with an output that has an `answer`; one question at a time."""
        self._inbox.put(lambda: self._to(seq, lambda s: self._asks.ask(s, question)))

    def cut(self, seq: int, keep: int) -> None:
        """Positions from `keep` on never were, and what was asked before is not answered."""
        if keep < 0:
            raise UsageError(f"keep={keep}: expected 0 or more")
        self._inbox.put(lambda: self._to(seq, lambda s: self._asks.cut(s, keep)))

    def n_begun(self, seq: int) -> int:
        """Positions of a sequence that layers have run so far, as an ended step left it; 0 for one that is gone."""
        s = self.seqs.get(seq)
        return 0 if s is None else s.n_begun

    # ------------------------------------------------------------ the loop

    def step(self) -> list[Output]:
        """One pass over what is most urgent; what it decided.  Nothing to do: an empty list at once."""
        self._drain()
        started, view = self.clock(), self.view()
        self._guess(view)
        plan = self.composer.plan(view)
        self._apply(plan)
        batch = batch_of(plan.works, self.seqs)
        planned = self.clock()
        results = run_or_find(self.executor, batch) if batch else []
        ran = self.clock()
        seconds = ran - planned
        served = [self._commit(work, result, seconds) for work, result in zip(plan.works, results, strict=True)]
        self._learn(plan, [x for x in served if x is not None], seconds)
        outputs, self._outputs = self._outputs, []
        c = self.counts
        c.steps += bool(plan.works)
        c.rows += sum(w.rows(self.facts.n_layers) for w in plan.works)
        c.prefix_evicted = self.pool.n_evicted
        c.plan_s += planned - started
        c.run_s += seconds
        c.commit_s += self.clock() - ran
        return outputs

    @property
    def has_work(self) -> bool:
        """Whether a step would do something, as far as this thread can know."""
        return not self._inbox.empty() or any(s.gap() is not None for s in self.seqs.values()) or bool(self._early())

    def view(self) -> EngineView:
        holding = self.holding.values()
        return EngineView(
            now=self.clock(),
            seqs=(*(s for s in holding if not s.is_idle), *self.waiting.window()),
            idle=tuple(s for s in holding if s.is_idle),
            early=self._early(),
            n_blocks=self.pool.n_blocks,
            room=self.pool.room,
            n_parkable=self.parked_rows - sum(s.n_parked for s in holding if len(s.stages) > 1),
            hit=self._hit,
            freed=self._freed,
            rooms=self.pool.rooms,
            is_upper=self._is_upper,
            can_swap=lambda s: self.executor.can_swap(len(s.blocks)),
            swap_s=lambda s: 2 * self.copy_s * len(s.blocks),
            cost=self.cost,
        )

    def _freed(self, seqs: Sequence[Seq], promised: Collection[int]) -> list[int]:
        held = Counter(block for s in seqs for block in s.blocks)
        return [b for b, n in held.items() if n == self.pool.references[b] and b not in promised]

    def _early(self) -> tuple[Seq, ...]:
        """Who may run before anybody asks, and has room."""
        room = self.pool.room
        return tuple(
            s
            for s in self._asks.early.values()
            if s.n_early and (room.for_(self._is_upper(s)) or s.computed < BLOCK * len(s.blocks))
        )

    def _is_upper(self, s: Seq) -> bool:
        """Whether `s` needs no memory in the lower layers, and there is such memory."""
        uppers = self.executor.uppers
        return uppers.n > 0 and s.req.entry >= uppers.first

    def _drain(self) -> None:
        while True:
            try:
                self._inbox.get_nowait()()
            except Empty:
                return

    def _guess(self, view: EngineView) -> None:
        if self.speculation is not None:
            for seq, drafts in self.speculation.propose(view).items():
                self.seqs[seq].drafts = drafts

    def _learn(self, plan: StepPlan, served: Sequence[Served], seconds: float) -> None:
        """Tell those who decide what the step came to."""
        self.counts.expected_s += self.cost.observe(plan.works, seconds)
        if self.speculation is not None:
            self.speculation.observe(served)
        self.composer.observe(served, self.view())

    def _apply(self, plan: StepPlan) -> None:
        """The memory of the plan: what is given up, then what is shared, then what is new."""
        for op in plan.kv_ops:
            if isinstance(op, Preempt):
                self._preempt(self.seqs[op.seq], op)
        for op in plan.kv_ops:
            if isinstance(op, Admit):
                self.waiting.discard(self.seqs[op.seq])
                self._begin(self.seqs[op.seq], op.cached)
        for op in plan.kv_ops:
            if isinstance(op, SwapIn):
                s = self.seqs[op.seq]
                s.blocks = self.pool.alloc(n_blocks_of(s.reached), is_upper=self._is_upper(s))
                s.status = Status.RUNNING
                self._copy(self.executor.swap_in, s, s.blocks)
        for w in plan.works:
            s = self.seqs[w.seq]
            need = n_blocks_of(w.end) - len(s.blocks)
            if need > 0:
                after = s.blocks[-1] if s.blocks else None
                s.blocks += self.pool.alloc(need, after, is_upper=self._is_upper(s))

    def _begin(self, s: Seq, blocks: Sequence[int]) -> None:
        """`s` holds memory from now on, and has `blocks` in common with whoever computed them."""
        n_full = self._n_shareable(s)
        self.pool.share(blocks)
        s.blocks, s.status, s.n_published = list(blocks), Status.RUNNING, len(blocks)
        s.n_cached = BLOCK * len(blocks)
        s.admitted = self.clock() if s.admitted is None else s.admitted
        for stage in s.stages:
            stage.computed = s.n_cached
        self.holding[s.id] = s
        self.counts.cached_tokens += s.n_cached
        if self.prefix_cache:
            self.counts.found(len(blocks), n_full - len(blocks), rows=s.req.entry > 0)

    def _copy(self, move: Callable[[int, Ids], None], s: Seq, blocks: Sequence[int]) -> None:
        """Blocks of `s` to where they wait, or back; what one took is learned."""
        started = self.clock()
        move(s.id, np.asarray(blocks, np.int32))
        self.copy_s += 0.3 * ((self.clock() - started) / max(1, len(blocks)) - self.copy_s)

    def _preempt(self, s: Seq, op: Preempt) -> None:
        if s.outside is None:
            s.drafts = []
        if op.how == "swap":
            s.truncate(s.n_known)  # no draft is taken along
            self._copy(self.executor.swap_out, s, s.blocks[: n_blocks_of(s.reached)])
            s.status = Status.SWAPPED
            self.counts.swapped += 1
        else:
            s.reset()
            self._asks.lose(s)
            self.executor.drop(s.id)
            s.status = Status.WAITING
            del self.holding[s.id]
            self.waiting.add(s)
        self.pool.release(s.blocks)
        s.blocks, s.n_published = [], 0
        s.n_preempted += 1
        self.counts.preempted += 1

    def _commit(self, w: Work, result: Result, seconds: float) -> Served | None:
        """What `w` computed counts, drafts are accepted or forgotten, full blocks are published, tokens go out."""
        s = self.seqs[w.seq]
        if result.error:
            self.counts.failed += 1
            self._finish(s, "error", result.error)
            return None
        is_early = s.is_idle
        s.advance(w)
        n_out, n_prompt = s.n_out, s.begin(w)
        if s.outside is not None:
            s.outside.seconds += seconds
            if is_early:
                s.outside.ran_early(w.start, w.end)
                self.counts.early_rows += w.n
                self._outputs.append(Output(s.id, (), early=Early(w.n, w.end, s.outside.n_cuts)))
        finish = self._decide(s, w, result) if w.sample else None
        self.counts.generated_tokens += s.n_out - n_out
        # A block that others may read is never written again, so what may have to run again is told when it is used.
        if s.computed >= BLOCK * (s.n_published + 1) and self.prefix_cache and not is_early:
            chain = self._chain(s).upto(s.text, s.computed)
            for i in range(s.n_published, len(chain)):
                self.pool.publish(s.blocks[i], chain[i])
            s.n_published = max(s.n_published, len(chain))
        self._branch(s)
        if finish:
            self._release(s)
        return Served(s, w, n_prompt, s.n_out - n_out, max(0, len(result.ids) - 1))

    def _decide(self, s: Seq, w: Work, result: Result) -> Finish | None:
        """Append the tokens of a result, as far as they are wanted, and tell; whether it is the end."""
        now = self.clock()
        s.first_token, s.last_token = now if s.first_token is None else s.first_token, now
        s.n_drafted, s.n_accepted = s.n_drafted + w.sample - 1, s.n_accepted + len(result.ids) - 1
        self.counts.drafted += w.sample - 1
        self.counts.accepted += len(result.ids) - 1
        if s.outside is not None:
            if (answer := self._asks.decided(s, result, w.sample - 1)) is not None:
                self._outputs.append(answer)
            return None
        ids = result.ids[: s.req.max_tokens - s.n_out]
        finish: Finish | None = "length" if s.n_out + len(ids) == s.req.max_tokens else None
        if not s.req.stop_ids.isdisjoint(ids):
            finish, ids = "stop", tuple(takewhile(lambda token: token not in s.req.stop_ids, ids))
        s.ids += ids
        s.n_out += len(ids)
        s.drafts = []
        s.truncate(s.n_known - 1)  # rows of wrong drafts do not count; the last token has not been run
        facts, told = s.facts(now) if finish else None, result.logprobs[: len(ids)]
        self._outputs.append(Output(s.id, ids, finish, told, "", facts, result.pooled))
        return finish

    # ------------------------------------------------------------ coming and going

    def _new(self, req: Request, hook: LogitsHook | None) -> Seq:
        s = Seq.new(next(self._numbers), req, self.facts.n_layers, self.clock())
        s.hook = hook
        return s

    def _arrive(self, seqs: list[Seq]) -> None:
        """The first one waits for memory, others of the same prompt for the first one."""
        for s in seqs:
            self.seqs[s.id] = s
            self.counts.prompt_tokens += s.n_positions
        self._queue(seqs)

    def _queue(self, seqs: list[Seq]) -> None:
        """As `_arrive`, or again, when the first one has gone before its prompt was computed."""
        seqs = [s for s in seqs if s.status is not Status.DONE]
        for s in seqs if seqs and n_shareable(seqs[0]) == 0 else seqs[:1]:
            self.waiting.add(s)
        if len(seqs) > 1 and n_shareable(seqs[0]):
            self.branches[seqs[0].id] = seqs[1:]

    def _branch(self, s: Seq) -> None:
        """Those who wait for the prompt of `s` begin with its full blocks, once they are computed.

        They take no block, so no policy is asked; the blocks that they need then are taken as by all who run.
        """
        if s.id in self.branches and s.computed >= BLOCK * (n := n_shareable(s)):
            for branch in self.branches.pop(s.id):
                if branch.status is not Status.DONE:
                    self._begin(branch, s.blocks[:n])

    def _to(self, seq: int, what: Callable[[Seq], Complaint]) -> None:
        """Do something to a sequence, if there still is one; it ends if that makes no sense."""
        s = self.seqs.get(seq)
        if s is not None and (wrong := what(s)):
            self._finish(s, "error", wrong)

    def _cancel(self, seq: int, n_steps: int) -> None:
        """Stop a sequence, if there still is one; so many steps had ended when somebody asked for it."""
        if seq in self.seqs:
            self.counts.cancelled += 1
            self.counts.steps_after_cancel += self.counts.steps - n_steps
            self._finish(self.seqs[seq], "abort")

    def _finish(self, s: Seq, finish: Finish, error: str = "") -> None:
        self._outputs.append(Output(s.id, (), finish, (), error, s.facts(self.clock())))
        self._release(s)

    def _release(self, s: Seq) -> None:
        self.pool.release(s.blocks)
        s.blocks, s.status = [], Status.DONE
        self.executor.drop(s.id)
        self._chains.pop(s.id, None)
        self._asks.lose(s)
        self._asks.early.pop(s.id, None)
        del self.seqs[s.id]
        self.holding.pop(s.id, None)
        self.waiting.discard(s)
        self._queue(self.branches.pop(s.id, []))

    # ------------------------------------------------------------ the prefix cache

    def _chain(self, s: Seq) -> prefix.Chain:
        if s.id not in self._chains:
            salt = prefix.salt(s.req.objective.tenant, self.facts.fingerprint, f"layer {s.req.entry}")
            self._chains[s.id] = prefix.Chain(salt)
        return self._chains[s.id]

    def _n_shareable(self, s: Seq) -> int:
        """Full blocks of what `s` is to run; at least one row is behind them."""
        return ((s.n_early if s.is_idle else s.n_known) - 1) // BLOCK

    def _hit(self, s: Seq) -> tuple[tuple[int, ...], Room]:
        """Blocks that hold the beginning of `s`; at least one row stays to be run, for its logits."""
        if not self.prefix_cache or s.req.pooled:  # a mean needs all rows
            return (), Room()
        blocks = self.pool.match(self._chain(s).upto(s.text, BLOCK * self._n_shareable(s)))
        return tuple(blocks), self.pool.n_idle(blocks)
