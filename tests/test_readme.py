"""What the documents tell people to type works: ```sh blocks run in bash, ```python blocks in Python, in order, in one
folder per document.  A line that would take long or change the machine runs in its form of REDUCED, which says why.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from nearfar import env
from nearfar.cli.main import EXIT_CODES, VERBS
from tests.paths import ROOT, SHARED, needs_nano

DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md")))]

# What a line starts with -> what is run instead ({} is the rest of the line), and why.
REDUCED = {
    "make": ("make -C {root} --dry-run {} > /dev/null", "sets up a whole environment: the target and its recipe exist"),
    "CMAKE_ARGS=": ("true", "builds llama.cpp for minutes: .ci/run does it"),
    ".ci/run": ("bash -n {root}/.ci/run", "takes most of an hour: the script parses"),
    "nearfar run": (
        "nearfar run {} || [ $? -eq 1 ]",
        "a later model may make another call, and the check may refuse it",
    ),
    "nearfar bench roofline": (
        "set -- {}; nearfar bench roofline --quick --parts machine,kernels --kinds i2 --rows 1 --threads 1 > /dev/null",
        "minutes: one kernel, roughly",
    ),
    "nearfar bench collab": ("nearfar bench collab --help", "two servers and minutes; tests/cli covers it"),
    "nearfar bench": ("nearfar bench {} --rounds 1 --prompt 16 --tokens 8", "minutes: a few tokens of one round"),
    "nearfar eval": ("nearfar eval --help", "needs corpora and an hour; tests/sdk covers it"),
    "nearfar calibrate": ("nearfar calibrate --help", "needs corpora and many minutes; tests/sdk covers it"),
    "nearfar fit-exit": ("nearfar fit-exit --help", "needs texts and many minutes; tests/sdk covers it"),
    "nearfar train": ("nearfar train --help", "needs corpora and half an hour; tests/cloud covers it"),
    "nearfar study": ("nearfar study --help", "needs corpora and ten minutes; tests/cloud covers it"),
    "nearfar cloud profile": ("nearfar cloud profile {} --quick --threads 1", "minutes: few shapes"),
    "nearfar pack": ("nearfar pack --help", "needs a master, an hour of training; tests/cli covers it"),
    "nearfar cloud serve nano": (
        "nearfar cloud serve nano --threads 1 > /dev/null & trap 'kill $(jobs -p); wait' EXIT\n"
        "until curl -sf localhost:8080/ready > /dev/null; do kill -0 $!; sleep 0.2; done",
        "waits for requests: in the background, until the commands behind it have run",
    ),
    "nearfar cloud serve halves/": (
        "nearfar cloud serve halves/{} --port 0 --threads 1 > /dev/null & trap 'kill $(jobs -p); wait' EXIT\n"
        "until (exec 3<> /dev/tcp/127.0.0.1/9090) 2> /dev/null; do kill -0 $!; sleep 0.2; done",
        "waits for devices: in the background, until the commands behind it have run",
    ),
    "nearfar cloud serve": ("nearfar cloud serve --help", "needs another model and a certificate"),
    "nearfar chaos suite": ("nearfar chaos suite --help", "a server and minutes; tests/cli covers it"),
    "nearfar chaos proxy": ("nearfar chaos proxy {} --for 0.1", "carries bytes until Ctrl-C: for a moment"),
    "nearfar chat": ("nearfar chat {} < /dev/null", "waits for a person"),
    "bash bench/": ("set -- {}; bash -n {root}/bench/$1", "downloads other servers: the script is read"),
    "python bench/": ("set -- {}; python -m py_compile {root}/bench/$1", "measures for minutes: the script compiles"),
    "python tests/fuzz/": ("set -- {}; python -m py_compile {root}/tests/fuzz/$1", "ten minutes: the script compiles"),
}


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(document: str) -> list[str]:
    """The lines of its sh blocks, without the folder of the environment."""
    return [line.removeprefix(".venv/bin/") for block in blocks(document, "sh") for line in block.splitlines()]


def reduced(line: str) -> str:
    """The line as it is run here."""
    for start, (instead, _) in REDUCED.items():
        if line.startswith(start):
            rest = line.removeprefix(start).strip()
            return instead.replace("{root}", str(ROOT)).replace("{}", rest)
    return line


def script(document: str) -> str:
    return "\n".join(reduced(line) for line in commands(document))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a document's commands run; the environment and the checkpoints that they name lie there."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    for name in ("stories260K.bin", "tok512.bin"):
        if (SHARED / "weights" / name).is_file():
            (tmp_path / name).symlink_to(SHARED / "weights" / name)
    return tmp_path


@needs_nano
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "sh")])
def test_the_commands_of_a_document_run(document: str, folder: Path) -> None:
    text = script(document)
    if "stories260K.bin" in text and not (folder / "stories260K.bin").exists():
        pytest.skip(f"the reference data is not at {SHARED}")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr}"
    assert "unexpected" not in done.stderr


@needs_nano
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if blocks(d, "python")])
def test_the_python_of_a_document_runs(document: str, folder: Path) -> None:
    code = "\n".join(blocks(document, "python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    assert done.stdout.strip()


def test_every_reduction_is_used_and_has_a_reason() -> None:
    lines = [line for document in DOCUMENTS for line in commands(document)]
    for start, (_, reason) in REDUCED.items():
        assert any(line.startswith(start) for line in lines), f"{start} stands in no document"
        assert reason


def test_extras_named_in_the_documents_exist() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        named = re.findall(r"nearfar\[([\w,]+)\]|\[extra `\[(\w+)\]`", text)
        for extra in ",".join("".join(pair) for pair in named).split(","):
            assert not extra or extra in known, f"{document}: extra {extra}"


def test_links_lead_to_files() -> None:
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if not target.startswith("http"):
                assert ((ROOT / document).parent / target).exists(), f"{document}: {target}"


def test_files_named_in_the_documents_exist() -> None:
    """Paths in backticks that begin with a folder of ours."""
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for name in re.findall(r"`((?:sdk|cloud|native|tests|bench|docs)/[\w./-]+)`", text):
            assert (ROOT / name).exists(), f"{document}: {name}"


def test_every_variable_is_in_the_table_of_the_command_line() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text.split("## Environment")[1], re.MULTILINE))
    assert rows == {name: what.replace("`", "`") for name, what in env.VARIABLES.items()}


def test_every_verb_and_exit_code_is_described() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    table = text.split("## run")[0]
    assert all(f"`{verb}`" in table for verb in VERBS)
    codes = set(re.findall(r"^\| (\d+) \|", text.split("## Exit codes")[1], re.MULTILINE))
    assert codes == set(re.findall(r"(?<![=\d])(\d+)  \w", EXIT_CODES))
