"""Requests of a workload into an engine, at their times; when each token came.

    workload -> submit what has come -> engine.step -> note tokens -> ... -> Replay -> report

The engine's clock decides what that is: on a wall clock a measurement, on a virtual clock with a `SimExecutor` a
simulation.  One thread does all; a request is handed over between two steps, which is when an engine takes it anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from nearfar.errors import NearfarError, UsageError
from nearfar_cloud.clock import Clock
from nearfar_cloud.engine import Engine
from nearfar_cloud.planning.workload import Workload
from nearfar_cloud.types import Objective, Request

IDLE_S = 1e-3  # how long to wait when policies let nothing run
PATIENCE_S = 60.0  # and after how long that is an error

Progress = Callable[[int, int, float], None]  # requests done, requests, seconds of the engine's clock


@dataclass(slots=True)
class Served:
    """What became of one request; seconds from the start of the replay."""

    arrival_s: float
    n_prompt: int
    n_output: int  # asked for
    token_s: list[float] = field(default_factory=list)  # when each token came
    end_s: float | None = None
    error: str = ""

    @property
    def finished(self) -> bool:
        return self.end_s is not None and not self.error

    @property
    def ttft_s(self) -> float | None:
        """Time to the first token, from arrival."""
        return self.token_s[0] - self.arrival_s if self.token_s else None

    @property
    def tbt_s(self) -> list[float]:
        """Times between tokens; accepted drafts come together."""
        return [b - a for a, b in zip(self.token_s, self.token_s[1:], strict=False)]

    @property
    def e2e_s(self) -> float | None:
        """To the end, from arrival."""
        return self.end_s - self.arrival_s if self.end_s is not None else None


@dataclass(frozen=True, slots=True)
class Replay:
    """A whole run: one record a request in order of arrival, its length, and what the engine counted meanwhile."""

    served: list[Served]
    seconds: float  # from the first arrival to the last token
    counts: dict[str, Any]


def replay(
    engine: Engine,
    workload: Workload,
    *,
    objective: Objective = Objective(),  # noqa: B008  frozen
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Replay:
    """Serve `workload`.  `objective` is what every request is promised; `seed` draws the prompts.

    A request that the engine refuses has the reason in its record.  Raises UsageError for an engine without a `Clock`
    or with work of others, NearfarError when nothing runs any more.
    """
    clock = engine.clock
    if not isinstance(clock, Clock):
        raise UsageError("a replay needs an engine with a clock of nearfar_cloud.clock: WallClock() or VirtualClock()")
    if engine.seqs or engine.has_work:
        raise UsageError(f"the engine already serves {len(engine.seqs)} sequences: a replay needs one of its own")
    start, before = clock.now, asdict(engine.counts)
    served = [
        Served(float(a), int(p), int(o))
        for a, p, o in zip(workload.arrival_s, workload.n_prompt, workload.n_output, strict=True)
    ]
    open_: dict[int, Served] = {}
    n_come = n_done = 0
    idle_since: float | None = None

    while True:
        while n_come < len(served) and start + served[n_come].arrival_s <= clock.now:
            one = served[n_come]
            request = Request(
                ids=workload.prompt(n_come, engine.facts.n_vocab, seed), max_tokens=one.n_output, objective=objective
            )
            n_come += 1
            with clock.dated(start + one.arrival_s):
                try:
                    open_[engine.submit(request)] = one
                except NearfarError as error:
                    one.error, n_done = str(error), n_done + 1
        next_s = start + served[n_come].arrival_s if n_come < len(served) else float("inf")
        if not engine.has_work:
            if n_come == len(served):
                break
            clock.wait_until(next_s)
            continue
        steps = engine.counts.steps
        outputs = engine.step()
        now = clock.now - start
        for out in outputs:
            one = open_[out.seq]
            one.token_s += [now] * len(out.ids)
            if out.finish:
                one.end_s, one.error, n_done = now, out.error, n_done + 1
                del open_[out.seq]
        if outputs or engine.counts.steps > steps:
            idle_since = None
            if on_progress is not None:
                on_progress(n_done, len(served), now)
            continue
        idle_since = clock.now if idle_since is None else idle_since
        if clock.now - idle_since > PATIENCE_S and n_come == len(served):
            raise NearfarError(f"nothing has run for {PATIENCE_S:g} s, and {len(open_)} requests wait for it")
        clock.wait_until(min(next_s, clock.now + IDLE_S))

    last = max((s.end_s for s in served if s.end_s is not None), default=0.0)
    counts = {name: value - before[name] for name, value in asdict(engine.counts).items()}
    return Replay(served, last, counts)


def capacity(engine: Engine, workload: Workload, seed: int = 0) -> float:
    """Requests a second when all of `workload` is there from the start: the rate that loads are shares of.

    Raises NearfarError if nothing of it could be served.
    """
    done = replay(engine, workload.at_once(), seed=seed)
    n = sum(s.finished for s in done.served)
    if not n or not done.seconds:
        raise NearfarError(f"{workload.name}: no request could be served ({done.served[0].error or 'none finished'})")
    return n / done.seconds
