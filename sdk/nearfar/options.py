"""How an engine is to run a model: what a caller may choose.  The ground floor: imports errors only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from nearfar.errors import UsageError

MAX_THREADS = 256

Lut = Literal["off", "fast"]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Choices that belong to the device's engine, not to the model.

    `threads`: None takes the physical cores that this process may use.
    `lut`: "fast" multiplies ternary matrices by table lookup, faster and near the exact product instead of equal to it
    (`nearfar.quant.lookup_product`); `nearfar eval MODEL --text FILE --lut fast` shows what that does to a model.
    `cache`: where packed matrices stay for the next time: "auto" (None) beside the model, or in the user's cache folder
    where that cannot be written; a folder; "off" packs into memory each time.
    """

    threads: int | None = None
    lut: Lut = "off"
    cache: str | Path | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise UsageError(f"threads={self.threads}: expected 1..{MAX_THREADS}")
        if self.lut not in get_args(Lut):
            raise UsageError(f"lut={self.lut!r}: expected one of {', '.join(get_args(Lut))}")
        if self.cache is not None and not str(self.cache):
            raise UsageError('cache="": expected auto, off or a folder')
