"""bench/soak.py: some seconds of it leave nothing behind, and it says so where something is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from http.client import IncompleteRead

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("fastapi", reason="fastapi is not installed (extra [cloud])")

from tests.paths import ROOT

NANO = ROOT / "sdk" / "nearfar" / "models" / "nano.gguf"


@pytest.mark.skipif(not NANO.is_file(), reason=f"{NANO.name} is not trained yet")
def test_everything_that_clients_do_for_some_seconds_leaves_nothing_behind() -> None:
    command = [sys.executable, str(ROOT / "bench" / "soak.py"), "--minutes", "0.15", "--rounds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout, done.stderr
    found = json.loads(done.stdout)
    assert found["faults"] == []
    assert done.returncode == 0
    assert len(found["samples"]) == 2
    assert found["requests"] > 50
    assert found["steps_after_cancel"] <= found["cancelled"]


@pytest.mark.parametrize("rounds", ["0", "1"])
def test_one_round_has_nothing_to_be_compared_with(rounds: str) -> None:
    command = [sys.executable, str(ROOT / "bench" / "soak.py"), "--rounds", rounds]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected 2 or more" in done.stderr


def test_a_reply_that_is_cut_is_a_fault_and_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import soak

    def cut(person: object) -> None:
        raise IncompleteRead(b"")

    monkeypatch.setattr(soak, "ACTIONS", {cut: (1, set())})
    faults: list[str] = []
    soak.client(0, 1, time.monotonic() + 0.05, {}, Counter(), faults)
    assert set(faults) == {"cut: IncompleteRead: IncompleteRead(0 bytes read)"}


def test_workers_are_looked_at_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from soak import Sample, children, resident_bytes, verdict

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert process.pid in children(os.getpid())
        assert resident_bytes(process.pid) > 0
    assert process.pid not in children(os.getpid())
    first, last = Sample(**AT_REST), Sample(**AT_REST | {"resident_bytes": 3e8 + (60 << 20)})
    assert verdict([first, last], 2) == ["memory grew from 3e+08 to 3.62915e+08 bytes"]
    assert verdict([first, last], 3) == []  # 24 MiB for each process


AT_REST = {
    "seqs": 0, "queue_tokens": 0, "blocks_used": 0, "kept_streams": 0, "tasks": 3, "threads": 10, "open_fds": 10,
    "resident_bytes": 3e8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("seqs", 1, "at rest seqs is 1, expected 0"),
        ("queue_tokens", 30, "at rest queue_tokens is 30, expected 0"),
        ("blocks_used", 1, "at rest blocks_used is 1, expected 0"),
        ("kept_streams", 1, "at rest kept_streams is 1, expected 0"),
        ("tasks", 4, "at rest tasks is 4, was 3"),
        ("open_fds", 11, "at rest open_fds is 11, was 10"),
        ("threads", 100, "100 threads, expected at most 24"),
        ("resident_bytes", 4e8, "memory grew from 3e+08 to 4e+08 bytes"),
    ],
)
def test_what_is_left_behind_is_named(name: str, value: float, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from soak import Sample, verdict

    first, last = Sample(**AT_REST), Sample(**AT_REST | {name: value})
    assert verdict([first, first]) == []
    assert verdict([first, last]) == [said]
