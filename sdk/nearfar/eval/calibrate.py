"""Exit thresholds that can be trusted: temperature, isotonic map, Learn then Test; into a copy of the file.

    held-out answers -> traces -> part A: temperature, isotonic map, per exit
                                  part B: how far down one fixed path of thresholds the loss stays under delta
                                  part C: what that means on answers that chose nothing

The loss of an answer is the share of its tokens that left early and differ from full depth.  With 95 % confidence the
mean loss of answers like those of B is at most delta; nothing is promised for others (Angelopoulos et al., Learn then
Test, 2110.01052; fixed-sequence testing).  The path is walked a second time for twice that delta: those thresholds are
for times when an upper side has too much to do.  The tensors are copied byte for byte; `nearfar.calibration.id` names
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nearfar.config import ExitConfig
from nearfar.errors import DataError
from nearfar.eval.exits import Trace, View, decide, guesses, loss, views
from nearfar.eval.intervals import Interval, bootstrap, wilson
from nearfar.eval.metrics import calibration_error, ratio, reliability
from nearfar.gguf_reader import GGUFFile
from nearfar.gguf_writer import GGUFWriter
from nearfar.lower import Lower

DELTA, ALPHA = 0.02, 0.05
LOOSER = 2  # times delta: what is promised for the thresholds of an overloaded upper side
PARTS = "ABC"
MAX_POINTS = 64  # of an isotonic map: it is evaluated for every token
FIT_ROWS = 4_000  # tokens that the temperature is fitted on: it is one number
LEVELS = (0.999, 0.998, 0.995, 0.99, 0.985, 0.98, 0.97, 0.96, 0.95, 0.93, 0.9)

Taus = tuple[float, ...]
Real = NDArray[np.float64]


# ---------------------------------------------------------------- the mathematics


def hoeffding_bentkus(mean_loss: float, n: int, delta: float) -> float:
    """The p-value of "the mean loss exceeds delta", given the mean of `n` losses in 0..1 (2110.01052, section 3.1)."""
    if n == 0:
        return 1.0
    r = min(mean_loss, delta)
    divergence = (1 - r) * math.log((1 - r) / (1 - delta)) + (r * math.log(r / delta) if r > 0 else 0.0)
    hits = math.ceil(n * mean_loss - 1e-9)  # the product of a mean and its count may miss a whole number by rounding
    return min(1.0, math.exp(-n * divergence), math.e * binomial_cdf(hits, n, delta))


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P[Bin(n, p) <= k]"""
    if k >= n:
        return 1.0
    log_p, log_q = math.log(p), math.log1p(-p)
    log_n = math.lgamma(n + 1)
    terms = (log_n - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * log_p + (n - i) * log_q for i in range(k + 1))
    return min(1.0, math.fsum(map(math.exp, terms)))


