"""Faults are drawn from a seed, kept as JSON, and shrunk to those that matter."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from nearfar.chaos.profiles import PROFILES, Profile, profile
from nearfar.chaos.schedule import KINDS, Fault, Schedule, blackouts, draw, merged, read
from nearfar.chaos.shrink import shrink
from nearfar.chaos.tcp import handshake_s, recovery_s, rto_s, wait_for_link_s
from nearfar.errors import FileError, UsageError

ALL = draw(7, list(KINDS), every=2.0, until=200.0)


def test_a_seed_draws_the_same_faults_again_and_another_seed_draws_others() -> None:
    assert draw(7, list(KINDS), 2.0, 200.0) == ALL
    assert draw(8, list(KINDS), 2.0, 200.0).faults != ALL.faults
    assert {f.kind for f in ALL.faults} == set(KINDS)


def test_one_fault_falls_into_every_stretch() -> None:
    assert [int(f.at // 2.0) for f in ALL.faults] == list(range(100))
    tokens = draw(1, ["reset", "evict"], every=20, until=1000, unit="token")
    assert [int(f.at) // 20 for f in tokens.faults] == list(range(50))
    assert all(f.at == int(f.at) for f in tokens.faults)


def test_a_schedule_survives_json_and_a_file(tmp_path: Path) -> None:
    assert Schedule.from_json(ALL.to_json()) == ALL
    path = tmp_path / "faults.json"
    path.write_text(ALL.to_json())
    assert read(path) == ALL


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not a schedule"),
        ("[]", "not a schedule"),
        ("[" * 100_000, "not a schedule"),
        ('{"seed": 1}', "not a schedule"),
        ('{"faults": []}', "seed=None"),
        ('{"seed": 1, "faults": 7}', "not a schedule"),
        ('{"seed": 1, "faults": [7]}', "not a schedule"),
        ('{"seed": 1, "unit": "days", "faults": []}', "expected one of s, token"),
        ('{"seed": 1, "faults": [{"at": 1, "kind": "flood"}]}', "'flood'"),
        ('{"seed": 1, "faults": [{"at": -1, "kind": "reset"}]}', "at=-1"),
        ('{"seed": 1, "faults": [{"at": NaN, "kind": "reset"}]}', "at=nan"),
        ('{"seed": 1, "faults": [{"at": "1", "kind": "reset"}]}', "expected a number"),
        ('{"seed": 1, "faults": [{"at": true, "kind": "reset"}]}', "expected a number"),
        ('{"seed": 1, "faults": [{"at": 1, "kind": "cut", "n_bytes": 1.5}]}', "expected a number"),
        ('{"seed": 1, "faults": [{"at": 1, "kind": "cut", "way": "out"}]}', "expected up or down"),
        ('{"seed": 1, "faults": [{"at": 1, "kind": "reset", "until": 3}]}', "until"),
        ('{"seed": 1, "faults": [{"at": 2, "kind": "reset"}, {"at": 1, "kind": "reset"}]}', "rising"),
    ],
)
def test_what_is_no_schedule_is_refused(text: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=word):
        Schedule.from_json(text)
    path = tmp_path / "faults.json"
    path.write_text(text)
    with pytest.raises(FileError, match="faults"):
        read(path)


def test_a_file_that_is_missing_huge_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="No such file"):
        read(tmp_path / "nowhere.json")
    path = tmp_path / "faults.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FileError, match="utf-8"):
        read(path)
    path.write_bytes(bytes((16 << 20) + 1))
    with pytest.raises(FileError, match="more than"):
        read(path)


def test_the_tunnel_has_blackouts_with_a_link_between_them_and_no_other_profile_has_any() -> None:
    spells = blackouts(profile("tunnel"), 7, until_s=3600)
    assert spells == blackouts(profile("tunnel"), 7, until_s=3600)
    assert len(spells) > 30
    end = 0.0
    for f in spells.faults:
        assert f.kind == "blackout"
        assert 5 <= f.seconds <= 30
        assert f.at - end + 1e-6 >= 20
        end = f.at + f.seconds
    assert [name for name in PROFILES if len(blackouts(PROFILES[name], 7, 3600))] == ["tunnel"]


def test_two_schedules_become_one_in_order() -> None:
    a, b = draw(1, ["reset"], 5, 50), draw(2, ["stall"], 5, 50)
    both = merged(a, b)
    assert both.seed == 1
    assert set(both.faults) == {*a.faults, *b.faults}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rate_bit_s": 0}, "rate_bit_s"),
        ({"jitter_ms": 51}, "jitter_ms"),
        ({"loss": 1.0}, "loss"),
    ],
)
def test_a_link_that_cannot_be_is_refused(change: dict[str, float], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Profile(**{"name": "x", "rate_bit_s": 1e6, "rtt_ms": 50.0, **change})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="4g-bad"):
        profile("5g")


# shrinking


def test_shrinking_finds_the_two_faults_that_matter_among_a_hundred() -> None:
    def fails(s: Schedule) -> bool:
        kinds = [f.kind for f in s.faults]
        return "evict" in kinds and "swap" in kinds[kinds.index("evict") :]

    small = shrink(ALL, fails)
    assert [f.kind for f in small.faults] == ["evict", "swap"]
    assert fails(small)
    assert small.seed == ALL.seed


def test_shrinking_shortens_what_is_left() -> None:
    long = Schedule(1, "s", (Fault(1, "stall", 8.0), Fault(2, "cut", n_bytes=4000), Fault(3, "reset")))
    small = shrink(long, lambda s: any(f.seconds >= 1 for f in s.faults) and any(f.n_bytes >= 300 for f in s.faults))
    assert small.faults == (Fault(1, "stall", 1.0), Fault(2, "cut", n_bytes=500))


def test_a_run_that_fails_without_any_fault_shrinks_to_none() -> None:
    assert shrink(ALL, lambda s: True).faults == ()


def test_shrinking_stops_after_its_runs_and_asks_nothing_twice() -> None:
    asked: list[Schedule] = []

    def fails(s: Schedule) -> bool:
        asked.append(s)
        return len(s) >= 3

    assert len(shrink(ALL, fails, max_runs=10)) >= 3
    assert len(asked) == 10
    asked.clear()
    shrink(ALL, fails)
    assert len(asked) == len(set(asked))


# what a loss costs TCP


def test_a_loss_with_packets_behind_it_costs_a_round_trip_and_one_at_the_end_costs_the_timer() -> None:
    link = Profile("x", 1e6, 50, loss=0.5)
    waits = {recovery_s(link, Random(i), 1000, n_behind=10_000) for i in range(200)}
    assert min(waits - {0.0}) == pytest.approx(link.rtt_s)
    waits = {recovery_s(link, Random(i), 1000, n_behind=0) for i in range(200)}
    assert min(waits - {0.0}) == pytest.approx(rto_s(link))
    assert rto_s(link) == pytest.approx(0.05 + 0.2)


def test_as_many_pieces_are_lost_as_the_profile_says() -> None:
    link, draws = Profile("x", 1e6, 50, loss=0.02), Random(3)
    lost = sum(recovery_s(link, draws, 100, 0) > 0 for _ in range(20_000))
    assert 300 < lost < 500
    lost = sum(recovery_s(link, draws, 10 * 1448, 0) > 0 for _ in range(20_000))  # ten packets in one piece
    assert 3400 < lost < 3850
    clean = Profile("x", 1e6, 50)
    assert not any(recovery_s(clean, draws, 100_000, 0) for _ in range(100))


def test_a_sender_without_a_link_tries_at_growing_intervals() -> None:
    assert wait_for_link_s(0.0, 0.25) == 0.0
    assert wait_for_link_s(-3.0, 0.25) == 0.0
    assert wait_for_link_s(0.1, 0.25) == 0.25
    assert wait_for_link_s(0.3, 0.25) == 0.75
    assert wait_for_link_s(5.0, 0.25) == 0.25 * 31


def test_a_connect_takes_a_round_trip_and_seconds_more_where_its_first_packet_is_lost() -> None:
    clean = Profile("x", 1e6, 50)
    assert handshake_s(clean, Random(1), 0.0) == pytest.approx(0.05)
    assert handshake_s(clean, Random(1), 2.0) == pytest.approx(3.05)
    lossy = Profile("x", 1e6, 50, loss=0.3)
    assert {round(handshake_s(lossy, Random(i), 0.0) - 0.05) for i in range(100)} >= {0, 1, 3, 7}


def test_jitter_stays_within_its_bounds() -> None:
    link, draws = profile("4g-bad"), Random(1)
    ways = [link.one_way_s(draws) for _ in range(1000)]
    assert min(ways) >= 0.04
    assert max(ways) <= 0.08
    assert max(ways) - min(ways) > 0.035
