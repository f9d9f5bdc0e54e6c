"""Ctrl-C reaches the engine even while Python has no turn, and the handlers are put back."""

from __future__ import annotations

import os
import signal
import threading
import time
import zlib

import pytest

from nearfar.cancel import Cancel
from nearfar.cli.interrupt import ctrl_c_cancels


def press_ctrl_c(after_s: float = 0.0) -> None:
    threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGINT)).start()


def test_the_flag_is_set_while_one_long_call_runs() -> None:
    """A Python handler alone would wait until the call returns; zlib, like the engine, releases the GIL meanwhile."""
    data = os.urandom(24 << 20)
    seen: list[float] = []

    def look(cancel: Cancel) -> None:
        while not cancel.is_set():
            time.sleep(0.005)
        seen.append(time.monotonic())

    with ctrl_c_cancels() as cancel:
        looking = threading.Thread(target=look, args=(cancel,))
        looking.start()
        press_ctrl_c(after_s=0.1)
        zlib.compress(data, 9)
        ended = time.monotonic()
        looking.join()
    assert seen[0] < ended - 0.05


def test_a_second_ctrl_c_interrupts_as_usual() -> None:
    with ctrl_c_cancels() as cancel:
        os.kill(os.getpid(), signal.SIGINT)
        while not cancel.is_set():
            time.sleep(0.001)
        press_ctrl_c(after_s=0.05)
        with pytest.raises(KeyboardInterrupt):
            time.sleep(10)


def test_the_handlers_are_those_of_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    with ctrl_c_cancels() as cancel:
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.set_wakeup_fd(-1) == -1
    assert not cancel.is_set()
