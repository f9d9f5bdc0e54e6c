"""The exit rule at its edges."""

import numpy as np
import pytest

from nearfar.config import ExitConfig
from nearfar.errors import WeightsError
from nearfar.exit import MAX_DEBT, confidence, max_softmax, should_exit


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
