"""The two machines with one rule broken at a time: a world that does not notice is too tame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from zlib import crc32

import pytest

from nearfar.ledger import Effect, Ledger, Rewind, Send
from nearfar.wire.messages import Ask, Cut, Ids, Mode, Opened, Rows, Verdict
from nearfar.wire.session import UpperSession

# Worlds in which something happens more often than in all of them.
LATE = {"mode": Mode.LOSSLESS, "is_late": True, "repeats": False, "finishes": False, "faults": ("reset",)}
ALONE = {"mode": Mode.LOSSLESS, "finishes": True, "repeats": False, "faults": ("reset", "half-open")}
IN_ORDER = {"mode": Mode.LOSSLESS, "is_late": False, "n_asks": 16, "faults": ("reset",)}
RUNS = {"mode": Mode.CLOUD_ONLY, "by_ids": True, "run": 100, "repeats": False, "faults": ("reset",)}
KILLS = {"mode": Mode.LOSSLESS, "finishes": False, "is_eager": True, "faults": ("reset", "kill")}
AUDITS = {"mode": Mode.LOSSY, "by_ids": True, "audit": 1.0, "finishes": False, "right": 0.3, "sure": 0.9}
EVICTS = {"repeats": False, "faults": ("evict",)}
DROPS = {"mode": Mode.LOSSLESS, "by_ids": False, "most_rows": 0, "faults": ("evict", "restart")}


@dataclass(frozen=True, slots=True)
class Mutant:
    """`change(original, self, *args)` in place of a method; `focus`: what of a world's setting is fixed."""

    owner: type
    method: str
    change: Callable[..., Any]
    focus: dict[str, Any] = field(default_factory=dict)

    def patch(self, patch: pytest.MonkeyPatch) -> None:
        original, change = getattr(self.owner, self.method), self.change
        patch.setattr(self.owner, self.method, lambda *args, **kwargs: change(original, *args, **kwargs))


def without(effects: list[Effect], kind: type, *messages: type) -> list[Effect]:
    """All but those of a kind; of `Send`, only with such messages."""
    kinds = messages or (object,)
    return [e for e in effects if not (isinstance(e, kind) and isinstance(getattr(e, "message", None), kinds))]


# ------------------------------------------------------------ of the device


def verdicts_of_any_generation(original: Any, self: Ledger, v: Verdict) -> Any:
    return original(self, replace(v, gen=self.gen))


def verdicts_out_of_order(original: Any, self: Ledger, v: Verdict) -> Any:
    if v.req in self.open:
        self.open = {v.req: self.open[v.req], **self.open}
    return original(self, v)


def last_cut_only(original: Any, self: Ledger, opened: Opened) -> Any:
    self.cuts = self.cuts[-1:]
    return original(self, opened)


def no_cuts(original: Any, self: Ledger, opened: Opened) -> Any:
    self.cuts = []
    return original(self, opened)


def asks_not_repeated(original: Any, self: Ledger, opened: Opened) -> Any:
    return without(original(self, opened), Send, Ask)


def rows_not_repeated(original: Any, self: Ledger, opened: Opened) -> Any:
    return without(original(self, opened), Send, Rows, Ids)


def trusting(original: Any, self: Ledger, opened: Opened) -> Any:
    self.is_resumed = False
    return original(self, opened)


def no_more_rows(original: Any, self: Ledger, opened: Opened) -> Any:
    return original(self, replace(opened, rows=min(opened.rows, self.n_rows)))


def eager(original: Any, self: Ledger, *args: Any) -> Any:
    was, self.is_resumed = self.is_resumed, False
    effects = original(self, *args)
    self.is_resumed = was
    return effects


def asks_left_behind(original: Any, self: Ledger, keep: int) -> Any:
    waiting, self.open = self.open, {}
    effect = original(self, keep)
    self.open = waiting
    return effect


def withdrawn_in_silence(original: Any, self: Ledger) -> Any:
    self.open.clear()
    return []


def asked_to_the_end(original: Any, self: Ledger, keep: int | None = None) -> Any:
    asked = self.asked
    effects = original(self, keep)
    self.asked = max(asked, self.asked)
    return effects


def without_audits(original: Any, self: Ledger) -> Any:
    audits, self.audits = self.audits, {}
    effects = original(self)
    self.audits = audits
    return effects


def rows_of_two_kernels(original: Any, self: Ledger, rows: list[bytes]) -> Any:
    self.crcs[self.sent : self.sent + len(rows)] = [crc32(row) for row in rows]
    return original(self, rows)


def dropped_and_not_missed(original: Any, self: Ledger, *args: Any) -> Any:
    self.sent = max(self.sent, self.dropped)
    return original(self, *args)


def drafts_dropped(original: Any, self: Ledger) -> None:
    final, self.final = self.final, self.sent
    original(self)
    self.final = final


