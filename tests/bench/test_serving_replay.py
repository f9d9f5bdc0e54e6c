"""bench/serving_replay.py: each policy on each workload, and by what the base does."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.paths import ROOT

SCRIPT = ROOT / "bench" / "serving_replay.py"


def run(*words: str) -> str:
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_policies_are_compared_on_poisson_on_bursts_and_beside_a_long_prompt() -> None:
    text = run("--requests", "12", "--loads", "0.5")
    titles = [line for line in text.splitlines() if line.startswith("simulated, ")]
    assert len(titles) == 3
    assert ["gamma-cv1" in titles[0], "gamma-cv4" in titles[1], "a prompt of 2048" in titles[2]] == [True] * 3
    assert text.count("chunked / prefill-first: TTFT p99") == 3
    found = json.loads(run("--requests", "6", "--loads", "0.5", "--promise", "--json"))
    runs = list(found["runs"].values())[-1]
    assert runs["chunked"]["tbt_s"]["max"] <= runs["prefill-first"]["tbt_s"]["max"] / 5


def test_a_trace_that_is_missing_is_said() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--trace", "none.csv"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "none.csv: No such file" in done.stderr
    assert "Traceback" not in done.stderr
