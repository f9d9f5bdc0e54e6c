"""How long a step takes: one model, learned from the steps themselves, that every decision asks.

    t = c0 + c1 R + c2 K + c3 A (+ c4 E)   R = sum n d     rows
                                           K = sum (start + n) d        positions of keys that are read
                                           A = sum n (start + n / 2) d  pairs of query and key
                                           E = of a mixture: bytes of experts that some row is expected to meet
    d = share of the layers that a work runs through

Coefficients are at least zero and are set apart below and above the knee, the number of rows from which on a product is
bound by arithmetic and no longer by reading the weights.  Recursive least squares with forgetting (Haykin, Adaptive
Filter Theory, ch. 10); a step that took four times what was expected is counted and not learned, unless it repeats.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import FileError
from nearfar_cloud.types import Work

Features = NDArray[np.float64]  # [F]: 1, R, K, A, and E of a mixture
SCALE = np.array([1.0, 100.0, 1e4, 1e5])  # brings them to about the same size
SCALE_OF_BYTES = 1e8
FORGET = 0.995  # weight of what was learned a step ago
OUTLIER, REPEATED = 4.0, 5
UNSURE = 1e2  # variance of a coefficient that nothing is known about
FORMAT = "nearfar-cost-1"


@dataclass(frozen=True, slots=True)
class Experts:
    """Of a mixture: how many a layer has, how many a row takes, bytes of one of them."""

    n: int
    n_used: int
    n_bytes: int

    def touched(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Bytes that `rows` rows of one layer are expected to read, were they to choose evenly."""
        return self.n * self.n_bytes * (1 - (1 - self.n_used / self.n) ** rows)


def features(works: Sequence[Work], n_layers: int, experts: Experts | None = None) -> Features:
    """Of a plan's works."""
    rows = reads = pairs = touched = 0.0
    for _, start, n, (first, last), _ in works:
        share = (last - first) / n_layers
        rows += n * share
        reads += (start + n) * share
        pairs += n * (start + n / 2) * share
    if experts is None:
        return np.array([1.0, rows, reads, pairs])
    cuts = sorted({at for w in works for at in w.layers})
    for first, last in pairwise(cuts):  # an expert is read once for all rows that meet in its layer
        n = sum(w.n for w in works if w.layers.first <= first and last <= w.layers.last)
        touched += (last - first) * float(experts.touched(np.array(float(n))))
    return np.array([1.0, rows, reads, pairs, touched])


