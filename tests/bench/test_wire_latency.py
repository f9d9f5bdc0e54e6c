"""bench/wire_latency.py measures both transports under every congestion control that may be chosen here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nearfar.chaos.netns import why_not
from tests.paths import ROOT


@pytest.mark.skipif(why_not() is not None, reason=f"no namespaces: {why_not()}")
def test_every_control_and_transport_is_measured() -> None:
    command = [sys.executable, str(ROOT / "bench" / "wire_latency.py"), "--rtt", "2", "--messages", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    controls = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control").read_text().split()
    measured = [(line.split(",")[0].removeprefix("| "), "gRPC" in line) for line in done.stdout.splitlines()]
    assert measured == [(control, is_grpc) for control in controls for is_grpc in (True, False)]
