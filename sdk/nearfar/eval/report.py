"""The table: every figure with its interval and its baseline beside it, for people and as JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nearfar.eval.baselines import Baseline
from nearfar.eval.intervals import Interval
from nearfar.eval.tasks import Figure

FREE, EARLY, SCHEMA = "free", "exits", "schema"
MODES = {FREE: "free, full depth", EARLY: "free, with exits", SCHEMA: "grammar, full depth"}


@dataclass(frozen=True)
class Section:
    """One task of the table: its figures per mode of decoding, and its baseline's."""

    name: str
    split: str
    n_rows: int
    figures: Mapping[str, Sequence[Figure]]  # mode -> figures; the first mode has every metric
    baseline: Baseline | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    def lines(self) -> Iterator[tuple[Figure, dict[str, Interval]]]:
        """Each figure of the first mode with its intervals by mode; a mode may lack some."""
        for figure in next(iter(self.figures.values()), ()):
            same = {mode: f.interval for mode, fs in self.figures.items() for f in fs if f.metric == figure.metric}
            yield figure, same

    def baseline_of(self, metric: str) -> Interval | None:
        """The baseline's figure for `metric`; "… by exit.4" is compared with the baseline's own "… by …"."""
        if self.baseline is None:
            return None
        stem = metric.split(" by ")[0]
        return next((f.interval for f in self.baseline.figures if f.metric.split(" by ")[0] == stem), None)


def as_json(sections: Iterable[Section], **facts: Any) -> dict[str, Any]:
    """Everything the table shows, and `facts` about the run."""
    return {**facts, "tasks": [_section_json(s) for s in sections]}


def _section_json(s: Section) -> dict[str, Any]:
    lines = []
    for figure, intervals in s.lines():
        line: dict[str, Any] = {"metric": figure.metric, "unit": figure.unit}
        line |= {mode: _interval_json(interval) for mode, interval in intervals.items()}
        beside = s.baseline_of(figure.metric)
        if beside is not None:
            line["baseline"] = _interval_json(beside)
        lines.append(line)
    named = {"name": s.baseline.name, "stored": s.baseline.stored} if s.baseline else None
    return {
        "task": s.name,
        "split": s.split,
        "rows": s.n_rows,
        "baseline": named,
        "figures": lines,
        "notes": list(s.notes),
    }


def _interval_json(i: Interval) -> dict[str, Any]:
    value, low, high = (None if math.isnan(x) else round(x, 5) for x in (i.value, i.low, i.high))
    return {"value": value, "low": low, "high": high, "n": i.n}


def as_text(sections: Iterable[Section]) -> str:
    """Blocks of aligned lines, one block for each task."""
    return "\n\n".join("\n".join(_section_text(s)) for s in sections)


def _section_text(s: Section) -> list[str]:
    modes = list(s.figures)
    head = [f"{s.split} ({s.n_rows:,} rows)" if modes else s.split, *(MODES.get(m, m) for m in modes)]
    if s.baseline is not None:
        head.append(f"{s.baseline.name}{' (stored)' if s.baseline.stored else ''}")
    rows = [head]
    for figure, intervals in s.lines():
        row = [f"  {figure.metric}", *(shown(intervals[m], figure.unit) if m in intervals else "-" for m in modes)]
        beside = s.baseline_of(figure.metric)
        if s.baseline is not None:
            row.append("-" if beside is None else shown(beside, figure.unit))
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return lines + [f"  note: {note}" for note in s.notes]


def shown(i: Interval, unit: str = "%") -> str:
    """`81.2 % [78.8, 83.5] n 1076`; "n/a" where nothing was observed."""
    if i.n == 0 or math.isnan(i.value):
        return "n/a"
    scale, digits = (100, 1) if unit == "%" else (1, 3)
    value, low, high = (f"{scale * x:.{digits}f}" for x in (i.value, i.low, i.high))
    return f"{value}{' %' if unit == '%' else ''} [{low}, {high}] n {i.n}"
