"""Where an upper side is: grpcs://host:port with TLS, grpc://host:port without."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from nearfar.errors import UsageError

DEFAULT_PORT = 9090


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int
    is_secure: bool

    @classmethod
    def parse(cls, url: str) -> Address:
        """Raises UsageError; nothing is looked up."""
        try:
            parts = urlsplit(url)
            port, host = parts.port, parts.hostname
        except ValueError as error:
            raise UsageError(f"upper side {url!r}: {error}; expected grpcs://host:port") from None
        extra = parts.path.strip("/") or parts.query or parts.fragment or parts.username or parts.password
        if parts.scheme not in ("grpc", "grpcs") or not host or extra or port == 0:
            raise UsageError(f"upper side {url!r}: expected grpcs://host:port, or grpc:// on this machine")
        return cls(host, DEFAULT_PORT if port is None else port, parts.scheme == "grpcs")

    @property
    def is_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def authority(self) -> str:
        """host:port, as it is dialled."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{'grpcs' if self.is_secure else 'grpc'}://{self.authority}"
