"""Sampling: filters by hand-made cases, draws by their frequencies."""

import numpy as np
import pytest

from nearfar.errors import UsageError
from nearfar.sampling import Sampling, gumbel, keep_min_p, keep_top_k, keep_top_p, penalize, sample

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03], np.float32))


def kept(z: np.ndarray) -> list[int]:
    return np.flatnonzero(np.isfinite(z)).tolist()


def test_greedy_takes_the_largest_logit_and_the_lowest_id_of_equals() -> None:
    assert sample(np.array([1.0, 3.0, 3.0], np.float32), Sampling(), position=7) == 1


def test_top_k_keeps_k_tokens() -> None:
    assert kept(keep_top_k(LOGITS, 2)) == [0, 1]
    assert kept(keep_top_k(LOGITS, 0)) == kept(keep_top_k(LOGITS, 9)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("p", "expected"), [(0.4, [0]), (0.5, [0]), (0.6, [0, 1]), (0.89, [0, 1, 2]), (1.0, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float, expected: list[int]) -> None:
    assert kept(keep_top_p(LOGITS, p)) == expected


def test_min_p_keeps_a_share_of_the_largest() -> None:
    assert kept(keep_min_p(LOGITS, 0.2)) == [0, 1, 2]


def test_repetition_penalty_pushes_recent_tokens_down_whatever_their_sign() -> None:
    z = np.array([2.0, -2.0, 1.0], np.float32)
    out = penalize(z, Sampling(repetition_penalty=2.0, repetition_window=2), recent=[2, 0, 1])
    assert out.tolist() == [1.0, -4.0, 1.0]  # token 2 is outside the window
    assert z.tolist() == [2.0, -2.0, 1.0]


def test_the_same_seed_and_position_draw_the_same_token() -> None:
    s = Sampling(temperature=1.0, seed=11)
    draws = [sample(LOGITS, s, position=i) for i in range(50)]
    assert draws == [sample(LOGITS, s, position=i) for i in range(50)]
    assert draws != [sample(LOGITS, Sampling(temperature=1.0, seed=12), position=i) for i in range(50)]


def test_draws_follow_the_softmax() -> None:
    s = Sampling(temperature=1.0, seed=3)
    counts = np.bincount([sample(LOGITS, s, position=i) for i in range(4000)], minlength=5) / 4000
    assert np.abs(counts - np.exp(LOGITS)).max() < 0.03  # four standard deviations


def test_a_low_temperature_sharpens() -> None:
    s = Sampling(temperature=0.2, seed=3)
    assert np.mean([sample(LOGITS, s, position=i) == 0 for i in range(500)]) > 0.9


def test_gumbel_noise_is_finite() -> None:
    assert np.isfinite(gumbel(0, 0, 100_000)).all()


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"repetition_window": -1},
    ],
)
def test_settings_outside_their_range_are_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(bad))):
        Sampling(**bad)  # type: ignore[arg-type]
