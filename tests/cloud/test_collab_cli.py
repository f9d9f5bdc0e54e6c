"""`nearfar cloud serve` for devices, as people start it: a process of its own, SIGTERM under load, what it refuses."""

from __future__ import annotations

import json
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("fastapi", reason="fastapi is not installed (extra [cloud])")
pytest.importorskip("grpc", reason="grpcio is not installed (extra [cloud])")
pytest.importorskip("nearfar_native", reason="the compiled extension is not built")

from nearfar.cli.main import main
from nearfar.ledger import Ledger
from nearfar.upper_remote import RemoteUpper
from nearfar.wire.messages import Close, Ids, Opened
from nearfar.wire.tls import Credentials
from nearfar_cloud.gateway.certificates import make_folder
from tests.cloud.collab import finish, halves, hello, new_lower, truth, whole
from tests.cloud.gateway import wait_until
from tests.sdk.small_device import BY_IDS, BY_ROWS, Device, opening


@contextmanager
def process(model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    command = [sys.executable, "-m", "nearfar.cli.main", "cloud", "serve", str(model), "--port", "0", "--json"]
    options = (*options, "--threads", "1", "--kv-memory", "64")
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        line = started.stdout.readline()
        assert line, started.communicate()[1]
        yield started, json.loads(line)
        started.kill()


def test_a_device_gets_its_whole_answer_from_a_server_that_is_told_to_stop() -> None:
    with process(halves().upper, "--collab-port", "0") as (server, facts):
        upper = RemoteUpper(facts["collab"].replace("127.0.0.1", "localhost"), hello=hello())
        device = Device(upper.open(opening(BY_ROWS)), new_lower(), BY_ROWS, truth(BY_ROWS))
        device.answer(4)
        server.send_signal(signal.SIGTERM)
        assert device.answer(24) == truth(BY_ROWS)
        finish(device)
        upper.close()
        assert server.wait(60) == 0
        assert server.stderr is not None
        assert server.stderr.read() == ""  # no warning, no trace, no id


@pytest.mark.parametrize("options", [(), ("--no-prefix-cache",)], ids=["as it is", "without"])
def test_a_server_may_be_told_to_find_nothing_of_earlier_answers(options: tuple[str, ...]) -> None:
    with process(whole(), "--collab-port", "0", *options) as (_, facts):
        upper = RemoteUpper(facts["collab"].replace("127.0.0.1", "localhost"), hello=hello())
        told = []
        for name in ("first", "second"):
            link = upper.open(opening(BY_ROWS, name.encode().ljust(16)))
            device = Device(link, new_lower(), BY_ROWS)
            device.ledger = Ledger([i * 37 % 300 for i in range(70)])
            told.append(device.answer(4))
            finish(device)
        assert told[0] == told[1]
        upper.close()
        assert (metric(facts, 'prefix_row_blocks_total{what="hit"}') > 0) == (not options)


def test_a_server_may_be_told_to_run_rows_before_anybody_asks() -> None:
    with process(whole(), "--collab-port", "0", "--eager-absorb") as (_, facts):
        upper = RemoteUpper(facts["collab"].replace("127.0.0.1", "localhost"), hello=hello())
        link = upper.open(opening(BY_IDS))
        while not any(isinstance(news, Opened) for news in link.receive(1.0)):
            pass
        link.send(Ids(0, 0, tuple(range(70))))
        wait_until(lambda: metric(facts, 'early_rows_total{what="run"}') == 69)
        link.send(Close())
        link.close()
        upper.close()


def test_a_part_of_the_memory_may_be_for_rows_alone() -> None:
    with process(whole(), "--collab-port", "0", "--hidden-share", "2,50") as (_, facts):
        assert metric(facts, 'kv_blocks{state="free"}') == 1.5 * facts["blocks"] * 2
        upper = RemoteUpper(facts["collab"].replace("127.0.0.1", "localhost"), hello=hello())
        for codec in (BY_ROWS, BY_IDS):
            device = Device(upper.open(opening(codec)), new_lower(), codec, truth(codec))
            assert device.answer(24) == truth(codec)
            finish(device)
        upper.close()


def metric(facts: dict[str, Any], name: str) -> float:
    text = urlopen(f"{facts['url'].removesuffix('/v1')}/metrics").read().decode()
    found = re.search(f"^nearfar_cloud_{re.escape(name)} (.*)$", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_other_machines_come_in_with_tls_1_3_and_a_certificate(tmp_path: Path) -> None:
    make_folder(tmp_path, ["localhost", "127.0.0.1"], ["phone"], 30)
    tls = ("--tls-cert", f"{tmp_path}/server.pem", "--tls-key", f"{tmp_path}/server-key.pem")
    options = ("--collab-port", "0", "--collab-host", "0.0.0.0", *tls, "--client-ca", f"{tmp_path}/ca.pem")
    with process(whole(), *options) as (_, facts):
        assert facts["collab"].startswith("grpcs://0.0.0.0:")
        port = int(facts["collab"].rpartition(":")[2])
        phone = Credentials.read(tmp_path / "ca.pem", "", tmp_path / "phone.pem", tmp_path / "phone-key.pem")
        upper = RemoteUpper(f"grpcs://localhost:{port}", hello=hello(), credentials=phone)
        device = Device(upper.open(opening(BY_IDS)), new_lower(), BY_IDS, truth(BY_IDS))
        assert device.answer(24) == truth(BY_IDS)
        finish(device)
        upper.close()
        assert handshake(port, tmp_path, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        with pytest.raises(ssl.SSLError):
            handshake(port, tmp_path, ssl.TLSVersion.TLSv1_2)


def handshake(port: int, folder: Path, version: ssl.TLSVersion) -> str | None:
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    context.load_cert_chain(folder / "phone.pem", folder / "phone-key.pem")
    context.minimum_version = context.maximum_version = version
    context.set_alpn_protocols(["h2"])
    sock = socket.create_connection(("127.0.0.1", port), 30)
    with context.wrap_socket(sock, server_hostname="localhost") as tls:
        return tls.version()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--collab-host", "0.0.0.0"], 2, "--tls-cert is a must"),
        (
            ["--collab-host", "0.0.0.0", "--tls-cert", "server.pem", "--tls-key", "server-key.pem"],
            2,
            "--client-ca has to say",
        ),
        (["--client-ca", "ca.pem"], 2, "--tls-cert has to give"),
        (["--tls-cert", "server.pem", "--tls-key", "server-key.pem", "--client-ca", "none.pem"], 3, "none.pem"),
        (["--workers", "2"], 2, "do not go together"),
        (["--region", "x" * 65], 2, "at most 64 characters"),
        (["--collab-host", "no.such.host.invalid"], 2, "--collab-host"),
        (["--max-sessions", "0"], 2, "1..1048576"),
    ],
)
def test_what_would_let_in_anybody_is_refused(
    options: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_folder(tmp_path, ["localhost"], [], 30)
    monkeypatch.chdir(tmp_path)
    try:
        found = main(["cloud", "serve", str(whole()), "--port", "0", "--collab-port", "0", *options])
    except SystemExit as ended:  # argparse
        found = int(ended.code or 0)
    assert found == code
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_named_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["cloud", "serve", "no-such-model", "--port", "0", "--collab-port", port]) == 2
    said = capsys.readouterr().err
    assert "in use" in said
    assert "--collab-port" in said
