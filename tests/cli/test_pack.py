"""`nearfar pack`: a master and a budget in, a model out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nearfar.weights import Weights
from tests.cli.conftest import Nearfar
from tests.master_file import write_master_file


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_master_file(tmp_path_factory.mktemp("master") / "master.gguf")


def test_a_model_of_the_budget_is_written_and_described(nearfar: Nearfar, master: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.gguf"
    done = nearfar("pack", master, "--budget", "1MB", "-o", out)
    assert (done.code, done.err) == (0, "")
    assert f"{out.stat().st_size:,} of 1,000,000 bytes" in done.out
    assert "trits" in done.out
    assert "exits never fire" in done.out
    assert Weights.open(out).config.n_layers == 4


def test_json_names_the_width_of_every_matrix(nearfar: Nearfar, master: Path, tmp_path: Path) -> None:
    done = nearfar("pack", master, "--budget", "900kB", "-o", tmp_path / "m.gguf", "--json")
    facts = json.loads(done.out)
    assert facts["bytes"] == (tmp_path / "m.gguf").stat().st_size <= facts["budget"] == 900_000
    assert len(facts["widths"]) == 29
    assert set(facts["widths"].values()) <= set("t348")


@pytest.mark.parametrize(
    ("args", "code", "sentence"),
    [
        (("--budget", "100kB"), 2, "the smallest file"),
        (("--budget", "much"), 2, "expected a size"),
        (("--budget", "1MB", "--data", "nowhere"), 8, "nowhere"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_leaves_no_file(
    nearfar: Nearfar, master: Path, tmp_path: Path, args: tuple[str, ...], code: int, sentence: str
) -> None:
    done = nearfar("pack", master, *args, "-o", tmp_path / "m.gguf")
    assert done.code == code, done.err
    assert sentence in done.err
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_master_is_not_packed_onto_itself_and_a_model_is_no_master(
    nearfar: Nearfar, master: Path, model: Path, tmp_path: Path
) -> None:
    assert nearfar("pack", master, "--budget", "1MB", "-o", master).code == 2
    done = nearfar("pack", model, "--budget", "1MB", "-o", tmp_path / "m.gguf")
    assert done.code == 4
    assert "train-multi" in done.err


def test_a_master_is_not_run_as_a_model(nearfar: Nearfar, master: Path) -> None:
    done = nearfar("run", "--model", master, "--raw", "the tin")
    assert done.code != 0
    assert "nearfar pack" in done.err
