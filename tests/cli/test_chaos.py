"""`nearfar chaos`: a proxy that says where it listens and what it carried, and schedules that it takes back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from nearfar.chaos.schedule import Schedule
from tests.cli.conftest import Nearfar


def proxy(*words: str | Path, to: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nearfar.cli.main", "chaos", "proxy", "--to", to, "--json", *map(os.fspath, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def next_line(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    facts = json.loads(process.stdout.readline())
    assert isinstance(facts, dict)
    return facts


def answer_once(listener: socket.socket) -> None:
    sock, _ = listener.accept()
    with sock:
        sock.sendall(sock.recv(100))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_the_proxy_carries_bytes_until_a_signal_and_counts_them(number: int, code: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer_once, args=(listener,), daemon=True).start()
        process = proxy("--profile", "4g-good", "--seed", "7", to=f"127.0.0.1:{listener.getsockname()[1]}")
        facts = next_line(process)
        assert (facts["profile"], facts["seed"]) == ("4g-good", 7)
        host, port = facts["listen"].split(":")
        with socket.create_connection((host, int(port)), timeout=60) as sock:
            sock.sendall(b"hello")
            assert sock.recv(100) == b"hello"
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (code, "")
    counted = json.loads(out)
    assert counted["up"]["n_bytes"] == counted["down"]["n_bytes"] == 5
    assert counted["connections"] == 1


def test_a_printed_schedule_is_played(nearfar: Nearfar, tmp_path: Path) -> None:
    words = ("--seed", "7", "--every", "0.02", "--until", "0.2", "--kinds", "reset,stall")
    done = nearfar("chaos", "schedule", *words)
    assert done.code == 0
    schedule = Schedule.from_json(done.out)
    assert len(schedule) == 10
    assert {f.kind for f in schedule.faults} == {"reset", "stall"}
    path = tmp_path / "faults.json"
    path.write_text(done.out)
    process = proxy("--faults", path, "--for", "4", to="127.0.0.1:9")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert sum(json.loads(out.splitlines()[1])["faults"].values()) == 10


def test_the_blackouts_of_a_profile_come_with_the_drawn_faults(nearfar: Nearfar) -> None:
    alone = Schedule.from_json(nearfar("chaos", "schedule", "--profile", "tunnel", "--until", "300").out)
    assert {f.kind for f in alone.faults} == {"blackout"}
    both = nearfar(
        "chaos", "schedule", "--profile", "tunnel", "--until", "300", "--every", "30", "--kinds", "reset"
    ).out
    assert len(Schedule.from_json(both)) == len(alone) + 10


def test_people_get_two_lines_of_text() -> None:
    command = [sys.executable, "-m", "nearfar.cli.main", "chaos", "proxy", "--to", "127.0.0.1:9", "--for", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    first, last = done.stdout.splitlines()
    assert "-> 127.0.0.1:9, lan, seed 0" in first
    assert "0 connections" in last


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        ([], 2, "expected proxy, schedule or suite"),
        (["proxy"], 2, "--to"),
        (["proxy", "--to", "here"], 2, "expected HOST:PORT"),
        (["proxy", "--to", "here:70000"], 2, "expected HOST:PORT"),
        (["proxy", "--to", "h:1", "--profile", "5g"], 2, "4g-bad"),
        (["proxy", "--to", "h:1", "--faults", "nowhere.json"], 3, "nowhere.json"),
        (["schedule", "--kinds", "flood"], 2, "'flood'"),
    ],
)
def test_what_cannot_be_done_is_refused(nearfar: Nearfar, words: list[str], code: int, text: str) -> None:
    done = nearfar("chaos", *words)
    assert done.code == code
    assert text in done.err


def test_a_port_in_use_is_one_sentence(nearfar: Nearfar) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = nearfar("chaos", "proxy", "--to", "h:1", "--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert done.code == 1
    assert "take another port" in done.err


def test_a_fault_that_no_link_can_play_is_refused(nearfar: Nearfar, tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    path.write_text('{"seed": 1, "unit": "s", "faults": [{"at": 1, "kind": "kill"}]}')
    done = nearfar("chaos", "proxy", "--to", "h:1", "--faults", path)
    assert done.code == 2
    assert "a link cannot do 'kill'" in done.err


@pytest.mark.parametrize("verb", ["proxy", "schedule"])
def test_each_verb_of_chaos_has_help_with_an_example(nearfar: Nearfar, verb: str) -> None:
    done = nearfar("chaos", verb, "--help")
    assert done.code == 0
    assert f"nearfar chaos {verb}" in done.out.split("examples:")[1]
