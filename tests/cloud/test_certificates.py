"""`nearfar cloud certs`: what it makes is what TLS wants, stays its owner's, and is never made twice."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

pytest.importorskip("cryptography", reason="cryptography is not installed (extra [cloud])")

from nearfar.cli.main import main
from nearfar.errors import FileError, UsageError
from nearfar_cloud.gateway.certificates import make_authority, make_client, make_folder, pem


def handshake(folder: Path, client: str | None, server_name: str) -> str:
    """Who the server takes the client for, or the words of whoever refuses."""
    at_server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    at_server.load_cert_chain(folder / "server.pem", folder / "server-key.pem")
    at_server.load_verify_locations(folder / "ca.pem")
    at_server.verify_mode = ssl.CERT_REQUIRED
    at_client = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    if client is not None:
        at_client.load_cert_chain(folder / f"{client}.pem", folder / f"{client}-key.pem")
    found: list[str] = []

    def serve(sock: socket.socket) -> None:
        try:
            with at_server.wrap_socket(sock, server_side=True) as tls:
                subject = dict(pair[0] for pair in tls.getpeercert()["subject"])  # type: ignore[index]
                found.append(str(subject["commonName"]))
                tls.sendall(b"x")
        except OSError as error:
            found.append(str(error))

    here, there = socket.socketpair()
    thread = threading.Thread(target=serve, args=(there,))
    thread.start()
    try:
        with at_client.wrap_socket(here, server_hostname=server_name) as tls:
            tls.recv(1)
    except OSError as error:
        found.append(str(error))
        here.close()
    thread.join()
    return " ".join(found)


def test_a_server_and_its_devices_know_each_other_by_the_authority(tmp_path: Path) -> None:
    make_folder(tmp_path, ["cloud.lan", "192.168.1.10"], ["phone"], 30)
    assert handshake(tmp_path, "phone", "cloud.lan") == "phone"
    assert handshake(tmp_path, "phone", "192.168.1.10") == "phone"
    assert "mismatch" in handshake(tmp_path, "phone", "other.lan")
    assert "peer did not return a certificate" in handshake(tmp_path, None, "cloud.lan")
    assert "purpose" in handshake(tmp_path, "server", "cloud.lan")  # a server is no device


def test_a_device_of_another_authority_is_nobody(tmp_path: Path) -> None:
    make_folder(tmp_path, ["cloud.lan"], ["phone"], 30)
    certificate, key = pem(make_client(make_authority(30), "phone", 30))
    (tmp_path / "phone.pem").write_bytes(certificate)
    (tmp_path / "phone-key.pem").write_bytes(key)
    assert "certificate verify failed" in handshake(tmp_path, "phone", "cloud.lan")


def test_files_are_their_owners_and_a_later_call_only_adds(tmp_path: Path) -> None:
    folder = tmp_path / "lan"
    first = make_folder(folder, ["cloud.lan"], ["phone"], 30)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [told.is_new for told in first] == [True, True, True]
    second = make_folder(folder, ["other.lan"], ["phone", "tablet"], 60)
    assert [told.is_new for told in second] == [False, False, False, True]
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert handshake(folder, "tablet", "cloud.lan") == "tablet"


def test_each_file_says_how_long_it_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cloud", "certs", str(tmp_path), "--client", "phone", "--days", "7", "--json"]) == 0
    facts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Path(fact["file"]).name for fact in facts] == ["ca.pem", "server.pem", "phone.pem"]
    left = [datetime.fromisoformat(fact["until"]) - datetime.now(UTC) for fact in facts]
    assert timedelta(days=6.9) < left[1] < timedelta(days=7.1)
    assert timedelta(days=6.9) < left[2] < timedelta(days=7.1)
    assert left[0] > timedelta(days=69)
    assert main(["cloud", "certs", str(tmp_path), "--client", "phone"]) == 0
    assert "kept as it was" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "ca", "server", "phone-key", "../phone", "a b", ".hidden", "x" * 64])
def test_a_name_that_is_no_files_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="client"):
        make_folder(tmp_path / "lan", ["cloud.lan"], [name], 30)
    assert not (tmp_path / "lan").exists()


def test_an_authority_that_cannot_sign_is_named(tmp_path: Path) -> None:
    make_folder(tmp_path, ["cloud.lan"], [], 30)
    (tmp_path / "ca-key.pem").write_bytes(pem(make_authority(1))[1])
    with pytest.raises(FileError, match=r"not the key of ca\.pem"):
        make_folder(tmp_path, ["cloud.lan"], ["phone"], 30)
    (tmp_path / "ca-key.pem").write_text("no key")
    with pytest.raises(FileError, match="remove both"):
        make_folder(tmp_path, ["cloud.lan"], ["phone"], 30)
    certificate, key = pem(make_authority(0))
    (tmp_path / "ca.pem").write_bytes(certificate)
    (tmp_path / "ca-key.pem").write_bytes(key)
    with pytest.raises(FileError, match="out of date"):
        make_folder(tmp_path, ["cloud.lan"], ["phone"], 30)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="folder that can be written"):
        make_folder(tmp_path / "file" / "lan", ["cloud.lan"], [], 30)
