"""What the front knows of its workers, and of the sequences that somebody waits for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Protocol

from nearfar_cloud.counts import Counts
from nearfar_cloud.executors.transport import Link
from nearfar_cloud.fleet.load import Load
from nearfar_cloud.fleet.messages import Submit, ToFront, Told
from nearfar_cloud.kv.pool import n_blocks_of
from nearfar_cloud.types import Request


class Place(Protocol):
    """Where a worker runs: a process here, an actor elsewhere."""

    link: Link[ToFront]

    def kill(self) -> None: ...  # at once, whether it still runs or not

    def close(self) -> None: ...  # end its link, wait until it has gone


@dataclass(slots=True)
class Ongoing:
    """A sequence that somebody waits for."""

    seq: int
    req: Request
    hook: str | None  # its source
    n_followed: int  # of the last ids of the request: where the hook was when it came
    arrival: float
    told: list[int] = field(default_factory=list)
    held_s: float = 0.0  # before it first went to a worker
    n_crashes: int = 0
    is_suspect: bool = False
    is_silent: bool = True  # it has told nothing since it came to its worker
    is_aborted: bool = False

    def submit(self) -> tuple[Submit, list[int]]:
        """What is left of it, as a worker may have it; and its ids."""
        left = replace(self.req, max_tokens=self.req.max_tokens - len(self.told))
        n_followed = self.n_followed + len(self.told)
        return Submit.of(left, (self.seq,), (self.hook,), n_followed), [*self.req.ids, *self.told]


class Member:
    """A worker as the front sees it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.starting: Future[Place] | None = None
        self.start_at = 0.0  # when to start it again
        self.n_starts = 0  # that came to nothing, in a row
        self.place: Place | None = None
        self.begin()

    def begin(self) -> None:
        """A new process, of which nothing is known."""
        self.is_ready = False
        self.pid = 0
        self.heard_at = time.monotonic()
        self.counts = Counts()
        self.load: Load | None = None
        self.open: dict[int, Ongoing] = {}
        self.trial: int | None = None  # the suspect that is there
        self._n_sent = 0
        self._sent: deque[tuple[int, int, int]] = deque()  # number of a Submit, sequences, blocks: not in `load` yet
        self._n_seqs_sent = self._n_blocks_sent = 0  # their sums

    def expect(self, n_ids: int, whose: Sequence[Ongoing]) -> None:
        """A Submit goes to it: its load does not know of that yet."""
        self.open |= {s.seq: s for s in whose}
        for s in whose:
            s.is_silent = True
        self._n_sent += 1
        self._sent.append((self._n_sent, len(whose), n_blocks_of(n_ids)))
        self._n_seqs_sent += len(whose)
        self._n_blocks_sent += n_blocks_of(n_ids)

    def withdraw(self, whose: Sequence[Ongoing]) -> None:
        """It was gone before they came, and takes nothing more."""
        for s in whose:
            del self.open[s.seq]
        self.trial = self.load = None

    def hear(self, told: Told) -> None:
        if told.load is not None:
            self.load = told.load
            while self._sent and self._sent[0][0] <= told.n_received:
                _, n_seqs, n_blocks = self._sent.popleft()
                self._n_seqs_sent -= n_seqs
                self._n_blocks_sent -= n_blocks

    @property
    def expected(self) -> Load | None:
        """Its load once it has heard what was sent; None: it takes nothing."""
        load = self.load
        return None if load is None else load.with_sent(self._n_seqs_sent, self._n_blocks_sent)
