"""Environment variables, all of them, in one table.  The ground floor: imports errors only."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from nearfar.errors import ConfigError

# name -> what it does; `nearfar doctor` prints this table with the values found.
VARIABLES = {
    "NEARFAR_DEBUG": "0..4: 1 stage timings, 2 shapes and exits, 3 messages to an upper side, 4 checksums per layer; "
    "where an unexpected error was",
    "NEARFAR_ISA": "force kernels: ref, avx2, avxvnni, avx512, avx512bf16, amx, neon, neon_dot, neon_i8mm "
    "(default: this CPU's best)",
    "NEARFAR_THREADS": "threads of the engine (default: the physical cores this process may use)",
    "NEARFAR_CACHE": "where packed matrices stay: auto (default: beside the model), off, or a folder",
    "XDG_CACHE_HOME": "the user's cache folder (default: ~/.cache): packed matrices where beside the model cannot be "
    "written, self-tests that passed",
    "NEARFAR_BACKEND": "force the engine: native, numpy, llama (default: native if built)",
    "NEARFAR_DATA": "folder of the corpora for `nearfar train`, `study` and `eval`",
    "NO_COLOR": "any value: no colours in the terminal (no-color.org)",
}

ISA_NAMES = ("ref", "avx2", "avxvnni", "avx512", "avx512bf16", "amx", "neon", "neon_dot", "neon_i8mm")
BACKENDS = ("native", "numpy", "llama")


def _choice(name: str, allowed: tuple[str, ...]) -> str | None:
    value = os.environ.get(name)
    if value is None or value == "":
        return None
    if value not in allowed:
        raise ConfigError(f"{name}={value}: expected one of {', '.join(allowed)}")
    return value


def _whole(name: str, low: int, high: int) -> int | None:
    value = os.environ.get(name)
    if value is None or value == "":
        return None
    if not value.isdecimal() or not low <= int(value) <= high:
        raise ConfigError(f"{name}={value}: expected a whole number {low}..{high}")
    return int(value)


def debug_level() -> int:
    """0 (quiet) to 4."""
    return _whole("NEARFAR_DEBUG", 0, 4) or 0


def isa() -> str | None:
    """The instruction set to force, or None for the best one."""
    return _choice("NEARFAR_ISA", ISA_NAMES)


def threads() -> int | None:
    """The number of engine threads to use, or None to choose."""
    return _whole("NEARFAR_THREADS", 1, 256)


def cache() -> str | None:
    """Where packed matrices stay, or None for the default."""
    return os.environ.get("NEARFAR_CACHE") or None


def user_cache_dir() -> Path:
    """The folder for what can be made again."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "nearfar"
    home = Path(os.path.expanduser("~"))
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "nearfar"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "nearfar" / "cache"
    return home / ".cache" / "nearfar"


def backend() -> str | None:
    """The engine to force, or None for the best one."""
    return _choice("NEARFAR_BACKEND", BACKENDS)


def data_dir() -> str | None:
    """The folder with the corpora, or None."""
    return os.environ.get("NEARFAR_DATA") or None


def no_color() -> bool:
    """Whether the person asked for plain text."""
    return bool(os.environ.get("NO_COLOR"))
