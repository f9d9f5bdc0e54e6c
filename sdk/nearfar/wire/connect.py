"""Attempts to connect, begun one after the other while none has come to an end; the first that does is taken.

    dial ─────────────────────────────x      the kernel sends a lost SYN again after one second, then after two more:
          dial ──────> stands                once a link is back, somebody new finds it sooner
                 dial ─x

Browsers do so between addresses (RFC 8305); here it is one address, and a link that may be dark.
"""

from __future__ import annotations

import asyncio

from nearfar.wire.address import Address
from nearfar.wire.dial import Connection, Unreachable
from nearfar.wire.tls import Credentials


async def connect(address: Address, credentials: Credentials, within_s: float, pause_s: float) -> Connection:
    """Another attempt every `pause_s`.  One that was refused is returned too: the first call on it says why.

    Raises Unreachable after `within_s`.
    """
    loop, taken = asyncio.get_running_loop(), None
    until = loop.time() + within_s
    attempts: dict[asyncio.Task[None], Connection] = {}
    try:
        while (left_s := until - loop.time()) > 0:
            connection = Connection.dial(address, credentials)
            attempts[asyncio.create_task(connection.settled())] = connection
            first = asyncio.FIRST_COMPLETED
            done, _ = await asyncio.wait(attempts, timeout=min(pause_s, left_s), return_when=first)
            if done:
                taken = attempts[done.pop()]
                return taken
        raise Unreachable(f"{address}: no connection within {within_s:.1f} s")
    finally:
        closing = asyncio.create_task(_close_all_but(taken, attempts))
        try:
            await asyncio.shield(closing)
        except asyncio.CancelledError:  # nobody will have the one that was taken either
            await closing
            if taken is not None:
                await taken.close()
            raise


async def _close_all_but(taken: Connection | None, attempts: dict[asyncio.Task[None], Connection]) -> None:
    for task, connection in attempts.items():
        if connection is not taken:
            task.cancel()
            await connection.close()
