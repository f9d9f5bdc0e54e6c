"""Figures of shared answers out of what was measured: each by hand, on answers that are written down here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nearfar.bench.collab.energy import Meter
from nearfar.bench.collab.measure import Answer
from nearfar.bench.collab.routing import LOOK, routing
from nearfar.bench.collab.summary import add_relative_cost, agreement, mixed, quantile, summary

ONE = Answer(
    [1, 2, 3, 4],
    [0.5, 0.6, 1.0, 1.1],
    [0.9] * 4,
    n_asked=1,
    asks=2,
    bytes_up=400,
    bytes_down=40,
    device_ms=100,
    upper_ms=72,
    accepted=3,
    retracted=1,
    reopened=1,
    replayed=7,
    row_layers=12,
    energy_j=8.0,
)
OTHER = replace(ONE, ids=[1, 2], at_s=[0.1, 0.2], confs=[0.1, 0.1], reopened=0, energy_j=4.0)


def test_a_summary_has_every_figure_of_its_answers() -> None:
    right = [Answer([1, 2, 3, 4], [0.0] * 4), Answer([1, 9], [0.0] * 2)]
    found = summary([ONE, OTHER], right, [Answer([1, 9, 9, 9], [0.0] * 4), OTHER], dollars_per_hour=3.6)
    expected = {
        "total_s": 0.65,
        "ttft_ms": 300,
        "tbt_p50_ms": 100,
        "tbt_p95_ms": 400,
        "tbt_p99_ms": 400,
        "stall_p95_ms": 400,
        "tokens_per_s": 6 / 1.3,
        "asked_share": 2 / 6,
        "asks_per_token": 4 / 6,
        "bytes_up_per_token": 800 / 6,
        "bytes_down_per_token": 80 / 6,
        "bytes_up_per_answer": 400,
        "bytes_down_per_answer": 40,
        "device_ms_per_token": 200 / 6,
        "upper_ms_per_token": 24,
        "upper_row_layers_per_token": 4,
        "energy_j_per_answer": 6,
        "energy_j_per_token": 2,
        "dollars_per_mtok": 24,  # 24 ms a token are 24,000 s for a million of them, at 0.001 $ a second
        "acceptance": 0.75,
        "retracted_per_token": 2 / 6,
        "agrees_with_oracle": 0.75,
        "agrees_with_full": 0.625,
        "exact_answers": 0.5,
        "resumes": 1,
        "replayed_rows": 14,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_a_stall_is_the_longest_time_between_tokens_of_each_answer_not_the_wait_for_the_first() -> None:
    steady = Answer(list(range(50)), [5 + i / 10 for i in range(50)])
    stalled = Answer(list(range(50)), [i / 10 + (3 if i > 20 else 0) for i in range(50)])
    right = [steady] * 20
    assert summary([steady] * 20, right, right)["stall_p95_ms"] == pytest.approx(100)
    assert summary([steady] * 18 + [stalled] * 2, right, right)["stall_p95_ms"] == pytest.approx(3100)
    assert Answer([1], [2.0]).stall_ms == 0


def test_figures_that_nobody_has_are_none_and_not_zero() -> None:
    alone = replace(ONE, accepted=0, retracted=0, energy_j=None)
    found = summary([alone, ONE], [ONE, ONE], [ONE, ONE])
    assert (found["energy_j_per_token"], found["dollars_per_mtok"]) == (None, None)
    assert summary([alone], [ONE], [ONE])["acceptance"] is None


def test_cost_is_told_beside_cloud_only() -> None:
    rows = [{"system": "cloud-only", "upper_ms_per_token": 40.0}, {"system": "x", "upper_ms_per_token": 10.0}]
    add_relative_cost(rows)
    assert [row["cost_of_cloud_only"] for row in rows] == [1.0, 0.25]
    add_relative_cost(rows[1:])
    assert rows[1]["cost_of_cloud_only"] is None


def test_quantiles_and_agreement_at_their_ends() -> None:
    assert (quantile([], 0.5), quantile([3, 1, 2], 0.5), quantile([1, 2], 0.99)) == (0.0, 2, 2)
    assert agreement(Answer([], []), Answer([], [])) == 1
    assert agreement(Answer([1, 2], []), Answer([1, 2, 3, 4], [])) == 0.5


# ------------------------------------------------------------ routing


def made(conf: float, upper_ms: float, token: int, step_s: float) -> Answer:
    """Eight tokens."""
    at_s = [step_s * (i + 1) for i in range(8)]
    return Answer([token] * 8, at_s, [conf] * 8, upper_ms=upper_ms, device_ms=8000 * step_s * (upper_ms == 0))


HERE = [made(conf, 0, 1, 0.1) for conf in (0.9, 0.2, 0.6)]  # the device is wrong throughout
THERE = [made(0, ms, 2, 0.2) for ms in (100, 40, 60)]
FULL = THERE


def spending(ms: float) -> list[Answer]:
    return [made(0, ms / 3, 2, 0.1)] * 3


def test_a_router_spends_what_the_compared_way_did_on_the_least_sure_answers() -> None:
    both = routing(HERE, THERE, spending(100), FULL)
    assert both["upper_s"] == pytest.approx(0.1 / 3)  # the second and the third
    assert both["agrees_with_full"] == pytest.approx(2 / 3)
    half = routing(HERE, THERE, spending(70), FULL)
    assert half["upper_s"] == pytest.approx(0.07 / 3)
    assert half["agrees_with_full"] == pytest.approx(0.5)  # the second, and the third at one chance in two


def test_a_router_sends_nothing_for_nothing_and_everything_for_more_than_everything() -> None:
    assert routing(HERE, THERE, spending(0), FULL)["agrees_with_full"] == 0
    everything = routing(HERE, THERE, spending(1000), FULL)
    assert (everything["agrees_with_full"], everything["upper_s"]) == (1, pytest.approx(0.2 / 3))


def test_what_the_device_did_before_it_was_decided_counts() -> None:
    """Four tokens take the device 0.4 s."""
    kept = routing(HERE, THERE, spending(0), FULL)
    assert kept["ttft_ms"] == pytest.approx(100 * LOOK)
    assert kept["total_s"] == pytest.approx(0.8)
    sent = routing(HERE, THERE, spending(1000), FULL)
    assert sent["ttft_ms"] == pytest.approx(100 * LOOK + 200)
    assert sent["total_s"] == pytest.approx(0.4 + 1.6)
    assert sent["device_s"] == pytest.approx(0.4)


def test_an_answer_that_ends_before_the_look_is_over_is_decided_by_what_there_is() -> None:
    short = replace(HERE[0], ids=[1, 1], at_s=[0.1, 0.2], confs=[0.5, 0.7])
    assert routing([short], THERE[:1], spending(0)[:1], FULL[:1])["ttft_ms"] == pytest.approx(200)


def test_a_mixture_lacks_what_one_side_lacks() -> None:
    assert mixed({"a": 1.0, "b": None}, {"a": 3.0, "b": 2.0}, 0.25) == {"a": 1.5, "b": None}


# ------------------------------------------------------------ energy


def zone(folder: Path, place: str, name: str, energy: str, range_uj: str = "1000000") -> Path:
    made = folder / place
    made.mkdir(parents=True)
    for file, text in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", range_uj)):
        (made / file).write_text(text + "\n")
    return made / "energy_uj"


def test_packages_and_memory_are_added_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", "100000")
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", "0")
    others = [zone(tmp_path, place, name, "0") for place, name in (
        ("intel-rapl:0:0", "core"), ("intel-rapl:1", "psys"), ("intel-rapl-mmio:0", "package-0"))]  # fmt: skip
    meter = Meter(tmp_path)
    before = meter.read()
    for file, now in ((package, "400000"), (memory, "50000"), *((file, "900000") for file in others)):
        file.write_text(now)
    assert meter.why_not == ""
    assert [z.name for z in meter.zones] == ["package-0", "dram"]
    assert meter.joules(before) == pytest.approx(0.35)


def test_a_counter_that_began_again_has_passed_its_range(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", "900000")
    meter = Meter(tmp_path)
    before = meter.read()
    file.write_text("50000")
    assert meter.joules(before) == pytest.approx(0.15)


def test_where_nobody_counts_energy_there_is_none_and_a_reason(tmp_path: Path) -> None:
    missing = Meter(tmp_path / "nowhere")
    assert missing.joules(missing.read()) is None
    assert "is not there" in missing.why_not
    (tmp_path / "empty").mkdir()
    assert "no zone" in Meter(tmp_path / "empty").why_not


@pytest.mark.parametrize("text", ["many", "-1", "9" * 40, ""])
def test_a_count_that_is_none_is_no_energy(tmp_path: Path, text: str) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", text)
    meter = Meter(tmp_path)
    assert "cannot be read" in meter.why_not
    assert meter.joules(meter.read()) is None


def test_a_counter_that_goes_away_is_no_energy(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", "1")
    meter = Meter(tmp_path)
    before = meter.read()
    file.unlink()
    assert meter.joules(before) is None
