"""bench/link.py measures every tier that this machine has, and says which one it has not."""

from __future__ import annotations

import subprocess
import sys

from nearfar.chaos.netns import why_not
from tests.paths import ROOT


def test_every_tier_is_measured_at_every_round_trip() -> None:
    command = [sys.executable, str(ROOT / "bench" / "link.py"), "--rtt", "0,10", "--messages", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [line.split(",")[0].removeprefix("| ") for line in done.stdout.splitlines()]
    tiers = ["no link", "proxy"] + ([] if why_not() else ["namespaces"])
    assert rows == 2 * tiers
    assert ("skipped" in done.stderr) == (why_not() is not None)
