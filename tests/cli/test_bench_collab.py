"""`nearfar bench collab`: real servers, real sockets, few tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Nearfar

for package in ("torch", "fastapi", "grpc"):
    pytest.importorskip(package, reason=f"{package} is not installed (extra [cloud])")

SMALL = ("--profiles", "lan", "--answers", "1", "--tokens", "12", "--prompts", "home")


def mixed(here: float, there: float, rows: dict[str, dict[str, float]]) -> float:
    share = min(1.0, rows["lossy .8"]["upper_s"] / rows["cloud-only"]["upper_s"])
    return (1 - share) * here + share * there


def test_the_table_compares_what_was_asked_for_and_exact_ways_are_exact(nearfar: Nearfar, tmp_path: Path) -> None:
    names = "device only,split,resend,lossy .8,lossless int8,lossless ids"
    picture = tmp_path / "p.png"
    rates = ("--device-rate", "0,0", "--upper-rate", "2,0")
    done = nearfar("bench", "collab", *SMALL, *rates, "--systems", names, "--plot", str(picture), "--json")
    result = json.loads(done.out)
    rows = {row["system"]: row for row in result["rows"]}
    assert set(rows) == {*names.split(","), "cloud-only", "routing"}
    assert rows["routing"]["total_s"] == pytest.approx(
        mixed(rows["device only"]["total_s"], rows["cloud-only"]["total_s"], rows), rel=1e-6
    )
    for name in ("split", "resend", "lossless int8", "lossless ids", "cloud-only"):
        assert rows[name]["agrees_with_oracle"] == 1, name
    assert rows["split"]["asks_per_token"] == 1
    assert rows["cloud-only"]["asks_per_token"] < 1
    assert rows["device only"]["kb_per_answer"] == 0
    assert rows["resend"]["kb_per_answer"] > 3 * rows["split"]["kb_per_answer"]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_people_get_a_table(nearfar: Nearfar) -> None:
    done = nearfar("bench", "collab", *SMALL, "--device-rate", "0,0", "--upper-rate", "0,0", "--systems", "split")
    assert "asks/tok" in done.out
    assert "cloud-only" in done.out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--profiles", "dsl"), "expected a profile"),
        (("--systems", "magic"), "expected some of device only"),
        (("--device-rate", "fast"), "expected two numbers"),
        (("--prompts", "poems"), "expected home, text"),
        (("--at", "6"), "6"),
    ],
)
def test_options_that_make_no_sense_are_refused(nearfar: Nearfar, options: tuple[str, str], expected: str) -> None:
    done = nearfar("bench", "collab", *options)
    assert done.code == 2
    assert expected in done.err
