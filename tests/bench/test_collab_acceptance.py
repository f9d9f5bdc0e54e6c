"""bench/collab_acceptance.py: the loop with its own clock drops what it must; drafters are measured one by one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nearfar.llm import LLM
from nearfar.pace import expected_tokens
from nearfar.sampling import Sampling
from tests.arrows import ROOT
from tests.tiny import write_tiny

N = 40


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


def drafts(holds: list[bool], sure: bool = True):
    from collab_acceptance import Drafts

    return Drafts(np.array(holds), np.full(len(holds), sure), np.full(len(holds), 0.6))


def test_drafts_that_all_hold_hide_the_link_and_none_is_dropped() -> None:
    from collab_acceptance import Link, play

    spent = play(drafts([True] * N), Link(0.02, 0.06, 0.0), 4, worth=1.0)
    assert (spent.dropped, spent.drafted) == (0, N)
    assert spent.asks <= N // 4  # a verdict's own token may spare a draft the check
    assert N * 0.02 < spent.seconds <= N * 0.02 + 0.06 + 1e-9  # only the last verdict is waited for


def test_drafts_that_stop_early_take_less_until_an_ask_brings_their_layers() -> None:
    from collab_acceptance import Link, play

    early = replace(drafts([True] * N), early=np.full(N, True))
    link = Link(0.02, 0.06, 0.0, saved_s=0.01)
    spent = play(early, link, N, worth=0.0)
    assert spent.asks == 1
    assert spent.seconds == pytest.approx(N * 0.01 + 0.01 + 0.06)


def test_drafts_that_never_hold_cost_a_round_trip_a_token() -> None:
    from collab_acceptance import Link, play

    spent = play(drafts([False] * N), Link(0.02, 0.06, 0.0), 1, worth=1.0)
    assert spent.asks >= N
    assert spent.dropped == spent.drafted
    assert spent.seconds == pytest.approx(N * 0.08)


def test_a_loop_that_waits_for_nothing_brings_what_pace_expects() -> None:
    from collab_acceptance import Link, play

    rng, n = np.random.default_rng(0), 3
    spent = play(drafts(list(rng.random(20_000) < 0.8)), Link(1.0, 0.0, 0.0), n, worth=0.0)
    assert 20_000 / spent.asks == pytest.approx(expected_tokens(0.8, n), rel=0.25)


def test_the_more_likely_drafts_have_to_hold_the_more_often_it_asks() -> None:
    from collab_acceptance import Link, play

    asks = [play(drafts([True] * N, False), Link(0.02, 0.06, 0.0), 4, worth=w).asks for w in (1.0, 0.3, 0.0)]
    assert asks[0] > asks[1] > asks[2]


def test_full_depth_as_a_drafter_always_holds_also_when_tokens_are_drawn(tmp_path: Path) -> None:
    from collab_acceptance import by_head, by_lookup, lower_exit_first, texts, ways

    with LLM.open(write_tiny(tmp_path / "tiny.gguf", exits=(1, 2)), backend="numpy") as llm:
        found = texts(llm, "text", 2, Sampling(1.0, seed=5), 8)
        lower = llm.stepper.lower  # type: ignore[union-attr]
        assert all(by_head(lower, 4, "final")(text).holds.all() for text in found)
        assert not all(by_head(lower, 1, "exit.1")(text).holds.all() for text in found)
        low, high = (by_head(lower, layer, f"exit.{layer}") for layer in (1, 2))
        for text in found:
            never, always = lower_exit_first(low, high, 1.0)(text), lower_exit_first(low, high, 0.0)(text)
            assert (never.holds == high(text).holds).all()
            assert (always.holds == low(text).holds).all()
            assert (never.early.any(), always.early.all()) == (False, True)
        assert set(ways(lower, 2)) >= {"exit 1", "exit 2", "layer 3, the final head", "text so far"}
        assert [len(by_lookup(text).holds) for text in found] == [len(text.ids) for text in found]
