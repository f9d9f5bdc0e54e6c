"""Who comes when, with how long a prompt, for how long an answer; scaled to a machine with its shape kept.

    load_trace | generate -> divided(8) -> first(n) or window(s) -> fitting(positions) -> at_rate(r) -> replay

Dividing lengths and stretching time keep what makes traffic hard to serve: bursts, heavy tails, shared beginnings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import DataError, UsageError

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]
Hashes = tuple[tuple[int, ...], ...]

MOST_TOKENS = 1 << 24  # of one prompt or answer


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests in order of arrival.  Raises DataError for arrays that do not form any.

    `hashes`, if there are any: of each request the blocks of its prompt, `hash_block` tokens each, the last one may be
    shorter.  Equal hashes are equal tokens, so that a prefix cache finds what it found where the trace was taken.
    """

    name: str
    arrival_s: F64  # [n] rising from 0
    n_prompt: I64  # [n] tokens
    n_output: I64  # [n] tokens
    hashes: Hashes = ()
    hash_block: int = 0

    def __post_init__(self) -> None:
        n = len(self.arrival_s)
        if not n:
            raise DataError(f"{self.name}: no requests")
        if not len(self.n_prompt) == len(self.n_output) == n or len(self.hashes) not in (0, n):
            raise DataError(f"{self.name}: {n} arrivals, {len(self.n_prompt)} prompts, {len(self.n_output)} answers")
        if not np.isfinite(self.arrival_s).all() or self.arrival_s[0] != 0 or (np.diff(self.arrival_s) < 0).any():
            raise DataError(f"{self.name}: arrivals have to rise from 0")
        for what, lengths in (("prompts", self.n_prompt), ("answers", self.n_output)):
            if lengths.min() < 1 or lengths.max() > MOST_TOKENS:
                raise DataError(f"{self.name}: {what} of {lengths.min()}..{lengths.max()} tokens, expected 1 or more")
        if any(len(h) * self.hash_block < n for h, n in zip(self.hashes, self.n_prompt, strict=False)):
            raise DataError(f"{self.name}: hashes do not cover a prompt")

    # ------------------------------------------------------------ figures

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def span_s(self) -> float:
        return float(self.arrival_s[-1])

    @property
    def rate(self) -> float:
        """Requests a second, over the intervals between the first and the last; inf if all come at once."""
        return (len(self) - 1) / self.span_s if self.span_s else float("inf")

    @property
    def cv(self) -> float:
        """Standard deviation of the intervals by their mean: 1 for Poisson, more for bursts; 0 if there are none."""
        gaps = np.diff(self.arrival_s)
        return float(gaps.std() / gaps.mean()) if len(gaps) and gaps.mean() else 0.0

    def figures(self) -> dict[str, Any]:
        """What a reader wants to know of it."""
        prompt, output = (
            {"mean": float(x.mean()), **{f"p{p}": float(np.percentile(x, p)) for p in (50, 99)}}
            for x in (self.n_prompt, self.n_output)
        )
        facts = {"name": self.name, "requests": len(self), "span_s": self.span_s, "cv": self.cv}
        return facts | {"rate": self.rate if self.span_s else None, "prompt": prompt, "output": output}

    # ------------------------------------------------------------ the same shape for another machine

    def divided(self, by: int) -> Workload:
        """Lengths divided, at least one token each; blocks of hashes shrink alike.  UsageError: they don't divide."""
        if by < 1 or self.hash_block % by:
            raise UsageError(f"lengths divided by {by}: expected a divisor of blocks of {self.hash_block} tokens")
        prompt, output = (np.maximum(x // by, 1) for x in (self.n_prompt, self.n_output))
        return replace(self, n_prompt=prompt, n_output=output, hash_block=self.hash_block // by)

    def at_rate(self, rate: float) -> Workload:
        """The same arrivals on another time scale, `rate` requests a second.  UsageError: all come at once."""
        if not 0 < rate < float("inf"):
            raise UsageError(f"a rate of {rate} requests a second: expected a positive number")
        if not self.span_s:
            raise UsageError(f"{self.name}: all come at once; that has no rate")
        return replace(self, arrival_s=self.arrival_s * (self.rate / rate))

    def at_once(self) -> Workload:
        """All there from the start: what a machine can do at most."""
        return replace(self, arrival_s=np.zeros(len(self)))

    def first(self, n: int) -> Workload:
        """The first `n` requests, or all."""
        return self._of(np.arange(len(self)) < n)

    def window(self, start_s: float, seconds: float) -> Workload:
        """Those that come in [start_s, start_s + seconds), from the first of them on.  UsageError: there are none."""
        inside = (self.arrival_s >= start_s) & (self.arrival_s < start_s + seconds)
        if not inside.any():
            raise UsageError(f"{self.name}: nobody comes in {start_s:g}..{start_s + seconds:g} s of {self.span_s:g} s")
        return self._of(inside)

    def fitting(self, n_positions: int) -> Workload:
        """Without the requests whose prompt and answer take more positions.  UsageError: none is left."""
        fits = self.n_prompt + self.n_output <= n_positions
        if not fits.any():
            raise UsageError(f"{self.name}: no request fits into {n_positions} positions")
        return self._of(fits)

    def _of(self, chosen: NDArray[np.bool_]) -> Workload:
        at = np.flatnonzero(chosen)
        arrival = self.arrival_s[at] - self.arrival_s[at[0]] if len(at) else self.arrival_s[at]
        hashes = tuple(self.hashes[i] for i in at) if self.hashes else ()
        return replace(self, arrival_s=arrival, n_prompt=self.n_prompt[at], n_output=self.n_output[at], hashes=hashes)

    # ------------------------------------------------------------ text

    def prompt(self, i: int, n_vocab: int, seed: int = 0) -> tuple[int, ...]:
        """Ids of request `i`: drawn, the same each time; shared with others as far as hashes say so."""
        n = int(self.n_prompt[i])
        if not self.hashes:
            return tuple(np.random.default_rng((seed, 0, i)).integers(0, n_vocab, n).tolist())
        ids: list[int] = []
        for h in self.hashes[i]:
            if len(ids) >= n:
                break
            ids += np.random.default_rng((seed, 1, h)).integers(0, n_vocab, self.hash_block).tolist()
        return tuple(ids[:n])
