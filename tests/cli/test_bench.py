"""`bench` measures what it says, and says what it left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nearfar.cli.bench import report
from tests.cli.conftest import Nearfar

QUICK = ["--rounds", "2", "--prompt", "8", "--tokens", "4"]


def test_each_engine_takes_its_turns(nearfar: Nearfar, model: Path) -> None:
    done = nearfar("bench", model, "--engines", "native,numpy", *QUICK, "--json")
    facts = json.loads(done.out)
    assert done.code == 0
    for name in ("native", "numpy"):
        if name in facts["absent"]:
            continue
        found = facts["engines"][name]
        assert len(found["turns"]) == 2
        assert found["decode"] == pytest.approx(sum(t["decode"] for t in found["turns"]) / 2)
        assert found["prefill"] > 0


def test_an_engine_that_cannot_run_the_file_is_named_with_its_reason(
    nearfar: Nearfar, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(model.read_bytes().replace(b"bitnet", b"mamba7"))
    done = nearfar("bench", path, "--engines", "native,numpy", *QUICK)
    assert done.code == 1
    assert "mamba7" in done.err


@pytest.mark.parametrize("words", [["--engines", "fast"], ["--prompt", "600"]])
def test_what_cannot_be_measured_is_refused(nearfar: Nearfar, model: Path, words: list[str]) -> None:
    done = nearfar("bench", model, "--rounds", "1", *words)
    assert done.code == 2


def test_ratios_are_against_the_first_engine() -> None:
    result = {
        "model": "nano",
        "cpu": "a CPU",
        "rounds": 5,
        "prompt": 128,
        "tokens": 64,
        "per": "second",
        "engines": {"native": {"prefill": 900.0, "decode": 300.0}, "numpy": {"prefill": 9.0, "decode": 2.0}},
        "absent": {"llama": "not installed"},
    }
    lines = report(result).splitlines()
    assert lines[3].split()[3:] == "native is 100x and 150x as fast".split()
    assert lines[4].split() == ["llama", "absent:", "not", "installed"]
