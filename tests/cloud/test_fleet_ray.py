"""Workers as actors of Ray: the same tokens, the same end, and nobody but them is let in.  Ray itself is optional."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("fastapi", reason="fastapi is not installed (extra [cloud])")
pytest.importorskip("msgspec", reason="msgspec is not installed (extra [cloud])")

from nearfar.errors import MissingExtraError, NearfarError
from nearfar_cloud.fleet import ray_cluster
from nearfar_cloud.fleet.ray_cluster import TOKEN, RayCluster, accept
from nearfar_cloud.fleet.supervisor import Fleet
from nearfar_cloud.types import Request
from tests.cloud.fleet import Answer, alone, children, collect
from tests.cloud.gateway import wait_until
from tests.paths import ROOT
from tests.processes import parents

pytestmark = pytest.mark.usefixtures("one_thread")
needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed (extra [cluster])")


def test_nothing_imports_ray_before_a_cluster_is_asked_for() -> None:
    modules = ("nearfar_cloud", "nearfar_cloud.cli", "nearfar_cloud.fleet.ray_cluster", "nearfar_cloud.fleet.process")
    code = f"import sys, {', '.join(modules)}; print('ray' in sys.modules, 'torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["False", "False"]


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"nearfar\[cluster\]"):
        RayCluster()


def test_only_who_knows_the_token_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "GREET_S", 0.2)
    token = bytes(range(TOKEN))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        strangers = [socket.create_connection(address) for _ in range(4)]
        for stranger, said in zip(strangers, (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(TOKEN), token[:-1]), strict=True):
            stranger.sendall(said)
        strangers[0].close()

        def arrive() -> None:
            strangers.append(socket.create_connection(address))
            strangers[-1].sendall(token + b"more")

        late = threading.Timer(0.1, arrive)
        late.start()
        sock = accept(listener, token, lambda: None)
        late.join()
        assert sock.getpeername() == strangers[-1].getsockname()
        assert sock.recv(10) == b"more"  # what is behind the token is the link's
        sock.close()
        with pytest.raises(NearfarError, match="no place"):
            accept(listener, token, lambda: None, seconds=0.1)
        for stranger in strangers:
            stranger.close()


def test_a_greeting_that_drips_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte comes soon after the one before; all of them would take too long."""
    monkeypatch.setattr(ray_cluster, "GREET_S", 0.2)
    token = bytes(range(TOKEN))
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as slow:

        def drip() -> None:
            with suppress(OSError):  # it is not let in
                for byte in token:
                    slow.sendall(bytes([byte]))
                    time.sleep(0.05)

        dripping = threading.Thread(target=drip)
        dripping.start()
        with pytest.raises(NearfarError, match="no place"):
            accept(listener, token, lambda: None, seconds=0.1)
        dripping.join()


def listening() -> set[str]:
    """Addresses in hexadecimal on which a descendant of this process, or this process, listens."""
    inodes = set()
    for pid in descendants():
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                name = os.readlink(link)
            except OSError:
                continue
            if name.startswith("socket:["):
                inodes.add(name[8:-1])
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found


def descendants() -> set[int]:
    started_by = parents()
    found, more = set(), {os.getpid()}
    while more:
        found |= more
        more = {pid for pid, parent in started_by.items() if parent in more} - found
    return found


@needs_ray
def test_a_cluster_looks_for_no_place_once_the_fleet_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    closing = threading.Event()
    closing.set()
    cluster = RayCluster()
    try:
        with pytest.raises(NearfarError, match="the fleet closes"):
            cluster.start("tests.cloud.fleet:open_random", {"seed": None, "poisoned": False}, 1, closing)
    finally:
        cluster.close()


@needs_ray
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_actors_of_ray_serve_as_processes_do_and_a_lost_one_is_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = children()
    cluster = RayCluster(n_cpus=2)
    try:
        settings = {"seed": None, "poisoned": False}
        fleet = Fleet(lambda i, closing: cluster.start("tests.cloud.fleet:open_random", settings, 1, closing), 2)
        try:
            assert listening() <= {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, twice
            asked = [Request(ids=(7, 8, n), max_tokens=600, n_logprobs=1) for n in range(4)]
            seqs = [fleet.submit_branches(r, 1)[0] for r in asked]
            killed = False

            def kill(answers: dict[int, Answer]) -> None:
                nonlocal killed
                if not killed and all(len(a.ids) >= 5 for a in answers.values()):
                    killed = True
                    os.kill(fleet.members[0].pid, signal.SIGKILL)

            found = collect(fleet, seqs, kill)
            assert list(found.values()) == [alone(r) for r in asked]
            assert fleet.n_restarts == 1
            pids = [m.pid for m in fleet.members.values()]
        finally:
            fleet.close()
    finally:
        cluster.close()
    assert children() == before
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids if pid))  # Ray ends them beside