# ------------------------------------------------------------ of the upper side


def asks_of_any_generation(original: Any, self: UpperSession, a: Ask) -> Any:
    return original(self, replace(a, gen=self.gen))


def cuts_of_any_generation(original: Any, self: UpperSession, m: Cut) -> Any:
    return original(self, Cut(max(m.gen, self.gen + 1), m.keep))


def one_row_too_many(original: Any, self: UpperSession, m: Cut) -> Any:
    return original(self, Cut(m.gen, m.keep + 1))


def verdicts_that_stay(original: Any, self: UpperSession, keep: int) -> Any:
    kept = self.verdicts.copy()
    effects = original(self, keep)
    self.verdicts = kept
    return effects


def decided_again(original: Any, self: UpperSession, a: Ask) -> Any:
    self.verdicts.clear()
    return original(self, a)


def all_forgotten(_: Any, self: UpperSession, upto: int) -> None:
    self.verdicts.clear()


def rows_of_any_generation(original: Any, self: UpperSession, gen: int, *args: Any) -> Any:
    return original(self, self.gen, *args)


MUTANTS = {
    "verdicts of any generation": Mutant(Ledger, "on_verdict", verdicts_of_any_generation, {"faults": ("kill",)}),
    "verdicts out of order": Mutant(Ledger, "on_verdict", verdicts_out_of_order, LATE | {"n_asks": 16}),
    "the last cut's keep": Mutant(Ledger, "on_opened", last_cut_only, ALONE),
    "cuts are forgotten": Mutant(Ledger, "on_opened", no_cuts),
    "asks are not repeated": Mutant(Ledger, "on_opened", asks_not_repeated),
    "rows are not sent again": Mutant(Ledger, "on_opened", rows_not_repeated),
    "a restart trusts what is there": Mutant(Ledger, "on_opened", trusting, KILLS),
    "what the other side went on with is kept": Mutant(Ledger, "on_opened", no_more_rows, RUNS),
    "a restart sends at once": Mutant(Ledger, "unsent", eager, KILLS),
    "a need is ignored": Mutant(Ledger, "on_need", lambda *_: [], EVICTS),
    "retracted and not rewound": Mutant(Ledger, "_replace", lambda f, *args: without(f(*args), Rewind)),
    "asks stay in the old generation": Mutant(Ledger, "_new_generation", asks_left_behind),
    "asks are withdrawn in silence": Mutant(Ledger, "_withdraw", withdrawn_in_silence, ALONE),
    "settled rows are not asked again": Mutant(Ledger, "settle", asked_to_the_end, ALONE),
    "dropped drafts are not cut": Mutant(Ledger, "_void", lambda f, *args: f(*args)[:2], ALONE),
    "a failed audit is not cut": Mutant(Ledger, "_on_audit", lambda f, *args: f(*args)[:0], AUDITS),
    "audits are not repeated": Mutant(Ledger, "repeat", without_audits, AUDITS | {"faults": ("reset",)}),
    "rows of two kernels are mixed": Mutant(Ledger, "remade", rows_of_two_kernels, DROPS | {"wobbles": 1.0}),
    "dropped rows are not missed": Mutant(Ledger, "unsent", dropped_and_not_missed, DROPS),
    "rows of drafts are dropped": Mutant(Ledger, "_drop", drafts_dropped, DROPS),
    "another kernel, and no cut": Mutant(
        Ledger, "_start_over", lambda f, self: without(f(self), Send), DROPS | {"wobbles": 1.0}
    ),
    "another kernel, and the cache stays": Mutant(
        Ledger, "_start_over", lambda f, self: without(f(self), Rewind), DROPS | {"wobbles": 1.0}
    ),
    "a cut keeps a row": Mutant(UpperSession, "_cut", one_row_too_many),
    "a cut keeps verdicts": Mutant(UpperSession, "_truncate", verdicts_that_stay),
    "cuts of any generation": Mutant(UpperSession, "_cut", cuts_of_any_generation, LATE),
    "rows of any generation": Mutant(UpperSession, "_arrive", rows_of_any_generation, LATE),
    "asks of any generation": Mutant(UpperSession, "_ask", asks_of_any_generation, LATE | {"by_ids": False}),
    "an ask is decided again": Mutant(UpperSession, "_ask", decided_again, IN_ORDER),
    "a commit forgets all verdicts": Mutant(UpperSession, "_commit", all_forgotten, IN_ORDER),
    "a commit forgets one too many": Mutant(UpperSession, "_commit", lambda f, self, n: f(self, n + 1), IN_ORDER),
    "asks behind a refused draft are decided": Mutant(UpperSession, "_is_void", lambda *_: False),
    "an eviction is not told": Mutant(UpperSession, "evict", lambda f, self: f(self)[:1], EVICTS),
}
