"""Memory runs short at the upper side: other answers need it, and one that was quiet for a moment makes room.

Nothing is patched: sessions with rows of nothing are opened until the server has evicted somebody.
"""

from __future__ import annotations

import secrets
import time
from zlib import crc32

from nearfar.chaos.upper_process import UpperProcess
from nearfar.errors import NearfarError
from nearfar.ledger import MAX_MESSAGE
from nearfar.remote_link import RemoteLink
from nearfar.upper_remote import RemoteUpper
from nearfar.wire.codec import Codec
from nearfar.wire.messages import ClientHello, Close, CodecId, CodecSpec, Ids, Mode, Open, Opened, Rows, Up
from nearfar.wire.tls import Credentials

QUIET_S = 1.2  # a server takes nothing from those who were there within the last second
WAIT_S = 2.0  # less than a device waits for a sign of life


class Pressure:
    """Sessions that take room.  `hello`: as a device says it; `n`: positions of each."""

    def __init__(
        self, upper: UpperProcess, hello: ClientHello, codec: CodecSpec, row_layer: int, d: int, n: int
    ) -> None:
        self.upper, self.hello, self.codec, self.row_layer, self.n = upper, hello, codec, row_layer, n
        self.row = b"" if codec.id == CodecId.IDS else bytes(Codec.of(codec, d).row_bytes)
        self.n_part = max(1, MAX_MESSAGE // max(4, len(self.row)))  # positions of a message

    def evict(self, n_sessions: int) -> bool:
        """Open so many sessions, until somebody has had to make room; whether somebody had."""
        remote = RemoteUpper(self.upper.url, hello=self.hello, credentials=Credentials(token=self.upper.token))
        links: list[RemoteLink] = []
        try:
            before = self._evicted()
            links += [self._filled(remote) for _ in range(n_sessions)]
            until = time.monotonic() + WAIT_S
            while (n := self._evicted()) <= before and time.monotonic() < until:
                time.sleep(0.02)
            return n > before
        except NearfarError:  # the server is being killed or stopped: then it forgets more than was wanted
            return False
        finally:
            for link in links:
                link.send(Close())
                link.close()
            remote.close()

    def _evicted(self) -> float:
        try:
            return self.upper.gauges()["device_events_total.evicted"]
        except OSError as error:
            raise NearfarError(f"the server does not answer: {error}") from None

    def _filled(self, remote: RemoteUpper) -> RemoteLink:
        """A session with as many positions as there may be."""
        opening = Open(secrets.token_bytes(16), 0, Mode.LOSSLESS, self.codec, self.row_layer)
        link, until = remote.open(opening), time.monotonic() + WAIT_S
        while not any(isinstance(news, Opened) for news in link.receive(0.05)):
            if time.monotonic() > until:
                raise NearfarError("the server does not open a session")
        for at in range(0, self.n, self.n_part):
            link.send(self._part(at, min(self.n_part, self.n - at)))
        return link

    def _part(self, at: int, n: int) -> Up:
        if not self.row:
            return Ids(0, at, (0,) * n)
        return Rows(0, at, (self.row,) * n, (crc32(self.row),) * n)
