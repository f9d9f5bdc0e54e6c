"""From a row and an answer to counts: what is right, how much of it, and how sure the model was.  numpy only."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def parse_answer(text: str) -> dict[str, Any] | None:
    """The JSON object that the whole text is, or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def normal_value(value: object) -> str:
    """One slot value as it is compared: casefolded, whitespace made single; 20.0 is "20", True is "true"."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    return " ".join(text.casefold().split())


def slot_pairs(slots: object) -> Counter[tuple[str, str]]:
    """The multiset of (type, value) of a slots object; a list is several values of one type."""
    pairs: Counter[tuple[str, str]] = Counter()
    if isinstance(slots, Mapping):
        for kind, value in slots.items():
            for one in value if isinstance(value, (list, tuple)) else (value,):
                pairs[kind, normal_value(one)] += 1
    return pairs


@dataclass(frozen=True, slots=True)
class Overlap:
    """How two multisets meet: the counts behind precision, recall and F1."""

    shared: int
    found: int
    wanted: int

    @property
    def exact(self) -> bool:
        return self.shared == self.found == self.wanted


def overlap(found: Counter[tuple[str, str]], wanted: Counter[tuple[str, str]]) -> Overlap:
    """Multiset intersection of (type, value) pairs: how many are shared, found and wanted."""
    return Overlap((found & wanted).total(), found.total(), wanted.total())


def group_sums(groups: Sequence[str], counts: Sequence[Sequence[float]]) -> np.ndarray:
    """counts [N, C], summed within each group: f64 [G, C] in the order of first appearance."""
    index = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    sums = np.zeros((len(index), len(counts[0]) if counts else 1))
    for name, count in zip(groups, counts, strict=True):
        sums[index[name]] += count
    return sums


def ratio(sums: np.ndarray) -> np.ndarray:
    """sums [..., 2] -> first / second; nan where the second is 0."""
    result: np.ndarray = np.divide(
        sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] > 0
    )
    return result


def micro_f1(counts: np.ndarray) -> np.ndarray:
    """counts [..., 3] = summed (shared, found, wanted) -> F1 [...]; nan where there was nothing to find."""
    shared, found, wanted = np.moveaxis(np.asarray(counts, np.float64), -1, 0)
    total = found + wanted
    result: np.ndarray = np.divide(2 * shared, total, out=np.full_like(total, np.nan), where=total > 0)
    return result


def auroc(positives: ArrayLike, negatives: ArrayLike) -> float:
    """The chance that a positive scores above a negative, ties counting half (Mann-Whitney U / nm)."""
    pos, neg = np.sort(np.asarray(positives, np.float64)), np.asarray(negatives, np.float64)
    if not len(pos) or not len(neg):
        return float("nan")
    above = len(pos) - np.searchsorted(pos, neg, side="right")
    equal = np.searchsorted(pos, neg, side="right") - np.searchsorted(pos, neg, side="left")
    return float((above + 0.5 * equal).sum() / (len(pos) * len(neg)))


def calibration_error(confidence: np.ndarray, correct: np.ndarray, n_bins: int = 15) -> float:
    """Expected calibration error over bins of equal mass: mean |share right - mean confidence|, by bin size.

    confidence [N] in 0..1, correct [N] bool.  Equal mass as in Nguyen and O'Connor (2015): no empty bins.
    """
    if not len(confidence):
        return float("nan")
    order = np.argsort(confidence, kind="stable")
    gaps = [
        len(part) * abs(float(correct[part].mean()) - float(confidence[part].mean()))
        for part in np.array_split(order, min(n_bins, len(order)))
    ]
    return sum(gaps) / len(order)


def reliability(confidence: np.ndarray, correct: np.ndarray, n_bins: int = 15) -> list[tuple[float, float, int]]:
    """(mean confidence, share right, count) of each equal-mass bin, rising."""
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, min(n_bins, max(len(order), 1))) if len(part)]
    return [(float(confidence[p].mean()), float(correct[p].mean()), len(p)) for p in parts]
