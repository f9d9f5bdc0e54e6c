"""How a device shows who it is, and knows whom it speaks to: certificates in PEM files, or a key as a bearer token."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nearfar.errors import FileError, UsageError


@dataclass(frozen=True, slots=True)
class Credentials:
    """`ca`: whose certificates are believed, PEM; None: the public ones.

    `token`: sent as `Authorization: Bearer`.  `certificate`, `key`: a client certificate with its chain, PEM.
    """

    ca: bytes | None = None
    token: str = field(default="", repr=False)
    certificate: bytes | None = None
    key: bytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise UsageError("a client certificate and its key belong together: expected both or none")
        if not self.token.isascii() or not self.token.isprintable() or " " in self.token:
            raise UsageError("a bearer token: expected visible ASCII characters")

    @classmethod
    def read(
        cls,
        ca: str | Path | None = None,
        token: str = "",
        certificate: str | Path | None = None,
        key: str | Path | None = None,
    ) -> Credentials:
        """From files.  Raises FileError for what cannot be used: gRPC itself would only say that it cannot connect."""
        if (certificate is None) != (key is None):
            raise UsageError("a client certificate and its key belong together: expected both or none")
        if ca is not None:
            _check(ca, lambda context: context.load_verify_locations(ca), "certificates in PEM")
        if certificate is not None:
            _check(certificate, lambda context: context.load_cert_chain(certificate, key), "a certificate and its key")
        pem = [None if path is None else Path(path).read_bytes() for path in (ca, certificate, key)]
        return cls(pem[0], token, pem[1], pem[2])


def _check(path: str | Path, load: Callable[[ssl.SSLContext], object], expected: str) -> None:
    try:
        load(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    except ssl.SSLError as error:
        raise FileError(f"{path}: {error.reason or error}; expected {expected}") from None
    except OSError as error:
        raise FileError(f"{error.filename or path}: {error.strerror or error}; expected {expected}") from None