def isotonic(x: ArrayLike, y: ArrayLike) -> tuple[Real, Real]:
    """The rising step function nearest to (x, y) in least squares, as points to interpolate between.

    Pool-adjacent-violators (Barlow et al., 1972): x [N] and y [N] -> the ends of the steps, and their heights.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    order = np.argsort(x, kind="stable")
    xs, first = np.unique(x[order], return_index=True)
    weight = np.diff([*first, len(x)]).astype(np.float64)
    height = np.add.reduceat(y[order], first) / weight if len(x) else y
    blocks: list[tuple[float, float, int, int]] = []  # (height, weight, first x, last x)
    for i, (h, w) in enumerate(zip(height, weight, strict=True)):
        block = (float(h), float(w), i, i)
        while blocks and blocks[-1][0] >= block[0]:
            before = blocks.pop()
            total = before[1] + block[1]
            block = ((before[0] * before[1] + block[0] * block[1]) / total, total, before[2], block[3])
        blocks.append(block)
    points = [(xs[i], b[0]) for b in blocks for i in dict.fromkeys((b[2], b[3]))]
    return np.array([p[0] for p in points]), np.array([p[1] for p in points])


def thinned(xs: Real, ys: Real, n: int = MAX_POINTS) -> tuple[Real, Real]:
    """At most `n` of the points, both ends kept, spread evenly over the list."""
    if len(xs) <= n:
        return xs, ys
    keep = np.unique(np.linspace(0, len(xs) - 1, n).round().astype(int))
    return xs[keep], ys[keep]


def fit_temperature(logits: NDArray[np.float32], truth: NDArray[np.integer[Any]]) -> float:
    """The temperature under which `truth` [N] is likeliest, given logits [N, V] (1706.04599).

    The negative log-likelihood has one minimum in log temperature; golden-section search, 0.1..10.
    """
    rows = np.arange(len(truth))

    def nll(log_t: float) -> float:
        z = logits / np.float32(math.exp(log_t))
        z -= z.max(1, keepdims=True)
        return float((np.log(np.exp(z).sum(1)) - z[rows, truth]).mean())

    low, high, ratio = math.log(0.1), math.log(10.0), (math.sqrt(5) - 1) / 2
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    at_a, at_b = nll(a), nll(b)
    while high - low > 1e-3:
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - ratio * (high - low)
            at_a = nll(a)
        else:
            low, a, at_a = a, b, at_b
            b = low + ratio * (high - low)
            at_b = nll(b)
    return math.exp((low + high) / 2)


def path(n_exits: int, levels: Sequence[float] = LEVELS) -> list[Taus]:
    """The one path of threshold tuples, strict to loose, fixed before any answer is seen.

    The deepest exit alone through all levels, then the one below it as well, and so on; 1 means that an exit never
    fires.  The levels are rounded as the file will hold them.
    """
    taus, steps = [1.0] * n_exits, []
    for e in reversed(range(n_exits)):
        for level in levels:
            taus[e] = _f32(level)
            steps.append(tuple(taus))
    return steps


@dataclass(frozen=True, slots=True)
class Step:
    """One tuple of thresholds that was tested."""

    taus: Taus
    mean_loss: float
    p: float


def walk(steps: Sequence[Taus], losses: Callable[[Taus], ArrayLike], delta: float, alpha: float = ALPHA) -> list[Step]:
    """Test the steps in order and stop after the first whose p-value is above `alpha`.

    `losses(taus)` [n]: the loss of each answer.  Every step but a last one with p > alpha is safe: testing in a fixed
    order and stopping at the first failure keeps the error of the whole walk at alpha.
    """
    tested: list[Step] = []
    for taus in steps:
        found = np.asarray(losses(taus), np.float64)
        mean = float(found.mean()) if len(found) else 1.0
        tested.append(Step(taus, mean, hoeffding_bentkus(mean, len(found), delta)))
        if tested[-1].p > alpha:
            break
    return tested


def chosen(tested: Sequence[Step], n_exits: int, alpha: float = ALPHA) -> Taus:
    """The loosest thresholds that passed; never-firing ones if none did."""
    safe = [step.taus for step in tested if step.p <= alpha]
    return safe[-1] if safe else (1.0,) * n_exits


def without_idle(taus: Taus, seen: Sequence[View]) -> Taus:
    """`taus` without the first exits that no token leaves at: their heads would only cost time.

    What remains is an earlier tuple of the same path, so it has been tested too.
    """
    kept = list(taus)
    for e in range(len(kept)):
        if any((decide(v, kept) == e).any() for v in seen):
            break
        kept[e] = 1.0
    return tuple(kept)


# ---------------------------------------------------------------- answers to thresholds


def part_of(name: str) -> str:
    """A, B or C: decided by the answer's name."""
    return PARTS[int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big") % len(PARTS)]


@dataclass(frozen=True)
class Calibration:
    """What was fitted, chosen and found."""

    exits: tuple[ExitConfig, ...]
    delta: float
    alpha: float
    n_answers: Mapping[str, int]  # per part
    tested: tuple[Step, ...]
    delta_loose: float
    ece: Mapping[int, tuple[float, float]]  # exit layer -> expected calibration error on C before, after
    curves: Mapping[int, tuple[list[tuple[float, float, int]], list[tuple[float, float, int]]]]  # the same, as bins
    report: Mapping[str, Interval]  # on C, at the chosen thresholds


def calibrate(lower: Lower, traces: Sequence[Trace], *, delta: float = DELTA, alpha: float = ALPHA) -> Calibration:
    """Fit, choose and report on three parts of `traces`.  Raises DataError where there are too few answers."""
    parts = {part: [t for t in traces if part_of(t.id) == part] for part in PARTS}
    needed = math.ceil(math.log(alpha) / math.log(1 - delta))
    if len(parts["B"]) < needed or not parts["A"] or not parts["C"]:
        raise DataError(
            f"{len(traces)} held-out answers: expected at least {needed} in the third that chooses thresholds "
            f"(delta {delta:g}), so about {3 * needed + 30} in all, found {len(parts['B'])} there"
        )
    plain = [ExitConfig(e.layer) for e in lower.config.exits]
    fitted = [_fit(lower, e.layer, parts["A"]) for e in plain]
    choosing = views(lower, parts["B"], fitted)
    losses = cache(lambda taus: tuple(loss(v, taus) for v in choosing))
    delta_loose = min(LOOSER * delta, (1 + delta) / 2)
    tested, looser = (walk(path(len(fitted)), losses, d, alpha) for d in (delta, delta_loose))
    taus, loose = (without_idle(chosen(steps, len(fitted), alpha), choosing) for steps in (tested, looser))
    exits = tuple(replace(e, tau=a, tau_loose=min(a, b)) for e, a, b in zip(fitted, taus, loose, strict=True))
    before, after = (views(lower, parts["C"], es) for es in (plain, fitted))
    ece, curves = {}, {}
    for i, e in enumerate(exits):
        raw, mapped = (_joined(seen, i) for seen in (before, after))
        ece[e.layer] = (calibration_error(*raw), calibration_error(*mapped))
        curves[e.layer] = (reliability(*raw), reliability(*mapped))
    counts = {part: len(found) for part, found in parts.items()}
    return Calibration(exits, delta, alpha, counts, tuple(tested), delta_loose, ece, curves, _report(after, exits))


def _fit(lower: Lower, layer: int, traces: Sequence[Trace]) -> ExitConfig:
    """Temperature on a sample of tokens, isotonic map on all of them; rounded as the file will hold them."""
    rows, truth = np.concatenate([t.rows[layer] for t in traces]), np.concatenate([t.tokens for t in traces])
    sample = np.linspace(0, len(truth) - 1, min(FIT_ROWS, len(truth))).astype(int)
    head = f"exit.{layer}"
    temperature = _f32(fit_temperature(lower.logits(np.ascontiguousarray(rows[sample]), head), truth[sample]))
    best, conf = guesses(lower, rows, head, temperature)
    xs, ys = thinned(*isotonic(conf, best == truth))
    xs, ys = np.maximum.accumulate(xs.astype(np.float32)), np.maximum.accumulate(ys.astype(np.float32))
    return ExitConfig(layer, temperature, tuple(map(float, xs)), tuple(map(float, ys)))


def _joined(seen: Sequence[View], i: int) -> tuple[np.ndarray, np.ndarray]:
    """(confidence, agreement) of exit `i` over all tokens."""
    return np.concatenate([v.conf[i] for v in seen]), np.concatenate([v.agree[i] for v in seen])


def _report(seen: Sequence[View], exits: Sequence[ExitConfig]) -> dict[str, Interval]:
    taus = [e.tau for e in exits]
    losses = np.array([loss(v, taus) for v in seen])
    decided = [decide(v, taus) for v in seen]
    shares = {
        f"tokens leaving at exit.{e.layer}": bootstrap(np.array([((d == i).sum(), len(d)) for d in decided]), ratio)
        for i, e in enumerate(exits)
    }
    loose = np.array([loss(v, [e.tau if e.tau_loose is None else e.tau_loose for e in exits]) for v in seen])
    mean, mean_loose = (bootstrap(np.stack([found, np.ones_like(found)], 1), ratio) for found in (losses, loose))
    return {
        "exited and different": mean,
        "the same at the looser thresholds": mean_loose,
        "answers unchanged": wilson(int((losses == 0).sum()), len(losses)),
        **shares,
    }


def _f32(x: float) -> float:
    return float(np.float32(x))


# ---------------------------------------------------------------- into the file


def tensors_id(file: GGUFFile) -> str:
    """Names the tensors that thresholds were chosen on: BLAKE2b over name, type, shape and bytes, in name order."""
    digest = blake2b(digest_size=16)
    for name in sorted(file.tensors):
        info = file.tensors[name]
        digest.update(f"{name}|{int(info.type)}|{info.shape}|".encode())
        digest.update(file.raw(name).data)
    return digest.hexdigest()


def write_calibrated(file: GGUFFile, out: Path, c: Calibration, mix: Mapping[str, int], oracle: str = "") -> Path:
    """A copy of `file` with the exits' new keys; every other key and all tensors as they were.

    `mix`: answers per data set, so that a reader knows for which answers the promise is made.  `oracle`: how a device
    half speaks to the layers above it, whose tokens counted ("int8", "ids").  Raises FileError.
    """
    keys = _keys(c, mix, tensors_id(file)) | ({"nearfar.calibration.oracle": oracle} if oracle else {})
    writer = GGUFWriter(out)
    for key in file.metadata:
        if key not in keys and key != "general.alignment":  # the writer has one alignment, the default
            writer.add_encoded(key, file.encoded(key))
    for key, value in keys.items():
        writer.add(key, value)
    for name, info in file.tensors.items():
        writer.add_tensor(name, file.raw(name), info.type, info.shape)
    return writer.write()


def _keys(c: Calibration, mix: Mapping[str, int], name: str) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "nearfar.calibration.id": name,
        "nearfar.calibration.delta": float(c.delta),
        "nearfar.calibration.delta_loose": float(c.delta_loose),
        "nearfar.calibration.alpha": float(c.alpha),
        "nearfar.calibration.n_answers": int(c.n_answers["B"]),
        "nearfar.calibration.tau": [float(e.tau) for e in c.exits],
        "nearfar.calibration.mix": ", ".join(f"{name} {n}" for name, n in mix.items()),
        "nearfar.calibration.loss": float(c.report["exited and different"].value),
    }
    for e in c.exits:
        at = f"nearfar.exit.{e.layer}"
        keys |= {
            f"{at}.temperature": float(e.temperature),
            f"{at}.tau": float(e.tau),
            f"{at}.tau_loose": float(e.tau if e.tau_loose is None else e.tau_loose),
            f"{at}.isotonic_x": np.array(e.isotonic_x, np.float32),
            f"{at}.isotonic_y": np.array(e.isotonic_y, np.float32),
        }
    return keys


def plot(c: Calibration, out: Path) -> bool:
    """Reliability before and after, one panel for each exit; False where matplotlib is not installed."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, axes = pyplot.subplots(1, len(c.exits), figsize=(4.2 * len(c.exits), 4.2), squeeze=False)
    for e, axis in zip(c.exits, axes[0], strict=True):
        axis.plot([0, 1], [0, 1], color="0.8")
        for bins, label, ece in zip(c.curves[e.layer], ("before", "after"), c.ece[e.layer], strict=True):
            axis.plot([b[0] for b in bins], [b[1] for b in bins], "o-", ms=3, label=f"{label}, ECE {ece:.3f}")
        axis.set(title=f"exit {e.layer}", xlabel="confidence", ylabel="agreement with full depth")
        axis.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
    return True
