"""A few seconds of the panel fuzzer in every test run, and proof that its second way reaches the engine."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz.fuzz_gguf import fuzz_plain

pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")

from tests.fuzz.fuzz_panels import Bench, make_check, sign


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    logging.getLogger("nearfar").setLevel(logging.ERROR)
    return Bench(tmp_path_factory.mktemp("fuzz"))


def test_every_seed_is_a_sound_file(bench: Bench, tmp_path: Path) -> None:
    check = make_check(bench)
    for data in bench.seeds():
        (tmp_path / "x").write_bytes(data)
        assert "opened / ran" in check(tmp_path / "x")


def test_some_hundred_damaged_files_change_no_number_and_crash_nothing(bench: Bench, tmp_path: Path) -> None:
    report = fuzz_plain(make_check(bench), bench.seeds(), tmp_path, max_runs=300, seed=1)
    assert report.runs == 300
    assert not report.findings
    assert len(report.outcomes) > 20  # the damage reaches many different checks
    assert any(outcome.endswith("ran") for outcome in report.outcomes)
    assert any("engine:" in outcome for outcome in report.outcomes)


def test_wrong_numbers_would_be_noticed(bench: Bench, tmp_path: Path) -> None:
    """Other codes under right digests, as only harm makes them: then the fuzzer's comparison is what is left."""
    data = bytearray(bench.places[0].read_bytes())
    data[1344 : 1344 + 4096] = np.random.default_rng(0).integers(0, 256, 4096, np.uint8).tobytes()
    (tmp_path / "x").write_bytes(sign(bytes(data), bench.native._core.checksums))
    with pytest.raises(AssertionError, match="other numbers"):
        make_check(bench)(tmp_path / "x")
