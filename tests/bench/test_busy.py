"""The arithmetic of bench/busy.py."""

from __future__ import annotations

import pytest

from tests.arrows import ROOT


def test_the_fair_share_beside_one_loop_a_core_is_half_of_the_idle_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    from busy import Row, busy_loops, line

    row = Row("nearfar", "m", 2, idle=[20.0, 10.0, 20.0], loaded=[10.0, 3.0, 9.0], idle_cpu=0.0)
    assert row.shares == [1.0, 0.6, 0.9]
    assert row.share == 0.9
    assert line(row).endswith("70% met")
    with busy_loops(1):
        pass
