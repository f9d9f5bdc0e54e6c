"""How far a long piece of work is, on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], n: int, what: str) -> Iterator[T]:
    """Pass `items` through and say on stderr how far they are; on a terminal the line is rewritten."""
    live, started = sys.stderr.isatty(), time.perf_counter()
    i = 0
    for i, item in enumerate(items, 1):
        yield item
        if live and i % 10 == 0:
            print(f"\r{what} {i}/{n}", end="", file=sys.stderr, flush=True)
    print(
        f"{chr(13) if live else ''}{what} {i}/{n}, {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True
    )
