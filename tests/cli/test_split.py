"""`split` writes two files and shows what goes where; `show` and `doctor` know the halves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nearfar.llm import LLM
from nearfar.weights import Weights
from nearfar.wire.golden import golden_prompts
from tests.cli.conftest import Nearfar


@pytest.fixture(scope="module")
def halves(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both halves of the model, cut at its exit."""
    from nearfar.cli.main import main

    folder = tmp_path_factory.mktemp("halves")
    assert main(["split", str(model), "--at", "2", "--out", str(folder / "out"), "--threads", "1", "--json"]) == 0
    return folder / "out"


def test_split_tells_what_goes_where(model: Path, nearfar: Nearfar, tmp_path: Path) -> None:
    done = nearfar("split", model, "--at", "2", "--out", tmp_path, "--threads", "1")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    at = {
        text: next(i for i, line in enumerate(lines) if text in line) for text in ("-device.gguf", "-upper.gguf", "↓")
    }
    assert at["-device.gguf"] < at["↓"] < at["-upper.gguf"]
    assert "layers [0, 2)" in lines[at["-device.gguf"]]
    assert "layers [2, 4)" in lines[at["-upper.gguf"]]
    assert next(i for i, line in enumerate(lines) if "layer 1" in line) < at["↓"]
    assert next(i for i, line in enumerate(lines) if "layer 2" in line) > at["↓"]
    assert "a row of 256 numbers" in lines[at["↓"]]
    assert "a self-test of 4 prompts" in lines[-1]


def test_rows_may_leave_the_device_below_its_last_layers(model: Path, nearfar: Nearfar, tmp_path: Path) -> None:
    done = nearfar("split", model, "--at", "2", "--rows-at", "1", "--out", tmp_path, "--threads", "1")
    assert done.code == 0, done.err
    assert "a row of 256 numbers for each token below layer 1:" in done.out
    assert "device half: layers [0, 2) of 4" in nearfar("show", tmp_path / "tiny-device.gguf").out
    assert "upper half: layers [1, 4) of 4" in nearfar("show", tmp_path / "tiny-upper.gguf").out


def test_split_says_the_same_to_programs(halves: Path, model: Path, nearfar: Nearfar, tmp_path: Path) -> None:
    facts = json.loads(nearfar("split", model, "--at", "2", "--out", tmp_path, "--threads", "1", "--json").out)
    for role in ("device", "upper"):
        assert Path(facts[role]["path"]).stat().st_size == facts[role]["bytes"]
        with Weights.open(facts[role]["path"]) as half:
            assert half.config.role == role
            assert half.file.metadata["nearfar.fingerprint"] == facts["fingerprint"]
            assert half.file.metadata["nearfar.codec.outlier_channels"] == facts["outlier_channels"]
    with Weights.open(facts["device"]["path"]) as device:
        assert len(golden_prompts(device.file.metadata, 320)) == facts["golden"] == 4
    assert (halves / "tiny-device.gguf").read_bytes() == (tmp_path / "tiny-device.gguf").read_bytes()


def test_a_text_of_one_s_own_chooses_the_channels(model: Path, nearfar: Nearfar, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The rows of this text choose. " * 30, encoding="utf-8")
    done = nearfar("split", model, "--at", "2", "--out", tmp_path, "--text", tmp_path / "text.txt", "--json")
    assert done.code == 0, done.err
    assert nearfar("split", model, "--at", "2", "--out", tmp_path, "--text", tmp_path / "none.txt").code == 3


def test_without_the_test_nothing_is_computed(model: Path, nearfar: Nearfar, tmp_path: Path) -> None:
    done = nearfar("split", model, "--at", "2", "--out", tmp_path, "--no-test")
    assert "no self-test" in done.out.splitlines()[-1]
    with Weights.open(tmp_path / "tiny-device.gguf") as device:
        assert golden_prompts(device.file.metadata, 320) == ()


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (["--at", "3"], 2, "no exit after layer 3 (the model has exits after 2)"),
        (["--at", "4"], 2, "cut at layer 4: the model has 4 layers, expected 1..3"),
        (["--at", "0"], 2, "expected a whole number 1..1023"),
        (["--at", "2", "--rows-at", "3"], 2, "rows of layer 3 from a device half cut at layer 2: expected 1..2"),
        ([], 2, "--at"),
    ],
)
def test_a_cut_that_cannot_be_is_refused(
    args: list[str], code: int, said: str, model: Path, nearfar: Nearfar, tmp_path: Path
) -> None:
    done = nearfar("split", model, *args, "--out", tmp_path / "out")
    assert (done.code, said in done.err) == (code, True), done.err
    assert not (tmp_path / "out").exists()


def test_a_made_exit_ends_the_tokens_of_the_device_half(model: Path, nearfar: Nearfar, tmp_path: Path) -> None:
    assert nearfar("split", model, "--at", "3", "--out", tmp_path, "--make-exit", "--threads", "1").code == 0
    with LLM.open(tmp_path / "tiny-device.gguf", threads=1) as llm:
        assert set(llm.generate("hello", max_tokens=20).stats.by_source) <= {"exit.2", "exit.3"}


def test_show_and_doctor_know_the_halves(halves: Path, nearfar: Nearfar) -> None:
    device, upper = halves / "tiny-device.gguf", halves / "tiny-upper.gguf"
    shown = nearfar("show", device).out
    assert "device half: layers [0, 2) of 4 · fingerprint of the pair" in shown
    assert "exit 2: leaves at confidence > 0.100; without an upper half, ends every token" in shown
    assert "full depth" not in shown
    shown = nearfar("show", upper).out
    assert "upper half: layers [2, 4) of 4" in shown
    assert "exit" not in shown
    facts = json.loads(nearfar("show", upper, "--json").out)
    assert facts["runs"] is True
    assert facts["config"]["role"] == "upper"
    whole = sum(t["bytes"] for t in facts["tensors"] if t["name"].startswith("blk."))
    head = next(t["bytes"] for t in facts["tensors"] if t["name"] == "token_embd.weight")
    assert facts["bytes_per_token"] == {"full": whole + head, "kv": 2 * 2 * 2 * 128}
    assert "upper half: layers [2, 4) of 4" in nearfar("doctor", upper).out


def test_a_device_half_runs_and_an_upper_half_says_why_it_does_not(halves: Path, nearfar: Nearfar) -> None:
    done = nearfar("run", "--model", halves / "tiny-device.gguf", "--raw", "--max-tokens", "6", "hello")
    assert done.code == 0, done.err
    done = nearfar("run", "--model", halves / "tiny-upper.gguf", "--raw", "hello")
    assert done.code == 2
    assert "open the device half" in done.err
