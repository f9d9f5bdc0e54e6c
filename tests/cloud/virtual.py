"""An engine in virtual time: nothing is computed, a step takes what a formula says.  Needs no torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np

from nearfar_cloud.engine import Engine
from nearfar_cloud.executors.base import BatchWork, Ids, ModelFacts, Result, Uppers
from nearfar_cloud.scheduling.compose import Composer
from nearfar_cloud.scheduling.cost import CostModel, Features, features
from nearfar_cloud.scheduling.policy import Policy
from nearfar_cloud.types import LayerRange, Objective, Request, Work

N_LAYERS = 4
Seconds = Callable[[Features], float]


def linear(x: Features) -> float:
    """5 ms a step and 1 ms a row, and a little for what is looked at."""
    return float(np.array([5e-3, 1e-3, 1e-7, 1e-8]) @ x)


def kneed(x: Features) -> float:
    """20 ms a step, a row is nearly free until the 32nd and costs 1 ms from there on."""
    return 20e-3 + 1e-4 * x[1] + 1e-3 * max(0.0, x[1] - 32)


def token(position: int) -> int:
    """What is decided at a position, whoever asks."""
    return position * 7919 % 251


class Virtual:
    """An executor whose steps move its clock and nothing else."""

    uppers = Uppers()

    def __init__(self, seconds: Seconds, n_blocks: int, n_ctx: int = 8192) -> None:
        self.facts = ModelFacts("virtual", N_LAYERS, 8, 256, n_ctx)
        self.n_blocks, self.seconds, self.now = n_blocks, seconds, 0.0
        self.steps: list[list[BatchWork]] = []

    def run(self, batch: Sequence[BatchWork]) -> list[Result]:
        self.steps.append(list(batch))
        self.now += self.seconds(features([Work(w.seq, w.start, w.n, w.layers, 0) for w in batch], N_LAYERS))
        return [self._decide(w) for w in batch]

    def _decide(self, w: BatchWork) -> Result:
        ids: list[int] = []
        if w.ask is not None:
            for j in range(1 + len(w.ask.drafts)):
                ids.append(token(w.ask.position + j))
                if j < len(w.ask.drafts) and w.ask.drafts[j] != ids[-1]:
                    break
        return Result(tuple(ids))

    def can_swap(self, n_blocks: int) -> bool:
        return True

    def swap_out(self, seq: int, blocks: Ids) -> None:
        pass

    def swap_in(self, seq: int, blocks: Ids) -> None:
        pass

    def drop(self, seq: int) -> None:
        pass


def taught(seconds: Seconds) -> CostModel:
    """A cost model that has seen enough steps."""
    rng, model = random.Random(1), CostModel(N_LAYERS)
    for _ in range(400):
        works = [work(1, rng.randint(10, 800)) for _ in range(rng.randint(0, 80))]
        works += [work(rng.choice((8, 16, 64, 200, 256)), rng.choice((0, 64, 1024)))] if rng.random() < 0.5 else []
        if works:
            model.observe(works, seconds(features(works, N_LAYERS)))
    return model


def work(n: int, start: int = 0) -> Work:
    return Work(1, start, n, LayerRange(0, N_LAYERS), 0)


def engine(*policies: Policy, seconds: Seconds = linear, n_blocks: int = 1024, **options: object) -> Engine:
    """An engine on virtual time that knows how long steps take."""
    executor = Virtual(seconds, n_blocks)
    options = {"cost": taught(seconds), "clock": lambda: executor.now, "prefix_cache": False} | options
    return Engine(executor, Composer(policies), **options)  # type: ignore[arg-type]


def request(prompt: int, max_tokens: int = 1, **objective: object) -> Request:
    return Request(ids=(1,) * prompt, max_tokens=max_tokens, objective=Objective(**objective))  # type: ignore[arg-type]


def finish_times(e: Engine, coming: Sequence[tuple[float, Request]] = ()) -> dict[int, float]:
    """Run until all is done, `coming` at their times; sequence -> when it was done."""
    assert isinstance(e.executor, Virtual)
    done, queue = {}, list(coming)
    for _ in range(20_000):
        while queue and (queue[0][0] <= e.executor.now or not e.has_work):
            e.executor.now = max(e.executor.now, queue[0][0])
            e.submit(queue.pop(0)[1])
        if not queue and not e.has_work:
            return done
        done |= {out.seq: e.executor.now for out in e.step() if out.finish}
    raise AssertionError("does not come to an end")
