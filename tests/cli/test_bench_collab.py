"""`nearfar bench collab`: real servers, real sockets, few tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Nearfar

for package in ("torch", "fastapi", "grpc"):
    pytest.importorskip(package, reason=f"{package} is not installed (extra [cloud])")

SMALL = ("--profiles", "lan", "--answers", "1", "--tokens", "12", "--prompts", "home")


def test_the_table_compares_what_was_asked_for_and_exact_ways_are_exact(nearfar: Nearfar, tmp_path: Path) -> None:
    names = "device only,split,resend,lossy .8,drafts ids,lossless int8,lossless ids"
    picture = tmp_path / "p.png"
    rates = ("--device-rate", "0,0", "--upper-rate", "2,0")
    money = ("--dollars-per-hour", "2")
    done = nearfar("bench", "collab", *SMALL, *rates, *money, "--systems", names, "--plot", str(picture), "--json")
    result = json.loads(done.out)
    rows = {row["system"]: row for row in result["rows"]}
    routers = {f"routing ({name})" for name in ("lossy .8", "lossless int8", "lossless ids")}
    assert set(rows) == {*names.split(","), "cloud-only", *routers}
    for router in routers:
        like = rows[router.removeprefix("routing (").removesuffix(")")]
        assert rows[router]["upper_s"] == pytest.approx(min(like["upper_s"], rows["cloud-only"]["upper_s"]))
        assert rows[router]["energy_j_per_token"] is None  # nothing ran
    for name in ("drafts ids", "split", "resend", "lossless int8", "lossless ids", "cloud-only"):
        assert rows[name]["agrees_with_oracle"] == 1, name
    assert rows["split"]["asks_per_token"] == 1
    assert rows["cloud-only"]["asks_per_token"] < 1
    assert rows["device only"]["kb_per_answer"] == rows["device only"]["cost_of_cloud_only"] == 0
    assert rows["device only"]["device_s"] == rows["device only"]["total_s"]
    assert (rows["device only"]["asked_share"], rows["split"]["asked_share"]) == (0, 1)
    assert rows["device only"]["acceptance"] is None
    assert rows["cloud-only"]["cost_of_cloud_only"] == 1
    for row in rows.values():
        assert row["dollars_per_mtok"] == pytest.approx(row["upper_ms_per_token"] * 2 / 3.6)
        assert row["stall_p95_ms"] >= row["tbt_p99_ms"] or row["system"] in routers  # of one answer
    assert bool(result["energy"]["zones"]) != bool(result["energy"]["why_not"])
    assert rows["resend"]["kb_per_answer"] > 3 * rows["split"]["kb_per_answer"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_people_get_a_table(nearfar: Nearfar) -> None:
    done = nearfar("bench", "collab", *SMALL, "--device-rate", "0,0", "--upper-rate", "0,0", "--systems", "split")
    assert "asks/tok" in done.out
    assert "stall p95" in done.out
    assert "$/Mtok" not in done.out  # nobody said what it costs
    assert done.out.count("cloud-only ") == 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--profiles", "dsl"), "expected a profile"),
        (("--systems", "magic"), "expected some of device only"),
        (("--device-rate", "fast"), "expected two numbers"),
        (("--prompts", "poems"), "expected home, text"),
        (("--at", "6"), "6"),
        (("--dollars-per-hour", "-1"), "expected a number 0..1e+06"),
    ],
)
def test_options_that_make_no_sense_are_refused(nearfar: Nearfar, options: tuple[str, str], expected: str) -> None:
    done = nearfar("bench", "collab", *options)
    assert done.code == 2
    assert expected in done.err
