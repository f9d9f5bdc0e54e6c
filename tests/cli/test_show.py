"""`show` tells what a file holds from its header alone."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest

from nearfar.cli.main import main
from nearfar.cli.show import shown, size
from tests.paths import SHARED, needs_shared


def test_the_picture_names_layers_types_and_exits(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "4 layers of width 256" in lines[1]
    assert [line.split()[:3] for line in lines if "layer " in line][:4] == [
        ["layer", str(i), "TQ2_0"] for i in range(4)
    ]
    assert any("exit 2: leaves at confidence > 0.100" in line for line in lines)
    assert any(line.split()[:2] == ["token_embd", "Q8_0"] for line in lines)


def test_bytes_per_token_are_those_of_the_tensors_that_a_token_reads(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(model), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    n_bytes = {t["name"]: t["bytes"] for t in facts["tensors"]}
    head = n_bytes["token_embd.weight"]
    row = head // facts["config"]["n_vocab"]
    layers = [sum(n for name, n in n_bytes.items() if name.startswith(f"blk.{i}.")) for i in range(4)]
    assert facts["bytes_per_token"] == {
        "exit.2": row + sum(layers[:2]) + head,
        "full": row + sum(layers) + head,
        "kv": 2 * 4 * 2 * 128,
    }
    assert facts["exits"] == [{"layer": 2, "tau": pytest.approx(0.1), "temperature": 1.0}]
    assert facts["runs"] is True


def test_keys_and_tensors_are_listed_when_asked_for(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(model), "--keys", "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "general.architecture = bitnet" in out
    assert "tokenizer.ggml.tokens = 320 values" in out
    assert "blk.3.ffn_down.weight" in out


@needs_shared
def test_a_file_with_a_tokenizer_alone_is_shown_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(SHARED / "tokenizers" / "ggml-vocab-phi-3.gguf")]) == 0
    assert "holds no model" in capsys.readouterr().out


def test_an_architecture_that_does_not_run_is_shown_with_the_reason(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(model.read_bytes().replace(b"bitnet", b"mamba7"))
    assert main(["show", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["runs"] is False
    assert "mamba7" in facts["why_not"]
    assert len(facts["parts"]) == 6


def test_header_values_cannot_repaint_the_terminal() -> None:
    assert shown("name\x1b[2J\nnext") == "name [2J next"
    assert shown("\udcff bytes") == "\\udcff bytes"
    assert len(shown("x" * 500)) == 70


@pytest.mark.parametrize(("n", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_060_000, "2.06 MB")])
def test_sizes_are_written_for_people(n: int, text: str) -> None:
    assert size(n) == text


@pytest.mark.parametrize(("number", "name"), [(16, "IQ2_XXS"), (7, "Q5_1")])
def test_a_type_that_our_engine_does_not_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, name: str
) -> None:
    """One matrix of another type: the file opens, `runs` is false, and the type is said."""
    kind = gguf.GGMLQuantizationType(number)
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    w = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
    w.add_tokenizer_model("gpt2")
    w.add_tensor("token_embd.weight", np.zeros((4, 256 // block * n_bytes), np.uint8), raw_dtype=kind)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    assert main(["show", str(tmp_path / "m.gguf"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["runs"] is False
    assert name in facts["why_not"]
