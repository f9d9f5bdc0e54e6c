"""Two upper sides for one answer: the second one is called when the first is late, and the first verdict counts.

    driver ── HedgedLink ─┬─ link of the first         every message
                          └─ link of the second        the same, once it is called, after all that it has missed

A side that comes back is told what it lacks (`Transcript`), so the driver hears `Lost` only when neither is there.  A
verdict that comes second is compared with the first: they must agree, and whether they did is counted.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

from nearfar.cancel import Cancel
from nearfar.errors import EgressDenied, NearfarError, UsageError
from nearfar.upper import Link, Lost, News, Traffic, Upper
from nearfar.wire.messages import Ask, CodecId, Credit, Cut, Err, Mode, Need, Open, Opened, Up, Verdict
from nearfar.wire.transcript import Transcript

POLL_S = 0.005  # between looks at two links
KEPT_VERDICTS = 64

log = logging.getLogger(__name__)


@dataclass(slots=True)
class HedgeCounts:
    """Over all answers."""

    called: int = 0  # answers for which the second side was wanted
    won: int = 0  # verdicts that came from the second side first
    agreed: int = 0  # verdicts that came from both and were the same
    differed: int = 0


class HedgedUpper(Upper):
    """`Upper` out of two.  The second one may be farther or dearer: it costs nothing while the first is in time."""

    def __init__(self, first: Upper, second: Upper) -> None:
        self.first, self.second = first, second
        self.counts = HedgeCounts()
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="nearfar-hedge")

    @property
    def where(self) -> str:
        return self.first.where

    def open(self, opening: Open, cancel: Cancel | None = None) -> HedgedLink:
        """Raises what the first one raises; UsageError where the upper side is to go on by itself."""
        if opening.mode == Mode.CLOUD_ONLY:
            raise UsageError("two upper sides cannot both generate: cloud-only takes one of them")
        return HedgedLink(self, self.first.open(opening, cancel), opening)

    def call_second(self, opening: Open) -> Future[Link]:
        """Opens it in a thread of its own: the first may answer meanwhile."""
        self.counts.called += 1
        return self._opener.submit(self.second.open, opening)

    def close(self) -> None:
        self._opener.shutdown()
        self.first.close()
        self.second.close()


@dataclass(slots=True, eq=False)
class Side:
    link: Link
    is_open: bool = False
    is_out: bool = False  # for good


class HedgedLink(Link):
    """`Link` over two.  For the engine's thread."""

    def __init__(self, upper: HedgedUpper, first: Link, opening: Open) -> None:
        self.upper, self.opening = upper, opening
        self.traffic, self.max_run, self.max_context = Traffic(), 1, first.max_context
        self._first = Side(first)
        self._sides = [self._first]  # and the second one, once it is there
        self._second: Future[Link] | None = None
        self._is_second_known = False  # it is there, or cannot be had
        self._transcript = Transcript(by_ids=opening.codec.id == CodecId.IDS)
        self._asked: dict[int, float] = {}  # when each open ask was made
        self._told: OrderedDict[tuple[int, int], Verdict] = OrderedDict()  # by generation and request
        self._down_since: float | None = time.monotonic()  # the first side
        self._is_lost = True  # as far as the driver knows

    def send(self, message: Up) -> None:
        self._transcript.hear(message)
        if isinstance(message, Ask):
            self._asked.setdefault(message.req, time.monotonic())
        elif isinstance(message, Cut):
            self._asked.clear()
        for side in self._sides:
            if side.is_open:
                side.link.send(message)

    def receive(self, timeout_s: float) -> list[News]:
        """Raises EgressDenied; of the other errors of a link only those of the last one that is left."""
        until = time.monotonic() + timeout_s
        while True:
            news = self._call_second_if_late()
            for side in list(self._sides):
                wait_s = 0.0 if news or side is not self._first else self._wait_s(until)
                for heard in self._listen(side, wait_s):
                    news += self._on(side, heard)
            self.traffic.up = sum(side.link.traffic.up for side in self._sides)
            self.traffic.down = sum(side.link.traffic.down for side in self._sides)
            if news or time.monotonic() >= until:
                return news

    @property
    def model_fp(self) -> bytes:
        return self._first.link.model_fp

    def deadline_s(self) -> float:
        return self._first.link.deadline_s()

    def wants_ids(self) -> bool:
        return False  # both sides would have to agree

    def close(self) -> None:
        for side in self._sides:
            side.link.close()
        if self._second is not None and len(self._sides) == 1:
            self._second.add_done_callback(_close)

    # ------------------------------------------------------------ when to call the second side

    def _call_second_if_late(self) -> list[News]:
        """Or take it in, once; `Lost` where it cannot be had and the first one is out."""
        if self._second is None:
            if time.monotonic() >= self._late_at():
                self._second = self.upper.call_second(self.opening)
        elif not self._is_second_known and self._second.done():
            self._is_second_known = True
            try:
                self._sides.append(Side(self._second.result()))
                self.max_context = min(side.link.max_context for side in self._sides)
            except NearfarError as error:
                log.warning("no second upper side: %s", error)
                if self._first.is_out:
                    return [Lost(f"no second upper side: {error}", final=True)]
        return []

    def _late_at(self) -> float:
        """When the first side has to have answered, or to be there at all."""
        waits = [self._asked[req] for req in self._transcript.asks]
        if self._down_since is not None:
            waits.append(self._down_since)
        return min(waits, default=float("inf")) + self.deadline_s()

    def _wait_s(self, until: float) -> float:
        """How long to listen to the first side alone."""
        now = time.monotonic()
        if self._second is None:
            return max(0.0, min(until, self._late_at()) - now)
        is_alone = self._is_second_known and len(self._sides) == 1
        return max(0.0, until - now if is_alone else min(POLL_S, until - now))

    # ------------------------------------------------------------ news of one side

    def _listen(self, side: Side, wait_s: float) -> list[News]:
        if side.is_out:
            time.sleep(wait_s)
            return []
        try:
            return side.link.receive(wait_s)
        except EgressDenied:
            raise
        except NearfarError as error:
            side.is_out = True
            if not self._has_hope():
                raise
            return [Lost(str(error), final=True)]

    def _on(self, side: Side, news: News) -> list[News]:
        match news:
            case Opened():
                return self._on_opened(side, news)
            case Need(gen, from_pos):
                if gen == self._transcript.gen:
                    for message in self._transcript.said(from_pos):
                        side.link.send(message)
            case Verdict():
                return self._on_verdict(side, news)
            case Err(retryable=False):
                side.is_out = True
                if not self._has_hope():
                    return [news]
                log.warning("one of two upper sides is out: %s", news.text)
            case Credit() | Err() if len(self._sides) == 1:  # nobody else has less to do
                return [news]
            case Lost():
                return self._on_lost(side, news)
        return []

    def _on_opened(self, side: Side, opened: Opened) -> list[News]:
        """It hears what it has missed; the driver hears of it only if nobody was there."""
        side.is_open = True
        if side is self._first:
            self._down_since = None
        t = self._transcript
        cuts, n = t.catch_up(opened)
        for message in [*cuts, *t.said(n)]:
            side.link.send(message)
        if not self._is_lost:
            return []
        self._is_lost = False
        return [replace(opened, gen=max(opened.gen, t.gen), rows=t.n)]

    def _on_lost(self, side: Side, lost: Lost) -> list[News]:
        side.is_open, side.is_out = False, side.is_out or lost.final
        if side is self._first:
            self._down_since = time.monotonic() - self.deadline_s()  # late at once
        if any(s.is_open for s in self._sides) or (self._is_lost and self._has_hope()):
            return []
        self._is_lost = True
        return [Lost(lost.reason, final=not self._has_hope())]

    def _on_verdict(self, side: Side, v: Verdict) -> list[News]:
        """The first one that can be right is told; the second is compared with it."""
        counts = self.upper.counts
        if (told := self._told.get((v.gen, v.req))) is not None:
            is_same = (v.pos0, v.n_accept, v.ids) == (told.pos0, told.n_accept, told.ids)
            counts.agreed += is_same
            counts.differed += not is_same
            return []
        ask = self._transcript.asks.get(v.req)
        if ask is None or v.gen != self._transcript.gen:
            return []
        if not self._transcript.is_answer(v) and any(s.is_open for s in self._sides if s is not side):
            log.warning("one of two upper sides gives an impossible verdict and is left")
            side.link.close()
            side.is_open, side.is_out = False, True
            return []
        counts.won += side is not self._first
        del self._transcript.asks[v.req], self._asked[v.req]
        self._told[v.gen, v.req] = v
        while len(self._told) > KEPT_VERDICTS:
            self._told.popitem(last=False)
        return [v]

    def _has_hope(self) -> bool:
        """Whether some side may still answer."""
        return not self._is_second_known or any(not side.is_out for side in self._sides)


def _close(second: Future[Link]) -> None:
    """It was opened when nobody wanted it any more."""
    with suppress(NearfarError):
        second.result().close()
