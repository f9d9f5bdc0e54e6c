"""How full an engine is, as one number: the steps until its memory is full (Llumnix, 2406.03243).

A sequence that waits counts like one that runs, with the blocks that it needs to begin: its memory is spoken for, so a
worker with a queue looks as full as it is about to be.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields, replace
from typing import TYPE_CHECKING

from nearfar_cloud.kv.pool import BLOCK, n_blocks_of
from nearfar_cloud.types import Status

if TYPE_CHECKING:
    from nearfar_cloud.engine import Engine


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine holds at a moment; sizes in blocks of keys and values."""

    n_blocks: int
    n_free: int  # nobody needs what they hold
    n_cached: int  # only the prefix cache does
    n_wanted: int  # what those who wait for memory need for the positions that they know
    n_waiting: int  # sequences by the place of their memory
    n_running: int
    n_swapped: int

    @property
    def n_used(self) -> int:
        return self.n_blocks - self.n_free - self.n_cached

    @property
    def n_seqs(self) -> int:
        return self.n_waiting + self.n_running + self.n_swapped

    def with_sent(self, n_seqs: int, n_blocks: int) -> Load:
        """As it will be once sequences that are on their way have come."""
        return replace(self, n_waiting=self.n_waiting + n_seqs, n_wanted=self.n_wanted + n_blocks)


def load_of(engine: Engine) -> Load:
    """From any thread: what changes meanwhile is counted before or after."""
    seqs = list(engine.seqs.values())
    waiting = [s for s in seqs if s.status is Status.WAITING and not s.is_idle]
    n_running = sum(s.status is Status.RUNNING for s in seqs)
    wanted = sum(n_blocks_of(s.n_known) for s in waiting)
    pool = engine.pool
    n_free, n_cached = pool.n_free - pool.n_cached, pool.n_cached
    n_swapped = sum(s.status is Status.SWAPPED for s in seqs)
    return Load(pool.n_blocks, n_free, n_cached, wanted, len(waiting), n_running, n_swapped)


def total(loads: Iterable[Load]) -> Load:
    """Of several engines together."""
    return Load(*(sum(column) for column in zip((0,) * len(fields(Load)), *map(astuple, loads), strict=True)))


def freeness(load: Load) -> float:
    """Positions that each sequence may still come to before memory is full; below 0: so many are missing.

    What is missing is not divided by the sequences that miss it, or a crowd would make a full worker look less full.
    """
    left = BLOCK * (load.n_blocks - load.n_used - load.n_wanted)
    return left / max(1, load.n_seqs) if left > 0 else float(left)


def freest(loads: dict[int, Load]) -> int | None:
    """The worker for the next request: the highest freeness, then the fewest sequences, then the lowest number."""
    return min(loads, key=lambda i: (-freeness(loads[i]), loads[i].n_seqs, i), default=None)
