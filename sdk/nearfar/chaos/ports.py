"""Ports for servers that go and come back: nobody else may have got them meanwhile."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from random import SystemRandom

# Below the ports that a system gives to whoever asks for any (Linux: from 32768 on, others: from 49152 on): a server
# that is started again finds its own still free.
LOW, HIGH = 20_000, 32_000


def free_ports(n: int) -> list[int]:
    """`n` ports of this machine that are free now."""
    draws, ports = SystemRandom(), list[int]()
    with ExitStack() as stack:
        while len(ports) < n:
            port = draws.randrange(LOW, HIGH)
            try:
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:  # somebody has it
                continue
            ports.append(port)
    return ports