@dataclass(slots=True)
class Regime:
    """The coefficients of one side of the knee, in seconds per scaled feature."""

    coefficients: NDArray[np.float64]  # [F]
    covariance: NDArray[np.float64]  # [F, F]
    n: int = 0

    @classmethod
    def guess(cls, seconds_a_row: float, n_features: int = 4) -> Regime:
        """Before anything is known: rows cost, all else is free."""
        start = np.zeros(n_features)
        start[1] = seconds_a_row * SCALE[1]
        return cls(start, np.eye(n_features) * UNSURE)

    @property
    def scale(self) -> NDArray[np.float64]:
        return SCALE if len(self.coefficients) == len(SCALE) else np.append(SCALE, SCALE_OF_BYTES)

    def predict(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """x [..., F] -> [...]"""
        return (x / self.scale) @ np.maximum(self.coefficients, 0)

    def start_again(self) -> None:
        """Keep the coefficients, doubt them."""
        self.covariance, self.n = np.eye(len(self.coefficients)) * UNSURE, 0

    def learn(self, x: Features, seconds: float) -> None:
        # Errors count by their share of the step: a long step is not worth more than a short one.
        z, y = x / self.scale / seconds, 1.0
        p = self.covariance @ z
        gain = p / (FORGET + z @ p)
        self.coefficients = self.coefficients + gain * (y - self.coefficients @ z)
        self.covariance = (self.covariance - np.outer(gain, p)) / FORGET
        if np.trace(self.covariance) > len(z) * UNSURE:
            # Forgetting also raises the doubt about what no step has shown for long, without end: at most as at first.
            sizes, axes = np.linalg.eigh((self.covariance + self.covariance.T) / 2)
            self.covariance = axes * np.clip(sizes, 0, UNSURE) @ axes.T
        self.n += 1


class CostModel:
    """Seconds of a step, from its works."""

    def __init__(
        self, n_layers: int, *, knee: int = 32, seconds_a_row: float = 1e-3, experts: Experts | None = None
    ) -> None:
        self.n_layers, self.knee, self.experts = n_layers, knee, experts
        self.n_features = 4 if experts is None else 5
        # Up to the knee, and above it.
        self.regimes = Regime.guess(seconds_a_row, self.n_features), Regime.guess(seconds_a_row, self.n_features)
        self.n_outliers = 0
        self._strange = 0

    def features(self, works: Sequence[Work]) -> Features:
        return features(works, self.n_layers, self.experts)

    def predict(self, works: Sequence[Work]) -> float:
        """Seconds; 0 for an empty plan."""
        return self.of(self.features(works)) if works else 0.0

    def of(self, x: Features) -> float:
        """Seconds of a step with features `x`."""
        return float(self._regime(x).predict(x))

    def of_many(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """Seconds of steps with features x [M, F] -> [M]"""
        below, above = (regime.predict(x) for regime in self.regimes)
        return np.where(x[:, 1] > self.knee, above, below)

    def with_rows(self, beside: Features, n: NDArray[np.float64], start: NDArray[np.float64]) -> NDArray[np.float64]:
        """A step with features `beside` and, in all layers, n [M] more rows from positions start [M] on -> [M, F]"""
        x = np.tile(beside, (len(n), 1))
        x[:, 1:4] += np.stack([n, start + n, n * (start + n / 2)], axis=1)
        if self.experts is not None:
            x[:, 4] = self.n_layers * self.experts.touched(x[:, 1])
        return x

    def observe(self, works: Sequence[Work], seconds: float) -> float:
        """A step took so long; what was expected, 0 for an empty plan."""
        if not works:
            return 0.0
        x = self.features(works)
        regime = self._regime(x)
        expected = float(regime.predict(x))
        if seconds <= 0:
            return expected
        if regime.n > 20 and not expected / OUTLIER < seconds < expected * OUTLIER:
            self.n_outliers += 1
            self._strange += 1
            if self._strange < REPEATED:
                return expected
            regime.start_again()  # the machine has changed: what was learned holds no longer
        self._strange = 0
        regime.learn(x, seconds)
        return expected

    def most_rows(self, seconds: float, start: int, beside: Features, least: int, most: int) -> int:
        """The most rows from position `start` on that fit into `seconds`, beside a step with features `beside`.

        Between `least` and `most`; late rows of a long prompt cost more, so a chunk shrinks along the prompt.
        """
        low, high = least, most
        while low < high:
            n = (low + high + 1) // 2
            if self.of_many(self.with_rows(beside, np.array([n * 1.0]), np.array([start * 1.0])))[0] <= seconds:
                low = n
            else:
                high = n - 1
        return low

    def _regime(self, x: Features) -> Regime:
        return self.regimes[int(x[1] > self.knee)]

    # ------------------------------------------------------------ kept between two lives of a server

    def save(self, path: str | os.PathLike[str], of: Mapping[str, str]) -> None:
        """As JSON, whole or not at all.  `of` says what it was learned from: model, format, machine, threads."""
        kept = [
            {"coefficients": r.coefficients.tolist(), "covariance": r.covariance.tolist(), "n": r.n}
            for r in self.regimes
        ]
        told = {"format": FORMAT, "of": dict(of), "n_layers": self.n_layers, "knee": self.knee, "regimes": kept}
        place = Path(path)
        beside = place.with_name(f"{place.name}.new")
        beside.write_text(json.dumps(told, indent=1))
        beside.replace(place)

    def load(self, path: str | os.PathLike[str], of: Mapping[str, str]) -> bool:
        """Take over what was saved; False, and nothing is changed, if it was learned `of` something else.

        Raises FileError for a file that is not what `save` writes, OSError for one that cannot be read.
        """
        try:
            told: Any = json.loads(Path(path).read_text())
            if told["format"] != FORMAT:
                raise ValueError(f"format {told['format']!r}")
            first, second = (_regime(r) for r in told["regimes"])
            sizes = told["n_layers"], told["knee"], len(first.coefficients)
            same = told["of"] == dict(of) and sizes == (self.n_layers, self.knee, self.n_features)
        except (ValueError, KeyError, TypeError) as error:
            raise FileError(f"{path}: not a cost model ({error}); delete it, and it is learned anew") from error
        if same:
            self.regimes = first, second
        return same


def _regime(told: dict[str, Any]) -> Regime:
    coefficients, covariance = (np.array(told[name], float) for name in ("coefficients", "covariance"))
    n = len(coefficients)
    if n not in (4, 5) or coefficients.shape != (n,) or covariance.shape != (n, n):
        raise ValueError(f"coefficients {coefficients.shape}, covariance {covariance.shape}: expected 4 or 5 of them")
    if not (np.isfinite(coefficients).all() and np.isfinite(covariance).all()):
        raise ValueError("numbers that are not finite")
    return Regime(coefficients, covariance, int(told["n"]))
