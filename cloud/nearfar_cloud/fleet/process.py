"""A worker as a process of this machine, at the other end of a socket pair: no port, nobody else can speak to it.

The process is started, never forked: threads and locks of the front are not copied.  It ignores Ctrl-C, and SIGTERM
once its model is loaded, which a whole service gets at once: the front finishes what is under way, and a worker ends
when its link does.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from nearfar_cloud.executors.transport import Link
from nearfar_cloud.fleet import worker
from nearfar_cloud.fleet.messages import ToFront, ToWorker


class ProcessWorker:
    """Owns the process and the front's end of its link."""

    def __init__(self, entry: str, settings: Mapping[str, Any]) -> None:
        """`entry` and `settings` (JSON): as in `worker.run`."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", __name__, entry, json.dumps(settings), str(theirs.fileno())]
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
        self.link: Link[ToFront] = Link(ours, ToFront)

    def kill(self) -> None:
        """At once; nothing happens to a process that has ended."""
        self._process.kill()

    def close(self) -> None:
        """End the link and wait for the process, which ends with it, or is made to."""
        self.link.close()
        try:
            self._process.wait(worker.END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main() -> None:
    """The other side."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    entry, settings, descriptor = sys.argv[1:]
    link: Link[ToWorker] = Link(socket.socket(fileno=int(descriptor)), ToWorker)
    worker.run(link, entry, json.loads(settings), _ignore_sigterm)


def _ignore_sigterm() -> None:
    """From now on something may be under way; while the model loads, nothing is."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


if __name__ == "__main__":
    main()
