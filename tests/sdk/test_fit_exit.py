"""An exit with a residual: its arithmetic in both engines, its way into a file, and what fitting it brings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from nearfar.cli.main import main
from nearfar.config import MAX_RANK
from nearfar.errors import DataError, WeightsError
from nearfar.eval.fit_exit import BATCH, Examples, Head, agreement, fit, loss_and_gradients, openings, write_exit
from nearfar.gguf_reader import GGUFFile
from nearfar.halves import check_pair, split
from nearfar.llm import LLM
from nearfar.lower import open_lower
from nearfar.lower_numpy import bend, rms_norm
from nearfar.options import EngineOptions
from nearfar.weights import Weights
from nearfar.wire.fingerprint import FOR_ROWS, Split, parts
from tests.edited import Edit, edited
from tests.tiny import write_tiny

EPS, RANK, D = 1e-5, 5, 256
MAX_HEAD_ERROR = 2e-4  # between the engines' head of floats, of logits that are about 1: sums in another order


def head(seed: int = 0, d: int = D, rank: int = RANK) -> Head:
    rng = np.random.default_rng(seed)
    shapes = ((d,), (rank, d), (d, rank))
    return Head(*(rng.normal(0, 0.3, shape).astype(np.float32) for shape in shapes))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("plain") / "tiny.gguf", exits=(1, 2), embedding_type="Q8_0")


@pytest.fixture(scope="module")
def fitted(plain: Path) -> Path:
    with GGUFFile.open(plain) as file:
        return write_exit(file, plain.with_name("fitted.gguf"), 2, head())


def rows(n: int) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 2, (n, D)).astype(np.float32)


def test_a_residual_of_zeros_leaves_the_exit_as_it_was() -> None:
    h, start = rows(3), Head.start(np.ones(D, np.float32), RANK, seed=0)
    np.testing.assert_allclose(start.rows(h, EPS), rms_norm(h, np.ones(D, np.float32), EPS), rtol=2e-5)


def test_a_row_bends_to_the_same_bits_in_any_company() -> None:
    h, x = rows(17), head()
    together = bend(h, x.down, x.up, EPS)
    for i in (0, 3, 16):
        assert np.array_equal(bend(h[i : i + 1], x.down, x.up, EPS)[0], together[i])


@pytest.mark.parametrize("n", [1, 3])
def test_both_engines_give_the_logits_of_a_low_rank_exit(fitted: Path, n: int) -> None:
    h, found = rows(n), {}
    for backend in ("numpy", "native"):
        with Weights.open(fitted) as weights:
            lower = open_lower(weights, backend, EngineOptions(threads=1, cache="off"))
            found[backend] = lower.norm(h, "exit.2"), lower.logits(h, "exit.2"), lower.greedy(h, "exit.2")[0]
    np.testing.assert_allclose(found["native"][0], found["numpy"][0], atol=1e-5)
    np.testing.assert_allclose(
        found["native"][1], found["numpy"][1], atol=MAX_HEAD_ERROR * abs(found["numpy"][1]).max()
    )
    assert found["native"][2].tolist() == found["numpy"][1].argmax(1).tolist()


def test_the_residual_changes_its_own_exit_and_nothing_else(plain: Path, fitted: Path) -> None:
    h = rows(2)
    with Weights.open(plain) as a, Weights.open(fitted) as b:
        before, after = (open_lower(w, "numpy") for w in (a, b))
        assert np.array_equal(before.logits(h), after.logits(h))
        assert np.array_equal(before.logits(h, "exit.1"), after.logits(h, "exit.1"))
        assert not np.allclose(before.logits(h, "exit.2"), after.logits(h, "exit.2"), atol=0.1)
        np.testing.assert_array_equal(after.norm(h, "exit.2"), head().rows(h, EPS))


def test_a_device_half_keeps_the_residual_and_belongs_to_its_upper_half(fitted: Path, tmp_path: Path) -> None:
    with Weights.open(fitted) as whole:
        halves = split(whole, 2, tmp_path)
    with Weights.open(halves.device) as device, Weights.open(halves.upper) as upper:
        check_pair(device, upper)
        pair = device.residual("exit.2")
        assert pair is not None
        assert np.array_equal(pair[0], head().down)
        assert np.array_equal(pair[1], head().up)
        assert not [name for name in upper.file.tensors if name.startswith("exit.")]
    with LLM.open(halves.device, backend="numpy") as a, LLM.open(halves.device, backend="native") as b:
        assert a.generate([5, 6, 7], max_tokens=4).ids == b.generate([5, 6, 7], max_tokens=4).ids


def test_the_fingerprint_of_the_exits_tells_two_residuals_apart(plain: Path, fitted: Path, tmp_path: Path) -> None:
    other = head()
    other.up[3, 1] += np.float32(1e-3)
    with GGUFFile.open(plain) as file:
        write_exit(file, tmp_path / "other.gguf", 2, other)
    with Weights.open(fitted) as a, Weights.open(tmp_path / "other.gguf") as b:
        ours, theirs = parts(a, Split(2, 2)), parts(b, Split(2, 2))
    assert ours["exits"] != theirs["exits"]
    assert all(ours[part] == theirs[part] for part in FOR_ROWS)  # exits are the device's own business


def changed(fitted: Path, folder: Path, edit: Edit) -> Path:
    """The fitted file, copied and changed."""
    return edited(Path(shutil.copy(fitted, folder)), edit)


@pytest.mark.parametrize(
    ("rank", "words"),
    [(0, "expected a whole number 1"), (MAX_RANK + 1, "expected a whole number 1"), (RANK + 1, "the header wants")],
)
def test_a_rank_that_does_not_fit_is_refused(fitted: Path, tmp_path: Path, rank: int, words: str) -> None:
    path = changed(fitted, tmp_path, lambda meta, _: meta.update({"nearfar.exit.2.rank": rank}))
    with pytest.raises(WeightsError, match=words):
        Weights.open(path)


def test_a_residual_that_is_missing_or_not_finite_is_refused(fitted: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no tensor exit\.2\.up\.weight"):
        Weights.open(changed(fitted, tmp_path, lambda _, tensors: tensors.pop("exit.2.up.weight")))
    with pytest.raises(WeightsError, match=r"exit\.2\.down\.weight holds a number that is not finite"):
        Weights.open(changed(fitted, tmp_path, lambda _, t: t["exit.2.down.weight"][2].view(np.float32).fill(np.nan)))


def test_a_residual_of_an_exit_that_says_norm_is_refused(fitted: Path, tmp_path: Path) -> None:
    path = changed(fitted, tmp_path, lambda meta, _: meta.update({"nearfar.exit.2.kind": "norm"}))
    with pytest.raises(WeightsError, match="has no place"):
        Weights.open(path)


def test_no_exit_of_the_copy_fires_before_it_is_calibrated(fitted: Path) -> None:
    with Weights.open(fitted) as weights:
        assert [(e.layer, e.tau, e.rank) for e in weights.config.exits] == [(1, 1.0, 0), (2, 1.0, RANK)]


# ---------------------------------------------------------------- fitting


def small(n: int, v: int = 24, d: int = 8) -> tuple[Examples, np.ndarray]:
    """Rows whose teacher is a fixed bend of them, which a residual can learn; and a head of `v` tokens."""
    rng = np.random.default_rng(2)
    h = rng.normal(0, 1, (n, d)).astype(np.float32)
    _, down, up = head(3, d, 4).arrays
    taught = Head(np.ones(d, np.float32), 3 * down, 3 * up).rows(h, EPS)
    return Examples(h, taught), rng.normal(0, 1, (v, d)).astype(np.float32)


def test_the_gradients_are_those_of_differences() -> None:
    examples, table = small(6)
    x = head(4, 8, 3)
    _, gradients = loss_and_gradients(x, examples.rows, examples.taught, table, EPS)
    for part in ("gain", "down", "up"):
        found, array, step = getattr(gradients, part), getattr(x, part), np.float32(1e-2)
        for at in [tuple(i) for i in np.argwhere(np.ones_like(array))][:12]:
            was, losses = array[at], []
            for sign in (1, -1):
                array[at] = was + sign * step
                losses.append(loss_and_gradients(x, examples.rows, examples.taught, table, EPS)[0])
            array[at] = was
            assert found[at] == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=0.05, abs=2e-3), (part, at)


def test_fitting_makes_the_exit_say_what_full_depth_says() -> None:
    train, table = small(4 * BATCH)
    held = Examples(train.rows[:300], train.taught[:300])
    found = fit(Head.start(np.ones(8, np.float32), 8, seed=0), train, held, table, EPS, steps=300)
    assert found.after > found.before + 0.1
    assert agreement(found.head, held, table, EPS) == found.after


def test_an_exit_that_fitting_does_not_help_stays_as_it_was() -> None:
    train, table = small(BATCH)
    start = Head.start(np.ones(8, np.float32), 4, seed=0)
    exact = Examples(train.rows, start.rows(train.rows, EPS))  # full depth says what the exit says
    found = fit(start, Examples(train.rows, -train.taught), exact, table, EPS, steps=3)
    assert (found.head, found.before) == (start, 1.0)


def test_openings_are_the_first_words_of_sentences() -> None:
    text = "The cat sat on a wall and slept. Short one. Was it a dog that came to the house last night?"
    found = list(openings(text, 20, seed=1))
    assert len(found) == 20
    assert all(text.find(o) in (0, text.index("Was")) and 4 <= o.count(" ") + 1 < 16 for o in found)
    with pytest.raises(DataError, match="without a sentence"):
        next(openings("no end here", 1, seed=0))


def test_a_sentence_is_fitted_to_or_calibrated_with_and_never_both() -> None:
    text = " ".join(f"Sentence {i} has just these words." for i in range(30))
    fitted, held = ({o.split()[1] for o in openings(text, 300, 0, held_out=h)} for h in (False, True))
    assert (len(fitted), len(held)) == (20, 10)
    assert not fitted & held


# ---------------------------------------------------------------- the verb


def test_fit_exit_writes_a_copy_with_the_exit_it_reports(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, text = tmp_path / "out.gguf", tmp_path / "text.txt"
    text.write_text("The cat sat on the wall and it slept. There was a dog in the house that night.")
    few = ["--answers", "20", "--tokens", "6", "--epochs", "2", "--rank", "3"]
    assert main(["fit-exit", str(plain), "--at", "3", "--text", str(text), "-o", str(out), "--json", *few]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["layer"], facts["rank"]) == (3, 3)
    assert facts["agrees_after"] >= facts["agrees_before"]
    with Weights.open(out) as weights:
        assert [e.layer for e in weights.config.exits] == [1, 2, 3]
        assert weights.config.exits[-1].rank == 3


def test_fit_exit_refuses_halves_layers_that_are_not_there_and_its_own_input(
    plain: Path, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The cat sat on the wall and it slept.")
    with Weights.open(fitted) as whole:
        halves = split(whole, 2, tmp_path)
    for model, out, more, words in (
        (halves.device, "o.gguf", (), "expected the whole model"),
        (plain, "o.gguf", ("--at", "4"), "expected 1..3"),
        (plain, plain, (), "expected another name"),
    ):
        assert main(["fit-exit", str(model), "--text", str(text), "-o", str(tmp_path / out), *more]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "o.gguf").exists()
