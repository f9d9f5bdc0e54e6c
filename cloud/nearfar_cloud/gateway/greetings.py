"""What the hello of a connection came to: an answer is opened there with what fitted, and with nothing else.

    Hello ─> judged, kept by connection          Open ─> | was this offered, and does it fit? | ─> contexts.py

A device that comes back sends both at once, so an `Open` waits for a hello that is still being judged.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable

from nearfar.wire.messages import Code, Err, Open, ServerHello
from nearfar.wire.rpc import Refused
from nearfar_cloud.gateway.pairing import Judgement

MOST = 1024  # connections of one subject that are remembered


class Greetings:
    """Owns what was judged.  On the event loop."""

    def __init__(self) -> None:
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
        return (await asyncio.shield(judged)).answer

    async def check(self, subject: str, peer: str, opening: Open) -> None:
        """Whether `peer`, if it has said a hello, may open this.  Raises Refused."""
        connections = self._of.get(subject)
        if connections is None or peer not in connections:
            return
        judgement = await asyncio.shield(connections[peer])
        if (opening.row_layer, opening.codec) not in judgement.fits:
            offered = f"{opening.codec.id.name} at layer {opening.row_layer} is not what the hello offered"
            raise Refused(Err(Code.MISMATCH, judgement.answer.why or offered))
