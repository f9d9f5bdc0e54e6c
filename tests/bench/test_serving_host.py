"""bench/serving_host.py: what planning and commit take, for each policy and number of sequences."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.paths import ROOT

SCRIPT = ROOT / "bench" / "serving_host.py"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=300)


def test_each_policy_is_measured_with_as_many_sequences() -> None:
    done = run("--sequences", "2,5", "--steps", "6", "--prompt", "70", "--profile", "5", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["runs"]
    assert [(r["policy"], r["sequences"]) for r in rows] == [
        (policy, n) for n in (2, 5) for policy in ("chunked", "standard")
    ]
    assert all(r["plan_us"] > 0 and r["commit_us"] > 0 and "share" not in r for r in rows)
    assert "function calls" in done.stderr


def test_too_few_steps_for_the_prompts_are_refused() -> None:
    done = run("--sequences", "64", "--steps", "1", "--prompt", "512")
    assert done.returncode == 1
    assert "1 steps are too few for 64 prompts of 512 ids" in done.stderr
    assert "Traceback" not in done.stderr
