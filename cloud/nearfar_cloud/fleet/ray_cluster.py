"""Workers as actors of Ray, on this machine or on those of a cluster: Ray finds a place for each and starts it there.

Nothing that is computed goes through Ray: a worker connects to the front and speaks its frames, as a process does over
its socket pair.  The link tells when a worker is lost; Ray then finds the next one a place.  Ray pickles between its
own processes, and our frames travel in the clear: a cluster is one trust domain, for a private network.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import Event
from typing import Any

from nearfar.errors import MissingExtraError, NearfarError
from nearfar_cloud.executors.transport import Link
from nearfar_cloud.fleet import worker
from nearfar_cloud.fleet.messages import ToFront, ToWorker

PLACE_S = 120.0  # for Ray to start an actor, and for that to connect
GREET_S = 5.0  # for whoever connects to say who it is
TOKEN = 32  # bytes, the first on a link: the worker that was started, and nobody else
STORE_BYTES = 80 << 20  # the least that Ray sets aside for objects, of which there are none


class RayCluster:
    """A connection to Ray; one in a process.  `local`: a Ray of our own, on loopback, that ends with this one."""

    def __init__(self, address: str = "local", *, n_cpus: int = 1) -> None:
        """`n_cpus`: that a local Ray may give away.  Raises MissingExtraError, NearfarError."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if address == "local":  # on Linux Ray would listen on all addresses; this way it does as on other systems
            os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        try:
            import ray
        except ImportError as error:
            raise MissingExtraError("ray", "cluster", "workers as actors of Ray") from error
        self._ray = ray
        options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "ERROR"}
        if address == "local":
            options |= {"num_cpus": n_cpus, "object_store_memory": STORE_BYTES, "include_dashboard": False}
        try:
            ray.init(**options)
        except (OSError, RuntimeError, ValueError) as error:
            raise NearfarError(f"Ray at {address}: {error}") from error
        self.host = str(ray.util.get_node_ip_address())
        if address == "local" and not self.host.startswith("127."):
            ray.shutdown()
            raise NearfarError(f"Ray listens on {self.host}, for it was imported before: start it here first")

    def start(self, entry: str, settings: Mapping[str, Any], n_cpus: int, closing: Event) -> RayWorker:
        """`entry` and `settings`: as in `worker.run`.

        Raises NearfarError when it has no place within PLACE_S, or none yet when `closing` is set.
        """
        with socket.create_server((self.host, 0)) as listener:
            token = secrets.token_bytes(TOKEN)
            actor = self._ray.remote(_Worker).options(num_cpus=n_cpus, scheduling_strategy="SPREAD").remote()
            ended = actor.run.remote(listener.getsockname()[:2], token, entry, dict(settings))

            def check() -> None:
                if closing.is_set():
                    raise NearfarError("no place is looked for any longer: the fleet closes")
                if self._ray.wait([ended], timeout=0)[0]:
                    self._ray.get(ended)  # raises what it died of

            try:
                return RayWorker(self._ray, actor, ended, accept(listener, token, check))
            except BaseException:
                self._ray.kill(actor)
                raise

    def close(self) -> None:
        self._ray.shutdown()


def accept(listener: socket.socket, token: bytes, check: Callable[[], None], seconds: float = PLACE_S) -> socket.socket:
    """The first connection that begins with the token; `check` raises when none will come.  Raises NearfarError."""
    until = time.monotonic() + seconds
    listener.settimeout(0.5)
    while time.monotonic() < until:
        check()
        try:
            sock, _ = listener.accept()
        except TimeoutError:
            continue
        if hmac.compare_digest(_greeting(sock), token):
            return sock
        sock.close()
    raise NearfarError(f"Ray found no place for a worker within {seconds:g} s: are so many CPUs free?")


def _greeting(sock: socket.socket) -> bytes:
    """The first bytes that come within GREET_S, as many as a token has; fewer from who does not greet."""
    came, until = b"", time.monotonic() + GREET_S
    with suppress(OSError):
        while len(came) < TOKEN and (left := until - time.monotonic()) > 0:
            sock.settimeout(left)
            if not (more := sock.recv(TOKEN - len(came))):
                break
            came += more
    return came


class RayWorker:
    """Owns an actor and the front's end of its link."""

    def __init__(self, ray: Any, actor: Any, ended: Any, sock: socket.socket) -> None:
        self._ray, self._actor, self._ended = ray, actor, ended
        self.link: Link[ToFront] = Link(sock, ToFront)

    def kill(self) -> None:
        """At once; nothing happens to an actor that has ended."""
        self._ray.kill(self._actor)

    def close(self) -> None:
        """End the link and wait for the worker, which ends with it; then its process goes, too."""
        self.link.close()
        self._ray.wait([self._ended], timeout=worker.END_S)
        self._ray.kill(self._actor)


class _Worker:
    """The actor."""

    def run(self, address: tuple[str, int], token: bytes, entry: str, settings: Mapping[str, Any]) -> None:
        """As long as its link lasts."""
        sock = socket.create_connection(address, timeout=GREET_S)
        sock.sendall(token)
        link: Link[ToWorker] = Link(sock, ToWorker)
        worker.run(link, entry, settings)
