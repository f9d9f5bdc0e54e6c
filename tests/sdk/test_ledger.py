"""One answer, two machines: whatever network and processes do, the text is the oracle's, told once and in order."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nearfar.errors import Diverged, WireError
from nearfar.ledger import Draft, Effect, Final, Ledger, Rebuild, Remake, Retract, Rewind, Send
from nearfar.wire.messages import Ask, Commit, Cut, Ids, Mode, Need, Opened, Rows, Verdict
from tests.sdk.ledger_mutants import MUTANTS
from tests.sdk.ledger_world import World
from tests.sdk.world_oracle import Setting, setting

QUICK = 50  # schedules of a test
N_MUTANT = 400  # schedules that a mutant may survive at most


def play(seed: int, n_tokens: int = 25, p_fault: float = 0.02, **focus: Any) -> World:
    """A world of which everything follows from the seed, and from what is fixed in `focus`."""
    rng = random.Random(seed)
    return World(replace(setting(rng, n_tokens, p_fault), **focus), rng).play()


# ------------------------------------------------------------ any schedule


@pytest.mark.parametrize("first", range(0, 6 * QUICK, QUICK))
def test_any_schedule_of_faults_gives_the_text_of_the_oracle(first: int) -> None:
    for seed in range(first, first + QUICK):
        try:
            play(seed)
        except Exception as error:
            pytest.fail(f"seed {seed}: {error}")


SETTINGS = st.builds(
    Setting,
    mode=st.sampled_from(Mode),
    by_ids=st.booleans(),
    n_tokens=st.integers(1, 12),
    n_prompt=st.integers(1, 4),
    window=st.integers(1, 16),
    n_asks=st.integers(1, 5),
    run=st.integers(1, 20),
    right=st.sampled_from((0.0, 0.5, 1.0)),
    sure=st.sampled_from((0.0, 0.5, 1.0)),
    n_vocab=st.sampled_from((2, 50)),
    n_stops=st.integers(0, 1),
    p_fault=st.sampled_from((0.0, 0.02, 0.1)),
    is_late=st.booleans(),
    is_eager=st.booleans(),
    repeats=st.booleans(),
    finishes=st.booleans(),
    audit=st.sampled_from((0.0, 0.3, 1.0)),
    most_rows=st.sampled_from((None, 0, 2)),
    wobbles=st.sampled_from((0.0, 0.5)),
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(SETTINGS, st.randoms(use_true_random=False))
def test_no_schedule_that_hypothesis_finds_breaks_it(s: Setting, rng: random.Random) -> None:
    World(replace(s, by_ids=s.by_ids or s.mode == Mode.CLOUD_ONLY), rng).play()


@pytest.mark.slow
def test_a_hundred_thousand_tokens_with_a_fault_in_twenty_are_the_oracles() -> None:
    n_tokens = n_faults = seed = 0
    while n_tokens < 100_000:
        world = play(10_000 + seed, n_tokens=100)
        n_tokens += len(world.text) - world.s.n_prompt
        n_faults += world.n_faults
        seed += 1
    assert 20 * n_faults >= n_tokens


def test_the_world_is_not_tame() -> None:
    """Each fault, and what it leads to, happens often enough to be noticed."""
    seen = {"retracted": 0, "stale": 0, "replayed": 0, "late": 0}
    n_audits = n_remade = 0
    kinds = dict.fromkeys(Setting().faults, 0)
    for seed in range(2 * QUICK):
        world = play(seed)
        counts = world.device.ledger.counts
        seen["retracted"] += counts.retracted
        seen["stale"] += counts.stale
        seen["replayed"] += counts.replayed
        seen["late"] += world.n_late
        n_audits += world.n_audits
        n_remade += world.n_remade
        for kind in kinds:
            kinds[kind] += world.counts[kind]
    assert min(seen.values()) > QUICK, seen
    assert min(kinds.values()) > QUICK // 5, kinds
    assert n_audits > QUICK // 5
    assert n_remade > QUICK // 2


def test_a_device_that_keeps_few_rows_and_changes_its_kernel_tells_what_is_behind_its_rows() -> None:
    n_kernels = 0
    for seed in range(QUICK):
        world = play(30_000 + seed, mode=Mode.LOSSLESS, by_ids=False, most_rows=seed % 3, wobbles=0.5)
        n_kernels += len(world.kernel)
    assert n_kernels > QUICK // 5


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name].patch(monkeypatch)
    for seed in range(N_MUTANT):
        try:
            play(20_000 + seed, 15, 0.03, **MUTANTS[name].focus)
        except (AssertionError, Diverged, WireError):
            return
    pytest.fail(f"not noticed in {N_MUTANT} schedules")


# ------------------------------------------------------------ one rule at a time

HEAD = Draft("exit.2", 0.9)


def sent(effects: list[Effect]) -> list[Any]:
    return [e.message for e in effects if isinstance(e, Send)]


def of_rows(*ids: int) -> list[bytes]:
    return [bytes([i]) * 4 for i in ids]


def drafted() -> Ledger:
    """A prompt of two, drafts 5, 6, 7 behind it, rows of all but the last, asked in two pieces."""
    ledger = Ledger([1, 2])
    for token in (5, 6, 7):
        ledger.add_draft(token, HEAD)
    ledger.add_rows(0, of_rows(1, 2, 5, 6))
    assert sent(ledger.make_ask(upto=2))[-1] == Ask(1, 0, 2, 1, (5,))
    assert sent(ledger.make_ask())[-1] == Ask(2, 0, 3, 3, ())
    return ledger


def test_a_perfect_drafter_asks_once_in_a_window() -> None:
    for by_ids in (False, True):
        for window in (1, 4, 15):
            s = Setting(by_ids=by_ids, n_tokens=60, window=window, right=1.0, sure=1.0, n_asks=1, p_fault=0)
            world = World(s, random.Random(window), is_hasty=False).play()
            assert world.n_retracts == 0
            assert world.n_asks <= 60 // window + 1


def test_what_is_drafted_is_accepted_retracted_or_still_open() -> None:
    for seed in range(QUICK):
        world = play(seed, mode=Mode.LOSSLESS, finishes=False, faults=("reset", "evict", "restart", "fail"))
        counts = world.device.ledger.counts
        assert counts.drafted == counts.accepted + counts.retracted + world.device.ledger.n_provisional


def test_a_verdict_that_comes_early_waits_for_those_before_it() -> None:
    ledger = drafted()
    assert ledger.on_verdict(Verdict(2, 0, 4, 0, (7,))) == []
    effects = ledger.on_verdict(Verdict(1, 0, 2, 1, (6,)))
    finals = [(e.index, e.id, e.source) for e in effects if isinstance(e, Final)]
    assert finals == [(2, 5, "verified"), (3, 6, "verified"), (4, 7, "verified")]
    assert sent(effects)[-1] == Commit(5)


def test_a_refused_draft_takes_everything_behind_it_along() -> None:
    ledger = drafted()
    effects = ledger.on_verdict(Verdict(1, 0, 2, 0, (9,)))
    assert effects == [Retract(2), Rewind(2), Send(Cut(1, 2)), Final(2, 9, "upper", None), Send(Commit(3))]
    assert (ledger.ids, ledger.n_rows, ledger.sent, ledger.asked, ledger.open) == ([1, 2, 9], 2, 2, 2, {})
    assert ledger.on_verdict(Verdict(2, 0, 4, 0, (7,))) == []
    assert ledger.counts.stale == 1


def test_a_verdict_about_other_rows_ends_the_answer() -> None:
    with pytest.raises(Diverged, match="different rows below position 3"):
        drafted().on_verdict(Verdict(1, 0, 2, 1, (6,), state_hash=b"12345678"))


@pytest.mark.parametrize(
    "verdict",
    [
        Verdict(1, 0, 3, 0, (5,)),
        Verdict(1, 0, 2, 2, (5,)),
        Verdict(1, 0, 2, -1, (5,)),
        Verdict(1, 0, 2, 0, ()),
        Verdict(1, 0, 2, 0, (5, 6)),
        Verdict(1, 0, 2, 0, (5,)),  # it refuses 5 and says 5
    ],
)
def test_a_verdict_that_answers_something_else_is_an_error(verdict: Verdict) -> None:
    with pytest.raises(WireError):
        drafted().on_verdict(verdict)


def test_a_cut_that_was_lost_is_said_again_under_a_new_number() -> None:
    ledger = drafted()
    ledger.on_verdict(Verdict(1, 0, 2, 0, (9,)))  # its Cut(1, 2) is lost
    ledger.add_rows(2, of_rows(9))
    messages = sent(ledger.on_opened(Opened(0, 4, 3, 0)))
    assert messages == [Cut(2, 2), Rows(2, 2, tuple(ledger.rows[2:]), tuple(ledger.crcs[2:]))]


def test_what_is_still_there_is_not_sent_again() -> None:
    effects = drafted().on_opened(Opened(0, 3, 0, 0))
    assert effects[0] == Rebuild(1)
    assert [type(m) for m in sent(effects)] == [Rows, Ask, Ask]
    assert sent(effects)[0].pos0 == 3


def test_a_device_that_was_killed_trusts_no_row_of_the_other_side() -> None:
    """The other side may hold a draft where the journal holds the token that replaced it, in the same generation."""
    for by_ids, keep in ((False, 0), (True, 2)):
        ledger = Ledger([1, 2, 9], by_ids=by_ids, is_resumed=True, n_prompt=2)
        ledger.add_rows(0, [] if by_ids else of_rows(1, 2, 9))
        assert sent(ledger.make_ask()) == []
        messages = sent(ledger.on_opened(Opened(0, 5, 5, 0)))
        assert messages[0] == Cut(1, keep)
        assert messages[1].pos0 == keep
        assert messages[2] == Ask(1, 1, 2, 2)


def test_a_need_is_filled_and_the_asks_come_again() -> None:
    ledger = drafted()
    messages = sent(ledger.on_need(Need(0, 1)))
    assert [type(m) for m in messages] == [Rows, Ask, Ask]
    assert messages[0].pos0 == 1
    assert ledger.on_need(Need(7, 1)) == []


def test_a_token_that_the_device_decides_withdraws_what_was_asked() -> None:
    ledger = Ledger([1, 2], by_ids=True)
    ledger.make_ask()
    effects = ledger.decide(8, HEAD)
    assert effects == [Send(Cut(1, 2)), Final(2, 8, "exit", HEAD), Send(Commit(3))]
    assert ledger.on_verdict(Verdict(1, 0, 2, 0, (5,))) == []
    assert sent(ledger.make_ask()) == [Ids(1, 2, (8,)), Ask(2, 1, 2, 2)]


def test_an_audit_changes_counts_and_neither_the_text_nor_other_asks() -> None:
    sure = Draft("exit.2", 0.9, is_sure=True)
    for says, n_wrong in ((8, 0), (5, 1)):
        ledger = Ledger([1, 2])
        ledger.add_rows(0, of_rows(1, 2))
        assert sent(ledger.audit(8, sure))[-1] == Ask(1, 0, 1, 1)
        assert sent(ledger.decide(8, sure)) == [Commit(2)]  # its verdict is still wanted
        ledger.add_rows(2, of_rows(8))
        ledger.make_ask()
        assert ledger.on_verdict(Verdict(1, 0, 2, 0, (says,))) == []
        assert (ledger.ids, list(ledger.open)) == ([1, 2, 8], [2])
        counts = ledger.counts
        assert (counts.checked, counts.sure, counts.sure_wrong, counts.asks, counts.audits) == (1, 1, n_wrong, 2, 1)


def test_every_row_below_an_ask_is_counted_once_whoever_decided_it() -> None:
    ledger = Ledger([1, 2], by_ids=True)
    ledger.on_opened(Opened(0, 0, 0, 0))
    ledger.decide(8, HEAD)
    ledger.decide(9, HEAD)
    ledger.make_ask()
    assert ledger.counts.rows_asked == 4
    ledger.on_verdict(Verdict(1, 0, 4, 0, (5,)))
    ledger.audit(7, HEAD)
    ledger.decide(7, HEAD)
    assert ledger.counts.rows_asked == 5
    ledger.decide(6, HEAD)
    ledger.make_ask()
    assert ledger.counts.rows_asked == 7


def test_rows_that_the_other_side_has_run_for_the_turn_before_are_not_counted_again() -> None:
    ledger = Ledger([1, 2, 3, 4], by_ids=True)
    ledger.on_opened(Opened(0, 3, 2, 0))
    ledger.make_ask()
    assert ledger.counts.rows_asked == 2


def test_with_ids_an_audit_that_fails_is_followed_by_what_was_told() -> None:
    """The other side holds the told token for a refused draft and would decide nothing behind it."""
    ledger = Ledger([1, 2], by_ids=True)
    ledger.audit(8, HEAD)
    ledger.decide(8, HEAD)
    ledger.make_ask()
    messages = sent(ledger.on_verdict(Verdict(1, 0, 2, 0, (5,))))
    assert messages == [Cut(1, 2), Ids(1, 2, (8,)), Ask(2, 1, 2, 2)]


def test_of_checked_drafts_those_that_were_sure_are_counted_apart() -> None:
    ledger = Ledger([1, 2], by_ids=True)
    for token, is_sure in ((5, True), (6, False), (7, True), (8, True)):
        ledger.add_draft(token, Draft("exit.2", 0.9, is_sure))
    ledger.make_ask()
    ledger.on_verdict(Verdict(1, 0, 2, 2, (9,)))
    assert (ledger.counts.checked, ledger.counts.sure, ledger.counts.sure_wrong) == (3, 2, 1)  # nobody judged the 8


def test_drafts_that_are_settled_can_be_asked_behind() -> None:
    ledger = drafted()
    ledger.add_rows(4, of_rows(7))
    ledger.make_ask()
    effects = ledger.settle()
    assert [e.index for e in effects if isinstance(e, Final)] == [2, 3, 4]
    assert sent(ledger.make_ask())[-1] == Ask(4, 1, 4, 4)


def test_a_run_tells_each_token_once() -> None:
    ledger = Ledger([1, 2], by_ids=True)
    ledger.make_ask(run=3)
    for i, token in enumerate((5, 6, 7)):
        verdict = Verdict(1, 0, 2 + i, 0, (token,))
        finals = [e for e in ledger.on_verdict(verdict) if isinstance(e, Final)]
        assert [(f.index, f.id, f.source) for f in finals] == [(2 + i, token, "upper")]
        assert ledger.on_verdict(verdict) == []
    assert not ledger.open
    assert sent(ledger.make_ask())[0] == Ids(0, 4, (7,))  # the last one is not there yet


def test_rows_travel_in_messages_of_bounded_size() -> None:
    ledger = Ledger(list(range(102)))
    ledger.add_rows(0, [bytes(1000)] * 100)
    messages = sent(ledger.unsent())
    assert [m.n_bytes for m in messages] == [16000] * 6 + [4000]
    assert [m.pos0 for m in messages] == list(range(0, 100, 16))
    ledger.add_rows(100, [bytes(70000)] * 2)
    assert [len(m.data) for m in sent(ledger.unsent())] == [1, 1]


def capped() -> Ledger:
    """Four final positions whose rows were sent, and a draft; two rows are kept."""
    ledger = Ledger([1, 2, 3, 4], max_row_bytes=8)
    ledger.add_rows(0, of_rows(1, 2, 3, 4))
    ledger.add_draft(5, HEAD)
    ledger.add_rows(4, of_rows(5))
    return ledger


def test_rows_that_are_final_and_sent_are_dropped_as_far_as_there_are_too_many() -> None:
    ledger = capped()
    assert (ledger.dropped, len(ledger.rows)) == (0, 5)  # nothing has been sent
    ledger.unsent()
    assert (ledger.dropped, ledger.n_rows, ledger.rows) == (3, 5, of_rows(4, 5))
    ledger.max_row_bytes = 0
    ledger.unsent()
    assert (ledger.dropped, ledger.n_rows, ledger.rows) == (4, 5, of_rows(5))  # that of a draft stays


def test_dropped_rows_are_made_again_when_they_are_wanted_and_the_others_follow() -> None:
    ledger = capped()
    ledger.unsent()
    assert ledger.on_need(Need(0, 1)) == [Rebuild(4), Remake(1, 3)]
    assert [m.pos0 for m in sent(ledger.remade(of_rows(2)))] == [1]
    messages = sent(ledger.remade(of_rows(3)))
    assert [(m.pos0, list(m.data)) for m in messages] == [(2, of_rows(3)), (3, of_rows(4, 5))]
    assert (ledger.sent, ledger.counts.remade) == (5, 2)
    assert ledger.on_need(Need(0, 3))[1:] == [Send(messages[1])]  # those are still here


def test_a_row_that_comes_out_otherwise_makes_everything_start_over() -> None:
    ledger = capped()
    ledger.unsent()
    ledger.on_need(Need(0, 0))
    assert ledger.remade(of_rows(1, 9)) == [Retract(4), Rewind(0), Send(Cut(1, 0))]
    assert (ledger.ids, ledger.n_rows, ledger.dropped, ledger.sent) == ([1, 2, 3, 4], 0, 0, 0)
    ledger.add_rows(0, of_rows(1, 9, 3, 4))
    assert [type(m) for m in sent(ledger.make_ask())] == [Rows, Ask]


def test_a_text_that_begins_like_an_earlier_one_has_its_rows_and_what_was_dropped() -> None:
    earlier = capped()
    earlier.unsent()
    for n, dropped, rows in ((2, 2, []), (4, 3, of_rows(4)), (5, 3, of_rows(4, 5))):
        ledger = Ledger([1, 2, 3, 4, 5, 6])
        ledger.begins_like(earlier, n)
        assert (ledger.n_rows, ledger.dropped, ledger.rows) == (n, dropped, rows)
        assert ledger.unsent() == [Remake(0, dropped)]
