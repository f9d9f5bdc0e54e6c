"""What a worker and the front that holds it say to each other, over `executors/transport.py`."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from nearfar.sampling import Sampling
from nearfar_cloud.counts import Counts
from nearfar_cloud.executors.base import ModelFacts
from nearfar_cloud.executors.transport import Arrays, WireError
from nearfar_cloud.fleet.load import Load
from nearfar_cloud.types import Array, Facts, Finish, Logprobs, Objective, Output, Request


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Continue a text, whose ids i32 [T] are the frame's array, in as many ways as there are `seqs`.

    The last `n_followed` ids were decided before, perhaps by another worker: the hooks are to follow them.
    """

    seqs: tuple[int, ...]  # the front's numbers
    n_followed: int
    max_tokens: int
    sampling: Sampling
    stop_ids: tuple[int, ...]
    n_logprobs: int
    pooled: bool
    objective: Objective
    hooks: tuple[str | None, ...]  # what the hook of each is made of

    def request(self, arrays: Arrays) -> Request:
        """Raises WireError for other arrays than ids, UsageError for what no engine can serve."""
        return Request(
            ids=tuple(_array(arrays, 0, "<i4").tolist()),
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            stop_ids=frozenset(self.stop_ids),
            n_logprobs=self.n_logprobs,
            pooled=self.pooled,
            objective=self.objective,
        )

    @classmethod
    def of(cls, req: Request, seqs: tuple[int, ...], hooks: tuple[str | None, ...], n_followed: int) -> Submit:
        return cls(
            seqs=seqs,
            n_followed=n_followed,
            max_tokens=req.max_tokens,
            sampling=req.sampling,
            stop_ids=tuple(req.stop_ids),
            n_logprobs=req.n_logprobs,
            pooled=req.pooled,
            objective=req.objective,
            hooks=hooks,
        )


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Stop a sequence; its last output still comes."""

    seq: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The first words of a worker: its model is loaded."""

    pid: int
    facts: ModelFacts
    n_blocks: int


class Broken(msgspec.Struct, frozen=True, tag=True):
    """Instead of Ready, and the last words: the model cannot be loaded."""

    error: str


class Told(msgspec.Struct, frozen=True, tag=True):
    """After each step, and as a sign of life at least every BEAT_S while there is nothing to do."""

    outputs: tuple[Out, ...]
    counts: Counts
    n_received: int  # Submits so far: `load` knows of them
    load: Load | None  # not with every step


class Out(msgspec.Struct, frozen=True, array_like=True):
    """An Output; its mean of rows, f32 [D], is an array of the frame."""

    seq: int
    ids: tuple[int, ...]
    finish: Finish | None
    logprobs: tuple[Logprobs, ...]
    error: str
    facts: Facts | None
    pooled: int | None  # which array

    def output(self, arrays: Arrays) -> Output:
        """Raises WireError for an array that is not there."""
        pooled = None if self.pooled is None else _array(arrays, self.pooled, "<f4")
        return Output(self.seq, self.ids, self.finish, self.logprobs, self.error, self.facts, pooled)


def outs(outputs: list[Output]) -> tuple[tuple[Out, ...], list[Array]]:
    """Outputs for a Told, and the arrays of its frame."""
    arrays = [out.pooled for out in outputs if out.pooled is not None]
    numbers = iter(range(len(arrays)))
    told = tuple(Out(*out[:6], None if out.pooled is None else next(numbers)) for out in outputs)
    return told, arrays


def _array(arrays: Arrays, i: int, dtype: str) -> np.ndarray[Any, Any]:
    """Array `i` of a frame, which has to be one row of numbers."""
    if not 0 <= i < len(arrays) or arrays[i].ndim != 1 or arrays[i].dtype.str != dtype:
        found = [(a.dtype.str, a.shape) for a in arrays]
        raise WireError(f"arrays {found}: expected one of {dtype} and one dimension at {i}")
    return arrays[i]


ToWorker = Submit | Abort
ToFront = Ready | Broken | Told
