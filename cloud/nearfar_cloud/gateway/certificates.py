"""Certificates for a network of one's own: an authority, and what it signs for a server and for devices.

    ca.pem, ca-key.pem            the authority: devices and server trust what its key has signed
    server.pem, server-key.pem    `nearfar cloud serve --tls-cert --tls-key`
    NAME.pem, NAME-key.pem        a device; its name is whom the server takes it for (`--client-ca ca.pem`)

All files are the owner's alone (0600).  What is there stays as it is: a later call adds devices.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from nearfar.errors import FileError, UsageError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
SLACK = timedelta(minutes=5)  # clocks of a LAN differ: certificates begin so long ago
AUTHORITY_TIMES = 10  # as long as what it signs: a new authority means new files for every device

Key: TypeAlias = ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: Key


@dataclass(frozen=True, slots=True)
class Told:
    """A file of the folder, for people and programs."""

    path: Path
    what: str
    until: datetime
    is_new: bool


def here() -> list[str]:
    """The names of this machine that a device of the same machine or network may use."""
    return sorted({"localhost", "127.0.0.1", "::1", socket.gethostname()})


def make_folder(folder: Path, hosts: Sequence[str], clients: Sequence[str], days: int) -> list[Told]:
    """Make what is missing of an authority, a server for `hosts` and `clients`, to hold for so many days.

    Raises UsageError for names that no file can have, FileError where the folder cannot be written or holds an
    authority that is damaged or out of date.
    """
    for name in clients:
        if not NAME.fullmatch(name) or name in ("ca", "server") or name.endswith("-key"):  # NAME-key.pem is a key
            raise UsageError(
                f"client {name!r}: expected letters, digits, dots and dashes; not ca, not server, no -key at its end"
            )
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        authority_told = _ensure(folder, "ca", "the authority", lambda: make_authority(AUTHORITY_TIMES * days))
        authority = read_authority(folder)
        return [
            authority_told,
            _ensure(folder, "server", "the server", lambda: make_server(authority, hosts, days)),
            *(_ensure(folder, n, f"the device {n}", partial(make_client, authority, n, days)) for n in clients),
        ]
    except OSError as error:
        raise FileError(f"{folder}: {error.strerror or error}; expected a folder that can be written") from None


def read_authority(folder: Path) -> Pair:
    """Raises FileError for one that cannot sign any more."""
    try:
        certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        key = load_pem_private_key((folder / "ca-key.pem").read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:  # TypeError: the key wants a password
        raise FileError(
            f"{folder}: no authority in ca.pem and ca-key.pem ({error}); remove both for a new one"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise FileError(f"{folder}: ca-key.pem is not the key of ca.pem; remove both for a new authority")
    if certificate.not_valid_after_utc <= datetime.now(UTC):
        until = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
        raise FileError(f"{folder}: the authority is out of date since {until}; an empty folder gets a new one")
    return Pair(certificate, key)


# ---------------------------------------------------------------- one certificate


def make_authority(days: int) -> Pair:
    """It signs itself, and certificates that sign nothing."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("nearfar local authority")
    builder = (
        _builder(name, key, days)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
    )
    return Pair(builder.sign(key, SHA256()), key)


def make_server(authority: Pair, hosts: Sequence[str], days: int) -> Pair:
    """For whoever reaches it under one of the names or addresses.  Raises UsageError for none, or for a wrong one."""
    if not hosts:
        raise UsageError("a server's certificate needs the names or addresses under which devices reach it")
    return _signed(authority, hosts[0], days, ExtendedKeyUsageOID.SERVER_AUTH, [_general_name(h) for h in hosts])


def make_client(authority: Pair, name: str, days: int) -> Pair:
    """For a device of that name."""
    return _signed(authority, name, days, ExtendedKeyUsageOID.CLIENT_AUTH, [])


def pem(pair: Pair) -> tuple[bytes, bytes]:
    """(certificate, key), the key without a password."""
    key = pair.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pair.certificate.public_bytes(Encoding.PEM), key


def _signed(authority: Pair, name: str, days: int, purpose: ObjectIdentifier, names: list[x509.GeneralName]) -> Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    parent = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    builder = (
        _builder(_name(name), key, days)
        .issuer_name(authority.certificate.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(parent), critical=False)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return Pair(builder.sign(authority.key, SHA256()), key)


def _builder(name: x509.Name, key: Key, days: int) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SLACK)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(host.encode("idna").decode("ascii"))
    except UnicodeError:
        raise UsageError(f"host {host[:80]!r}: expected a name or an address") from None


# ---------------------------------------------------------------- files


def _ensure(folder: Path, name: str, what: str, make: Callable[[], Pair]) -> Told:
    """The pair of that name: as it is there, or made."""
    path = folder / f"{name}.pem"
    is_new = not path.exists()
    if is_new:
        _write(folder, name, make())
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except ValueError:
        raise FileError(f"{path}: no certificate; remove it and {name}-key.pem for new ones") from None
    return Told(path, what, certificate.not_valid_after_utc, is_new)


def _write(folder: Path, name: str, pair: Pair) -> None:
    """The key first: a certificate that is there has its key."""
    certificate, key = pem(pair)
    for path, content in ((folder / f"{name}-key.pem", key), (folder / f"{name}.pem", certificate)):
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        with open(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
            file.write(content)
        unfinished.replace(path)
