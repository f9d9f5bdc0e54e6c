"""A replay in figures: latencies with their tails, goodput under a promise, work done; as table, JSON, plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.errors import MissingExtraError, UsageError
from nearfar_cloud.planning.replay import Replay, Served

Summary = dict[str, Any]

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Slo:
    """A promise to every request: its first token within `ttft_s`, and no interval between tokens above `tbt_s`."""

    ttft_s: float
    tbt_s: float

    def __post_init__(self) -> None:
        if not self.ttft_s > 0 or not self.tbt_s > 0:
            raise UsageError(f"limits of {self.ttft_s} s and {self.tbt_s} s: expected positive numbers")

    def holds(self, s: Served) -> bool:
        """Whether `s` got all its tokens in time."""
        return s.finished and (s.ttft_s or 0) <= self.ttft_s and max(s.tbt_s, default=0.0) <= self.tbt_s


def summarise(done: Replay, slo: Slo) -> Summary:
    """The figures of a replay, ready for JSON; seconds.  A figure that nothing was measured for is None.

    `goodput` counts the requests a second that the promise held for, `attained` is their share of all requests.
    `host_share` is planning and commit by the time of whole steps; 0 in a simulation, where neither takes time.
    """
    served = done.served
    seconds = done.seconds or float("nan")
    kept = sum(slo.holds(s) for s in served)
    c = done.counts
    step_s = c["plan_s"] + c["run_s"] + c["commit_s"]
    rates = {
        "requests_s": sum(s.finished for s in served) / seconds,
        "goodput": kept / seconds,
        "tokens_s": c["generated_tokens"] / seconds,
        "prompt_tokens_s": sum(s.n_prompt for s in served if s.finished) / seconds,
    }
    return {
        "requests": len(served),
        "finished": sum(s.finished for s in served),
        "failed": sum(bool(s.error) for s in served),
        "seconds": done.seconds,
        "ttft_s": spread([s.ttft_s for s in served if s.ttft_s is not None]),
        "tbt_s": spread([t for s in served for t in s.tbt_s]),
        "e2e_s": spread([s.e2e_s for s in served if s.e2e_s is not None]),
        "slo": {"ttft_s": slo.ttft_s, "tbt_s": slo.tbt_s},
        "attained": kept / len(served),
        **{name: value if np.isfinite(value) else None for name, value in rates.items()},
        "steps": c["steps"],
        "rows_a_step": c["rows"] / c["steps"] if c["steps"] else None,
        "cached_share": c["cached_tokens"] / c["prompt_tokens"] if c["prompt_tokens"] else None,
        "preempted": c["preempted"],
        "host_share": (c["plan_s"] + c["commit_s"]) / step_s if step_s else None,
    }


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean, percentiles and the largest; None where there are no values."""
    names = ["mean", *(f"p{p}" for p in PERCENTILES), "max"]
    if not len(values):
        return dict.fromkeys(names)
    x = np.asarray(values)
    return dict(zip(names, map(float, (x.mean(), *np.percentile(x, PERCENTILES), x.max())), strict=True))


def table(rows: Mapping[str, Summary]) -> str:
    """A line a run; milliseconds, and requests and tokens a second."""
    width = max(len("run"), *map(len, rows))
    columns = ("TTFT p50", "p95", "p99", "TBT p50", "p95", "p99", "max", "E2E p50", "p99", "goodput", "kept", "tok/s")
    lines = [f"{'run':<{width}} " + " ".join(f"{c:>9}" for c in columns)]
    for name, r in rows.items():
        latencies = [
            *(r["ttft_s"][p] for p in ("p50", "p95", "p99")),
            *(r["tbt_s"][p] for p in ("p50", "p95", "p99", "max")),
            *(r["e2e_s"][p] for p in ("p50", "p99")),
        ]
        cells = ["-" if x is None else f"{x * 1e3:.1f}" for x in latencies]
        cells += ["-" if r["goodput"] is None else f"{r['goodput']:.2f}", f"{r['attained']:.0%}"]
        cells += ["-" if r["tokens_s"] is None else f"{r['tokens_s']:.0f}"]
        lines.append(f"{name:<{width}} " + " ".join(f"{c:>9}" for c in cells))
    return "\n".join(lines)


def plot(runs: Mapping[str, Replay], path: str | Path, title: str = "") -> None:
    """Shares of requests, or of intervals, that took at most so long: TTFT, TBT, end to end.  A PNG, SVG or PDF file.

    Raises MissingExtraError without matplotlib, UsageError for a name that it can't write.
    """
    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "train", "the plot")
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{path}: expected a name that ends with .png, .svg or .pdf")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), constrained_layout=True)
    for name, done in runs.items():
        kinds = (
            [s.ttft_s for s in done.served if s.ttft_s is not None],
            [t for s in done.served for t in s.tbt_s],
            [s.e2e_s for s in done.served if s.e2e_s is not None],
        )
        for axis, values in zip(axes, kinds, strict=True):
            if values:
                ms = np.sort(values) * 1e3
                axis.step(ms, np.arange(1, len(ms) + 1) / len(ms), where="post", label=name)
    for axis, what in zip(axes, ("time to first token", "time between tokens", "end to end"), strict=True):
        axis.set(title=what, xlabel="ms", ylabel="share that took at most so long", xscale="log", ylim=(0, 1.02))
        axis.grid(alpha=0.4)
    axes[0].legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
