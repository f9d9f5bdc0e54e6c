"""A model of the same shape with other weights: who compares what it should compare tells the two apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from nearfar.chaos.other_weights import write_other
from nearfar.errors import MismatchError
from nearfar.halves import Halves, check_pair, split
from nearfar.llm import LLM
from nearfar.weights import Weights
from nearfar.wire.fingerprint import FOR_IDS, FOR_ROWS, Split, compare, own_parts
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("other") / "m.gguf", "llama", "Q8_0", exits=(1, 2), n_ctx=160)


@pytest.fixture(scope="module")
def halves(model: Path) -> Halves:
    with Weights.open(model) as whole:
        return split(whole, 2, model.parent)


def test_the_upper_half_differs_in_its_weights_and_in_nothing_else(halves: Halves, tmp_path: Path) -> None:
    other = write_other(halves.upper, tmp_path / "o.gguf")
    assert other.stat().st_size == halves.upper.stat().st_size
    with Weights.open(halves.upper) as ours, Weights.open(other) as theirs, Weights.open(halves.device) as device:
        assert [m.part for m in compare(own_parts(theirs), own_parts(ours), FOR_ROWS)] == ["upper"]
        changed = [n for n in ours.file.tensors if (ours.file.raw(n) != theirs.file.raw(n)).any()]
        assert len(changed) == 1
        with pytest.raises(MismatchError, match="upper"):
            check_pair(device, theirs)


def test_a_whole_model_also_has_a_tokenizer_of_its_own_so_that_ids_know_it(model: Path, tmp_path: Path) -> None:
    other, at = write_other(model, tmp_path / "o.gguf"), Split(2, 2)
    with Weights.open(model) as ours, Weights.open(other) as theirs:
        assert [m.part for m in compare(own_parts(theirs, at), own_parts(ours, at), FOR_IDS)] == ["tokenizer"]
        assert [m.part for m in compare(own_parts(theirs, at), own_parts(ours, at))] == ["tokenizer", "upper"]


def test_it_runs_and_says_something_else(model: Path, tmp_path: Path) -> None:
    other = write_other(model, tmp_path / "o.gguf")
    with LLM.open(model) as ours, LLM.open(other) as theirs:
        prompt = list(range(3, 20))
        assert ours.generate(prompt, max_tokens=24).ids != theirs.generate(prompt, max_tokens=24).ids
