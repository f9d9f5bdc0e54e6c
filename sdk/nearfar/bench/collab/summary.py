"""What a row of the comparison says, out of the answers of one way on one link."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from nearfar.bench.collab.measure import Answer

Figures = dict[str, float | None]  # None: there is no such figure


def quantile(values: Sequence[float], q: float) -> float:
    """The value below which a share `q` lies (nearest rank)."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def agreement(a: Answer, b: Answer) -> float:
    """Share of positions at which both have the same token, of the longer one."""
    n = max(len(a.ids), len(b.ids))
    return sum(x == y for x, y in zip(a.ids, b.ids, strict=False)) / n if n else 1.0


def summary(
    answers: Sequence[Answer], oracle: Sequence[Answer], full: Sequence[Answer], dollars_per_hour: float | None = None
) -> Figures:
    """Means of answers, quantiles of intervals, and work for each token.

    `dollars_per_hour`: what the upper machine costs; the price of an answer is that of the seconds it was busy with it.
    """
    n_tokens = sum(len(a.ids) for a in answers)
    gaps = [gap for a in answers for gap in a.gaps_ms]
    checked = sum(a.accepted + a.retracted for a in answers)
    same = [agreement(a, b) for a, b in zip(answers, oracle, strict=True)]
    same_full = [agreement(a, b) for a, b in zip(answers, full, strict=True)]
    upper_ms, device_ms = (sum(getattr(a, name) for a in answers) for name in ("upper_ms", "device_ms"))
    up, down = (sum(getattr(a, name) for a in answers) for name in ("bytes_up", "bytes_down"))
    energy = [a.energy_j for a in answers if a.energy_j is not None]
    joules = sum(energy) if len(energy) == len(answers) else None
    n = len(answers)
    return {
        "total_s": mean(a.total_s for a in answers),
        "ttft_ms": median(1000 * a.at_s[0] for a in answers),
        "tbt_p50_ms": quantile(gaps, 0.5),
        "tbt_p95_ms": quantile(gaps, 0.95),
        "tbt_p99_ms": quantile(gaps, 0.99),
        "stall_p95_ms": quantile([a.stall_ms for a in answers], 0.95),
        "tokens_per_s": n_tokens / sum(a.total_s for a in answers),
        "asked_share": sum(a.n_asked for a in answers) / n_tokens,
        "asks_per_token": sum(a.asks for a in answers) / n_tokens,
        "bytes_up_per_token": up / n_tokens,
        "bytes_down_per_token": down / n_tokens,
        "bytes_up_per_answer": up / n,
        "bytes_down_per_answer": down / n,
        "kb_per_answer": (up + down) / n / 1000,
        "device_s": device_ms / n / 1000,
        "upper_s": upper_ms / n / 1000,
        "link_s": mean(a.link_ms for a in answers) / 1000,
        "device_ms_per_token": device_ms / n_tokens,
        "upper_ms_per_token": upper_ms / n_tokens,
        "upper_row_layers_per_token": sum(a.row_layers for a in answers) / n_tokens,
        "energy_j_per_answer": None if joules is None else joules / n,
        "energy_j_per_token": None if joules is None else joules / n_tokens,
        "dollars_per_mtok": None if dollars_per_hour is None else upper_ms / n_tokens * dollars_per_hour / 3.6,
        "acceptance": sum(a.accepted for a in answers) / checked if checked else None,
        "retracted_per_token": sum(a.retracted for a in answers) / n_tokens,
        "agrees_with_oracle": mean(same),
        "agrees_with_full": mean(same_full),
        "exact_answers": mean(float(s == 1) for s in same),
        "resumes": sum(a.reopened for a in answers),
        "replayed_rows": sum(a.replayed for a in answers),
        "tokens": n_tokens,
    }


def mixed(a: Figures, b: Figures, share: float) -> Figures:
    """`share` of b and the rest of a; a figure that one of them lacks is lacking."""
    both = {name: (x, b[name]) for name, x in a.items()}
    return {name: None if x is None or y is None else (1 - share) * x + share * y for name, (x, y) in both.items()}


def add_relative_cost(rows: Sequence[dict[str, Any]]) -> None:
    """To rows of one link and kind of prompt: the upper side's time for a token beside that of `cloud-only`."""
    base = next((row["upper_ms_per_token"] for row in rows if row["system"] == "cloud-only"), 0.0)
    for row in rows:
        row["cost_of_cloud_only"] = row["upper_ms_per_token"] / base if base else None
