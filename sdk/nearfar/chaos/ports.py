"""Ports for servers that go and come back: nobody else may have got them meanwhile."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from random import SystemRandom

from nearfar.errors import NearfarError

# Below the ports that a system gives to whoever asks for any (Linux: from 32768 on, others: from 49152 on): a server
# that is started again finds its own still free.
LOW, HIGH = 20_000, 32_000
TRIES = 200  # ports that others may have


def free_ports(n: int) -> list[int]:
    """`n` ports of this machine that are free now.  Raises NearfarError."""
    ports, why = list[int](), ""
    with ExitStack() as stack:
        for port in SystemRandom().sample(range(LOW, HIGH), n + TRIES):
            try:
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError as error:  # somebody has it
                why = str(error)
                continue
            ports.append(port)
            if len(ports) == n:
                return ports
    raise NearfarError(f"{len(ports)} of {n + TRIES} ports of {LOW}..{HIGH} can be had, expected {n}: {why}")
