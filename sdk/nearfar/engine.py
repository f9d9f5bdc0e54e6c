"""The one loop of the device: embed -> layers up to an exit -> sure? -> token, else the next layers.

A model with exits after layers e1 < e2 has the stages [0, e1), [e1, e2), [e2, L).  A token that leaves at an exit
owes the layers above it; the next token that goes further runs the owed rows in the same pass, so that the cache is
always what full depth would have made (states are recomputed, never copied upwards) and no layer runs a row twice.
The device half of a split model ends at its last exit, which then decides whatever its confidence.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from nearfar.cancel import Cancel
from nearfar.config import ExitConfig, ModelConfig
from nearfar.constraint import Constraint
from nearfar.exit import confidence, max_softmax, should_exit
from nearfar.kv_cache import FULL, KVDtype, Policy
from nearfar.lower import Lower
from nearfar.sampling import Sampling, sample
from nearfar.sequence import Sequence

Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Token:
    """One decision: which token, which head made it ("full" or "exit.{layer}"), how sure, in how many ms.

    `n_drafted`: tokens that were drafted in this step (nearfar.speculate).  `where`: "device", "edge" or "cloud".
    `is_final`: False for a draft that is told at once (`Sequence.tells_drafts`); `gen`: how often rows were void.
    """

    id: int
    source: str
    conf: float
    ms: float
    n_drafted: int = 0
    where: str = "device"
    is_final: bool = True
    gen: int = 0


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers [first, last) and the head that looks at their rows; `exit` is None at full depth.

    `forced`: no layers follow, so the token is decided here.  With neither no head looks: only the rows are wanted.
    """

    first: int
    last: int
    exit: ExitConfig | None
    forced: bool

    @property
    def source(self) -> str:
        return "full" if self.exit is None else f"exit.{self.exit.layer}"

    @property
    def head(self) -> str:
        return "final" if self.exit is None else self.source

    def conf(self, logits: Array) -> float:
        """logits [V] of the head -> how sure it is of its likeliest token, 0..1."""
        return max_softmax(logits) if self.exit is None else confidence(logits, self.exit)


class Look(NamedTuple):
    """What a look at the newest row came to: the token, the stage whose head chose it, and how sure that is."""

    token: int
    stage: Stage
    conf: float


OnRows = Callable[[int, int, Array], None]  # rows [n, D] that are the inputs of a layer, from a position on


def _nobody(layer: int, at: int, rows: Array) -> None:
    """Whom rows are told by default."""


def own_tau(e: ExitConfig) -> float:
    """By default the one of the file."""
    return e.tau


class Stepper(Protocol):
    """What `LLM` drives: our engine, or an outside one behind the same face."""

    def new_sequence(self, sampling: Sampling, use_exits: bool) -> Sequence: ...
    def step(self, s: Sequence, constraint: Constraint | None = None, cancel: Cancel | None = None) -> Token: ...
    def close(self) -> None: ...


