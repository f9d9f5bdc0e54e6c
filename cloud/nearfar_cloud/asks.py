"""Outside sequences in the engine: positions come, a question is asked, one pass answers it, positions are taken back.

    append ──> positions                   nothing runs, or what may run early, where a step has rows left
    ask    ──> known positions, drafts ──> plan, run ──> decided ──> the rest of the drafts, or an Output
    cut    ──> fewer positions             and no answer to what was asked before

To plans and policies a question is what a request is that waits for its next token.  Its drafts are checked as guesses
are; where a plan has cut the work, what has held is known and the rest is checked before anything is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from nearfar_cloud.counts import Counts
from nearfar_cloud.executors.base import Result
from nearfar_cloud.kv import prefix
from nearfar_cloud.kv.pool import BLOCK, KVPool, n_blocks_of
from nearfar_cloud.outside import Question, RowStore
from nearfar_cloud.scheduling.queue import Waiting
from nearfar_cloud.types import Answer, Output, Seq, Status

Complaint = str  # what is wrong with what a sequence was told, and ends it; "": nothing


class Asks:
    """What becomes of outside sequences, in the engine's thread, on what is the engine's.

    `limit`: positions of one sequence.
    """

    def __init__(
        self,
        limit: int,
        pool: KVPool,
        waiting: Waiting,
        chains: Mapping[int, prefix.Chain],
        counts: Counts,
        clock: Callable[[], float],
    ) -> None:
        self.limit, self.pool, self.waiting, self.chains = limit, pool, waiting, chains
        self.counts, self.clock = counts, clock
        self.early: dict[int, Seq] = {}  # those of whom some positions may run before anybody asks

    def append(self, s: Seq, ids: Sequence[int], rows: RowStore | None, early: bool) -> Complaint:
        """Positions behind those that are there; `early`: all of them may run before anybody asks."""
        o, n_new = s.outside, len(ids if rows is None else rows)
        n = s.n_positions + n_new
        if o is None or (o.rows is None) != (rows is None) or (ids and rows is not None):
            return "positions come: expected ids for a sequence of ids from outside, rows for one of rows"
        if o.question is not None and o.question.run > 1:
            return "positions come while the sequence goes on by itself: cut it first"
        if n > self.limit:
            return f"{n} positions: the model and its cache hold {self.limit}"
        if o.rows is not None and rows is not None:
            o.rows.append(rows)
        s.ids += ids
        self.counts.prompt_tokens += n_new
        if early:
            o.early_end, self.early[s.id] = n, s
        return ""

    def ask(self, s: Seq, q: Question) -> Complaint:
        """Begin to answer.  Rows that have been computed and are to decide again are computed again."""
        o, n = s.outside, s.n_positions
        if o is None or o.question is not None:
            return f"question {q.req}: expected a sequence from outside, and that the one before was answered or cut"
        if q.pos >= n or q.pos + q.run > self.limit:
            return f"question {q.req} about row {q.pos} and {q.run} tokens: there are {n} of at most {self.limit} rows"
        if q.run > 1 and (o.rows is not None or q.pos != n - 1):
            return f"question {q.req} for {q.run} tokens: expected ids, and that it is about the last of them"
        drafts = s.ids[q.verify_from + 1 : q.pos + 1] if o.rows is None else list(q.draft)
        if len(drafts) != q.pos - q.verify_from:
            return f"question {q.req} with {len(drafts)} drafts: expected {q.pos - q.verify_from}"
        if s.computed > q.verify_from:
            self._rewind(s, q.verify_from)
        o.early = range(0)  # what is left of it is used
        o.take_up(q)
        s.drafts = drafts
        s.arrival, s.first_token = self.clock(), None  # what was promised, and patience, count from here
        s.admitted = s.arrival if s.status is Status.RUNNING else None
        if s.status is Status.WAITING:
            self.waiting.add(s)
        return ""

    def cut(self, s: Seq, keep: int) -> Complaint:
        """Positions from `keep` on never were; their blocks are free."""
        o = s.outside
        if o is None:
            return "a cut: expected a sequence from outside"
        self.waiting.discard(s)
        o.take_up(None)
        s.drafts = []
        del s.ids[keep:]
        if o.rows is not None:
            o.rows.truncate(keep)
        if s.id in self.chains:
            self.chains[s.id].cut(keep)
        s.n_begun, o.early_end = min(s.n_begun, keep), min(o.early_end, keep)
        o.n_cuts += 1
        self._rewind(s, min(keep, s.computed))
        return ""

    def decided(self, s: Seq, result: Result, n_checked: int) -> Output | None:
        """Of the next `n_checked` drafts some hold, then one id comes; the answer, unless drafts are left to check."""
        o, q = s.outside, s.question
        assert o is not None
        assert q is not None
        ids = result.ids
        s.n_out += len(ids)
        if len(ids) > n_checked and s.drafts[n_checked : n_checked + 1] == [ids[-1]]:
            o.held += ids
            s.drafts = s.drafts[len(ids) :]
            return None
        told = (*o.held, *ids)
        answer = Answer(q.req, q.verify_from + 1, len(told) - 1, result.margin, round(1e6 * o.seconds), result.hidden)
        s.drafts = []
        o.take_up(None)
        s.truncate(q.verify_from + len(told))  # rows of wrong drafts do not count
        if q.run > 1 and len(told) > q.pos - q.verify_from and ids[-1] not in s.req.stop_ids:
            s.ids.append(ids[-1])
            s.n_begun += 1  # it is no prompt
            o.take_up(replace(q, pos=q.pos + 1, verify_from=q.pos + 1, draft=(), run=q.run - 1))
        return Output(s.id, told, answer=answer)

    def _rewind(self, s: Seq, n: int) -> None:
        """Only the first `n` positions are computed; fewer, where they end in a block that others may read.

        Such a block is never written again.
        """
        whole = n // BLOCK
        if whole < s.n_published:
            s.n_published, n = whole, whole * BLOCK
        s.truncate(n)
        self.lose(s, n)
        self.pool.release(s.blocks[n_blocks_of(n) :])
        del s.blocks[n_blocks_of(n) :]

    def lose(self, s: Seq, n: int = 0) -> None:
        """Positions from `n` on are not computed any longer."""
        if s.outside is not None:
            self.counts.early_lost += s.outside.lost(n)
