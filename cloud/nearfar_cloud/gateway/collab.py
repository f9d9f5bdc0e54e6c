"""The door for devices: gRPC beside the HTTP of the gateway, in the same event loop.

    Hello   ─> who asks? ─> pairing.py      Session ─> who asks? ─> greetings.py ─> contexts.py ─> engine
    Health  ─> how full this server is                sweep, every second

Who asks is known from the name in a client certificate, or from a key as with HTTP.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress

import grpc

from nearfar.errors import UsageError
from nearfar.wire import messages as wire
from nearfar.wire import rpc
from nearfar.wire.messages import ClientHello, Code, Err, Load, Open, ServerHello
from nearfar.wire.rpc import Caller, Refused, Stream
from nearfar_cloud.engine import Engine
from nearfar_cloud.executors.local import LocalExecutor
from nearfar_cloud.gateway.contexts import RETRY_MS, Connection, Contexts, refused
from nearfar_cloud.gateway.endpoint import Budget, Endpoint
from nearfar_cloud.gateway.greetings import Greetings
from nearfar_cloud.gateway.limits import Key, Keys, Limits
from nearfar_cloud.gateway.metrics import Metrics
from nearfar_cloud.gateway.pairing import Pairing
from nearfar_cloud.gateway.refusal import Refusal
from nearfar_cloud.gateway.served import Served
from nearfar_cloud.gateway.service import Service

SWEEP_S = 1.0


class Collab:
    """What answers devices; `rpc.Door`.  `free_bytes`: of keys and values; `is_ready`: whether the engine runs."""

    def __init__(
        self,
        contexts: Contexts,
        pairing: Pairing,
        keys: Keys,
        endpoint: Endpoint,
        free_bytes: Callable[[], int],
        is_ready: Callable[[], bool],
    ) -> None:
        self.contexts, self.pairing, self.keys, self.endpoint = contexts, pairing, keys, endpoint
        self.free_bytes, self.is_ready = free_bytes, is_ready
        self.greetings = Greetings()
        self.port = 0
        self._server: grpc.aio.Server | None = None
        self._sweeper: asyncio.Task[None] | None = None

    # ------------------------------------------------------------ calls of devices

    async def hello(self, hello: ClientHello, caller: Caller) -> ServerHello:
        key = self._who(caller)
        return await self.greetings.answer(key.tenant, caller.peer, self.pairing.judge(hello))

    async def open(self, opening: Open, caller: Caller, stream: Stream) -> Connection:
        key = self._who(caller)
        if not self.is_ready():
            raise Refused(Err(Code.OVERLOADED, "the engine of this server has stopped", True, RETRY_MS))
        await self.greetings.check(key.tenant, caller.peer, opening)
        return self.contexts.open(key, opening, stream)

    def load(self, caller: Caller) -> Load:
        self._who(caller)
        return Load(1000 * self.contexts.queue_s, self.free_bytes(), self.contexts.is_draining)

    def _who(self, caller: Caller) -> Key:
        """Raises Refused."""
        try:
            if caller.names:
                return self.keys.of(caller.names[0])
            return self.keys.find(caller.authorization)
        except Refusal as refusal:
            raise refused(refusal) from None

    # ------------------------------------------------------------ coming and going

    @property
    def url(self) -> str:
        return self.endpoint.url(self.port)

    async def start(self) -> None:
        """Take connections.  Raises UsageError where the port cannot be had."""
        server, address = rpc.serve(self), self.endpoint.authority
        tls = _credentials(self.endpoint)
        try:
            self.port = server.add_insecure_port(address) if tls is None else server.add_secure_port(address, tls)
        except RuntimeError:
            raise UsageError(f"{address} cannot be had; --collab-host and --collab-port choose another") from None
        await server.start()
        self._server = server
        self.pairing.prepare()
        self._sweeper = asyncio.create_task(self._sweep())

    async def drain(self, until: Callable[[], bool]) -> None:
        """Take no new answers, and wait for those that are under way as long as `until` allows."""
        self.contexts.is_draining = True
        while self.contexts.n_connected and not until():
            await asyncio.sleep(0.02)

    async def stop(self) -> None:
        """Tell those who are still there, then close."""
        self.contexts.close()
        if self._sweeper is not None:
            self._sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._sweeper
        if self._server is not None:
            await self._server.stop(1.0)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self.contexts.sweep()


def open_collab(
    served: Served, service: Service, keys: Keys, limits: Limits, metrics: Metrics, endpoint: Endpoint, budget: Budget
) -> Collab:
    """Devices in front of a served model.  Raises UsageError where it cannot serve them."""
    engine, weights = served.engine, served.weights
    if not isinstance(engine, Engine):
        raise UsageError("devices ask one engine: --collab-port and --workers do not go together")
    if weights is None:
        raise UsageError(f"{served.name} is a folder: devices ask for the layers of a GGUF file")
    executor = engine.executor

    def free_bytes() -> int:
        return executor.bytes_of(engine.pool.room) if isinstance(executor, LocalExecutor) else 0

    contexts = Contexts(service, engine.facts, limits, budget, on_wait=metrics.ask_wait.observe)
    metrics.add_devices(contexts)
    told = wire.Limits(
        max_context=contexts.max_positions,
        max_sessions=budget.max_sessions,
        idle_ttl_s=math.ceil(budget.idle_s),
        max_run=budget.max_run,
        credit_bytes=budget.credit_bytes,
    )
    return Collab(
        contexts,
        Pairing(weights, told, contexts.epoch, endpoint.region),
        keys,
        endpoint,
        free_bytes=free_bytes,
        is_ready=lambda: service.failure is None,
    )


def _credentials(endpoint: Endpoint) -> grpc.ServerCredentials | None:
    """None: without TLS."""
    if endpoint.certificate is None or endpoint.private_key is None:
        return None
    pair = (endpoint.private_key.read_bytes(), endpoint.certificate.read_bytes())
    ca = None if endpoint.client_ca is None else endpoint.client_ca.read_bytes()
    return grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)
