"""The exit rule at its edges."""

import numpy as np
import pytest

from nearfar.config import ExitConfig
from nearfar.errors import WeightsError
from nearfar.exit import DRAFT, MAX_DEBT, confidence, decayed, draft_tau, max_softmax, should_exit


def test_confidence_is_the_largest_probability() -> None:
    logits = np.log(np.array([0.2, 0.7, 0.1], np.float32))
    assert max_softmax(logits) == pytest.approx(0.7, abs=1e-6)


def test_temperature_flattens_and_the_isotonic_map_is_read_between_its_points() -> None:
    logits = np.log(np.array([0.8, 0.2], np.float32))
    assert max_softmax(logits, temperature=2.0) == pytest.approx(2 / 3, abs=1e-6)  # sqrt(.8) : sqrt(.2) = 2 : 1
    mapped = ExitConfig(2, isotonic_x=(0.5, 1.0), isotonic_y=(0.0, 0.5))
    assert confidence(logits, mapped) == pytest.approx(0.3, abs=1e-6)


def test_tau_of_one_never_exits_even_when_the_softmax_saturates() -> None:
    logits = np.array([1000.0, 0.0], np.float32)
    assert max_softmax(logits) == 1.0
    assert not should_exit(1.0, tau=1.0, debt=1)
    assert should_exit(1.0, tau=0.999, debt=1)


def test_a_decaying_threshold_begins_stricter_and_ends_where_it_was_calibrated() -> None:
    for decay in (0.5, 4.0):
        taus = [decayed(0.7, t, 50, decay) for t in range(60)]
        assert taus[0] == pytest.approx(0.9 * 0.7 + 0.1)
        assert taus == sorted(taus, reverse=True)
        assert min(taus) >= 0.7
    assert decayed(0.7, 50, 50, 4.0) == 0.7
    assert decayed(0.7, 10, 50, 0.5) == pytest.approx(0.63 + 0.1 * np.exp(-0.1))
    assert decayed(0.7, 49, 50, 0.0) == pytest.approx(0.73)  # it never comes down


@pytest.mark.parametrize("t", [0, 1, 49, 10_000])
def test_a_decaying_threshold_of_one_is_never_passed(t: int) -> None:
    for decay in (0.0, 4.0, 1e300):
        assert decayed(1.0, t, 50, decay) == 1.0
        assert not should_exit(1.0, decayed(1.0, t, 50, decay), debt=1)
        assert 0 <= decayed(0.0, t, 50, decay) <= 0.1


def test_a_draft_that_is_checked_stops_at_a_looser_threshold_if_the_confidence_was_measured() -> None:
    measured = {"isotonic_x": (0.0, 1.0), "isotonic_y": (0.0, 1.0)}
    assert draft_tau(ExitConfig(2, tau=1.0, **measured)) == DRAFT  # also of an exit that decides nothing by itself
    assert draft_tau(ExitConfig(2, tau=0.5, **measured)) == 0.5
    assert draft_tau(ExitConfig(2, tau=0.99)) == 0.99
    assert draft_tau(ExitConfig(2)) == 1.0


def test_confidence_equal_to_the_threshold_goes_on() -> None:
    assert not should_exit(0.9, tau=0.9, debt=1)


def test_a_full_debt_forces_the_upper_layers_to_catch_up() -> None:
    assert should_exit(1.0, tau=0.5, debt=MAX_DEBT)
    assert not should_exit(1.0, tau=0.5, debt=MAX_DEBT + 1)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": 0.0},
        {"tau": 1.5},
        {"tau": float("nan")},
        {"isotonic_x": (0.1,), "isotonic_y": ()},
        {"isotonic_x": (0.5, 0.1), "isotonic_y": (0.0, 1.0)},
    ],
)
def test_a_damaged_calibration_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(WeightsError, match=r"exit\.2"):
        ExitConfig(2, **bad)  # type: ignore[arg-type]
