"""Ctrl-C as a cancel: the answer ends, the program goes on.  Used by the verbs that stream.

Python runs a signal handler only between two of its own steps, and one step may be a long call into the engine.  The
C-level half of the handler, however, writes a byte to the wake-up descriptor at once; a small thread waits for that
byte and sets the flag that the engine reads between layers.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from nearfar.cancel import Cancel


@contextmanager
def ctrl_c_cancels() -> Iterator[Cancel]:
    """Within the block Ctrl-C sets the flag that is handed out; a second one interrupts as usual.  Main thread only."""
    cancel = Cancel()
    seen = 0
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def wait_for_signal() -> None:
        for byte in iter(lambda: os.read(reading, 1), b""):
            if byte[0] == signal.SIGINT:
                cancel.set()

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen += 1
        cancel.set()
        if seen > 1:
            raise KeyboardInterrupt

    watcher = threading.Thread(target=wait_for_signal, name="nearfar-ctrl-c", daemon=True)
    watcher.start()
    handler_before = signal.signal(signal.SIGINT, on_signal)
    descriptor_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    try:
        yield cancel
    finally:
        signal.set_wakeup_fd(descriptor_before)
        signal.signal(signal.SIGINT, handler_before)
        os.close(writing)  # the watcher reads the end of the pipe
        watcher.join()
        os.close(reading)
