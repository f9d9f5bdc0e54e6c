"""A few seconds of the fuzzer in every test run, and proof that it would notice."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz.fuzz_gguf import Check, Report, fuzz_plain, make_check, mutate, seeds
from tests.paths import ROOT


@pytest.fixture(scope="module")
def corpus() -> list[bytes]:
    return seeds()


def test_every_seed_but_the_odd_ones_is_a_sound_model(corpus: list[bytes], tmp_path: Path) -> None:
    check, path = make_check(), tmp_path / "x.gguf"
    outcomes = []
    for data in corpus:
        path.write_bytes(data)
        outcomes.append(check(path))
    assert outcomes[:10] == ["text | sound"] * 9 + ["tensors | sound"]  # the last is an upper half
    assert all("sound" not in o for o in outcomes[10:])


def test_some_hundred_damaged_files_are_all_refused_in_our_own_words(corpus: list[bytes], tmp_path: Path) -> None:
    report = fuzz_plain(make_check(), list(corpus), tmp_path, max_runs=600, seed=1)
    assert report.runs == 600
    assert not report.findings
    assert len(report.outcomes) > 20  # the damage reaches many different checks


def test_the_same_seed_makes_the_same_files(corpus: list[bytes]) -> None:
    first, second = (mutate(corpus[0], corpus[1], random.Random(7)) for _ in range(2))
    assert first == second != corpus[0]


def _crash(path: Path) -> str:
    if path.stat().st_size < 100:
        raise KeyError("a bug")
    return "fine | fine"


def _hang(path: Path) -> str:
    while path.stat().st_size < 100:
        try:
            sum(range(1000))
        except Exception:  # what a careless reader might do: it must not hide the time-out
            continue
    return "fine | fine"


def _hoard(path: Path) -> str:
    if path.stat().st_size < 100:
        np.ones(60 << 20, np.uint8).sum()
    return "fine | fine"


def _fuzz_briefly(check: Check, findings: Path) -> Report:
    return fuzz_plain(check, [bytes(200)], findings, max_runs=60, seed=3, max_growth_mb=40, max_seconds=0.05)


@pytest.mark.parametrize(("check", "said"), [(_crash, "KeyError in"), (_hang, "TooSlow in")])
def test_a_planted_bug_is_found_and_its_input_kept(check: Check, said: str, tmp_path: Path) -> None:
    report = _fuzz_briefly(check, tmp_path)
    assert any(said in problem for problem in report.findings)
    for kept in report.findings.values():
        assert len(kept.read_bytes()) < 100


def test_planted_greed_is_found(tmp_path: Path) -> None:
    code = "import sys, pathlib, tests.fuzz.test_fuzz_gguf as t; t._fuzz_briefly(t._hoard, pathlib.Path(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tmp_path)]  # a process of its own: this one's peak may lie high already
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stderr
    assert "FINDING memory grew by 40 MB" in said
    assert all(kept.stat().st_size < 100 for kept in tmp_path.iterdir())


@pytest.mark.parametrize(("check", "said"), [("_crash", "KeyError"), ("_hang", "s of processor time")])
def test_atheris_finds_planted_bugs_too(check: str, said: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris is not installed: pip install atheris")
    code = (
        "import sys, pathlib, tests.fuzz.test_fuzz_gguf as t, tests.fuzz.fuzz_gguf as f\n"
        f"f.MAX_SECONDS = 0.2\nf.fuzz_atheris(t.{check}, 30, 3, pathlib.Path(sys.argv[1]))"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode != 0
    assert said in ended.stdout + ended.stderr
    assert any(kept.name.startswith("crash-") for kept in tmp_path.iterdir())
