"""How an engine is to run a model: what a caller may choose.  The ground floor: imports errors only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from nearfar.errors import UsageError

MAX_THREADS = 256

Lut = Literal["off", "fast"]
Head = Literal["file", "q4", "screened"]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Choices that belong to the device's engine, not to the model.

    `threads`: None takes the physical cores that this process may use.
    `lut`: "fast" multiplies ternary matrices by table lookup, faster and near the exact product instead of equal to it
    (`nearfar.quant.lookup_product`); `nearfar eval MODEL --text FILE --lut fast` shows what that does to a model.
    `head`: "q4" requantises the matrix of the heads to 4.5 bits as Q4_0 rounds: fewer bytes a token, other logits.
    "screened" keeps it and, where only the largest logit is asked for, looks at a smaller copy first and multiplies
    what may be the largest as the file has it: the same tokens, more memory, fewer bytes where the choice is clear.
    `cache`: where packed matrices stay for the next time: "auto" (None) beside the model, or in the user's cache folder
    where that cannot be written; a folder; "off" packs into memory each time.
    """

    threads: int | None = None
    lut: Lut = "off"
    cache: str | Path | None = None
    head: Head = "file"

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise UsageError(f"threads={self.threads}: expected 1..{MAX_THREADS}")
        if self.lut not in get_args(Lut):
            raise UsageError(f"lut={self.lut!r}: expected one of {', '.join(get_args(Lut))}")
        if self.head not in get_args(Head):
            raise UsageError(f"head={self.head!r}: expected one of {', '.join(get_args(Head))}")
        if self.cache is not None and not str(self.cache):
            raise UsageError('cache="": expected auto, off or a folder')
