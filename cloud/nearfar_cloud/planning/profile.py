"""How long steps of a real model take: measured over a grid of shapes, fitted, checked on shapes that were held out.

    grid -> measure (executor.run) -> fit: least squares of relative errors, coefficients >= 0 -> Fit -> CostModel

The fit belongs to one model, dtype, machine and number of threads, and says so in its file.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from nearfar.errors import DataError, FileError, UsageError
from nearfar.machine import cpu_name
from nearfar.sampling import Sampling
from nearfar_cloud.executors.base import Ask, BatchWork, Executor
from nearfar_cloud.kv.pool import n_blocks_of
from nearfar_cloud.planning.workload import F64
from nearfar_cloud.scheduling.cost import SCALE, CostModel, features
from nearfar_cloud.types import LayerRange, Work

KNEES = (1, 2, 4, 8, 16, 32, 64, 128)  # rows at which the two regimes may meet
CERTAIN = 1e-4  # variance of a measured coefficient, for an engine that goes on learning
VERSION = 1


class Piece(NamedTuple):
    """`n` rows of one sequence, from position `start` on."""

    n: int
    start: int

    @property
    def end(self) -> int:
        return self.n + self.start


Shape = tuple[Piece, ...]  # of one step


class Sample(NamedTuple):
    """A shape and the seconds that a step of it took."""

    shape: Shape
    seconds: float


def grid(n_ctx: int, n_blocks: int, *, most_batch: int = 64, most_rows: int = 512) -> list[Shape]:
    """What schedules are made of: next tokens of some sequences, a piece of a prompt, both; whatever memory holds."""
    batches = [2**i for i in range(most_batch.bit_length()) if 2**i <= most_batch]
    chunks = [16 * 4**i for i in range(8) if 16 * 4**i < most_rows] + [most_rows]
    contexts = [c for c in (0, 64, 256, 1024, 4096) if c < n_ctx]
    shapes: list[Shape] = [(Piece(1, c),) * b for b in batches for c in contexts]
    shapes += [(Piece(n, c),) for n in chunks for c in contexts]
    shapes += [(Piece(n, 0), *(Piece(1, c),) * b) for n in chunks for c in contexts[1:] for b in batches[1::2]]
    fits = [s for s in shapes if all(p.end <= n_ctx for p in s) and sum(n_blocks_of(p.end) for p in s) <= n_blocks]
    if len(fits) < 16:
        raise UsageError(f"{n_blocks} blocks and {n_ctx} positions hold only {len(fits)} shapes; expected at least 16")
    return fits


def works_of(shape: Shape, n_layers: int) -> list[Work]:
    return [Work(i, p.start, p.n, LayerRange(0, n_layers), 1) for i, p in enumerate(shape, 1)]


def measure(
    executor: Executor,
    shapes: Iterable[Shape],
    *,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
) -> Iterator[Sample]:
    """The median of `repeats` steps of each shape, after one that does not count.

    Every piece decides a token.  What lies in the blocks is of no matter to the time, so nothing is computed before.
    `clock`: time.process_time on a busy machine, with one thread.  Raises UsageError for a shape that a step fails on.
    """
    rng = np.random.default_rng(seed)
    for shape in shapes:
        batch = _batch(shape, executor, rng)
        seconds = []
        for _ in range(1 + repeats):
            began = clock()
            results = executor.run(batch)
            seconds.append(clock() - began)
            if failed := [r.error for r in results if r.error]:
                raise UsageError(f"a step of {shape[:4]} fails: {failed[0]}")
        yield Sample(shape, median(seconds[1:]))


def _batch(shape: Shape, executor: Executor, rng: np.random.Generator) -> list[BatchWork]:
    facts, first, batch = executor.facts, 0, []
    for i, p in enumerate(shape, 1):
        blocks = np.arange(first, first + n_blocks_of(p.end), dtype=np.int32)
        first += len(blocks)
        ids = rng.integers(0, facts.n_vocab, p.n).astype(np.int32)
        ask = Ask(p.end, [], (), Sampling(), 0, None)
        batch.append(BatchWork(i, p.start, p.n, LayerRange(0, facts.n_layers), blocks, ids, None, ask))
    if first > executor.n_blocks:
        raise UsageError(f"a shape takes {first} blocks, the executor has {executor.n_blocks}")
    return batch


@dataclass(frozen=True, slots=True)
class Fit:
    """Measured coefficients and how far they can be trusted.

    `below`, `above` [4]: seconds of a step, a row, a key read, a pair of query and key (`scheduling/cost.py`), up to
    `knee` rows and above.  Errors are shares of the measured time.
    """

    model: str  # fingerprint
    dtype: str
    machine: str
    threads: int
    n_layers: int
    knee: int
    below: tuple[float, ...]
    above: tuple[float, ...]
    n_fitted: int
    n_held_out: int
    error_fitted: float  # mean
    error_held_out: float  # mean
    worst_held_out: float

    def cost_model(self) -> CostModel:
        """A cost model that knows this from its first step on, and may go on learning."""
        cost = CostModel(self.n_layers, knee=self.knee)
        for regime, seconds in zip(cost.regimes, (self.below, self.above), strict=True):
            regime.coefficients = np.array(seconds) * SCALE
            regime.covariance, regime.n = np.eye(len(SCALE)) * CERTAIN, self.n_fitted
        return cost

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps({"version": VERSION} | asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Fit:
        """Raises FileError (missing), DataError (not the coefficients of a fit)."""
        try:
            found = json.loads(Path(path).read_bytes())
        except OSError as error:
            raise FileError(f"{path}: {error.strerror}") from None
        except ValueError as error:
            raise DataError(f"{path}: not JSON ({error})") from None
        return cls(**_checked(found, str(path)))


def _checked(found: Any, path: str) -> dict[str, Any]:
    """The fields of a Fit.  Raises DataError."""
    names = {f.name: f.type for f in fields(Fit)}
    if not isinstance(found, dict) or found.get("version") != VERSION:
        raise DataError(f'{path}: expected an object with "version": {VERSION}, as `nearfar cloud profile` writes it')
    if missing := sorted(names.keys() - found.keys()):
        raise DataError(f"{path}: lacks {', '.join(missing)}")
    values: dict[str, Any] = {}
    for name, kind in names.items():
        value = found[name]
        if not _FORMS[str(kind)](value):
            raise DataError(f"{path}: {name}={str(value)[:60]}, expected {kind}, finite and not negative")
        values[name] = tuple(map(float, value)) if isinstance(value, list) else value
    if values["n_layers"] < 1 or not any(values["below"]) or not any(values["above"]):
        raise DataError(f"{path}: a model without layers, or steps that take no time")
    return values


def _is_cost(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


_FORMS: dict[str, Callable[[Any], bool]] = {  # type of a field -> whether a value of JSON is one
    "str": lambda v: isinstance(v, str),
    "int": lambda v: type(v) is int and 0 <= v < 1 << 32,
    "float": _is_cost,
    "tuple[float, ...]": lambda v: isinstance(v, list) and len(v) == len(SCALE) and all(map(_is_cost, v)),
}


def fit(
    samples: Sequence[Sample],
    n_layers: int,
    *,
    model: str,
    dtype: str,
    threads: int,
    held_out: float = 0.25,
    seed: int = 0,
) -> Fit:
    """Coefficients from all samples but a share that is drawn and held out.  Raises UsageError for too few of them."""
    order = np.random.default_rng(seed).permutation(len(samples))
    n_out = int(len(samples) * held_out)
    n_in = len(samples) - n_out
    if n_in < 10 or n_out < 1:
        raise UsageError(f"{len(samples)} samples, {n_out} of them held out: expected at least 10 and 1")
    x = np.array([features(works_of(samples[i].shape, n_layers), n_layers) for i in order])
    y = np.array([samples[i].seconds for i in order])
    fits = [(knee, *_two_regimes(x[:n_in], y[:n_in], knee)) for knee in KNEES]
    knee, below, above = min(fits, key=lambda f: float(np.square(_errors(x[:n_in], y[:n_in], *f)).sum()))
    errors = np.abs(_errors(x, y, knee, below, above))
    inside, outside = errors[:n_in], errors[n_in:]
    return Fit(
        model,
        dtype,
        cpu_name(),
        threads,
        n_layers,
        knee,
        tuple(map(float, below)),
        tuple(map(float, above)),
        n_in,
        n_out,
        float(inside.mean()),
        float(outside.mean()),
        float(outside.max()),
    )


def _two_regimes(x: F64, y: F64, knee: int) -> tuple[F64, F64]:
    """Coefficients up to `knee` rows and above; a side with too few steps has those of all steps."""
    sides = (x[:, 1] <= knee, x[:, 1] > knee)
    below, above = (not_negative(x[s], y[s]) if s.sum() > len(SCALE) else not_negative(x, y) for s in sides)
    return below, above


def _errors(x: F64, y: F64, knee: int, below: F64, above: F64) -> F64:
    """Shares by which the predictions are above what was measured."""
    return np.asarray(np.where(x[:, 1] <= knee, x @ below, x @ above) / y - 1)


def not_negative(x: F64, y: F64) -> F64:
    """c [k] >= 0 that minimises sum((x c / y - 1)^2), x [n, k], y [n].

    The best of the least squares over every subset of columns whose solution is not negative: exact, for k = 4 cheap.
    """
    z = x / y[:, None]
    best, least = np.zeros(x.shape[1]), float("inf")
    for size in range(1, x.shape[1] + 1):
        for columns in itertools.combinations(range(x.shape[1]), size):
            part = z[:, columns]
            scale = np.abs(part).max(axis=0)
            scale[scale == 0] = 1
            c = np.linalg.lstsq(part / scale, np.ones(len(y)), rcond=None)[0] / scale
            error = float(np.square(part @ c - 1).sum())
            if (c >= 0).all() and error < least:
                best, least = np.zeros(x.shape[1]), error
                best[list(columns)] = c
    return best
