"""Self-speculation on one device: an early exit drafts, full depth checks the drafts in one pass.

    ids -> layers [0, e) -> exit head -> draft -> layers [0, e) -> exit head -> draft ...      a few times
    all those rows -> layers [e, L) -> final head -> logits of every position                  once

Each step takes one row of those logits and decides exactly as `engine.step` does at full depth.  If the token is the
draft, the next row was computed from it and is good; if not, what was drafted behind it is dropped.  A row's bits do
not depend on how many rows share a call, so every token is the one that full depth takes alone, whatever the sampling,
the schema or the drafts: drafts decide about time only.  Where weights come from memory, several rows cost little more
than one.  Speculative decoding: 2211.17192; with a model's own early exits: LayerSkip, 2404.16710.

No layer runs a row twice, and nothing is owed: the exits draft here, they do not decide.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from nearfar.cancel import Cancel
from nearfar.config import ExitConfig
from nearfar.constraint import Constraint
from nearfar.engine import Engine, Stage, Token, stages, wants_largest
from nearfar.errors import UsageError
from nearfar.exit import confidence
from nearfar.sampling import Sampling, sample
from nearfar.sequence import Ahead, Sequence

Array = NDArray[np.float32]

MAX_ROWS = 8  # of a checking pass: what the kernels multiply for little more than one
MAX_DRAFTS = MAX_ROWS - 1

# Drafting ends where all drafts so far are right with less than this probability: below it another draft (a third of
# the layers and a head, for nano) costs more than the token that it may save.
LEAST_SURE = 0.4

# Where not even a first draft is that sure, the exit's head was computed for nothing.  When that happened 2, 3, 4, ...
# times in a row, the next 1, 2, 4, 8, 8, ... steps do without: text that the exit cannot foresee pays little for it.
LONGEST_PAUSE = 8


@dataclass(frozen=True, slots=True)
class Speculative:
    """A `Stepper` that gives the tokens of `engine` without exits, several for each pass through the upper layers.

    `n_drafts`: at most so many a pass, 1..MAX_DRAFTS.  `ends`: ids that end an answer, so they are not drafted.
    Raises UsageError for a model without exits.
    """

    engine: Engine
    n_drafts: int = MAX_DRAFTS
    ends: Collection[int] = ()
    least_sure: float = LEAST_SURE

    def __post_init__(self) -> None:
        if not 1 <= self.n_drafts <= MAX_DRAFTS:
            raise UsageError(f"speculate={self.n_drafts}: expected 1..{MAX_DRAFTS} drafts, True or False")
        config = self.engine.lower.config
        if not config.exits or self.exit.layer == self.whole.last:
            raise UsageError("speculate: this model has no early exits (nearfar.exit_layers) that could draft")

    @property
    def exit(self) -> ExitConfig:
        """The exit that drafts: the lowest, whose drafts are the cheapest."""
        return self.engine.lower.config.exits[0]

    @property
    def whole(self) -> Stage:
        """All layers, whose head decides."""
        return stages(self.engine.lower.config, use_exits=False)[-1]

    def new_sequence(self, sampling: Sampling, use_exits: bool = False) -> Sequence:
        return self.engine.new_sequence(sampling, use_exits)

    def close(self) -> None:
        self.engine.close()

    def step(self, s: Sequence, constraint: Constraint | None = None, cancel: Cancel | None = None) -> Token:
        """As `Engine.step`; `source` is "draft.{layer}" where the exit had foreseen the token."""
        assert not s.owed, "a sequence that left at exits"
        started, n_drafted = time.perf_counter(), 0
        try:
            if cancel is not None:
                cancel.check()
            if not s.ahead:
                n_drafted = self._look_ahead(s, constraint, cancel)
            row = s.ahead.popleft()
            if row.largest is not None:
                token, conf = row.largest
            else:
                assert row.logits is not None
                logits = row.logits if constraint is None else constraint.mask(row.logits)  # [V]
                conf = self.whole.conf(logits)
                token = sample(logits, s.sampling, position=len(s.ids), recent=s.ids)
            if constraint is not None:
                constraint.accept(token)
        except BaseException:
            s.rewind(s.n_run)
            raise
        foreseen = token == row.draft
        s.n_run = len(s.ids)
        s.ids.append(token)
        if not foreseen:
            s.rewind(s.n_run)
        source = f"draft.{self.exit.layer}" if foreseen else self.whole.source
        return Token(token, source, conf, 1000 * (time.perf_counter() - started), n_drafted)

    def _look_ahead(self, s: Sequence, constraint: Constraint | None, cancel: Cancel | None) -> int:
        """Draft, then run the upper layers over the pending rows and the drafts; how many were drafted."""
        lower, e = self.engine.lower, self.exit.layer
        room = min(self.n_drafts, MAX_ROWS - len(s.ids) + s.n_run, self.engine.max_len - len(s.ids))
        if s.pause.left or room < 1:
            s.pause.left = max(0, s.pause.left - 1)
            h = lower.forward(lower.embed(s.pending()), s.kv, 0, self.whole.last, cancel)
            self._keep(s, h, [], constraint)
            return 0
        rows = [lower.forward(lower.embed(s.pending()), s.kv, 0, e, cancel)]  # [T, D]
        ids, drafts, sure = list(s.ids), list[int](), 1.0
        # The likeliest token, not a draw.  At temperature 1, 86 % of such drafts are right in nano's answers; of tokens
        # drawn with the noise of the real choice 77 %, because noise moves the flatter logits of the exit further.
        likeliest = replace(s.sampling, temperature=0.0)
        grammar = None if constraint is None else constraint.fork()
        while len(drafts) < room:
            logits = lower.logits(rows[-1][-1:], f"exit.{e}")[0]  # [V]
            if grammar is not None:
                logits = grammar.mask(logits)
            sure *= confidence(logits, self.exit)
            token = sample(logits, likeliest, position=len(ids), recent=ids)
            if sure < self.least_sure or token in self.ends:
                break
            drafts.append(token)
            ids.append(token)
            rows.append(lower.forward(lower.embed(np.array([token], np.int32)), s.kv, 0, e, cancel))
            if grammar is not None:
                grammar.accept(token)
                if grammar.is_done:
                    break
        s.pause.n_unsure = 0 if drafts else s.pause.n_unsure + 1
        s.pause.left = min(1 << s.pause.n_unsure >> 2, LONGEST_PAUSE)
        h = lower.forward(np.concatenate(rows), s.kv, e, self.whole.last, cancel)  # [T + drafts, D]
        self._keep(s, h, drafts, constraint)
        return len(drafts)

    def _keep(self, s: Sequence, h: Array, drafts: list[int], constraint: Constraint | None) -> None:
        """Let the last row of h [T, D] and those of the drafts wait for their steps."""
        lower, rows = self.engine.lower, h[-len(drafts) - 1 :]
        if wants_largest(lower, s.sampling, constraint):
            found = zip(*lower.greedy(rows, self.whole.head), [*drafts, None], strict=True)
            s.ahead.extend(Ahead(None, draft, (int(token), float(conf))) for token, conf, draft in found)
        else:
            logits = lower.logits(rows, self.whole.head)  # [drafts + 1, V]
            s.ahead.extend(Ahead(z, draft) for z, draft in zip(logits, [*drafts, None], strict=True))