class Engine:
    """Runs sequences on one `Lower`; keeps no state between steps."""

    def __init__(
        self,
        lower: Lower,
        max_len: int,
        kv_dtype: KVDtype = "f16",
        kv_policy: Policy = FULL,
    ) -> None:
        self.lower, self.max_len, self.kv_dtype, self.kv_policy = lower, max_len, kv_dtype, kv_policy

    def new_sequence(self, sampling: Sampling, use_exits: bool) -> Sequence:
        kv = self.lower.new_kv(self.max_len, self.kv_dtype, self.kv_policy)
        return Sequence(kv, sampling=sampling, use_exits=use_exits)

    def step(self, s: Sequence, constraint: Constraint | None = None, cancel: Cancel | None = None) -> Token:
        """Compute the pending rows of `s`, append one token and return it; a step that fails appends nothing."""
        started = time.perf_counter()
        look = self.look(s, stages(self.lower.config, s.use_exits), constraint, cancel)
        s.ids.append(look.token)
        return Token(look.token, look.stage.source, look.conf, 1000 * (time.perf_counter() - started))

    def close(self) -> None:
        """Nothing to give back: memory goes with the object."""

    def look(
        self,
        s: Sequence,
        cut: list[Stage],
        constraint: Constraint | None = None,
        cancel: Cancel | None = None,
        on_rows: OnRows = _nobody,
        tau_of: Callable[[ExitConfig], float] = own_tau,
    ) -> Look:
        """Run the pending rows of `s` up to the first stage of `cut` that is sure; nothing is appended.

        `on_rows` gets the rows that leave each stage, `tau_of` gives the threshold of an exit.  A look that fails
        leaves `s` as it was.
        """
        assert not s.ahead, "rows that nearfar.speculate has run ahead: rewind first"
        h = self.lower.embed(s.pending())  # [T, D]
        n_new, reached = len(h), 0
        token: int | None = None
        try:
            for stage in cut:
                at = s.kv.length(stage.first)
                h = self.lower.forward(
                    s.with_owed(stage.first, h), s.kv, stage.first, stage.last, cancel
                )  # [owed+T, D]
                s.owed.pop(stage.first, None)
                reached = stage.last
                on_rows(stage.last, at, h)
                tau = 1.0 if stage.exit is None else tau_of(stage.exit)
                if tau == 1 and not stage.forced:
                    continue  # no head, or one that is never sure: it would only cost time
                if stage.exit is None and wants_largest(self.lower, s.sampling, constraint):
                    ids, sure = self.lower.greedy(h[-1:], stage.head)
                    token, conf = int(ids[0]), float(sure[0])
                    break
                logits = self.lower.logits(h[-1:], stage.head)[0]  # [V]
                if constraint is not None:
                    logits = constraint.mask(logits)
                conf = stage.conf(logits)
                if stage.exit and should_exit(conf, tau, debt=len(s.with_owed(stage.last, h))):
                    break
            if token is None:
                token = sample(logits, s.sampling, position=len(s.ids), recent=s.ids)
            if constraint is not None:
                constraint.accept(token)
        except BaseException:
            if reached < self.lower.config.layers[1]:
                s.owe(reached, h[:-n_new])  # rows of older tokens that this step brought up to `reached`
            s.rewind(s.n_run)
            raise
        if not stage.forced:
            s.owe(stage.last, h)
        s.n_run = len(s.ids)
        return Look(token, stage, conf)

    def catch_up(self, s: Sequence, cut: list[Stage], cancel: Cancel | None = None, on_rows: OnRows = _nobody) -> None:
        """Run all rows that wait between stages of `cut` through the rest of them; layers above it are owed then."""
        h = np.empty((0, self.lower.config.d_model), np.float32)
        for stage in cut:
            if not len(rows := s.with_owed(stage.first, h)):
                continue
            at = s.kv.length(stage.first)
            try:
                new = self.lower.forward(rows, s.kv, stage.first, stage.last, cancel)
            except BaseException:
                s.owe(stage.first, h)
                raise
            s.owed.pop(stage.first, None)
            h = new
            on_rows(stage.last, at, h)
        if not stage.forced:
            s.owe(stage.last, h)


def wants_largest(lower: Lower, sampling: Sampling, constraint: Constraint | None) -> bool:
    """Whether the largest logit is all that is asked for, and an engine with a screened head gives it for less."""
    plain = sampling.temperature == 0 and sampling.repetition_penalty == 1
    return lower.screens and plain and constraint is None


def stages(config: ModelConfig, use_exits: bool = True, rows_at: int = 0) -> list[Stage]:
    """The layers here, cut at the exits that may fire (tau < 1) and end where no layers follow.

    `rows_at`: cut there, too, as the rows that enter this layer are wanted.
    """
    first, last = config.layers
    heads = {e.layer: e for e in config.exits if use_exits and e.tau < 1 and e.layer < last} | {last: config.last_exit}
    cuts = sorted({first, *heads, rows_at or last})
    return [Stage(a, b, heads.get(b), b == last) for a, b in pairwise(cuts)]
