"""An engine that is slowed down takes its time and gives the same tokens."""

from __future__ import annotations

import time

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")

from nearfar_cloud.executors.base import BatchWork
from nearfar_cloud.executors.paced import PacedExecutor, slow_down
from nearfar_cloud.types import LayerRange
from tests.cloud import serving

pytestmark = pytest.mark.usefixtures("one_thread")


def work(n: int, first: int, last: int) -> BatchWork:
    return BatchWork(1, 0, n, LayerRange(first, last), np.zeros(1, np.int32), None, None, None)


def test_layers_are_read_once_and_rows_cost_their_own_layers() -> None:
    engine = serving.engine()
    n = engine.facts.n_layers
    paced = PacedExecutor(engine.executor, step_s=1.0, row_s=0.1)
    assert paced.seconds([work(1, 0, n)]) == pytest.approx(1.1)
    assert paced.seconds([work(1, 0, n), work(3, 0, n)]) == pytest.approx(1.4)
    assert paced.seconds([work(2, n - 1, n)]) == pytest.approx(1.2 / n)


def test_a_slow_engine_takes_its_time_and_says_the_same() -> None:
    engine = serving.engine()
    slow_down(engine, 0.02, 0.0)
    started = time.perf_counter()
    (answer,) = serving.run(engine, [serving.request(0, max_tokens=4)])
    assert time.perf_counter() - started >= 4 * 0.02
    assert answer == serving.alone(0)[:4]
