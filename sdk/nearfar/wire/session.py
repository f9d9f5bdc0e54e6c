"""The upper side of one answer: what has arrived, what is asked, what was decided.  A pure machine, no compute.

Messages of the device go in, effects come out; the counterpart is `ledger.py`.  Rows never trigger compute, asks do.

    rows     | absorbed ............. | waiting ......... | n_rows
    asks     one at a time goes to whoever computes (`Decide`); its answer comes back as `decided`

What is here is soft: the device can send all of it again.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias
from zlib import crc32

from nearfar.wire.hashes import START, chain, crc_of_id, settings_hash
from nearfar.wire.messages import (
    Ask,
    Close,
    Code,
    Commit,
    Cut,
    Down,
    Err,
    Ids,
    Need,
    Open,
    Opened,
    Ping,
    Pong,
    Rows,
    Up,
    Verdict,
)

KEPT_VERDICTS = 64
MAX_OPEN_ASKS = 64


# ------------------------------------------------------------ effects


@dataclass(frozen=True, slots=True)
class Reply:
    """To the device."""

    message: Down


@dataclass(frozen=True, slots=True)
class Append:
    """Positions from `pos0` on have come: packed rows, or ids."""

    pos0: int
    rows: tuple[bytes, ...] = ()
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Forget:
    """Positions from `keep` on never were; a decision under way is void."""

    keep: int


@dataclass(frozen=True, slots=True)
class Decide:
    """Compute what `ask` wants and report it with `UpperSession.decided`; `draft` is filled in for ids, too."""

    ask: Ask
    draft: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class End:
    """The session is over; `keep_s`: its positions may serve the next turn so long."""

    keep_s: int


Effect: TypeAlias = Reply | Append | Forget | Decide | End


@dataclass(slots=True)
class UpperSession:
    """One answer of one device.

    `row_bytes`: of a packed row, 0 with ids.  `max_positions`: of the model; `max_bytes`: what rows may take.
    `n_vocab`: ids below it exist; `max_run`: tokens that one ask may bring.
    """

    opening: Open
    row_bytes: int
    max_positions: int
    n_vocab: int
    max_run: int = 1
    max_bytes: int = 1 << 30
    epoch: int = 0
    resume_token: bytes = b""
    gen: int = 0
    absorbed: int = 0  # rows that have been run: for a decision, or early
    crcs: list[int] = field(default_factory=list)  # one for each position that is here
    ids: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    verdicts: OrderedDict[tuple[int, int], Verdict] = field(default_factory=OrderedDict)  # (req, pos0)
    queue: deque[Ask] = field(default_factory=deque)  # the first one is being decided
    is_gap: bool = False  # `Need` was sent, and what it wants has not come: what comes meanwhile is dropped
    void_from: int | None = None  # a draft was refused: rows from here on wait for their cut, nobody decides on them
    n_stale: int = 0
    n_repeated: int = 0  # asks answered from what was kept

    @property
    def by_ids(self) -> bool:
        return self.row_bytes == 0

    @property
    def n_rows(self) -> int:
        return len(self.crcs)

    @property
    def n_reserved(self) -> int:
        """Positions that are here, and those that asks may add by themselves."""
        return min(self.n_rows + sum(a.run - 1 for a in self.queue), self.max_positions)

    @property
    def n_bytes(self) -> int:
        """Of these."""
        return self.n_reserved * (self.row_bytes or 4)

    def n_new(self, message: Up) -> int:
        """Positions that a message adds to these, as far as sizes tell; 0 also for one that will be refused."""
        match message:
            case Rows(gen, first, data) if not self.by_ids and all(len(row) == self.row_bytes for row in data):
                end = first + len(data)
            case Ids(gen, first, ids) if self.by_ids:
                end = first + len(ids)
            case Ask(req, gen, first, run=run) if self.by_ids and 1 < run <= self.max_run and first + 1 == self.n_rows:
                end = first if any(a.req == req for a in self.queue) else min(first + run, self.max_positions)
            case _:
                return 0
        fits = gen == self.gen and first <= self.n_rows and end <= self.max_positions
        return max(0, end - self.n_reserved) if fits else 0

    def passed_over(self) -> None:
        """Rows have come and found no room: what follows finds a gap again, also where one was told before."""
        self.is_gap = False

    # ------------------------------------------------------------ the device speaks

    def on(self, message: Up) -> list[Effect]:
        """What a message of the device leads to."""
        match message:
            case Open():
                return self._open(message)
            case Rows():
                return self._rows(message)
            case Ids():
                return self._ids(message)
            case Ask():
                return self._ask(message)
            case Cut():
                return self._cut(message)
            case Commit():
                self._commit(message.upto)
                return []
            case Ping():
                return [Reply(Pong(message.n))]
            case Close():
                self.queue.clear()
                return [End(message.keep_s)]

    def _open(self, message: Open) -> list[Effect]:
        """The first connection, or another one after the link was lost."""
        settings = settings_hash(message)
        if settings != settings_hash(self.opening):
            return [_err(Code.MISMATCH, "the settings of this session have changed: begin another one")]
        self.is_gap = False  # a connection begins with what is here
        opened = Opened(self.gen, self.n_rows, self.absorbed, self.epoch, self.resume_token, settings)
        return [Reply(opened)]

    def _rows(self, m: Rows) -> list[Effect]:
        if self.by_ids:
            return [_err(Code.BAD_FRAME, "rows in a session of ids")]
        if not m.data or len(m.crc32) != len(m.data) or any(len(row) != self.row_bytes for row in m.data):
            sizes = sorted({len(row) for row in m.data})
            return [
                _err(
                    Code.BAD_FRAME,
                    f"{len(m.data)} rows of {sizes[:3]} bytes and {len(m.crc32)} checksums: "
                    f"expected at least one, {self.row_bytes} bytes each",
                )
            ]
        if any(crc32(row) != crc for row, crc in zip(m.data, m.crc32, strict=True)):
            return [_err(Code.BAD_FRAME, f"a row from position {m.pos0} on does not have its checksum")]
        return self._arrive(m.gen, m.pos0, m.crc32, m.data)

    def _ids(self, m: Ids) -> list[Effect]:
        if not self.by_ids:
            return [_err(Code.BAD_FRAME, "ids in a session of rows")]
        if not m.ids or max(m.ids) >= self.n_vocab or min(m.ids) < 0:
            return [_err(Code.BAD_FRAME, f"{len(m.ids)} ids: expected at least one, each in 0..{self.n_vocab - 1}")]
        return self._arrive(m.gen, m.pos0, [crc_of_id(i) for i in m.ids], m.ids)

    def _arrive(self, gen: int, pos0: int, crcs: Sequence[int], what: Sequence[bytes] | Sequence[int]) -> list[Effect]:
        """Positions from `pos0` on: new ones are taken, known ones must be the same."""
        if gen != self.gen:
            self.n_stale += 1
            return []
        if pos0 > self.n_rows:
            return self._need()
        self.is_gap = False
        n_known = min(self.n_rows - pos0, len(crcs))
        if list(crcs[:n_known]) != self.crcs[pos0 : pos0 + n_known]:
            return [_err(Code.DIVERGED, f"positions {pos0}..{pos0 + n_known - 1} came before with other content")]
        new = what[n_known:]
        if not new:
            return []
        if any(a.run > 1 for a in self.queue):
            return [_err(Code.BAD_FRAME, "ids in the middle of a run: expected a cut before them")]
        n_after = self.n_rows + len(new)
        if n_after > self.max_positions:
            return [_err(Code.QUOTA, f"{n_after} positions: this model takes {self.max_positions}")]
        if n_after * (self.row_bytes or 4) > self.max_bytes:
            return [_err(Code.QUOTA, f"{n_after} rows of {self.row_bytes} bytes: allowed are {self.max_bytes} bytes")]
        first = self.n_rows
        self.crcs += crcs[n_known:]
        if self.by_ids:
            ids = tuple(int(i) for i in new)
            self.ids += ids
            return [Append(first, ids=ids)]
        return [Append(first, rows=tuple(bytes(row) for row in new))]

    def _ask(self, a: Ask) -> list[Effect]:
        if a.gen != self.gen:
            self.n_stale += 1
            return []
        if (kept := self.verdicts.get((a.req, a.verify_from + 1))) is not None:
            self.n_repeated += 1
            return [Reply(kept)]
        if any(waiting.req == a.req for waiting in self.queue) or self._is_void(a):
            return []
        n_checked = a.pos - a.verify_from
        if n_checked < 0 or len(a.draft) != (0 if self.by_ids else n_checked):
            return [_err(Code.BAD_FRAME, f"an ask from row {a.verify_from} to {a.pos} with {len(a.draft)} drafts")]
        if a.draft and (max(a.draft) >= self.n_vocab or min(a.draft) < 0):
            return [_err(Code.BAD_FRAME, f"drafts outside the vocabulary of {self.n_vocab}")]
        most = self.max_run if self.by_ids and not n_checked else 1
        if not 1 <= a.run <= most:
            return [_err(Code.BAD_FRAME, f"an ask for {a.run} tokens: expected 1..{most}")]
        if a.pos >= self.n_rows:
            return self._need()
        if a.run > 1 and a.pos + 1 < self.n_rows:  # an old one: it has run, and its verdicts were told
            self.n_stale += 1
            return []
        if len(self.queue) >= MAX_OPEN_ASKS:
            return [_err(Code.QUOTA, f"{MAX_OPEN_ASKS} asks are open", retry_after_ms=100)]
        self.queue.append(a)
        return [self._decide(a)] if len(self.queue) == 1 else []

    def _is_void(self, a: Ask) -> bool:
        """Whether `a` rests on a draft that was refused: the device cuts it off as soon as it knows."""
        return self.void_from is not None and a.verify_from >= self.void_from

    def _need(self) -> list[Effect]:
        """Ask for what is missing, once: the messages behind it that are under way would all ask for it."""
        if self.is_gap:
            return []
        self.is_gap = True
        return [Reply(Need(self.gen, self.n_rows, "gap"))]

    def _decide(self, a: Ask) -> Decide:
        draft = tuple(self.ids[a.verify_from + 1 : a.pos + 1]) if self.by_ids else a.draft
        return Decide(a, draft)

    def _cut(self, m: Cut) -> list[Effect]:
        if m.gen <= self.gen:
            self.n_stale += 1
            return []
        self.gen = m.gen
        return self._truncate(m.keep)

    def _truncate(self, keep: int) -> list[Effect]:
        self.is_gap, self.void_from = False, None
        self.queue.clear()
        self.verdicts.clear()
        del self.crcs[keep:], self.ids[keep:], self.hashes[keep:]
        self.absorbed = min(self.absorbed, keep)
        return [Forget(keep)]

    def _commit(self, upto: int) -> None:
        for key in [key for key, v in self.verdicts.items() if v.pos0 + v.n_accept < upto]:
            del self.verdicts[key]

    # ------------------------------------------------------------ who computes speaks

    def decided(
        self, req: int, n_accept: int, token: int, *, margin: float = 0.0, upper_us: int = 0, hidden: bytes = b""
    ) -> list[Effect]:
        """What the ask `req`, the first of the queue, came to; a decision of something that was cut is dropped."""
        if not self.queue or self.queue[0].req != req:
            return []
        a = self.queue[0]
        state = self._hash(a.pos)
        v = Verdict(a.req, a.gen, a.verify_from + 1, n_accept, (token,), margin, state, upper_us, hidden)
        self.verdicts[a.req, v.pos0] = v
        while len(self.verdicts) > KEPT_VERDICTS:
            self.verdicts.popitem(last=False)
        self.absorbed = max(self.absorbed, a.pos + 1)
        effects: list[Effect] = [Reply(v)]
        if a.run > 1 and token not in self.opening.stop_ids and self.n_rows < self.max_positions:
            self.ids.append(token)  # it goes on with its own token
            self.crcs.append(crc_of_id(token))
            self.queue[0] = replace(a, pos=a.pos + 1, verify_from=a.pos + 1, run=a.run - 1)
            return effects
        self.queue.popleft()
        behind = a.verify_from + 1 + n_accept
        if n_accept < a.pos - a.verify_from or (self.by_ids and self.ids[behind : behind + 1] not in ([], [token])):
            self.void_from = behind
            self.queue = deque(waiting for waiting in self.queue if not self._is_void(waiting))
        if self.queue:
            effects.append(self._decide(self.queue[0]))
        return effects

    def ran_early(self, upto: int) -> None:
        """Rows below `upto` have been run, though no ask wanted them yet."""
        self.absorbed = max(self.absorbed, min(upto, self.n_rows))

    def failed(self, req: int, text: str) -> list[Effect]:
        """Nobody could compute the ask `req`; the device may ask again."""
        if not self.queue or self.queue[0].req != req:
            return []
        self.queue.clear()
        return [Reply(Err(Code.INTERNAL, text, retryable=True, retry_after_ms=100))]

    def evict(self) -> list[Effect]:
        """Give everything up; a device that waits is told at once, another one when it asks for what is not there."""
        is_waiting = bool(self.queue)
        effects = self._truncate(0)
        return effects + (self._need() if is_waiting else [])

    def _hash(self, row: int) -> bytes:
        for crc in self.crcs[len(self.hashes) : row + 1]:
            self.hashes.append(chain(self.hashes[-1] if self.hashes else START, crc))
        return self.hashes[row]


def _err(code: Code, text: str, retry_after_ms: int = 0) -> Reply:
    return Reply(Err(code, text, retryable=retry_after_ms > 0, retry_after_ms=retry_after_ms))
