"""`nearfar cloud serve` as a victim: killed, stopped, back at its address, and asked what it holds."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nearfar.chaos.ports import free_ports
from nearfar.chaos.schedule import Fault
from nearfar.chaos.victim import Victim
from nearfar.errors import NearfarError

_GAUGE = re.compile(r'^nearfar_cloud_(\w+?)(?:\{\w+="(\w+)"\})? ([0-9.e+-]+)$', re.MULTILINE)
# What must be at its baseline when nobody is there: positions, bytes and asks of devices, blocks of keys and values.
_HELD = (
    "device_sessions.connected",
    "device_sessions.away",
    "device_positions",
    "device_bytes",
    "device_asking",
    "kv_blocks.used",
    "tasks",
)

# What a server with other weights must never get, nor tell.  What was sent stays counted: its sessions are kept.
_FOR_STRANGERS = ("device_positions", "device_bytes", "device_events_total.asks", "device_events_total.tokens")

KEEP_S = 15  # what a device has left behind is given up after so long
ANSWER_S = 30.0  # a server that takes connections may so long take to answer its first request


@dataclass(frozen=True, slots=True)
class UpperProcess:
    """A server at an address that stays, whoever is there.  Faults come from several threads, one at a time."""

    victim: Victim
    port: int  # for devices
    http: int
    token: str
    _turn: threading.Lock
    strangers_got: dict[str, float] = field(default_factory=dict)  # a server with other weights: what, and how much

    @property
    def url(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"

    def inject(self, fault: Fault) -> None:
        with self._turn:
            self.victim.inject(fault)

    def wait(self) -> None:
        """Until it is as it was before."""
        with self._turn:
            self.victim.wait()

    def gauges(self) -> dict[str, float]:
        """Figures of /metrics, by name or name.label."""
        url = f"http://127.0.0.1:{self.http}/metrics"
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {self.token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read().decode()
        return {name + (f".{label}" if label else ""): float(value) for name, label, value in _GAUGE.findall(text)}

    def look_at_stranger(self) -> None:
        """Before a server with other weights goes: whether anybody has trusted it.  Raises NearfarError."""
        until = time.monotonic() + ANSWER_S
        while True:
            try:
                gauges = self.gauges()
                break
            except OSError as error:
                if time.monotonic() > until:
                    raise NearfarError(f"the server with other weights does not answer: {error}") from None
                time.sleep(0.1)
        for name in _FOR_STRANGERS:
            if gauges[name]:
                self.strangers_got[name] = self.strangers_got.get(name, 0.0) + gauges[name]

    def held(self) -> dict[str, float]:
        """What answers take up there: positions, bytes, blocks, tasks, sockets."""
        gauges = self.gauges()
        held = {name: gauges[name] for name in _HELD}
        if (n := _n_sockets(self.victim.pid)) is not None:
            held["sockets"] = n
        return held

    def settled(self, baseline: dict[str, float], within_s: float) -> dict[str, tuple[float, float]]:
        """What is more than it was at the baseline after so long: name -> (now, then).  Empty: nothing."""
        until = time.monotonic() + within_s
        while True:
            now = self.held()
            more = {name: (now[name], then) for name, then in baseline.items() if now[name] > then}
            if not more or time.monotonic() > until:
                return more
            time.sleep(0.25)


@contextmanager
def serving(
    model: Path, folder: Path, n_positions: int, token: str = "", other: Path | None = None
) -> Iterator[UpperProcess]:
    """A server for `model`, whose devices may hold so many positions together.  Raises NearfarError.

    `token`: the key that they show; empty: one of chance.  `other`: the file that it has after a `swap`.
    """
    token = token or secrets.token_hex(16)
    keys, log = folder / f"{model.stem}-keys.json", folder / f"{model.stem}-server.log"
    entry = {"tenant": "suite", "sha256": hashlib.sha256(token.encode()).hexdigest(), "metrics": True}
    keys.write_text(json.dumps({"keys": [entry | {"session_positions": n_positions}]}))
    port, http = free_ports(2)
    serve = [sys.executable, "-m", "nearfar.cli.main", "cloud", "serve"]
    options = ["--key-file", str(keys), "--port", str(http), "--collab-port", str(port), "--threads", "1"]
    options += ["--kv-memory", "64", "--session-keep", str(KEEP_S)]
    command, swapped = [*serve, str(model), *options], None if other is None else [*serve, str(other), *options]
    with (
        log.open("ab") as said,
        Victim(command, lambda: _answers(port), swapped, stdout=said, stderr=said, start_new_session=True) as victim,
    ):
        upper = UpperProcess(victim, port, http, token, threading.Lock())
        victim.on_leaving = upper.look_at_stranger
        yield upper


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False


def _n_sockets(pid: int) -> int | None:
    """Open sockets of a process; None where there is no /proc."""
    folder = Path(f"/proc/{pid}/fd")
    if not folder.is_dir():
        return None
    n = 0
    for link in folder.iterdir():
        try:
            n += os.readlink(link).startswith("socket:")
        except OSError:  # closed meanwhile
            continue
    return n
