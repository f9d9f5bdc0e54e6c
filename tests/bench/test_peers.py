"""The arithmetic of bench/peers.py, and its engines on a model of two layers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.arrows import ROOT

BENCH = ROOT / "bench"


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def test_a_ratio_is_the_median_of_neighbours_in_time() -> None:
    from peers import Row

    row = Row("m", "decode", 1, "peer", [30.0, 10.0, 20.0], [10.0, 5.0, 4.0], 2.5)  # a busy spell in the middle
    assert row.ratios == [3.0, 2.0, 5.0]
    assert row.ratio == 3.0
    assert row.met is True
    assert Row("m", "decode", 1, "peer", [1.0], [1.0], None).met is None


def test_the_goals_are_those_of_models_that_can_be_made() -> None:
    from peers import GOALS

    from nearfar.bench.random_model import Recipe

    assert {Recipe.parse(model).name for model, _, _ in GOALS}
    assert all(task == "decode" or task.startswith("prefill ") for _, task, _ in GOALS)


def test_the_speed_is_read_out_of_llama_bench() -> None:
    from peers import parse_llama_bench

    assert parse_llama_bench(json.dumps([{"n_prompt": 0, "n_gen": 16, "avg_ts": 12.5}])) == 12.5
    with pytest.raises(SystemExit, match="expected one test"):
        parse_llama_bench("[]")


def test_a_peer_that_a_path_points_to_takes_its_turns(tmp_path: Path) -> None:
    peer = tmp_path / "llama-bench"
    peer.write_text(f"#!{sys.executable}\nprint('[{{\"avg_ts\": 2.0}}]')\n")
    peer.chmod(0o755)
    words = ["--only", "tiny:TQ2_0", "--threads", "1", "--rounds", "2", "--tasks", "decode", "--tokens", "4", "--json"]
    command = [sys.executable, BENCH / "peers.py", *words, "--folder", tmp_path, "--no-llama-cpp-python"]
    done = subprocess.run([*command, "--llama-bench", peer, "--delete"], check=True, capture_output=True, text=True)
    (row,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert row["peer"] == "llama-bench"
    assert row["theirs"] == [2.0, 2.0]
    assert row["ratio"] == pytest.approx(sum(row["ours"]) / 2 / 2.0)
    assert not list(tmp_path.glob("*.gguf"))
