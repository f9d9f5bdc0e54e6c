"""The other end of device.py: a device's process, which can be killed, and comes back with the answer it was at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any

from nearfar.errors import NearfarError

START_S = 120.0  # until a new process must be ready, on a machine that is busy with others
END_S = 30.0

Line = dict[str, Any]


class Handset:
    """A device.  `settings` are those of device.py; what its process says besides goes to the file `log`.

    with Handset(settings, log) as device:
        device.ask(task)
        line = device.next(60)
        left = device.kill()      # what it had said before; `ask` again with the same journal
    """

    def __init__(self, settings: dict[str, Any], log: Path) -> None:
        self.settings, self.log = settings, log
        self._process: subprocess.Popen[str] | None = None
        self._lines: SimpleQueue[Line | None] = SimpleQueue()

    def __enter__(self) -> Handset:
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.close()
            process.wait(END_S if kind is None else 1.0)
        except (OSError, subprocess.TimeoutExpired):
            process.kill()
            process.wait()

    def ask(self, task: dict[str, Any]) -> None:
        """Begin an answer.  Raises NearfarError where the process is gone."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._gone() from None

    def next(self, timeout_s: float) -> Line:
        """What it says next.  Raises NearfarError: it is gone, or silent for so long."""
        try:
            line = self._lines.get(timeout=timeout_s)
        except Empty:
            raise NearfarError(f"the device has said nothing for {timeout_s:g} s") from None
        if line is None:
            raise self._gone()
        return line

    def kill(self) -> list[Line]:
        """SIGKILL and a new process; what the old one had said and nobody had read yet."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        left = list(self._left())
        self._start()
        return left

    def pause(self) -> None:
        """SIGSTOP: it sleeps, as a phone does in a pocket."""
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _left(self) -> Iterator[Line]:
        """Until the end of its output."""
        while (line := self._lines.get()) is not None:
            yield line

    def _start(self) -> None:
        self._lines = SimpleQueue()
        command = [sys.executable, "-m", "nearfar.chaos.device"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
        reader = threading.Thread(target=_read, args=(self._process, self._lines), name="nearfar-handset", daemon=True)
        reader.start()
        self.ask(self.settings)
        if "ready" not in self.next(START_S):
            raise self._gone()

    def _gone(self) -> NearfarError:
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
            said = log.read().decode("utf-8", "replace").strip() or "it said nothing"
        return NearfarError(f"the device's process has ended: {said}")


def _read(process: subprocess.Popen[str], lines: SimpleQueue[Line | None]) -> None:
    """A process that is killed in the middle of a line has not said it."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if line.endswith("\n"):
                lines.put(json.loads(line))
    lines.put(None)
