"""The process that serves the upper layers, killed, stopped and started again while somebody needs it."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from nearfar.chaos.schedule import Fault
from nearfar.errors import NearfarError, UsageError

KINDS = ("kill", "stop", "swap")
START_S = 120.0  # until a new process must be ready, on a machine that is busy with others
LOOK_AGAIN = 0.1  # of an outage: within it a device has tried again (remote_link.py), so it meets who is swapped in
_LOOK_S = 0.01


class Victim:
    """A server process at one address.  Faults begin at once and end on a thread of their own; one at a time.

        with Victim([python, "-m", "server", "--port", "7070"], lambda: answers("127.0.0.1", 7070)) as upper:
            upper.inject(Fault(0, "kill", seconds=0.5))
            ...
            upper.wait()

    `is_ready` says whether the process takes connections; `other` is the command with other weights, for `swap`.
    `on_leaving` may be set: it is called while that one is still there, before it has to make room again.
    """

    def __init__(
        self,
        command: Sequence[str],
        is_ready: Callable[[], bool],
        other: Sequence[str] | None = None,
        **options: object,
    ) -> None:
        """`options` go to subprocess.Popen, for example stdout and stderr."""
        self._command, self._other, self._is_ready, self._options = list(command), other, is_ready, options
        self.on_leaving: Callable[[], None] = lambda: None
        self.n_swaps = self.n_swapped_back = 0  # that have begun, and that are over
        self._process: subprocess.Popen[bytes] | None = None
        self._recovery: threading.Thread | None = None
        self._trouble: NearfarError | None = None
        self._closing = threading.Event()

    def __enter__(self) -> Victim:
        self._start(self._command)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        if self._recovery is not None:
            self._recovery.join()
        self._kill()

    @property
    def pid(self) -> int:
        """Of the process that is there now."""
        assert self._process is not None  # between __enter__ and __exit__
        return self._process.pid

    def inject(self, fault: Fault) -> None:
        """Begin it; whatever went wrong before has to be over, so this waits for it.  Raises as `wait` does."""
        if fault.kind not in KINDS:
            raise UsageError(f"a process cannot do {fault.kind!r}; expected one of {', '.join(KINDS)}")
        if fault.kind == "swap" and self._other is None:
            raise UsageError("a swap needs the command of a process with other weights")
        self.wait()
        self.n_swaps += fault.kind == "swap"
        if fault.kind == "stop":
            self._signal(signal.SIGSTOP)
        else:
            self._kill()
        self._recovery = threading.Thread(target=self._recover, args=(fault,), name="nearfar-victim", daemon=True)
        self._recovery.start()

    def wait(self) -> None:
        """Until the process is as it was before.  Raises NearfarError if it does not come back."""
        if self._recovery is not None:
            self._recovery.join()
        if self._trouble is not None:
            raise self._trouble

    def _recover(self, fault: Fault) -> None:
        began, seconds = time.monotonic(), fault.seconds
        try:
            if fault.kind == "swap":
                assert self._other is not None  # checked before
                self._start(self._other)
                seconds += LOOK_AGAIN * (time.monotonic() - began)
            self._closing.wait(seconds)
            if fault.kind == "stop":
                self._signal(signal.SIGCONT)
                return
            if fault.kind == "swap" and not self._closing.is_set():
                self.on_leaving()
            self._kill()
            self._start(self._command)
            self.n_swapped_back += fault.kind == "swap"
        except NearfarError as error:  # told to whoever waits
            self._trouble = error

    def _start(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(command, **self._options)  # type: ignore[call-overload]
        end = time.monotonic() + START_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > end:
                self._kill()
                raise NearfarError(
                    f"{command[0]}: not ready, exit code {self._process.returncode}; expected a server that goes on"
                )
            if self._closing.wait(_LOOK_S):
                return

    def _kill(self) -> None:
        assert self._process is not None
        self._process.kill()  # no matter if it is stopped or has ended
        self._process.wait()

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)
