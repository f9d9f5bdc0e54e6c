"""What an engine asks of whoever computes: run a batch, move blocks.  Arrays of numpy, for it may be far away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import ContextError, UsageError
from nearfar.sampling import Sampling
from nearfar_cloud.kv.pool import BLOCK, n_blocks_of
from nearfar_cloud.outside import RowPieces, RowStore
from nearfar_cloud.scheduling.cost import Experts
from nearfar_cloud.types import Array, LayerRange, LogitsHook, Logprobs, Request, Seq, Work

Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the engine has to know of a model.

    `prefix_cache`: whether blocks may serve later requests that begin alike.  They hold the same bits as computed anew,
    so no answer depends on it; off for a model that is better off without (hits too rare for the memory, or an executor
    whose rows are not the same in every batch).
    """

    fingerprint: str
    n_layers: int
    d_model: int
    n_vocab: int
    n_ctx: int
    prefix_cache: bool = True
    experts: Experts | None = None  # of a mixture
    first_layer: int = 0  # the upper half of a model begins there, with rows

    def check(self, req: Request, n_blocks: int) -> None:
        """UsageError, ContextError: a request that this model with so many blocks can never serve."""
        if req.entry < self.first_layer:
            raise UsageError(
                f"{f'rows for layer {req.entry}' if req.entry else 'ids'} for the upper half of a model, layers "
                f"[{self.first_layer}, {self.n_layers}): expected rows that enter at layer {self.first_layer}"
            )
        if req.entry and not 0 < req.entry < self.n_layers:
            raise UsageError(f"rows enter at layer {req.entry}: expected 1..{self.n_layers - 1}")
        self.check_ids(req.ids)
        n = len(req.ids) + (0 if req.outside else req.max_tokens)
        if req.rows is not None:
            self.check_rows(req.rows)
            n = len(req.rows)
        if n > self.limit(n_blocks):
            limit = self.limit(n_blocks)
            raise ContextError(f"prompt and answer take {n} positions: the model and its cache hold {limit}")

    def check_ids(self, ids: Sequence[int]) -> None:
        """UsageError: some are no tokens of this model."""
        if ids and (min(ids) < 0 or max(ids) >= self.n_vocab):
            raise UsageError(f"ids {min(ids)}..{max(ids)}: the vocabulary holds 0..{self.n_vocab - 1}")

    def check_rows(self, rows: RowStore) -> None:
        """UsageError: they are not as wide as this model."""
        if rows.width != self.d_model:
            raise UsageError(f"rows of {rows.width} numbers: expected [n, {self.d_model}]")

    def limit(self, n_blocks: int) -> int:
        """The most positions of one sequence."""
        return min(self.n_ctx, BLOCK * n_blocks)


class Ask(NamedTuple):
    """Decide the tokens behind the last `1 + len(drafts)` rows of a work: each draft holds iff it is what is chosen."""

    position: int  # of the first token that is decided
    recent: Sequence[int]  # the ids before it, as far as penalties look back
    drafts: tuple[int, ...]
    sampling: Sampling
    n_logprobs: int
    hook: LogitsHook | None
    wants_margin: bool = False
    wants_hidden: bool = False


class BatchWork(NamedTuple):
    """One work with all that it needs: `ids` [n] or all `rows` where it enters, neither if its rows are parked.

    Rows are read when they are run, so such as cannot be read fail their own work.
    """

    seq: int
    start: int
    n: int
    layers: LayerRange
    blocks: Ids  # of positions 0..start+n-1
    ids: Ids | None
    rows: RowPieces | None
    ask: Ask | None
    pooled: bool = False  # the rows of the last layer are summed up, over all works of the sequence


def batch_of(works: Sequence[Work], seqs: Mapping[int, Seq]) -> list[BatchWork]:
    """The works of a plan with what an executor needs for them."""
    pairs = [(seqs[w.seq], w) for w in works]
    blocks = _arrays([s.blocks[: n_blocks_of(w.start + w.n)] for s, w in pairs])
    ids = _arrays([_ids(s, w) for s, w in pairs])
    batch = []
    for (s, w), its_blocks, its_ids in zip(pairs, blocks, ids, strict=True):
        entering = its_ids if len(its_ids) else None
        rows = s.outside.rows if s.outside is not None and w.layers.first == s.req.entry else None
        ask = _ask(s, w.sample) if w.sample else None
        batch.append(BatchWork(w.seq, w.start, w.n, w.layers, its_blocks, entering, rows, ask, s.req.pooled))
    return batch


def _arrays(lists: Sequence[Sequence[int]]) -> list[Ids]:
    """Each list as an array; all are pieces of one, for making a small array takes as long as a large one."""
    whole = np.array(list(chain.from_iterable(lists)), np.int32)
    return [whole[a:b] for a, b in pairwise((0, *accumulate(map(len, lists))))]


def _ids(s: Seq, w: Work) -> Sequence[int]:
    """What enters, drafts behind what is known; nothing where rows do."""
    if w.layers.first:
        return ()
    known = s.ids[w.start : w.start + w.n]
    return known if len(known) == w.n else (known + s.drafts)[: w.n]


def _ask(s: Seq, n: int) -> Ask:
    """To decide behind each of the last `n` rows."""
    req, position, drafts = s.req, s.n_known, tuple(s.drafts[: n - 1]) if n > 1 else ()
    window = 0 if req.sampling.repetition_penalty == 1 else req.sampling.repetition_window
    recent = s.ids[max(0, position - window) : position] if window else ()
    if (question := s.question) is None:
        return Ask(position, recent, drafts, req.sampling, req.n_logprobs, s.hook)
    return Ask(position, recent, drafts, req.sampling, req.n_logprobs, s.hook, True, question.wants_hidden)


class Result(NamedTuple):
    """Of one work: the tokens decided (accepted drafts, then one), or what is wrong with it."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    error: str = ""
    pooled: Array | None = None  # f32 [D], with the last work of a sequence that asks for it
    margin: float = 0.0  # of the row that decided the last id: how far its largest logit is above the next one
    hidden: Array | None = None  # f32 [D]: that row, as the last layer left it


class Uppers(NamedTuple):
    """The last `n` blocks have memory for layers from `first` on alone: for rows that enter there or above."""

    n: int = 0
    first: int = 0


class Executor(Protocol):
    """Owns weights, blocks, parked rows and copies.  `run` is all or nothing for what the engine may see."""

    @property
    def uppers(self) -> Uppers: ...

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def n_blocks(self) -> int: ...

    def run(self, batch: Sequence[BatchWork]) -> list[Result]: ...

    def swap_out(self, seq: int, blocks: Ids) -> None: ...  # keep a copy of the blocks, in order

    def swap_in(self, seq: int, blocks: Ids) -> None: ...  # and put it back into as many others

    def can_swap(self, n_blocks: int) -> bool: ...

    def drop(self, seq: int) -> None: ...  # copies, parked rows and sums of a sequence


def run_or_find(executor: Executor, batch: Sequence[BatchWork]) -> list[Result]:
    """Run a batch; if that fails, halves of it, until the work that fails is alone: it harms no other one."""
    try:
        return executor.run(batch)
    except Exception as error:  # the boundary to whatever computes
        if len(batch) == 1:
            return [Result(error=f"{type(error).__name__}: {error}")]
        half = len(batch) // 2
        return run_or_find(executor, batch[:half]) + run_or_find(executor, batch[half:])
