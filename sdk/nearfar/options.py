"""How an engine is to run a model: what a caller may choose.  The ground floor: imports errors only."""

from __future__ import annotations

from dataclasses import dataclass

from nearfar.errors import UsageError

MAX_THREADS = 256


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Choices that belong to the device's engine, not to the model.

    `threads`: None takes the physical cores that this process may use.
    """

    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and not 1 <= self.threads <= MAX_THREADS:
            raise UsageError(f"threads={self.threads}: expected 1..{MAX_THREADS}")
