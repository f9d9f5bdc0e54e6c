"""Server-sent events, and watching whether anybody is still there to read them."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
SEND_S = 20.0  # a reader that takes nothing for so long has gone


class Gone(Exception):
    """The client has left."""


def as_json(value: Any) -> bytes:
    """UTF-8; a lone surrogate, which a body may hold as an escape, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


async def unless_gone(request: HTTPRequest, work: Awaitable[T]) -> T:
    """What `work` gives.  Raises Gone, and cancels it, when the client leaves before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        await _cancel(task, gone)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(Response):
    """Sends pieces as they come; ends with them, with `cut`, when the client leaves or reads nothing for `SEND_S`.

    `close` is called whichever end it was.
    """

    media_type = "text/event-stream"

    def __init__(self, pieces: AsyncIterator[bytes], close: Callable[[], None], cut: asyncio.Event) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._pieces, self._close, self._cut = pieces, close, cut

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pump, gone = asyncio.ensure_future(self._pump(send)), asyncio.ensure_future(_left(receive))
        cut = asyncio.ensure_future(self._cut.wait())
        try:
            await asyncio.wait({pump, gone, cut}, return_when=asyncio.FIRST_COMPLETED)
            if pump.done():
                with contextlib.suppress(TimeoutError, OSError):  # a reader that does not read, or is gone
                    pump.result()
        finally:
            await _cancel(pump, gone, cut)
            self._close()

    async def _pump(self, send: Send) -> None:
        await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for piece in self._pieces:
            await self._send(send, {"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(
                0
            )  # many pieces may be there at once: others have their turn, a client that left is seen
        await self._send(send, {"type": "http.response.body", "body": b""})

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        async with asyncio.timeout(SEND_S):
            await send(message)
