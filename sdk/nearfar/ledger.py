"""The ledger of one answer: which tokens are final, which are drafts, what the upper side has been asked.

A pure machine: events go in as method calls, effects come out as a list, and nothing here waits, sends or computes.
`collab.py` drives it; `wire/session.py` is its counterpart on the other side.

    ids      | prompt ......... | final ......... | provisional ...... |
                                 n_prompt          final               len(ids)
    rows     | dropped ....................... asked ........ n_rows           (n_rows <= len(ids))

Row i belongs to ids[i] and decides ids[i + 1].  Rows below `asked` have been asked about, each exactly once: an ask for
rows asked..p brings how many drafts hold and the token at the first place where they end.  Verdicts are applied in the
order of their asks, so each one speaks of a text whose beginning is final already.

Rows below `dropped` have been sent, belong to final tokens and are not kept, for the sake of memory; their checksums
are.  Should the other side want them again, they are made again of the ids (`Remake`), and used if they are what they
were.

Whatever was said in vain (rows of drafts that do not hold, asks that nobody waits for) is left behind by a new
generation, a `Cut`: messages of an earlier one are dropped on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias
from zlib import crc32

from nearfar.errors import Diverged, WireError
from nearfar.wire.hashes import START, chain, crc_of_id
from nearfar.wire.messages import Ask, Commit, Cut, Ids, Need, Opened, Rows, Up, Verdict

Source = Literal["exit", "upper", "verified"]
MAX_MESSAGE = 16 << 10  # bytes of rows in one message, unless one row is larger


@dataclass(frozen=True, slots=True)
class Draft:
    """What a head of the device says of a token; `head` is "exit.2" or the like.

    `is_sure`: by a threshold that was calibrated, so that this can be held against it.
    """

    head: str
    conf: float
    is_sure: bool = False


# ------------------------------------------------------------ effects


@dataclass(frozen=True, slots=True)
class Send:
    message: Up


@dataclass(frozen=True, slots=True)
class Rewind:
    """The device's cache keeps the first `n` positions: what lies behind was made of a wrong token."""

    n: int


@dataclass(frozen=True, slots=True)
class Final:
    """The token at `index` of the text will not change any more."""

    index: int
    id: int
    source: Source
    draft: Draft | None


@dataclass(frozen=True, slots=True)
class Retract:
    """Provisional tokens from `index` on were wrong."""

    index: int


@dataclass(frozen=True, slots=True)
class Rebuild:
    """The other side has lost rows: `n` of them are sent again."""

    n: int


@dataclass(frozen=True, slots=True)
class Remake:
    """The dropped rows first..end - 1 are wanted: make them of the ids, in order, and give them to `Ledger.remade`."""

    first: int
    end: int


Effect: TypeAlias = Send | Rewind | Final | Retract | Rebuild | Remake


@dataclass(slots=True)
class OpenAsk:
    """An ask without its verdict yet; one that came too early waits here."""

    ask: Ask
    verdict: Verdict | None = None


@dataclass(frozen=True, slots=True)
class Audit:
    """An ask behind which the device has decided already: it said `told`."""

    ask: Ask
    told: int
    draft: Draft


@dataclass(slots=True)
class Counts:
    """What the machine has seen, for reports."""

    drafted: int = 0
    accepted: int = 0  # drafts that a verdict confirmed
    retracted: int = 0
    asks: int = 0
    rows_asked: int = 0  # rows that the upper side had to run for them; those of `replayed` not again
    stale: int = 0  # messages of an earlier generation, dropped
    replayed: int = 0  # rows sent again
    remade: int = 0  # ... that had been dropped
    near_ties: int = 0  # verdicts whose two largest logits are closer than 1e-4
    checked: int = 0  # tokens of the device that the upper side has decided too; where nobody was sure, or of an audit
    sure: int = 0  # ... that an exit was sure of
    sure_wrong: int = 0  # ... and that the upper side would not have said
    audits: int = 0  # of the asks: for the sake of these counts alone


