"""What the hello of a connection came to: an answer is opened there with what fitted, and with nothing else.

    Hello ─> judged, kept by connection          Open ─> | was this offered, and does it fit? | ─> contexts.py

A device that comes back sends both at once, so an `Open` waits for a hello that is on its way or is being judged.  One
without a hello happens, too: gRPC makes a connection that was lost between two answers anew by itself.  Then the server
may have been started again with other weights meanwhile, so the device is told to dial, which begins with a hello.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Container

from nearfar.wire.messages import Code, Err, Open, ServerHello
from nearfar.wire.rpc import Refused
from nearfar_cloud.gateway.pairing import Judgement

WITHIN_S = 2.0  # a hello comes, counted from its Open: both leave a device at the same time, on the same connection
MOST = 1024  # connections of one subject that are remembered
RETRY_MS = 50


class Greetings:
    """Owns what was judged.  On the event loop.

    `within_s`: how long an `Open` waits for the hello of its connection.
    """

    def __init__(self, within_s: float = WITHIN_S) -> None:
        self.within_s, self._news = within_s, asyncio.Condition()
        # The last hello, by subject, then by connection; who has said one last stands last.
        self._of: dict[str, OrderedDict[str, asyncio.Future[Judgement]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    async def answer(self, subject: str, peer: str, judging: Awaitable[Judgement]) -> ServerHello:
        """A hello of `peer`; it is judged to its end, though the device may be gone by then."""
        judged, connections = asyncio.ensure_future(judging), self._of.setdefault(subject, OrderedDict())
        connections[peer] = judged
        connections.move_to_end(peer)
        if len(connections) > MOST:
            connections.popitem(last=False)
        async with self._news:
            self._news.notify_all()
        return (await asyncio.shield(judged)).answer

    async def check(self, subject: str, peer: str, opening: Open) -> None:
        """Whether `peer` may open this.  Raises Refused."""
        connections = self._of.setdefault(subject, OrderedDict())
        await self._wait(connections, peer)
        judgement = await asyncio.shield(connections[peer])
        if (opening.row_layer, opening.codec) not in judgement.fits:
            offered = f"{opening.codec.id.name} at layer {opening.row_layer} is not what the hello offered"
            raise Refused(Err(Code.MISMATCH, judgement.why or offered))

    async def _wait(self, connections: Container[str], peer: str) -> None:
        """Until its hello has come.  Raises Refused."""
        try:
            async with asyncio.timeout(self.within_s), self._news:
                await self._news.wait_for(lambda: peer in connections)
        except TimeoutError:
            text = "no hello has come on this connection: expected one before an answer is opened"
            raise Refused(Err(Code.MISMATCH, text, True, RETRY_MS), hangs_up=True) from None
