"""Types of arguments on the command line, for the verbs of every house: a wrong one is refused with what was expected.

Ground floor.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable


def whole(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: a whole number in low..high."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number {low}..{high}")
        return int(text)

    return parse


def real(low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number in low..high."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a number {low:g}..{high:g}")
        return value

    return parse
