"""What policies see of the engine: nothing that they could change, no tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from nearfar_cloud.kv.pool import Room
from nearfar_cloud.scheduling.cost import CostModel
from nearfar_cloud.types import Seq


@dataclass(frozen=True, slots=True)
class EngineView:
    """One moment.  Policies read the sequences and change nothing."""

    now: float  # seconds, of the engine's clock
    seqs: Sequence[Seq]  # all that hold memory, in blocks or in a tier; then a window of those that wait for some
    idle: Sequence[Seq]  # such as hold memory and do nothing until somebody asks: their memory can be had
    early: Sequence[Seq]  # such as do nothing until somebody asks, and may run before that with what is left of a step
    n_blocks: int
    room: Room  # blocks that could be had at once
    n_parkable: int  # rows for which there is room between two layers
    hit: Callable[[Seq], tuple[tuple[int, ...], Room]]  # blocks the prefix cache has, and how many of them are idle
    freed: Callable[[Sequence[Seq], Collection[int]], Sequence[int]]  # blocks that only these hold, but those promised
    rooms: Callable[[Collection[int]], Room]  # how many of some blocks are of each group
    is_upper: Callable[[Seq], bool]  # whether a sequence needs no memory in the lower layers
    can_swap: Callable[[Seq], bool]  # whether a tier has room
    swap_s: Callable[[Seq], float]  # to copy its blocks there and back, by what copies have taken
    cost: CostModel
