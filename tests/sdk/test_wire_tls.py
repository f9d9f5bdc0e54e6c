"""Who may speak to whom: authorities, names, expiry, client certificates, and no TLS below 1.3."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from nearfar.errors import FileError, UpperError
from nearfar.lower import Lower, open_lower
from nearfar.upper_remote import RemoteUpper
from nearfar.weights import Weights
from nearfar.wire.messages import ClientHello, Opened
from nearfar.wire.tls import Credentials
from nearfar_cloud.gateway.certificates import Pair, make_authority, make_client, make_server, pem
from tests.sdk.small_device import BY_IDS, opening
from tests.sdk.wire_server import MODEL_FP, Door, WireServer
from tests.tiny import write_tiny

HELLO = ClientHello(MODEL_FP, {}, (BY_IDS,))
EXPIRED = 0  # days


@pytest.fixture(scope="module")
def lower(tmp_path_factory: pytest.TempPathFactory) -> Lower:
    path = tmp_path_factory.mktemp("tls") / "m.gguf"
    return open_lower(Weights.open(write_tiny(path, d_model=64, d_ff=64, n_layers=3)), "numpy")


@pytest.fixture(scope="module")
def authority() -> Pair:
    return make_authority(10)


@contextmanager
def serving(lower: Lower, pair: Pair, clients: Pair | None = None) -> Iterator[WireServer]:
    """With a certificate; `clients`: the authority that devices need one of."""
    certificate, key = pem(pair)
    ca = None if clients is None else pem(clients)[0]
    tls = grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=ca is not None)
    with WireServer(Door(lower), tls) as server:
        yield server


def is_let_in(url: str, credentials: Credentials) -> bool:
    """Raises UpperError."""
    upper = RemoteUpper(url, hello=HELLO, credentials=credentials)
    try:
        return isinstance(upper.open(opening(BY_IDS)).receive(20.0)[0], Opened)
    finally:
        upper.close()


def test_a_server_of_the_authority_is_spoken_to(lower: Lower, authority: Pair) -> None:
    with serving(lower, make_server(authority, ["localhost"], 5)) as server:
        server.door.token = "sesame"
        assert is_let_in(server.url, Credentials(ca=pem(authority)[0], token="sesame"))


@pytest.mark.parametrize(
    ("hosts", "days", "is_ours"),
    [(["localhost"], EXPIRED, True), (["elsewhere.example"], 5, True), (["localhost"], 5, False)],
    ids=["expired", "another name", "another authority"],
)
def test_a_server_that_is_not_who_it_should_be_gets_no_byte_of_us(
    lower: Lower, authority: Pair, hosts: list[str], days: int, is_ours: bool
) -> None:
    signer = authority if is_ours else make_authority(10)
    with serving(lower, make_server(signer, hosts, days)) as server:
        with pytest.raises(UpperError, match="no upper side could be reached"):
            is_let_in(server.url, Credentials(ca=pem(authority)[0], token="a-secret"))
        assert server.door.hellos == []


def test_a_device_is_known_by_its_certificate(lower: Lower, authority: Pair) -> None:
    with serving(lower, make_server(authority, ["localhost"], 5), authority) as server:
        certificate, key = pem(make_client(authority, "phone", 5))
        assert is_let_in(server.url, Credentials(pem(authority)[0], certificate=certificate, key=key))
        assert server.door.callers[0].names == ("phone",)


@pytest.mark.parametrize("client", ["none", "expired", "another authority"])
def test_a_device_without_a_good_certificate_is_not_let_in(lower: Lower, authority: Pair, client: str) -> None:
    signer = make_authority(10) if client == "another authority" else authority
    certificate, key = pem(make_client(signer, "phone", EXPIRED if client == "expired" else 5))
    ca = pem(authority)[0]
    with serving(lower, make_server(authority, ["localhost"], 5), authority) as server:
        with pytest.raises(UpperError):
            is_let_in(server.url, Credentials(ca) if client == "none" else Credentials(ca, "", certificate, key))
        assert server.door.hellos == []


def test_no_tls_to_a_port_that_wants_it_and_none_from_a_port_that_has_none(lower: Lower, authority: Pair) -> None:
    with serving(lower, make_server(authority, ["localhost"], 5)) as server, pytest.raises(UpperError):
        is_let_in(server.url.replace("grpcs", "grpc"), Credentials())
    with WireServer(Door(lower)) as server, pytest.raises(UpperError):
        is_let_in(server.url.replace("grpc", "grpcs"), Credentials(ca=pem(authority)[0]))


@pytest.mark.parametrize(("version", "is_taken"), [(ssl.TLSVersion.TLSv1_2, False), (ssl.TLSVersion.TLSv1_3, True)])
def test_a_server_takes_nothing_below_tls_1_3(
    lower: Lower, authority: Pair, version: ssl.TLSVersion, is_taken: bool
) -> None:
    context = ssl.create_default_context(cadata=pem(authority)[0].decode())
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version
    with (
        serving(lower, make_server(authority, ["localhost"], 5)) as server,
        socket.create_connection(("127.0.0.1", server.port)) as raw,
    ):
        assert has_agreed(lambda: context.wrap_socket(raw, server_hostname="localhost").close()) == is_taken


@pytest.mark.parametrize(("version", "is_taken"), [(ssl.TLSVersion.TLSv1_2, False), (ssl.TLSVersion.TLSv1_3, True)])
def test_a_device_speaks_to_nothing_below_tls_1_3(
    authority: Pair, tmp_path: Path, version: ssl.TLSVersion, is_taken: bool
) -> None:
    certificate, key = pem(make_server(authority, ["localhost"], 5))
    (tmp_path / "both.pem").write_bytes(certificate + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "both.pem")
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version
    agreed = []

    def serve(listener: socket.socket) -> None:
        raw, _ = listener.accept()
        with raw:
            agreed.append(has_agreed(lambda: context.wrap_socket(raw, server_side=True).close()))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        with pytest.raises(UpperError):
            is_let_in(f"grpcs://localhost:{listener.getsockname()[1]}", Credentials(ca=pem(authority)[0]))
        thread.join()
    assert agreed == [is_taken]


def has_agreed(handshake: object) -> bool:
    assert callable(handshake)
    try:
        handshake()
    except (ssl.SSLError, ConnectionError):
        return False
    return True


def test_certificates_are_read_from_files(lower: Lower, authority: Pair, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("ca.pem", "phone.pem", "phone-key.pem")]
    for path, data in zip(paths, (pem(authority)[0], *pem(make_client(authority, "phone", 5))), strict=True):
        path.write_bytes(data)
    with serving(lower, make_server(authority, ["localhost"], 5), authority) as server:
        assert is_let_in(server.url, Credentials.read(paths[0], certificate=paths[1], key=paths[2]))
    paths[2].write_bytes(pem(make_client(authority, "tablet", 5))[1])
    with pytest.raises(FileError, match="a certificate and its key"):
        Credentials.read(paths[0], certificate=paths[1], key=paths[2])