@dataclass(slots=True)
class Ledger:
    """The state of one answer on the device.  `by_ids`: positions travel as token ids instead of rows.

    `is_resumed`: the ids are a journal's, and the process that knew the rest is gone.  Nothing is sent before `Opened`.
    `max_row_bytes`: more of them are not kept of rows that could be made again; None: all are.
    """

    ids: list[int]
    by_ids: bool = False
    is_resumed: bool = False
    max_row_bytes: int | None = None
    gen: int = 0
    n_prompt: int = 0
    final: int = 0  # positions below it are final
    asked: int = 0  # rows below it have been asked about
    sent: int = 0  # rows below it have been sent in this generation
    run: int = 0  # rows below it the other side has run for an ask, or will
    drafts: dict[int, Draft] = field(default_factory=dict)  # of provisional positions
    rows: list[bytes] = field(default_factory=list)  # packed, from position `dropped` on; empty with ids
    dropped: int = 0
    crcs: list[int] = field(default_factory=list)  # of dropped rows too
    hashes: list[bytes] = field(default_factory=list)  # chain over crcs: what both sides have to agree on
    cuts: list[Cut] = field(default_factory=list)
    open: dict[int, OpenAsk] = field(default_factory=dict)  # by request number, in the order of asking
    audits: dict[int, Audit] = field(default_factory=dict)  # likewise; given up with their generation
    counts: Counts = field(default_factory=Counts)
    next_req: int = 1

    def __post_init__(self) -> None:
        self.n_prompt = self.n_prompt or len(self.ids)
        self.final = self.final or len(self.ids)
        self.asked = self.asked or len(self.ids) - 1

    # ------------------------------------------------------------ what is where

    @property
    def n_rows(self) -> int:
        """Positions that could be sent."""
        return len(self.ids) if self.by_ids else self.dropped + len(self.rows)

    @property
    def n_provisional(self) -> int:
        return len(self.ids) - self.final

    @property
    def n_unasked(self) -> int:
        """Rows that nobody has asked about."""
        return self.n_rows - self.asked

    def begins_like(self, earlier: Ledger, n: int) -> None:
        """The first `n` positions are those of `earlier`: as many of its rows are there already."""
        if not self.by_ids:
            n = min(n, earlier.n_rows)
            self.dropped = min(earlier.dropped, n)
            self.rows, self.crcs = earlier.rows[: n - self.dropped], earlier.crcs[:n]

    def goes_on(self, earlier: Ledger, n: int) -> None:
        """`earlier` was the text of this session, and its first `n` positions are this one's, too.  Before `Opened`.

        To the other side the rest of it is one more cut, of which it hears when it says what it still has.
        """
        self.gen, self.next_req = earlier.gen + 1, earlier.next_req
        self.cuts = [*earlier.cuts, Cut(self.gen, n)]

    # ------------------------------------------------------------ the device makes something

    def add_rows(self, pos0: int, rows: Sequence[bytes]) -> None:
        """Packed rows of the positions from `pos0` on; those that are there already stay."""
        assert pos0 <= self.n_rows, (pos0, self.n_rows)
        new = rows[self.n_rows - pos0 :]
        self.rows += new
        self.crcs += [crc32(row) for row in new]

    def add_draft(self, token: int, draft: Draft) -> None:
        """The next token, provisional; not while the other side goes on by itself, as it would say something there."""
        assert all(waiting.ask.run == 1 for waiting in self.open.values()), "a draft where the other side goes on"
        self.drafts[len(self.ids)] = draft
        self.ids.append(token)
        self.counts.drafted += 1

    def decide(self, token: int, draft: Draft) -> list[Effect]:
        """The next token, final at once on the device's own word (lossy and standalone); open asks no longer count."""
        assert self.final == len(self.ids), "provisional tokens before one that the device decides"
        effects = self._withdraw()
        self.ids.append(token)
        self.asked = len(self.ids) - 1
        return effects + self._finalise(len(self.ids), {len(self.ids) - 1: "exit"}, {len(self.ids) - 1: draft})

    def settle(self, keep: int | None = None) -> list[Effect]:
        """The provisional tokens become final as they are: the link is gone, and the policy says to go on.

        Those at `keep` and behind it are dropped instead: the device by itself would not say them yet.
        """
        effects = self._withdraw()
        if keep is not None and keep < len(self.ids):
            effects += self._void(keep, keep - 1)  # the last row has to be looked at again
        self.asked = len(self.ids) - 1
        sources: dict[int, Source] = dict.fromkeys(range(self.final, len(self.ids)), "exit")
        return effects + self._finalise(len(self.ids), sources, dict(self.drafts))

    def _withdraw(self) -> list[Effect]:
        """Nobody waits for the open asks any more: the other side need not compute them, nor what rests on them."""
        if not self.open:
            return []
        self.open.clear()
        return [self._new_generation(self.n_rows)]

    def make_ask(self, *, upto: int | None = None, run: int = 1, deadline_ms: int = 0) -> list[Effect]:
        """Ask about all rows that are there (or those up to row `upto`), after sending them.

        `run` > 1: the other side goes on by itself, behind a text without drafts.
        """
        pos = self.n_rows - 1 if upto is None else upto
        assert self.asked <= pos < self.n_rows, (self.asked, pos, self.n_rows)
        assert run == 1 or self.asked == pos == len(self.ids) - 1, "a run behind drafts"
        sending = self.unsent(pos + 1)
        draft = () if self.by_ids else tuple(self.ids[self.asked + 1 : pos + 1])
        ask = Ask(self.next_req, self.gen, pos, self.asked, draft, run, deadline_ms)
        self.open[ask.req] = OpenAsk(ask)
        self.next_req += 1
        self._count_ask(pos)
        self.asked = pos + 1
        return [*sending, *([] if self.is_resumed else [Send(ask)])]

    def audit(self, token: int, draft: Draft) -> list[Effect]:
        """Ask behind the newest row, though the device is about to decide on `token`: that stays, whatever is said."""
        pos = len(self.ids) - 1
        assert pos < self.n_rows, (pos, self.n_rows)
        ask = Ask(self.next_req, self.gen, pos, pos)
        self.audits[ask.req] = Audit(ask, token, draft)
        self.next_req += 1
        self._count_ask(pos)
        self.counts.audits += 1
        return [*self.unsent(pos + 1), *([] if self.is_resumed else [Send(ask)])]

    def _count_ask(self, pos: int) -> None:
        """Behind row `pos`: before, the other side runs all that it has not, also of tokens that the device decided."""
        self.counts.asks += 1
        self.counts.rows_asked += max(0, pos + 1 - self.run)
        self.run = max(self.run, pos + 1)

    def count(self, draft: Draft, *, holds: bool) -> None:
        """Somebody else has decided too where the device said `draft`."""
        self.counts.checked += 1
        self.counts.sure += draft.is_sure
        self.counts.sure_wrong += draft.is_sure and not holds

    def unsent(self, upto: int | None = None) -> list[Effect]:
        """Messages with the rows below `upto` (default: all) that this generation has not sent."""
        end = self.n_rows if upto is None else upto
        effects: list[Effect] = []
        while self.sent < end and not self.is_resumed:
            if self.sent < self.dropped:
                return [*effects, Remake(self.sent, self.dropped)]
            first = self.sent - self.dropped
            message = (
                self._ids_from(self.sent, end) if self.by_ids else self._first_of(self.rows[first : end - self.dropped])
            )
            self.sent = message.pos0 + len(message.ids if isinstance(message, Ids) else message.data)
            effects.append(Send(message))
        self._drop()
        return effects

    def remade(self, rows: Sequence[bytes]) -> list[Effect]:
        """Dropped rows from `sent` on, made again; if one has come out otherwise, it fits none of the others."""
        if [crc32(row) for row in rows] != self.crcs[self.sent : self.sent + len(rows)]:
            return self._start_over()
        effects: list[Effect] = []
        self.counts.remade += len(rows)
        while rows:
            message = self._first_of(rows)
            rows, self.sent = rows[len(message.data) :], self.sent + len(message.data)
            effects.append(Send(message))
        return effects if self.sent < self.dropped else [*effects, *self.unsent()]

    def _start_over(self) -> list[Effect]:
        """No row is what it was: what is final stays, and everything is computed and sent anew."""
        effects: list[Effect] = []
        if self.n_provisional:
            self.counts.retracted += self.n_provisional
            effects.append(Retract(self.final))
            self.drafts.clear()
            del self.ids[self.final :]
        self.open.clear()
        self.dropped, self.asked = 0, len(self.ids) - 1
        return [*effects, Rewind(0), self._cut(0)]

    def _drop(self) -> None:
        """The oldest rows that are final and have been sent, as far as there are too many bytes of them."""
        if self.max_row_bytes is None or not self.rows:
            return
        n_over = len(self.rows) - self.max_row_bytes // max(1, len(self.rows[0]))
        n = min(n_over, min(self.final, self.sent) - self.dropped)
        if n > 0:
            del self.rows[:n]
            self.dropped += n

    def _ids_from(self, first: int, end: int) -> Ids:
        return Ids(self.gen, first, tuple(self.ids[first : min(end, first + MAX_MESSAGE // 4)]))

    def _first_of(self, rows: Sequence[bytes]) -> Rows:
        """As many as one message takes; they follow what has been sent."""
        n = min(len(rows), max(1, MAX_MESSAGE // max(1, len(rows[0]))))
        return Rows(self.gen, self.sent, tuple(rows[:n]), tuple(self.crcs[self.sent : self.sent + n]))

    def _hash(self, row: int) -> bytes:
        """Of rows 0..row: the upper side has the same, or the two have diverged."""
        if self.by_ids:
            self.crcs += [crc_of_id(i) for i in self.ids[len(self.crcs) : row + 1]]
        for crc in self.crcs[len(self.hashes) : row + 1]:
            self.hashes.append(chain(self.hashes[-1] if self.hashes else START, crc))
        return self.hashes[row]

    # ------------------------------------------------------------ the upper side says something

    def on_verdict(self, v: Verdict) -> list[Effect]:
        """Raises WireError for a verdict that cannot be an answer to its ask, Diverged for one about other rows."""
        waiting = self.open.get(v.req) or self.audits.get(v.req)
        if waiting is None or v.gen != self.gen or v.pos0 <= waiting.ask.verify_from:
            self.counts.stale += 1  # or told twice, in an ask that runs on
            return []
        ask = waiting.ask
        n_left = ask.pos - ask.verify_from
        if v.pos0 != ask.verify_from + 1 or not 0 <= v.n_accept <= n_left or len(v.ids) != 1:
            raise WireError(
                f"a verdict of {v.n_accept} drafts and {len(v.ids)} ids at position {v.pos0}: "
                f"expected 0..{n_left} and one id at {ask.verify_from + 1}"
            )
        if v.state_hash and v.state_hash != self._hash(ask.pos):
            raise Diverged(f"the two sides hold different rows below position {ask.pos + 1}")
        if isinstance(waiting, Audit):
            return self._on_audit(waiting, v)
        waiting.verdict = v
        effects: list[Effect] = []
        while self.open:
            first = next(iter(self.open.values()))
            if first.verdict is None:
                break
            effects += self._apply(first, first.verdict)
        return effects

    def _on_audit(self, audit: Audit, v: Verdict) -> list[Effect]:
        """The token was told and stays; by ids the other side takes it for refused, until it is cut and said again."""
        del self.audits[v.req]
        holds = v.ids[0] == audit.told
        self.count(audit.draft, holds=holds)
        if holds or not self.by_ids:
            return []
        cut = self._new_generation(v.pos0)
        self.sent = min(self.sent, v.pos0)
        return [cut, *self.unsent(), *self.repeat()]

    def _apply(self, asked: OpenAsk, v: Verdict) -> list[Effect]:
        """The verdict on the oldest open ask: some drafts hold, then comes one token."""
        ask, token = asked.ask, v.ids[0]
        if ask.run > 1:
            asked.ask, asked.verdict = _rest(ask), None
        if ask.run == 1:
            del self.open[v.req]
        self.counts.near_ties += v.margin < 1e-4
        self.counts.accepted += v.n_accept
        q = v.pos0 + v.n_accept
        for i in range(self.final, min(q + 1, len(self.ids))):
            self.count(self.drafts[i], holds=i < q or self.ids[i] == token)
        sources: dict[int, Source] = dict.fromkeys(range(self.final, q), "verified")
        effects: list[Effect] = []
        if q < len(self.ids) and self.ids[q] == token:
            if v.n_accept < ask.pos - ask.verify_from:
                raise WireError(f"the upper side refuses the draft at position {q} and puts the same token there")
            sources[q] = "verified"
            self.counts.accepted += 1
        else:
            sources[q] = "upper"
            effects += self._replace(q, token)
        if ask.run > 1:  # it generates by itself: what it says it also has
            self.counts.rows_asked += 1
            self.asked, self.run, self.sent = q + 1, q + 1, max(self.sent, q + 1)
            effects += self._finalise(q + 1, sources, {})
            return effects
        return effects + self._finalise(q + 1, sources, dict(self.drafts))

    def _replace(self, q: int, token: int) -> list[Effect]:
        """`token` stands at `q`; drafts from there on, and the rows made of them, never were."""
        effects: list[Effect] = []
        if q < len(self.ids):
            effects += self._void(q, q)
            self.asked = q
        self.ids.append(token)
        return effects

    def _void(self, q: int, n_run: int) -> list[Effect]:
        """The tokens from `q` on are void, and the rows and asks that rest on them; the device keeps `n_run` rows."""
        self.counts.retracted += len(self.ids) - q
        effects: list[Effect] = [Retract(q), Rewind(n_run)]
        self.open.clear()
        if self.n_rows > q:
            effects.append(self._cut(q))
        for i in range(q, len(self.ids)):
            self.drafts.pop(i, None)
        del self.ids[q:]
        return effects

    def _cut(self, keep: int) -> Send:
        """Rows from `keep` on never were."""
        del self.rows[keep - self.dropped :], self.crcs[keep:], self.hashes[keep:]
        self.sent = min(self.sent, keep)
        return self._new_generation(keep)

    def _new_generation(self, keep: int) -> Send:
        """The other side forgets what it was asked, and its rows from `keep` on.  Open asks go along with it."""
        self.gen += 1
        self.run = min(self.run, keep)
        self.audits.clear()
        self.cuts.append(Cut(self.gen, keep))
        for waiting in self.open.values():
            waiting.ask = replace(waiting.ask, gen=self.gen)
        return Send(self.cuts[-1])

    def _finalise(self, upto: int, sources: dict[int, Source], drafts: dict[int, Draft]) -> list[Effect]:
        """Positions below `upto` are final; each is told once."""
        effects: list[Effect] = []
        for i in range(self.final, upto):
            source = sources.get(i, "verified")
            draft = drafts.get(i) if source != "upper" else None
            effects.append(Final(i, self.ids[i], source, draft))
            self.drafts.pop(i, None)
        self.final = max(self.final, upto)
        wanted = min((audit.ask.pos + 1 for audit in self.audits.values()), default=self.final)
        return [*effects, Send(Commit(min(self.final, wanted)))]

    # ------------------------------------------------------------ the link comes back, or wants something

    def on_opened(self, opened: Opened, max_run: int | None = None) -> list[Effect]:
        """After every connection: what the other side still has is kept, the rest is sent again, asks are repeated.

        `max_run`: of this other side; open runs that are longer are shortened.
        Of cuts that it has not seen the deepest counts; a new one says so under a number that it cannot have heard.
        """
        for waiting in self.open.values():
            waiting.ask = replace(waiting.ask, run=min(waiting.ask.run, max_run or waiting.ask.run))
        keep = min(opened.rows, self.n_rows, *(cut.keep for cut in self.cuts if cut.gen > opened.gen))
        if self.is_resumed:  # what it has may be of drafts that are forgotten here; rows may come out otherwise now
            keep = min(keep, self.n_prompt) if self.by_ids else 0
        if not self.counts.asks:
            self.run = min(keep, opened.absorbed)  # of the turn before
        effects: list[Effect] = []
        if self.is_resumed or opened.gen != self.gen or opened.rows > self.n_rows:  # it may have gone on by itself
            self.gen, self.is_resumed = max(self.gen, opened.gen), False
            effects.append(self._new_generation(keep))
        return effects + self._resend(keep)

    def on_need(self, need: Need) -> list[Effect]:
        """The other side lacks rows from `need.from_pos` on."""
        if need.gen != self.gen:
            self.counts.stale += 1
            return []
        return self._resend(min(need.from_pos, self.sent))

    def _resend(self, keep: int) -> list[Effect]:
        n_again = max(0, self.sent - keep)
        self.counts.replayed += n_again
        self.sent = keep
        effects: list[Effect] = [Rebuild(n_again)] if n_again else []
        return [*effects, *self.unsent(), *self.repeat()]

    def repeat(self) -> list[Effect]:
        """The asks without a verdict, once more under their numbers."""
        waiting = [audit.ask for audit in self.audits.values()]
        waiting += [asked.ask for asked in self.open.values() if asked.verdict is None]
        return [Send(ask) for ask in waiting]


def _rest(ask: Ask) -> Ask:
    """What is left of an ask that runs on, after one more token."""
    return replace(ask, pos=ask.pos + 1, verify_from=ask.pos + 1, draft=(), run=ask.run - 1)
