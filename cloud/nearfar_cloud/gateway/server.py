"""The process around the gateway: a socket, signals, the orderly end."""

from __future__ import annotations

import asyncio
import signal
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from nearfar.errors import FileError, UsageError
from nearfar_cloud.gateway.app import Gateway, create_app

KEEP_ALIVE_S = 30


class Server(uvicorn.Server):
    """uvicorn, but for signals: the first one drains the gateway while the door still answers (503), then ends.

    A second one ends what is under way at once.  `on_started` is called when connections are taken.
    """

    def __init__(
        self,
        gateway: Gateway,
        *,
        local: bool,
        grace_s: float = 30.0,
        certificate: Path | None = None,
        private_key: Path | None = None,
        on_started: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                create_app(gateway, local=local),
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=2,
                lifespan="on",
                ws="none",
                ssl_certfile=certificate,
                ssl_keyfile=private_key,
            )
        )
        self.gateway, self.grace_s, self.on_started = gateway, grace_s, on_started
        self.signal: int | None = None  # the one that ended it
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        if self.started:
            self.on_started()
        if self.signal is not None:
            self._begin_drain()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            self.gateway.is_hurried = True
            return
        self.signal = sig
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._draining = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        await self.gateway.drain(self.grace_s)
        self.should_exit = True


def bind(host: str, port: int, options: str = "--host and --port") -> socket.socket:
    """A listening socket, taken before a model is loaded.  Raises UsageError where it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(1024)
        except OSError:
            sock.close()
            raise
        return sock
    except OSError as error:
        raise UsageError(f"{host} port {port}: {error.strerror or error}; {options} choose another") from None


def is_loopback(sock: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    address = str(sock.getsockname()[0])
    return address.startswith("127.") or address == "::1"


def check_certificate(certificate: Path, private_key: Path) -> None:
    """Raises FileError for files that do not belong together."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, private_key)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise FileError(f"{certificate}, {private_key}: no certificate with its key ({error})") from None


def check_authority(path: Path) -> None:
    """Raises FileError for a file without certificates."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(path)
    except (OSError, ValueError) as error:
        raise FileError(f"{path}: no certificates in PEM ({error})") from None


def serve(server: Server, sock: socket.socket) -> int:
    """Until a signal; its exit code: 130 for Ctrl-C, 0 for an orderly end."""
    server.run(sockets=[sock])
    return 130 if server.signal == signal.SIGINT else 0
