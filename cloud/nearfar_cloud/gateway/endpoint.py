"""Where devices may ask, and what they get: what `nearfar cloud serve` says about them.  Imports no gRPC."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`client_ca`: whose certificates of devices are believed; then every device needs one.

    `region`: where this server is, for devices that mind.
    """

    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    certificate: Path | None = None
    private_key: Path | None = None
    client_ca: Path | None = None
    region: str = ""

    @property
    def authority(self) -> str:
        """host:port, as it is bound."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def url(self, port: int) -> str:
        """As a device would write it."""
        scheme = "grpc" if self.certificate is None else "grpcs"
        return f"{scheme}://{self.authority.rpartition(':')[0]}:{port}"


@dataclass(frozen=True, slots=True)
class Budget:
    """What a server gives devices, all together."""

    max_sessions: int = 256
    max_bytes: int = 1 << 30  # packed rows, or 4 bytes an id
    idle_s: float = 60.0  # a device that is away, or silent, is waited for so long
    most_keep_s: int = 600  # between two turns of a chat, where the device asks for it
    max_run: int = 256  # tokens of one ask
    credit_bytes: int = 512 << 10  # under way to one session
    eager_absorb: bool = False  # rows run before anybody asks, where steps have room
