"""The loop of an answer that two machines make: the device drafts, whoever runs the upper layers decides.

    draft:  ids -> embed -> layers up to an exit -> token, sure or not          engine.look
    send:   rows of layer k (or ids), as soon as they are there                 ledger.unsent
    ask:    drafts may be wrong, or the window is full, or the text would end   ledger.make_ask
    news:   verdicts, needs, a link that is lost or there again                 ledger.on_verdict ...

All decisions about tokens are the ledger's; this file turns its effects into calls.  One thread owns all of it; the
network lives behind `Link` in a thread of its own.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np

from nearfar.alarm import Alarm, is_audited
from nearfar.cancel import Cancel
from nearfar.collab_options import Collab
from nearfar.config import ExitConfig
from nearfar.constraint import Constraint
from nearfar.engine import Engine, Token, own_tau, stages
from nearfar.errors import ContextError, Diverged, EgressDenied, MismatchError, UpperError, UsageError, WireError
from nearfar.exit import decayed, draft_tau, should_exit
from nearfar.journal import Journal, JournalHead, JournalState
from nearfar.ledger import Draft, Effect, Final, Ledger, Rebuild, Remake, Retract, Rewind, Send
from nearfar.lower import Array
from nearfar.pace import MAX_WINDOW, Pace
from nearfar.sampling import Sampling
from nearfar.sequence import Notice, Sequence
from nearfar.shared_sequence import MIN_RUN, ByIds, Shared, Shares
from nearfar.upper import Link, Lost, NoLink, Traffic, Upper, check_sampling
from nearfar.wire.codec import Codec
from nearfar.wire.hashes import settings_hash
from nearfar.wire.messages import Close, Code, CodecId, CodecSpec, Credit, Err, Mode, Need, Open, Opened, Verdict

CHUNK = 64  # rows of a prompt that are computed, then sent while the next ones are computed
MOST_WAITING = 1024  # rows above those that travel: they take memory as floats, and are copied when more join them
POLL_S = 0.02  # how often a wait looks at the stop button
GRACE_S = 1.0  # for the first connection, before the device goes on alone
WORTH = 0.3  # drafts are asked about once they are less likely all right than this (bench/collab_acceptance.py)
MOST_AUDITS = 8  # open at once
EASE_S, MOST_PRESSED_S = 1.0, 60.0  # behind a pause that an upper side has asked for: the next one may follow
SURE = 0.8  # of a head without a calibrated threshold: a device that is a whole model of its own

OnMeeting = Callable[[int, Cancel | None], None]


def nobody(epoch: int, cancel: Cancel | None) -> None:
    """Whom an upper side that has opened is shown by default."""


def _at_its_least(e: ExitConfig, how: Collab) -> ExitConfig:
    """With the lowest threshold that it can have in an answer: where that is 1, nobody has to look."""
    if how.tau is not None:
        return replace(e, tau=how.tau, tau_loose=None)
    if how.mode == Mode.LOSSLESS:
        return replace(e, tau=draft_tau(e), tau_loose=None)
    return e if e.tau_loose is None else replace(e, tau=e.tau_loose)


class Collaboration:
    """`Stepper` over a device's engine and an `Upper`: a step returns the next token that is final.

    With `Sequence.tells_drafts` it also returns each draft when it is made; those that are void are told as a notice.
    """

    def __init__(
        self,
        engine: Engine,
        upper: Upper,
        how: Collab,
        fingerprint: bytes = b"",
        delta: float | None = None,
        delta_loose: float | None = None,
        on_meeting: OnMeeting = nobody,
    ) -> None:
        """`fingerprint`: of the model, so that a journal is only taken up with the same one.

        `delta`: what was promised for the calibrated thresholds: the mean share of an answer's tokens that an exit is
        sure of and that the upper side would not say; `delta_loose`: for the looser ones.  `on_meeting` gets the epoch
        of an upper side that has opened, before anything is sent to it (self_test.py).  Raises UsageError,
        WeightsError.
        """
        config = engine.lower.config
        if not how.by_ids and config.role != "device":
            raise UsageError("rows are sent by the device half of a split model (nearfar split); a whole one sends ids")
        self.engine, self.upper, self.how, self.fingerprint = engine, upper, how, fingerprint
        self.on_meeting = on_meeting
        self.row_layer = 0 if how.by_ids else config.row_layer
        self.codec = None if how.by_ids else Codec.of(how.codec, config.d_model)
        self.taus = {e.layer: e.tau if how.tau is None else how.tau for e in config.exits}
        config = replace(config, exits=tuple(_at_its_least(e, how) for e in config.exits))
        # What an answer needs of the device; the layers above, up to its upper exits, are run for drafts alone.
        self.reach = self.row_layer or config.layers[1]
        self.stages = stages(config, rows_at=self.reach)
        self.heads = {stage.source: stage.exit for stage in self.stages}
        self.pace = Pace()
        # Nothing is promised for other thresholds.
        self.alarm = Alarm(delta) if delta is not None and how.tau is None else None
        self.delta_loose = delta_loose

    def new_sequence(self, sampling: Sampling, use_exits: bool) -> Shared:
        kv = self.engine.lower.new_kv(self.engine.max_len, self.engine.kv_dtype, self.engine.kv_policy)
        s = Shared(kv, sampling=sampling, use_exits=use_exits, keep_s=self.how.keep_s)
        s.alarm, s.delta_loose = self.alarm, self.delta_loose
        return s

    def step(self, s: Sequence, constraint: Constraint | None = None, cancel: Cancel | None = None) -> Token:
        """The next final token.

        Raises UpperError, MismatchError, Diverged, WireError, EgressDenied, ContextError (of the upper side), FileError
        (of the journal), Cancelled.
        """
        assert isinstance(s, Shared)
        if constraint is not None:
            raise UsageError("a schema with an upper side: the upper layers cannot follow it; open the model alone")
        s.cancel = cancel
        if s.link is None:
            self._begin(s, cancel)
        while not s.ready:
            if cancel is not None:
                cancel.check()
            self._listen(s, 0.0)
            if self.how.backlog == "ids":
                self._change_over(s, cancel)
            if self._is_alone(s):
                self._settle(s)
            if s.ready:
                break
            if self._wants_ask(s):
                self._ask(s, cancel)
            elif self._wants_draft(s):
                self._draft(s, cancel)
            else:
                self._wait(s)
        return s.ready.popleft()

    def close(self) -> None:
        self.upper.close()

    # ------------------------------------------------------------ the beginning

    def _begin(self, s: Shared, cancel: Cancel | None) -> None:
        """Open a link; the rows of the prompt leave while the next ones are computed."""
        how, now = self.how, time.perf_counter()
        session, ends = secrets.token_bytes(16), tuple(sorted(s.ends))
        opening = Open(session, 0, how.mode, how.codec, self.row_layer, s.sampling, ends)
        check_sampling(opening)
        ledger = Ledger(s.ids, by_ids=how.by_ids, max_row_bytes=how.max_row_bytes)
        s.ready.clear()  # of an earlier text that ended before all of it was told
        if s.ledger.by_ids and not how.by_ids:  # the earlier text changed over, and its rows were not kept
            s.rewind(0)
        path, left = s.journal_path, None
        if path is not None and path.exists():
            left = self._resume_journal(s, opening, path)
            opening = replace(opening, session=left.head.session)
            ledger = Ledger(left.text, how.by_ids, True, how.max_row_bytes, n_prompt=len(s.ids))
        ledger.begins_like(s.ledger, s.n_run)
        opening = self._goes_on(s, opening, ledger)
        s.ledger, s.ids, s.opening = ledger, ledger.ids, opening
        s.shares, s.asked_at, s.told_at, s.reminded = Shares(), {}, now, 0.0
        s.candidate, s.hope, s.ended, s.is_gone = None, 1.0, False, False
        s.run, s.run_req, s.tried, s.audit_bytes, s.loosened = MIN_RUN, 0, True, 0, 0
        s.before, s.has_tried_ids = Traffic(), False
        s.link = self._open(opening, cancel)
        s.traffic, s.lost_at = s.link.traffic, time.perf_counter()  # a first hello may take long; `Opened` does not
        if path is not None:
            self._keep_journal(s, path, left)
        if s.owed:  # early exits of the earlier text
            self._catch_up(s, cancel)
        while how.mode != Mode.CLOUD_ONLY and len(s.ids) - s.n_run > 1:
            self._prefill(s, min(CHUNK, len(s.ids) - s.n_run - 1), cancel)
            self._listen(s, 0.0)
            self._send_rows(s)

    def _goes_on(self, s: Shared, opening: Open, ledger: Ledger) -> Open:
        """The session of the turn before, if its settings were these: then only the rest is sent."""
        kept, s.kept = s.kept, None
        # Not with a journal: who takes that up after a crash does not know what the session held before.
        if kept is None or s.journal_path is not None or time.monotonic() > kept.until:
            return opening
        if kept.settings != settings_hash(opening):
            return opening
        same = zip(s.ledger.ids, ledger.ids, strict=False)
        n_alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], same))
        ledger.goes_on(s.ledger, n_alike if self.how.by_ids else ledger.n_rows)
        return replace(opening, session=kept.session)

    def _resume_journal(self, s: Shared, opening: Open, path: Path) -> JournalState:
        """One that an earlier process left: its tokens are told again, the next one follows."""
        s.journal, left = Journal.resume(path)
        is_ours = left.head.settings == settings_hash(opening) and left.head.fingerprint.startswith(self.fingerprint)
        if not is_ours:
            raise MismatchError(f"{path}: the journal of another model, or of an answer with other settings")
        if list(left.head.prompt) != s.ids:
            raise MismatchError(f"{path}: the journal of an answer to another prompt")
        s.ready += [Token(i, "journal", 0.0, 0.0) for i in left.ids]
        return left

    def _keep_journal(self, s: Shared, path: Path, left: JournalState | None) -> None:
        """A new journal; or the one that is `left`, if the same model is on the other side."""
        assert s.link is not None
        assert s.opening is not None
        models = self.fingerprint + s.link.model_fp
        if left is None:
            head = JournalHead(s.opening.session, settings_hash(s.opening), models, tuple(s.ids))
            s.journal = Journal.create(path, head)
            return
        knows_both = s.link.model_fp and left.head.fingerprint != self.fingerprint
        if knows_both and left.head.fingerprint != models:
            raise MismatchError(f"{path}: the answer was begun with another model on the upper side; expected that one")

    def _open(self, opening: Open, cancel: Cancel | None) -> Link:
        """A link; where nobody answers and the device may go on alone, one that is down."""
        try:
            return self.upper.open(opening, cancel)
        except (MismatchError, EgressDenied):
            raise
        except UpperError as error:
            if self.how.lost == "wait":
                raise
            return NoLink(str(error))

    def _prefill(self, s: Shared, n: int, cancel: Cancel | None) -> None:
        """The next `n` positions of the prompt; layers above the rows that travel wait for the first draft."""
        started, lower = time.perf_counter(), self.engine.lower
        h = lower.forward(lower.embed(s.pending()[:n]), s.kv, 0, self.reach, cancel)
        self._keep_rows(s, self.reach, s.n_run, h)
        s.n_run += n
        if self.reach < self.stages[-1].last:
            s.owe(self.reach, h)
            self._catch_up_above(s, cancel)
        s.shares.device_s += time.perf_counter() - started

    # ------------------------------------------------------------ drafting

    def _wants_draft(self, s: Shared) -> bool:
        mode = self.how.mode
        if mode == Mode.CLOUD_ONLY or s.ended or s.candidate:
            return False
        alone = self._is_alone(s)
        # One token more than positions, as of any engine; of ids the verdict brings it without a draft.
        if len(s.ids) > self._n_positions(s) - (mode == Mode.LOSSLESS and self.how.by_ids and not alone):
            return False
        if mode == Mode.LOSSY or alone:
            return True
        return s.run_req not in s.ledger.open and s.ledger.n_provisional < self.how.in_flight * self._window(s)

    def _n_positions(self, s: Shared) -> int:
        """That both sides hold; the device alone has its own."""
        assert s.link is not None
        return self.engine.max_len if self._is_alone(s) else min(self.engine.max_len, s.link.max_context)

    def _window(self, s: Shared) -> int:
        """The longest one where the upper side has too much to do: fewer asks, and drafts while one waits."""
        if self.how.window is not None:
            return self.how.window
        return MAX_WINDOW if self._is_pressed(s) else self.pace.window(MAX_WINDOW)

    def _is_pressed(self, s: Shared) -> bool:
        return time.perf_counter() < s.pressed_until

    def _is_alone(self, s: Shared) -> bool:
        """Whether the device decides by itself just now."""
        if self.how.lost == "wait" or s.lost_at is None:
            return False
        return s.is_gone or time.perf_counter() - s.lost_at > GRACE_S

    def _draft(self, s: Shared, cancel: Cancel | None) -> None:
        """One token of the device: final where it may decide, provisional where the upper side will look at it."""
        started, ledger, alone = time.perf_counter(), s.ledger, self._is_alone(s)
        if alone:  # only since now, maybe: it is a matter of time
            self._settle(s)
        while len(s.ids) - s.n_run > CHUNK and s.owed.keys() <= {self.reach}:  # the cache has begun anew
            self._prefill(s, CHUNK, cancel)
        is_checked = self.how.mode == Mode.LOSSLESS and not alone and s.sampling.temperature == 0
        keep, tau_of = partial(self._keep_rows, s), own_tau if is_checked else partial(self._tau, s)
        look = self.engine.look(s, self.stages, cancel=cancel, on_rows=keep, tau_of=tau_of)
        spent = time.perf_counter() - started
        s.shares.device_s += spent
        self.pace.drafted(spent)
        is_sure = s.use_exits and self._is_sure(s, look.stage.exit, look.conf)
        draft = Draft(look.stage.source, look.conf, is_sure and look.stage.exit is not None)
        if self.how.mode == Mode.LOSSY or alone:
            s.candidate = look.token, draft
            s.loosened += draft.is_sure and not self._is_sure(s, look.stage.exit, look.conf, loosely=False)
            if not alone:
                self._audit(s, look.token, draft, cancel)
            if is_sure or alone:
                self._decide(s)
        else:
            if s.tells_drafts:
                s.ready.append(Token(look.token, draft.head, look.conf, 1000 * spent, is_final=False, gen=ledger.gen))
            ledger.add_draft(look.token, draft)
            s.hope, s.ended = s.hope * (1.0 if is_sure else look.conf), look.token in s.ends
        self._send_rows(s)

    def _settle(self, s: Shared) -> None:
        """Alone: what was drafted is final, up to the first draft that stopped only because it would be checked."""
        ledger, last = s.ledger, self.stages[-1].source
        if ledger.n_provisional:
            loose = (i for i, d in sorted(ledger.drafts.items()) if not d.is_sure and d.head != last)
            self._do(s, ledger.settle(next(loose, None)))
        if s.candidate is not None:
            self._decide(s)

    def _decide(self, s: Shared) -> None:
        """What the device thinks best is final."""
        assert s.candidate is not None
        (token, draft), s.candidate = s.candidate, None
        self._do(s, s.ledger.decide(token, draft))

    def _is_sure(self, s: Shared, e: ExitConfig | None, conf: float, *, loosely: bool = True) -> bool:
        """Whether the head that looked last, an exit's or full depth's, would decide by itself."""
        whole = SURE if self.how.tau is None else self.how.tau
        return should_exit(conf, self._tau(s, e, loosely=loosely) if e else whole, debt=0)

    def _tau(self, s: Shared, e: ExitConfig, *, loosely: bool = True) -> float:
        """Above it an exit is sure; `loosely`: lowered as far as a promise goes, if the upper side is pressed."""
        tau = self.taus[e.layer]
        if loosely and e.tau_loose is not None and self.how.mode == Mode.LOSSY and self._is_pressed(s):
            tau = e.tau_loose
        if self.how.decay is None:
            return tau
        return decayed(tau, len(s.ids) - s.ledger.n_prompt, s.n_most, self.how.decay)

    def _press(self, s: Shared, ms: int) -> None:
        """The upper side has too much to do, for so long at least; a token that waits for it may be sure enough now."""
        s.pressed_until = time.perf_counter() + min(ms / 1000, MOST_PRESSED_S) + EASE_S
        if self.how.mode != Mode.LOSSY or s.candidate is None or not s.use_exits:
            return
        draft, e = s.candidate[1], self.heads.get(s.candidate[1].head)
        # One that counts as checked by the upper side is left to it.
        is_counted = self.alarm is not None and is_audited(s.sampling.seed, len(s.ids), self.how.audit)
        if e is not None and not is_counted and self._is_sure(s, e, draft.conf):
            s.loosened += 1
            self._decide(s)

    def _catch_up(self, s: Shared, cancel: Cancel | None) -> None:
        """All rows that exits have left waiting go on as far as an answer needs them."""
        started, below = time.perf_counter(), [stage for stage in self.stages if stage.last <= self.reach]
        self.engine.catch_up(s, below, cancel, on_rows=lambda *rows: self._keep_rows(s, *rows))
        self._catch_up_above(s, cancel)
        s.shares.device_s += time.perf_counter() - started

    def _catch_up_above(self, s: Shared, cancel: Cancel | None) -> None:
        """Too many rows wait for the layers that only drafts want."""
        if len(s.owed.get(self.reach, ())) >= MOST_WAITING:
            self.engine.catch_up(s, [stage for stage in self.stages if stage.first >= self.reach], cancel)

    def _keep_rows(self, s: Shared, last: int, at: int, h: Array) -> None:
        """Rows [n, D] of the positions from `at` on have left layer `last` - 1: those of the cut leave at once."""
        if self.codec is not None and last == self.row_layer and not s.ledger.by_ids:
            s.ledger.add_rows(at, self.codec.encode(h))
            self._send_rows(s)

    def _send_rows(self, s: Shared) -> None:
        """Rows travel as soon as they are there, whether or not somebody will ask: the transfer costs no time then."""
        if s.lost_at is None:
            self._do(s, s.ledger.unsent())

    # ------------------------------------------------------------ asking

    def _wants_ask(self, s: Shared) -> bool:
        ledger = s.ledger
        if s.lost_at is not None:
            return False
        if self.how.mode == Mode.CLOUD_ONLY:
            return not ledger.open and len(s.ids) <= self._n_positions(s)
        if self.how.mode == Mode.LOSSY:
            return s.candidate is not None and not ledger.open
        n = self._n_askable(s) - ledger.asked
        if n <= 0 or len(ledger.open) >= self.how.in_flight or s.run_req in ledger.open:
            return False
        if self._run_of(s) > 1:
            return True
        return s.hope < WORTH or s.ended or n >= self._window(s) or not self._wants_draft(s)

    def _run_of(self, s: Shared) -> int:
        """Tokens that the other side should make by itself: 1, where drafts pay.

        With ids it can; between two runs drafts are tried again, and runs that go on paying get longer.
        """
        assert s.link is not None
        most = max(1, min(s.link.max_run, self._n_positions(s) + 1 - len(s.ids)))
        if self.how.mode == Mode.CLOUD_ONLY:
            return most
        ready = self.how.by_ids and self.how.mode == Mode.LOSSLESS and self.how.window is None
        if not ready or not s.tried or s.ledger.n_provisional or s.ledger.open:
            return 1
        run = min(s.run, most)
        return run if self.pace.prefers_runs(run) else 1

    def _n_askable(self, s: Shared) -> int:
        """Rows that an ask could take along: those that the device has run; of ids also the newest draft."""
        return len(s.ids) - s.ended if s.ledger.by_ids else s.n_run

    def _ask(self, s: Shared, cancel: Cancel | None) -> None:
        if not s.ledger.by_ids:
            self._catch_up(s, cancel)
        assert s.link is not None
        run = self._run_of(s)
        ms = int(1000 * s.link.deadline_s())
        s.hope, s.tried = 1.0, run == 1
        if run > 1:
            s.run_req, s.run = s.ledger.next_req, 2 * s.run
        s.asked_at[s.ledger.next_req] = time.perf_counter()
        self._do(s, s.ledger.make_ask(upto=self._n_askable(s) - 1, run=run, deadline_ms=ms))

    def _audit(self, s: Shared, token: int, draft: Draft, cancel: Cancel | None) -> None:
        """Lossy: some of the tokens are asked about although the device decides; the answer changes counts only."""
        if self.alarm is None or s.lost_at is not None or not is_audited(s.sampling.seed, len(s.ids), self.how.audit):
            return
        if not draft.is_sure:
            s.ledger.count(draft, holds=True)  # it costs nothing to know: the upper side decides
        elif len(s.ledger.audits) < MOST_AUDITS:
            if not s.ledger.by_ids:
                self._catch_up(s, cancel)
            self._do(s, s.ledger.audit(token, draft))
            s.count_audit(s.ledger.audits[s.ledger.next_req - 1].ask)

    # ------------------------------------------------------------ news

    def _listen(self, s: Shared, timeout_s: float) -> None:
        assert s.link is not None
        for news in s.link.receive(timeout_s):
            match news:
                case Verdict():
                    self._on_verdict(s, news)
                case Opened():
                    self._on_opened(s, news)
                case Need():
                    self._do(s, s.ledger.on_need(news))
                case Lost(reason, final):
                    self._on_lost(s, reason, final)
                case Credit(n_bytes, retry_after_ms):
                    if not n_bytes:
                        self._press(s, retry_after_ms)
                case Err():
                    self._on_error(s, news)

    def _change_over(self, s: Shared, cancel: Cancel | None) -> None:
        """Lossy: where rows are more than the link carries, a session by ids takes over as soon as it has opened.

        Rows go on until then, and if it does not open.
        """
        assert s.link is not None
        assert s.opening is not None
        if s.by_ids is None:
            is_time = self.how.mode == Mode.LOSSY and not s.has_tried_ids and s.lost_at is None and s.link.wants_ids()
            if not is_time:
                return
            s.has_tried_ids = True
            session, codec = secrets.token_bytes(16), CodecSpec(CodecId.IDS)
            opening = replace(s.opening, session=session, codec=codec, row_layer=0, resume_token=b"")
            try:
                s.by_ids = ByIds(self.upper.open(opening, cancel), opening)
            except (UpperError, WireError):
                return
        try:
            news = s.by_ids.link.receive(0.0)
        except (UpperError, WireError) as error:
            news = [Lost(str(error))]
        for what in news:
            match what:
                case Opened():
                    self._by_ids_from_here(s, s.by_ids, what)
                    return
                case Err() | Lost():  # an upper half alone, for one: it takes rows and nothing else
                    s.drop_ids()
                    return

    def _by_ids_from_here(self, s: Shared, way: ByIds, opened: Opened) -> None:
        """Everything is final in lossy mode; a token that is waited for is asked about anew."""
        assert s.link is not None
        if opened.settings_hash and opened.settings_hash != settings_hash(way.opening):
            raise MismatchError("the upper side has other settings for this session than the device")
        s.link.send(Close())
        s.link.close()
        s.by_ids, s.before = None, replace(s.traffic)
        s.link, s.opening, s.traffic = way.link, way.opening, way.link.traffic
        s.lost_at, s.is_gone, s.asked_at = None, False, {}
        old = s.ledger
        s.ledger = Ledger(s.ids, by_ids=True, n_prompt=old.n_prompt, counts=old.counts, next_req=old.next_req)
        s.tell(Notice("mode_changed"))
        self._do(s, s.ledger.on_opened(opened, s.link.max_run))

    def _on_verdict(self, s: Shared, v: Verdict) -> None:
        refused_before = s.ledger.counts.retracted
        if v.req in s.ledger.audits:
            s.count_audit(v)
        self._do(s, s.ledger.on_verdict(v))
        s.shares.upper_s += v.upper_us / 1e6
        if v.n_accept:
            s.run = MIN_RUN
        if (asked := s.asked_at.pop(v.req, None)) is not None:
            n_refused = s.ledger.counts.retracted - refused_before
            self.pace.replied(time.perf_counter() - asked, v.upper_us / 1e6, v.n_accept, n_refused)
        if v.req in s.ledger.open:  # a run: its next token is waited for from now on
            s.asked_at[v.req] = time.perf_counter()

    def _on_opened(self, s: Shared, opened: Opened) -> None:
        assert s.opening is not None
        if opened.settings_hash and opened.settings_hash != settings_hash(s.opening):
            raise MismatchError("the upper side has other settings for this session than the device")
        self.on_meeting(opened.epoch, s.cancel)
        if s.shares.opened:
            s.tell(Notice("back"))
        s.shares.opened += 1
        s.lost_at, s.is_gone, s.reason = None, False, ""
        assert s.link is not None
        self._do(s, s.ledger.on_opened(opened, s.link.max_run))
        s.asked_at = dict.fromkeys(s.ledger.open, time.perf_counter())

    def _on_lost(self, s: Shared, reason: str, final: bool) -> None:
        if final and self.how.lost == "wait":
            raise UpperError(f"the upper side is out of reach: {reason}")
        if s.lost_at is None:
            s.lost_at = time.perf_counter()
            s.tell(Notice("degraded"))
        s.is_gone, s.reason = True, reason
        s.asked_at.clear()

    def _on_error(self, s: Shared, err: Err) -> None:
        """What the upper side refuses for good ends the answer, or its share of it; the rest is waited for."""
        s.reason = f"{err.code.name}: {err.text}"
        if err.code == Code.OVERLOADED:
            self._press(s, err.retry_after_ms)
        fatal = err.code in (Code.MISMATCH, Code.DIVERGED, Code.BAD_FRAME)
        if err.retryable or (self.how.lost == "finish" and not fatal):  # then the link is down, and says so
            return
        kinds: dict[Code, type[UpperError]] = {Code.MISMATCH: MismatchError, Code.DIVERGED: Diverged}
        raise kinds.get(err.code, UpperError)(f"the upper side says {s.reason}")

    def _wait(self, s: Shared) -> None:
        """Nothing to do but wait for the other side; whoever waits is told, and the ask is repeated."""
        assert s.link is not None
        started = time.perf_counter()
        self._listen(s, POLL_S)
        now = time.perf_counter()
        s.shares.waited_s += now - started
        if s.ready:
            return
        if s.lost_at is not None and now - s.lost_at > self.how.patience_s:
            why = f" ({s.reason})" if s.reason else ""
            raise UpperError(f"no upper side for {self.how.patience_s:g} s{why}; the text so far is final")
        if s.ledger.final > self._n_positions(s):
            raise ContextError(f"the upper side holds {s.link.max_context} positions, and the text has as many")
        s.asked_at = {req: at for req, at in s.asked_at.items() if req in s.ledger.open}
        oldest = min(s.asked_at.values(), default=now)
        if now - max(oldest, s.reminded) > s.link.deadline_s():
            s.reminded = now
            s.tell(Notice("waiting", int(1000 * (now - oldest))))
            if s.candidate is not None and self.how.slow == "finish":
                self._decide(s)
            else:
                self._do(s, s.ledger.repeat())

    # ------------------------------------------------------------ effects

    def _do(self, s: Shared, effects: list[Effect]) -> None:
        """The ledger's effects, in order; what is final goes to the journal before anybody sees it."""
        finals = [e for e in effects if isinstance(e, Final)]
        if finals and s.journal is not None:
            crcs = [s.ledger.crcs[e.index] if e.index < len(s.ledger.crcs) else 0 for e in finals]
            s.journal.append([e.index for e in finals], [e.id for e in finals], crcs)
        for effect in effects:
            match effect:
                case Send(message):
                    if s.link is not None and s.lost_at is None:
                        s.link.send(message)
                case Rewind(n):
                    s.rewind(n)
                    s.hope, s.ended, s.candidate = 1.0, False, None
                case Final():
                    self._tell(s, effect)
                case Retract(index):
                    s.tell(Notice("retract", index - s.ledger.n_prompt))
                case Rebuild(n):
                    s.tell(Notice("rebuilding", n))
                case Remake(first, end):
                    self._remake(s, first, end)

    def _remake(self, s: Shared, first: int, end: int) -> None:
        """Dropped rows once more.  A row needs those before it, which the cache has, but not as rows: from 0 on."""
        assert self.codec is not None
        started, engine, lower = time.perf_counter(), self.engine, self.engine.lower
        kv = lower.new_kv(engine.max_len, engine.kv_dtype, engine.kv_policy)
        for at in range(0, end, CHUNK):
            ids = np.asarray(s.ids[at : min(at + CHUNK, end)], np.int32)
            h = lower.forward(lower.embed(ids), kv, 0, self.row_layer, s.cancel)
            if len(rows := self.codec.encode(h)[max(0, first - at) :]):
                self._do(s, s.ledger.remade(rows))
            if not s.ledger.dropped:  # one has come out otherwise
                break
        s.shares.device_s += time.perf_counter() - started

    def _tell(self, s: Shared, f: Final) -> None:
        """A token is final: `step` returns it."""
        now = time.perf_counter()
        s.candidate = None
        source = f.source if f.draft is None else f"{f.source}.{f.draft.head.removeprefix('exit.')}"
        conf = 0.0 if f.draft is None else f.draft.conf
        where = "device" if f.source == "exit" else self.upper.where
        s.ready.append(Token(f.id, source, conf, 1000 * (now - s.told_at), where=where, gen=s.ledger.gen))
        s.told_at = now
