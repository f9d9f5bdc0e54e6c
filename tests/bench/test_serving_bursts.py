"""bench/serving_bursts.py on a model of two layers: each server answers everything, one that is missing is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [train])")
pytest.importorskip("safetensors", reason="safetensors is not installed (extra [cloud])")

from tests.paths import ROOT

SCRIPT = ROOT / "bench" / "serving_bursts.py"


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), "--tiny", "--folder", str(folder), "--envs", str(folder / "none"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_servers_get_the_same_requests_and_one_that_is_not_there_is_named(tmp_path: Path) -> None:
    peers = "nearfar:fp32@standard,nearfar:fp32@prefill-first,llama_server:none"
    done = run(tmp_path, "--peers", peers, "--loads", "0.4,0.8", "--requests", "8", "--rounds", "2", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["runs"]
    assert [(r["facts"], r["load"]) for r in rows] == [
        (f"nearfar fp32, {policy}", load) for load in (0.4, 0.8) for policy in ("standard", "prefill-first")
    ]
    assert rows[0]["rate"] == rows[1]["rate"] == pytest.approx(rows[2]["rate"] / 2)
    for r in rows:
        assert 0 < r["ttft_p50_s"] <= r["ttft_p99_s"]
        assert 0 < r["tbt_p50_s"] <= r["tbt_p99_s"] <= r["tbt_max_s"]
        assert 0 <= r["attained"] <= 1
        assert r["at_once"] > 0
    assert "without llama_server:none ended with 1" in done.stderr


def test_without_any_server_there_is_nothing_to_compare(tmp_path: Path) -> None:
    done = run(tmp_path, "--peers", "openvino:none")
    assert done.returncode == 1
    assert "no server could be started" in done.stderr
