"""A few seconds of the fuzzer of messages in every test run, and proof that it would notice something."""

from __future__ import annotations

from pathlib import Path

import pytest

from nearfar.wire import unpack
from nearfar.wire.messages import Rows
from tests.fuzz.fuzz_gguf import fuzz_plain
from tests.fuzz.fuzz_wire import READERS, make_check, seeds


def test_every_seed_is_read_to_its_end(tmp_path: Path) -> None:
    check = make_check()
    outcomes = []
    for data in seeds():
        (tmp_path / "x").write_bytes(data)
        outcomes.append(check(tmp_path / "x"))
    for name in ("Open", "Rows", "Ask", "Close", "Opened", "Verdict", "Err", "NoneType", "True rows"):
        assert any(name in outcome for outcome in outcomes), name
    assert "hear_as_device | final 5, gen True" in outcomes
    assert "read_journal | True ids, False torn" in outcomes


def test_some_thousand_damaged_inputs_raise_nothing_but_errors_of_ours(tmp_path: Path) -> None:
    report = fuzz_plain(make_check(), seeds(), tmp_path, max_runs=2000, seed=1)
    assert report.runs == 2000
    assert not report.findings
    reached = {outcome.split()[0] for outcome in report.outcomes}
    assert reached == {read.__name__ for read in READERS}
    assert len(report.outcomes) > 25  # the damage reaches many different checks


def test_a_missing_check_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(unpack._UP, "rows", lambda m: Rows(0, 0, (m.data[: len(m.data) // m.n],), (0,)))
    rows = [data for data in seeds() if data.startswith(b"\0") and b"row 5" in data]
    report = fuzz_plain(make_check(), rows, tmp_path, max_runs=2000, seed=1)
    assert any("ZeroDivisionError" in problem for problem in report.findings)
