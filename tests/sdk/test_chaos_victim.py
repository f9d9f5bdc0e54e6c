"""A server that is killed, stopped and swapped comes back at the same address."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nearfar.chaos.ports import free_ports
from nearfar.chaos.schedule import Fault
from nearfar.chaos.victim import Victim
from nearfar.errors import NearfarError, UsageError

# answers every connection with its name and its number
SERVER = """
import os, socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as s:
    while True:
        with s.accept()[0] as c: c.sendall(f"{sys.argv[2]} {os.getpid()}".encode())
"""


def ask(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        return sock.recv(100).decode()


def answers(port: int) -> bool:
    try:
        return bool(ask(port))
    except OSError:
        return False


@pytest.fixture
def port() -> int:
    return free_ports(1)[0]


@pytest.fixture
def upper(port: int) -> Iterator[Victim]:
    def command(name: str) -> list[str]:
        return [sys.executable, "-c", SERVER, str(port), name]

    with Victim(command("ours"), lambda: answers(port), command("other")) as upper:
        yield upper


def test_a_killed_process_comes_back_as_another_one(upper: Victim, port: int) -> None:
    before = upper.pid
    assert ask(port) == f"ours {before}"
    upper.inject(Fault(0, "kill", seconds=0.2))
    assert not Path(f"/proc/{before}").exists()
    upper.wait()
    assert upper.pid != before
    assert ask(port) == f"ours {upper.pid}"


def test_a_stopped_process_is_silent_and_then_goes_on(upper: Victim, port: int) -> None:
    before, state = upper.pid, Path(f"/proc/{upper.pid}/status")
    upper.inject(Fault(0, "stop", seconds=1e6))
    end = time.monotonic() + 60
    while "\nState:\tT" not in state.read_text():  # a signal takes a moment to arrive
        assert time.monotonic() < end, "the process never stopped"
        time.sleep(0.001)
    upper._closing.set()  # its time is over
    upper.wait()
    assert ask(port) == f"ours {before}"


def test_for_a_while_another_process_is_in_its_place(upper: Victim, port: int) -> None:
    upper.inject(Fault(0, "swap", seconds=0.1))
    upper.wait()
    assert ask(port).startswith("ours")
    upper.inject(Fault(0, "swap", seconds=1e6))
    end = time.monotonic() + 60
    while not (answers(port) and ask(port).startswith("other")):
        assert time.monotonic() < end, "nobody else has come"
        time.sleep(0.01)
    assert ask(port) == f"other {upper.pid}"


def test_who_has_to_leave_again_is_looked_at_before(upper: Victim, port: int) -> None:
    seen: list[str] = []
    upper.on_leaving = lambda: seen.append(ask(port).split()[0])
    assert (upper.n_swaps, upper.n_swapped_back) == (0, 0)
    upper.inject(Fault(0, "swap", seconds=1e6))
    assert (upper.n_swaps, upper.n_swapped_back) == (1, 0)
    upper._closing.set()  # nobody is looked at when all ends
    upper.wait()
    assert seen == []
    upper._closing.clear()
    upper.inject(Fault(0, "swap"))
    upper.wait()
    assert (seen, upper.n_swaps, upper.n_swapped_back) == (["other"], 2, 2)
    upper.inject(Fault(0, "kill"))
    upper.wait()
    assert seen == ["other"]


def test_faults_follow_each_other(upper: Victim, port: int) -> None:
    pids = {upper.pid}
    for _ in range(3):
        upper.inject(Fault(0, "kill"))
    upper.wait()
    pids.add(upper.pid)
    assert len(pids) == 2
    assert answers(port)


def test_nothing_is_left_behind_even_if_it_is_stopped(port: int) -> None:
    with Victim([sys.executable, "-c", SERVER, str(port), "ours"], lambda: answers(port)) as upper:
        upper.inject(Fault(0, "stop", seconds=1e6))
        pid = upper.pid
    assert not Path(f"/proc/{pid}").exists()
    assert not answers(port)


def test_what_is_no_server_and_what_a_process_cannot_do_is_refused(upper: Victim, port: int) -> None:
    with pytest.raises(UsageError, match="'reset'"):
        upper.inject(Fault(0, "reset"))
    alone = Victim([sys.executable, "-c", "raise SystemExit(3)"], lambda: False)
    with pytest.raises(NearfarError, match="exit code 3"):
        alone.__enter__()
    with pytest.raises(UsageError, match="other weights"):
        alone.inject(Fault(0, "swap"))


def test_a_process_that_does_not_come_back_is_told_to_whoever_waits(port: int, tmp_path: Path) -> None:
    once = tmp_path / "once"
    code = f"import os; os.mkdir({str(once)!r})\n{SERVER}"  # a second one fails
    with Victim([sys.executable, "-c", code, str(port), "ours"], lambda: answers(port)) as upper:
        upper.inject(Fault(0, "kill"))
        with pytest.raises(NearfarError, match="exit code 1"):
            upper.wait()


def test_a_machine_without_a_port_to_give_is_not_searched_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(address: tuple[str, int]) -> socket.socket:
        raise OSError(98, "in use")

    assert len(set(free_ports(3))) == 3
    monkeypatch.setattr(socket, "create_server", taken)
    with pytest.raises(NearfarError, match=r"expected 2: .*in use"):
        free_ports(2)
