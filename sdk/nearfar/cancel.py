"""A stop button that Python and the C++ engine both see.  Imports numpy only.

The flag is one byte of memory: the engine reads it between layers, whoever holds the `Cancel` sets it from any
thread or signal handler.  Setting it twice is harmless; a set flag stays set.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import Cancelled


class Cancel:
    """Handed to a call that may take long; `set()` ends the call with `Cancelled` and leaves no trace of it."""

    def __init__(self) -> None:
        self.flag: NDArray[np.uint8] = np.zeros(1, np.uint8)  # [1], shared with the engine

    def set(self) -> None:
        """Press the button."""
        self.flag[0] = 1

    def is_set(self) -> bool:
        """Whether it was pressed."""
        return bool(self.flag[0])

    def check(self) -> None:
        """Raise Cancelled if the button was pressed."""
        if self.is_set():
            raise Cancelled("stopped on request")
