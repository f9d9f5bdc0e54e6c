"""One figure on one line, with what is needed to judge it: command, machine, date.  Shared by the scripts beside it."""

from __future__ import annotations

import os
import platform
import sys
import time
from statistics import median

from nearfar.machine import cpu_name


def machine() -> str:
    """CPU, cores for this process, Python."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpu_name()}, {cores} cores, Python {platform.python_version()}"


def show(what: str, figure: str, goal: str = "") -> None:
    """Print a row of docs/benchmarks.md."""
    command = f"python {os.path.relpath(sys.argv[0])} {' '.join(sys.argv[1:])}".strip()
    print(f"| {what} | {figure} | {goal or '-'} | `{command}` | {machine()} | {time.strftime('%Y-%m-%d')} |")


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def spread(values: list[float], unit: str, digits: int = 1) -> str:
    """`median (smallest-largest of n) unit`"""
    return f"{median(values):.{digits}f} {unit} ({min(values):.{digits}f}-{max(values):.{digits}f}, {len(values)} runs)"


def plain_env() -> dict[str, str]:
    """The environment without PYTHON*: an unusual setting (no .pyc files, say) would be measured along."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
