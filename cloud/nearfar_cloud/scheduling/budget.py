"""How many rows a step has, and who gets them: next tokens first, prompts in pieces of what is left.

ChunkedPrefill   no token waits behind a prompt, and a prompt gets on by at least a tile a step however many
                 sequences generate (stall-free batching, Sarathi-Serve, arXiv 2403.02310).  Fewer rows where
                 somebody was promised tokens at an interval; pieces end with a tile.
SplitFuse        every step has the same number of rows while prompts wait (Dynamic SplitFuse, arXiv 2401.08671).
PrefillFirst     whole prompts before any next token: the rule of older servers, for comparison.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from nearfar_cloud.kv.pool import BLOCK
from nearfar_cloud.scheduling.policy import Policy
from nearfar_cloud.scheduling.view import EngineView
from nearfar_cloud.types import Seq, Status, Work

MARGIN = 0.9  # of a promised interval that a step may take
RUNNING = Status.RUNNING  # found once: a member is slow to look up


def n_missing(s: Seq) -> int:
    """Known positions that are not computed: 1 for a sequence that only waits for its next token."""
    return s.n_known - s.computed


def generates(s: Seq) -> bool:
    """Whether a sequence has nothing to do but its next token.

    A device that asks may lack rows of tokens that it has decided by itself, and brings drafts: at most a tile in all.
    """
    if s.outside is None:
        return s.status is RUNNING and n_missing(s) <= 1
    return s.status is RUNNING and n_missing(s) + len(s.drafts) <= BLOCK


def generating(seqs: Iterable[Seq]) -> list[Seq]:
    """Those who have nothing to do but their next token."""
    return [s for s in seqs if generates(s)]


def gaps(seqs: Iterable[Seq]) -> list[Work]:
    """What could run next of each that has something to run."""
    return [gap for s in seqs if (gap := s.gap())]


def shortest_interval(seqs: Iterable[Seq]) -> float | None:
    """Seconds between tokens: the least that one of `seqs`, who generate, was promised."""
    return min((t for s in seqs if (t := s.req.objective.tbt_s)), default=None)


def n_next(seqs: Iterable[Seq]) -> int:
    """Rows of the next tokens of `seqs`, who generate, drafts included; none for who waits for rows from outside."""
    return sum(n + len(s.drafts) for s in seqs if (n := n_missing(s)))


class Arrival(Policy):
    """First come, first served; what runs goes before what waits."""

    def order(self, seqs: Sequence[Seq], view: EngineView) -> Sequence[Seq]:
        return sorted(seqs, key=lambda s: (s.status is not RUNNING, s.arrival, s.id))


class Priority(Policy):
    """Higher priorities first.  Where they never pause, lower ones wait for ever: that is what they ask for."""

    def order(self, seqs: Sequence[Seq], view: EngineView) -> Sequence[Seq]:
        return sorted(seqs, key=lambda s: -s.req.objective.priority)


class ChunkedPrefill(Policy):
    """One row for each sequence that generates, then prompts in chunks that end with a tile.

    At most `n_rows` of them; fewer where somebody who generates was promised tokens at an interval: as many as the cost
    model expects to fit into `MARGIN` of the shortest interval promised.
    """

    def __init__(self, n_rows: int = 256) -> None:
        self.n_rows = n_rows

    def rows(self, seqs: Sequence[Seq], view: EngineView) -> Sequence[Seq]:
        return sorted(seqs, key=lambda s: not generates(s))

    def budget(self, view: EngineView) -> int:
        tokens = generating(view.seqs)
        n, interval = n_next(tokens), shortest_interval(tokens)
        if interval is None:
            return max(self.n_rows, n + BLOCK)
        prompt = next((s for s in view.seqs if n_missing(s) > 1), None)
        start = 0 if prompt is None else self.deepest(prompt)
        beside = view.cost.features(gaps(tokens))
        return n + view.cost.most_rows(MARGIN * interval, start, beside, BLOCK, max(self.n_rows - n, BLOCK))

    def deepest(self, s: Seq) -> int:
        """The position from which on the next rows of a prompt are expected to run."""
        return s.computed

    def shape(self, work: Work, s: Seq, left: int, view: EngineView) -> Work | None:
        """A prompt is cut where a tile ends, so that no tile is walked by two steps."""
        if work.n <= left or generates(s):
            return work
        whole = (work.start + left) // BLOCK * BLOCK - work.start
        return work.narrowed(s, whole if whole > 0 else left)


class SplitFuse(Policy):
    """`n_rows` in every step: a row for each sequence that generates, then prompts, the last of them cut to fill it.

    Unlike ChunkedPrefill's, a step never has fewer rows while prompts wait: not for a promised interval, not for the
    end of a tile.  Steps take about equally long; tokens come at the pace of `n_rows`, promised or not.
    """

    def __init__(self, n_rows: int = 256) -> None:
        self.n_rows = n_rows

    def rows(self, seqs: Sequence[Seq], view: EngineView) -> Sequence[Seq]:
        return sorted(seqs, key=lambda s: not generates(s))

    def budget(self, view: EngineView) -> int:
        return max(self.n_rows, n_next(generating(view.seqs)) + 1)


class PrefillFirst(Policy):
    """Whole prompts before any next token: what chunking is measured against."""

    def rows(self, seqs: Sequence[Seq], view: EngineView) -> Sequence[Seq]:
        return sorted(seqs, key=generates)

    def shape(self, work: Work, s: Seq, left: int, view: EngineView) -> Work | None:
        prompts = any(not generates(o) and o.status is RUNNING for o in view.seqs)
        return None if prompts and generates(s) else work
