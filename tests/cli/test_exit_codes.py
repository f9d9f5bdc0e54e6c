"""Bad input of every kind gives one clear sentence on stderr and the documented exit code; nothing crashes or hangs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from nearfar import errors
from nearfar.cli.main import EXIT_CODES, VERBS, main
from tests import gguf_bytes as b
from tests.cli.conftest import Done, Nearfar

REQUEST = "turn off the kitchen lights"


def refused(done: Done, code: int, *words: str) -> None:
    """The command ended with `code` and one sentence that holds `words`."""
    assert done.code == code, done.err
    sentence = done.err.strip()
    assert sentence.startswith("nearfar: ")
    assert "\n" not in sentence
    assert "Traceback" not in sentence
    for word in words:
        assert word in sentence


def damaged(model: Path, folder: Path, kind: str) -> Path:
    """A GGUF file with one thing wrong."""
    data = model.read_bytes()
    path = folder / "damaged.gguf"
    if kind == "cut short":
        data = data[: len(data) // 2]
    elif kind == "wrong magic":
        data = b"GGML" + data[4:]
    elif kind == "huge count":
        data = data[:8] + b.u64(1 << 63) + data[16:]
    elif kind == "tensor past the end":
        data = b.gguf(tensors=[b.tensor("token_embd.weight", (256, 4), 0, offset=1 << 40)], data=bytes(4096))
    elif kind == "empty file":
        data = b""
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("cut short", "cut short"),
        ("wrong magic", "not a GGUF file"),
        ("huge count", "damaged"),
        ("tensor past the end", "token_embd.weight"),
        ("empty file", "empty"),
    ],
)
@pytest.mark.parametrize("verb", ["run", "show"])
def test_a_damaged_file_ends_with_3(
    nearfar: Nearfar, model: Path, tmp_path: Path, kind: str, word: str, verb: str
) -> None:
    path = damaged(model, tmp_path, kind)
    refused(nearfar(*(["run", "--model", path, REQUEST] if verb == "run" else ["show", path])), 3, word)


def test_a_missing_file_ends_with_3(nearfar: Nearfar) -> None:
    refused(nearfar("run", "--model", "nowhere.gguf", REQUEST), 3, "nowhere.gguf", "no such file")


def test_a_missing_tokenizer_ends_with_3(nearfar: Nearfar, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "mute.gguf"
    path.write_bytes(model.read_bytes().replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz"))
    refused(nearfar("run", "--model", path, REQUEST), 3, "tokenizer")


def test_an_unknown_architecture_ends_with_4(nearfar: Nearfar, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    path.write_bytes(model.read_bytes().replace(b"bitnet", b"mamba7"))
    refused(nearfar("run", "--model", path, REQUEST), 4, "mamba7")
    refused(nearfar("run", "--model", path, REQUEST, NEARFAR_BACKEND="native"), 4, "mamba7", "nearfar[llama]")


def test_an_unsupported_tensor_type_ends_with_4(nearfar: Nearfar, model: Path, tmp_path: Path) -> None:
    data = model.read_bytes()
    name = b"blk.0.ffn_up.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # n_dims, two sizes, then the type
    assert data[at : at + 4] == b.u32(35)
    path = tmp_path / "typed.gguf"
    path.write_bytes(data[:at] + b.u32(36) + data[at + 4 :])  # I2_S
    refused(nearfar("run", "--model", path, REQUEST, NEARFAR_BACKEND="native"), 4, "I2_S", "blk.0.ffn_up.weight")


def test_a_prompt_longer_than_the_context_ends_with_5(nearfar: Nearfar, story_model: Path) -> None:
    refused(nearfar("run", "--model", story_model, "--raw", "the " * 400), 5, "128")


def test_a_request_longer_than_the_context_ends_with_5(nearfar: Nearfar, model: Path) -> None:
    refused(nearfar("run", "--model", model, "the " * 900), 5, "512")


@pytest.mark.parametrize("text", ["", " \n\t"])
@pytest.mark.parametrize("verb", ["run", "raw", "ask"])
def test_an_empty_prompt_ends_with_2(nearfar: Nearfar, model: Path, tmp_path: Path, text: str, verb: str) -> None:
    schema = tmp_path / "s.json"
    schema.write_text('{"type": "boolean"}')
    words = {"run": ["run"], "raw": ["run", "--raw"], "ask": ["ask", "--schema", schema]}[verb]
    refused(nearfar(*words, "--model", model, text), 2, "empty")
    done = nearfar(*words, "--model", model, stdin=text.encode())
    assert done.code == 2
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("words", [["run"], ["run", "--raw"], ["chat"]], ids=" ".join)
def test_invalid_utf8_on_stdin_ends_with_2(nearfar: Nearfar, model: Path, words: list[str]) -> None:
    given = [model] if words == ["chat"] else ["--model", model]
    refused(nearfar(*words, *given, stdin=b"turn on \xff\xfe"), 2, "UTF-8")


def test_invalid_utf8_in_an_argument_ends_with_2(nearfar: Nearfar, model: Path) -> None:
    refused(nearfar("run", "--model", model, b"turn \xff on"), 2, "UTF-8")


@pytest.mark.parametrize(
    "schema",
    [
        '{"type": "string", "enum": []}',
        '{"allOf": [{"const": 1}, {"const": 2}]}',
        '{"type": "strin"}',
        "[1, 2]",
        "{not json",
    ],
)
def test_a_schema_that_cannot_be_satisfied_ends_with_6(
    nearfar: Nearfar, model: Path, tmp_path: Path, schema: str
) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra [schema])")
    path = tmp_path / "schema.json"
    path.write_text(schema)
    refused(nearfar("ask", "--model", model, "--schema", path, "anything"), 6)


def test_a_missing_extra_ends_with_7(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)  # what an import of a missing package finds
    path = tmp_path / "schema.json"
    path.write_text('{"type": "boolean"}')
    assert main(["ask", "--model", str(model), "--schema", str(path), "is it on"]) == 7
    assert "pip install 'nearfar[schema]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["nonsense"], [], ["run", "--temperature", "hot"], ["run", "--max-tokens", "0", "x"], ["ask", "no schema"]],
)
def test_arguments_that_cannot_be_used_end_with_2(nearfar: Nearfar, words: list[str]) -> None:
    done = nearfar(*words)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert "usage: nearfar" in done.err


@pytest.mark.parametrize("name", ["NEARFAR_ISA", "NEARFAR_DEBUG", "NEARFAR_BACKEND", "NEARFAR_THREADS"])
def test_an_unknown_value_of_a_variable_ends_with_2(nearfar: Nearfar, model: Path, name: str) -> None:
    refused(nearfar("run", "--model", model, REQUEST, **{name: "quick"}), 2, name, "quick", "expected")


def test_ctrl_c_in_the_middle_of_a_stream_ends_with_130(model: Path) -> None:
    command = [sys.executable, "-m", "nearfar.cli.main", "run", "--model", model, "--backend", "numpy"]
    options = ["--n-ctx", "100000", "--max-tokens", "90000"]
    process = subprocess.Popen(
        [*command, *options, "--raw", "the inn"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.read(1)  # the stream has begun
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.decode() == "nearfar: stopped\n"
    assert out.endswith(b"\n")


def test_a_reader_that_goes_away_is_no_error(model: Path) -> None:
    command = f"{sys.executable} -m nearfar.cli.main show {model} --keys --tensors | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "0"


def test_an_unexpected_failure_is_one_sentence_and_a_trace_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(VERBS, "broken", "tests.cli.broken_verb")
    assert main(["broken"]) == 1
    sentence = capsys.readouterr().err
    assert sentence.count("\n") == 1
    assert "RuntimeError: out of biscuits" in sentence
    assert "NEARFAR_DEBUG=1" in sentence
    monkeypatch.setenv("NEARFAR_DEBUG", "1")
    with pytest.raises(RuntimeError, match="biscuits"):
        main(["broken"])


def test_help_names_every_exit_code() -> None:
    tree = [errors.NearfarError, *errors.NearfarError.__subclasses__()]
    named = {int(n) for n in re.findall(r"(?<!=)\b(\d+)  \w", EXIT_CODES)}
    assert named == {0} | {kind.exit_code for kind in tree}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_examples_and_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"nearfar {verb}" in text.split("examples:")[1]
    assert "--json" in text


def test_every_verb_module_imports(capsys: pytest.CaptureFixture[str]) -> None:
    for module in VERBS.values():
        assert callable(import_module(module).add_verb)
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(re.search(rf"^    {verb}\s+\w", text, re.MULTILINE) for verb in VERBS)


def test_a_terminal_without_our_characters_is_no_error(model: Path) -> None:
    command = [sys.executable, "-m", "nearfar.cli.main", "show", model]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert b"layer 3" in done.stdout
