"""What waits to leave on one stream, in order, and how many bytes of rows may be under way.  Pure: the time is given.

    push ─> | waiting ... | ─> pop ─> | under way: sent, not acknowledged | ─> acked

Rows and ids need credit, everything else does not.  Nothing overtakes: an ask behind rows would arrive before them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from nearfar.wire.messages import Ask, Close, Credit, Cut, Ids, Ping, Rows, Up


@dataclass(slots=True)
class Outbox:
    """`credit`: bytes of rows that may be under way; a message larger than that goes alone."""

    credit: int
    waiting: deque[Up] = field(default_factory=deque)
    n_sent: int = 0  # messages, which is also the number of the last one
    under_way: int = 0  # bytes
    since: float | None = None  # rows have waited for credit, with no moment in between in which none did
    _unacked: deque[tuple[int, int]] = field(default_factory=deque)  # number, bytes
    _paused_until: float = 0.0

    def push(self, message: Up) -> None:
        """A cut takes back what has not left yet; behind the end of the answer nothing matters; a ping needs no row."""
        if isinstance(message, Ping):
            self.waiting.appendleft(message)
            return
        if isinstance(message, Cut):
            self.waiting = deque(m for m in self.waiting if not _is_void(m, message.keep))
        elif isinstance(message, Close):
            self.waiting.clear()
        self.waiting.append(message)

    def pop(self, now: float) -> Up | None:
        """The next message that may leave; None: not now."""
        is_paused = now < self._paused_until
        if is_paused or not self.waiting:
            self.since = None
        if not self.waiting:
            return None
        n = row_bytes(self.waiting[0])
        if n and is_paused:
            return None
        if n and self.under_way and self.under_way + n > self.credit:
            self.since = now if self.since is None else self.since
            return None
        self.n_sent += 1
        if n:
            self.under_way += n
            self._unacked.append((self.n_sent, n))
        return self.waiting.popleft()

    def acked(self, seq: int) -> None:
        """The other side has taken in messages up to the number `seq`."""
        while self._unacked and self._unacked[0][0] <= seq:
            self.under_way -= self._unacked.popleft()[1]

    def on_credit(self, credit: Credit, now: float) -> None:
        """More or less of it; none at all is a pause."""
        if credit.n_bytes:
            self.credit, self._paused_until = credit.n_bytes, 0.0
        else:
            self._paused_until = now + credit.retry_after_ms / 1000

    def pause_s(self, now: float) -> float | None:
        """How long a pause still lasts; None: there is none, or nothing waits for its end."""
        left = self._paused_until - now
        return left if left > 0 and self.waiting else None


def row_bytes(message: Up) -> int:
    """What a message takes of the credit: its rows, or four bytes an id."""
    if isinstance(message, Rows):
        return message.n_bytes
    return 4 * len(message.ids) if isinstance(message, Ids) else 0


def _is_void(message: Up, keep: int) -> bool:
    """Whether a cut to `keep` rows leaves nothing of it; asks belong to the generation that ends."""
    return isinstance(message, Ask) or (isinstance(message, Rows | Ids) and message.pos0 >= keep)
