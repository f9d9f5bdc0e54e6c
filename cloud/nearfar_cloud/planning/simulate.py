"""The real engine on a machine that is not there: a cost model for its steps, a clock that jumps.

fit.cost_model  |  roofline.cost_model ──> simulated(...) ──> replay ──> report
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nearfar_cloud.clock import VirtualClock
from nearfar_cloud.engine import Engine
from nearfar_cloud.executors.base import ModelFacts
from nearfar_cloud.executors.sim import SimExecutor
from nearfar_cloud.scheduling.budget import Arrival, ChunkedPrefill, PrefillFirst, SplitFuse
from nearfar_cloud.scheduling.compose import Composer
from nearfar_cloud.scheduling.cost import CostModel
from nearfar_cloud.scheduling.layered import LayeredPrefill
from nearfar_cloud.scheduling.policy import Policy
from nearfar_cloud.scheduling.standard import standard

# Name -> the chain of policies with so many rows a step; the last of a chain weighs most.
POLICIES: Mapping[str, Callable[[int], Sequence[Policy]]] = {
    "chunked": lambda rows: (Arrival(), ChunkedPrefill(rows)),
    "prefill-first": lambda rows: (Arrival(), PrefillFirst()),
    "splitfuse": lambda rows: (Arrival(), SplitFuse(rows)),
    "layered": lambda rows: (Arrival(), LayeredPrefill(rows)),
    "standard": standard,
}


def simulated(
    facts: ModelFacts, cost: Callable[[], CostModel], policies: Sequence[Policy], *, n_blocks: int, **options: Any
) -> Engine:
    """An engine that computes nothing.  `options` are those of `Engine`, but for its clock.

    `cost` makes a cost model: one is the machine, another one is what the engine knows of it and goes on learning.
    """
    clock = VirtualClock()
    engine = Engine(SimExecutor(facts, n_blocks, cost(), clock), Composer(policies), clock=clock, **options)
    engine.cost = cost()
    return engine
