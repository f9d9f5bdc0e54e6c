"""An answer that two machines make, in the making: the sequence of collab.py with its ledger, link and journal."""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from nearfar.alarm import Alarm
from nearfar.cancel import Cancel
from nearfar.engine import Token
from nearfar.errors import NearfarError
from nearfar.journal import Journal
from nearfar.ledger import Draft, Ledger, Send
from nearfar.sequence import Notice, Sequence, SharedStats
from nearfar.upper import FRAME, Link, Lost, Traffic
from nearfar.wire.hashes import settings_hash
from nearfar.wire.messages import Ask, Close, Err, Need, Open, Opened, Verdict

MIN_RUN = 8
LATE_S = 1.0  # at most so long the end of an answer waits for audits


@dataclass(slots=True)
class Shares:
    """Where the time of an answer went, in seconds."""

    device_s: float = 0.0
    waited_s: float = 0.0
    upper_s: float = 0.0  # as the other side counts it; it may pass while the device drafts
    opened: int = 0  # connections of this answer


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer that is over, of which the other side may still have something."""

    session: bytes
    settings: bytes
    until: float


@dataclass(frozen=True, slots=True)
class ByIds:
    """A second way to the upper side, by ids, of which nobody knows yet whether it opens."""

    link: Link
    opening: Open


@dataclass(slots=True)
class Shared(Sequence):
    """A sequence whose tokens are decided by two machines."""

    ledger: Ledger = field(default_factory=lambda: Ledger([0]))
    link: Link | None = None
    traffic: Traffic = field(default_factory=Traffic)
    by_ids: ByIds | None = None  # what may take the place of link and opening
    has_tried_ids: bool = False
    before: Traffic = field(default_factory=Traffic)  # of the link that was there first
    journal_path: Path | None = None  # where this answer is kept until it is over; a file that is there is taken up
    journal: Journal | None = None
    ready: deque[Token] = field(default_factory=deque)  # final and not told yet
    shares: Shares = field(default_factory=Shares)
    candidate: tuple[int, Draft] | None = None  # lossy: what the device would say, while the upper side is asked
    hope: float = 1.0  # lossless: how likely all unsure drafts behind the last ask hold, as the heads see it
    ended: bool = False  # the newest draft ends the text: there is nothing to draft behind it
    lost_at: float | None = 0.0  # since when there is no link; None: there is one
    is_gone: bool = False  # it was lost, or could not be had: not only on its way
    reason: str = ""  # what the other side, or the network, said last
    opening: Open | None = None
    keep_s: int = 0
    kept: Kept | None = None
    asked_at: dict[int, float] = field(default_factory=dict)
    run: int = MIN_RUN  # tokens that the other side makes by itself, when drafts do not pay
    run_req: int = 0  # the ask for it
    tried: bool = True  # drafts have been tried since the last run
    reminded: float = 0.0  # when the user and the upper side last heard of a wait
    told_at: float = 0.0
    pressed_until: float = 0.0  # the upper side has said that it has too much to do
    loosened: int = 0  # tokens that the device decided for that reason
    delta_loose: float | None = None  # what is promised for an answer with such
    alarm: Alarm | None = None  # of the LLM; None: nothing was promised
    audit_bytes: int = 0
    cancel: Cancel | None = None  # of the step under way

    def keep_in(self, journal: Path) -> None:
        self.journal_path = journal

    def shared_stats(self) -> SharedStats:
        c, t, x = self.ledger.counts, self.traffic, self.shares
        link_s = max(0.0, x.waited_s - x.upper_s)
        times = 1000 * x.device_s, 1000 * x.upper_s, 1000 * link_s
        reopened = max(0, x.opened - 1)
        return SharedStats(
            c.asks,
            c.rows_asked,
            self.before.up + t.up,
            self.before.down + t.down,
            *times,
            c.drafted,
            c.accepted,
            c.retracted,
            reopened,
            c.replayed,
            c.near_ties,
            c.sure,
            c.sure_wrong,
            c.audits,
            self.audit_bytes,
            self.loosened,
            0.0 if self.alarm is None else self.alarm.disagreement,
            self.alarm is not None and self.alarm.is_raised,
        )

    def count_audit(self, message: Ask | Verdict) -> None:
        """What it takes on the network, as far as `Traffic` counts at all."""
        if not self.traffic.up:
            return
        from nearfar.wire import pack  # protobuf belongs to links beyond this process

        data = pack.pack_up(message.req, message) if isinstance(message, Ask) else pack.pack_down(message.req, message)
        self.audit_bytes += len(data) + FRAME

    def finish(self, done: bool = True, *, in_haste: bool = False) -> None:
        """The answer is over; a later text begins another session, unless this one is kept.

        The journal stays where something failed.
        """
        self.drop_ids()
        if self.link is not None:
            if done and self.ledger.audits and not in_haste:
                self._hear_audits(self.link)
            has_changed_over = self.has_tried_ids and self.ledger.by_ids  # and the next turn begins by rows
            keep_s = self.keep_s if done and self.lost_at is None and not has_changed_over else 0
            self.link.send(Close(keep_s=keep_s))
            self.link.close()
            self.link = None
            if keep_s and self.opening is not None:
                until = time.monotonic() + keep_s
                self.kept = Kept(self.opening.session, settings_hash(self.opening), until)
            c = self.ledger.counts
            delta = self.delta_loose if self.loosened else None
            if self.alarm is not None and self.use_exits and self.alarm.saw(c.checked, c.sure, c.sure_wrong, delta):
                self.tell(Notice("alarm"))
        if self.journal is not None:
            self.journal.close(keep=not done)
            self.journal = None
        self.journal_path = None

    def drop_ids(self) -> None:
        """The second way is not taken, or the answer is over."""
        if self.by_ids is not None:
            self.by_ids.link.send(Close())
            self.by_ids.link.close()
            self.by_ids = None

    def _hear_audits(self, link: Link) -> None:
        """Of the last tokens some may still be asked about: without them short answers would never be audited.

        No longer than for a reply that is in time; what has not come by then is not counted.
        """
        until = time.monotonic() + min(link.deadline_s(), LATE_S)
        with suppress(NearfarError):  # the answer is complete, whatever happens to the link now
            while self.ledger.audits and self.lost_at is None and (left_s := until - time.monotonic()) > 0:
                for news in link.receive(left_s):
                    if isinstance(news, Verdict) and news.req in self.ledger.audits:
                        self.count_audit(news)
                        for effect in self.ledger.on_verdict(news):
                            if isinstance(effect, Send):
                                link.send(effect.message)
                    elif isinstance(news, Lost | Err | Need | Opened):
                        return
