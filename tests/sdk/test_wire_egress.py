"""The door out, addresses and credentials: what is refused before anything happens."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from nearfar.errors import EgressDenied, FileError, UsageError
from nearfar.upper_remote import RemoteUpper
from nearfar.wire.address import Address
from nearfar.wire.egress import Account, Egress, Policy
from nearfar.wire.messages import Ask, ClientHello, CodecId, CodecSpec, Commit, Ids, Mode, Open, Rows, Up
from nearfar.wire.tls import Credentials

BY_IDS = Open(b"s" * 16, 0, Mode.LOSSY, CodecSpec(CodecId.IDS), 0)
BY_ROWS = Open(b"s" * 16, 0, Mode.LOSSY, CodecSpec(CodecId.FP16), 2)
ROWS, IDS = Rows(0, 0, (b"row",), (0,)), Ids(0, 0, (1,))


def test_local_only_lets_nothing_out() -> None:
    door = Egress(Policy(local_only=True))
    with pytest.raises(EgressDenied, match="local_only"):
        door.dial("localhost")
    for message in (ClientHello(b"f" * 32, {}, ()), BY_IDS, Commit(1)):
        with pytest.raises(EgressDenied, match="local_only"):
            door.out("cloud", message, 1)
    assert door.account.rows() == []


@pytest.mark.parametrize("message", [BY_IDS, IDS, Ask(1, 0, 3, 2, (5,))])
def test_ids_stay_where_the_policy_keeps_them(message: Up) -> None:
    with pytest.raises(EgressDenied, match="ids_ok"):
        Egress(Policy(ids_ok=False)).out("cloud", message, 1)
    Egress(Policy(hidden_ok=False)).out("cloud", message, 1)


@pytest.mark.parametrize("message", [BY_ROWS, ROWS])
def test_rows_stay_where_the_policy_keeps_them(message: Up) -> None:
    with pytest.raises(EgressDenied, match="hidden_ok"):
        Egress(Policy(hidden_ok=False)).out("cloud", message, 1)
    Egress(Policy(ids_ok=False)).out("cloud", message, 1)


def test_an_ask_without_drafts_tells_no_ids() -> None:
    Egress(Policy(ids_ok=False)).out("cloud", Ask(1, 0, 3, 3), 1)


def test_an_answer_sends_no_more_bytes_than_the_policy_allows() -> None:
    door = Egress(Policy(max_bytes=100))
    door.out("cloud", ROWS, 60)
    with pytest.raises(EgressDenied, match="101 bytes"):
        door.out("cloud", ROWS, 41)
    door.out("cloud", ROWS, 40)
    assert door.spent == 100


def test_only_named_hosts_are_dialled() -> None:
    door = Egress(Policy(hosts=("edge.local",)))
    door.dial("edge.local")
    with pytest.raises(EgressDenied, match=r"edge\.local"):
        door.dial("elsewhere.example")


def test_the_account_tells_who_got_what() -> None:
    account = Account()
    for _ in range(2):
        Egress(Policy(), account).out("edge", ROWS, 10)
    Egress(Policy(), account).out("cloud", IDS, 7)
    assert account.rows() == [("edge", "Rows", 2, 20), ("cloud", "Ids", 1, 7)]


def test_local_only_is_refused_before_a_name_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a socket, or a look-up")

    monkeypatch.setattr(socket, "socket", fail)
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(EgressDenied, match="local_only"):
        RemoteUpper("grpcs://cloud.example", hello=ClientHello(b"f" * 32, {}, ()), policy=Policy(local_only=True))


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("grpcs://cloud.example:443", Address("cloud.example", 443, True)),
        ("grpcs://cloud.example", Address("cloud.example", 9090, True)),
        ("grpc://127.0.0.1:1", Address("127.0.0.1", 1, False)),
        ("grpcs://[::1]:50051", Address("::1", 50051, True)),
    ],
)
def test_an_address_is_read_and_written(url: str, address: Address) -> None:
    assert Address.parse(url) == address
    assert Address.parse(str(address)) == address


@pytest.mark.parametrize(
    "url",
    "cloud.example http://cloud.example grpcs:// grpcs://:1 grpcs://a:b grpcs://a:99999 grpcs://a/b grpcs://u@a "
    "grpcs://a?b grpcs://a:0 grpcs://[::1".split(),
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="expected grpcs"):
        Address.parse(url)


@pytest.mark.parametrize(("host", "is_here"), [("localhost", True), ("127.9.9.9", True), ("::1", True)])
def test_this_machine_is_known(host: str, is_here: bool) -> None:
    assert Address(host, 1, False).is_loopback == is_here
    assert not Address("192.168.0.7", 1, False).is_loopback
    assert not Address("localhost.example", 1, False).is_loopback


def test_without_tls_only_this_machine_is_spoken_to_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("nearfar.upper_remote.log.warning", lambda text, *about: said.append(text % about))
    hello = ClientHello(b"f" * 32, {}, ())
    with pytest.raises(UsageError, match=r"expected grpcs://192\.168\.0\.7:9090"):
        RemoteUpper("grpc://192.168.0.7", hello=hello)
    RemoteUpper("grpc://192.168.0.7", hello=hello, insecure=True)
    assert "without TLS" in said[0]


def test_credentials_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    nonsense = tmp_path / "ca.pem"
    nonsense.write_text("no certificate")
    with pytest.raises(FileError, match=r"ca\.pem.*certificates in PEM"):
        Credentials.read(ca=nonsense)
    with pytest.raises(FileError, match="No such file"):
        Credentials.read(ca=tmp_path / "missing.pem")
    with pytest.raises(UsageError, match="belong together"):
        Credentials.read(certificate=nonsense)
    with pytest.raises(UsageError, match="ASCII"):
        Credentials(token="two words")


def test_secrets_are_not_printed() -> None:
    shown = repr(Credentials(token="a-secret", certificate=b"public", key=b"private"))
    assert "a-secret" not in shown
    assert "private" not in shown
