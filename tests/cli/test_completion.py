"""Completion scripts know what the parser knows."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from nearfar.cli.completion import bash, fish, read_verbs, zsh
from nearfar.cli.main import VERBS, build_parser


@pytest.fixture(scope="module")
def verbs() -> list:
    return read_verbs(build_parser())


def completed(script: str, folder: Path, *words: str) -> list[str]:
    """What bash offers after `words`, the last of which is being typed."""
    line = " ".join(f"'{word}'" for word in words)
    ask = f'{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _nearfar; printf "%s\\n" "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", ask], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_every_verb_and_option_of_the_parser_is_known(verbs: list) -> None:
    assert {v.name for v in verbs} >= set(VERBS)
    for script in (bash(verbs), zsh(verbs)):
        assert all(option.name in script for verb in verbs for option in verb.options)
    assert all(f"-l {o.name.removeprefix('--')}" in fish(verbs) for verb in verbs for o in verb.options)


def test_bash_completes_verbs_options_values_and_files(verbs: list, tmp_path: Path) -> None:
    script = bash(verbs)
    (tmp_path / "model.gguf").touch()
    assert completed(script, tmp_path, "nearfar", "do") == ["doctor"]
    assert completed(script, tmp_path, "nearfar", "show", "--te") == ["--tensors"]
    assert completed(script, tmp_path, "nearfar", "run", "--backend", "") == ["native", "numpy", "llama"]
    assert completed(script, tmp_path, "nearfar", "show", "mod") == ["model.gguf"]
    assert completed(script, tmp_path, "nearfar", "completion", "f") == ["fish"]


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_accept_their_script(verbs: list, shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    path = tmp_path / "script"
    path.write_text({"zsh": zsh, "fish": fish}[shell](verbs))
    subprocess.run([shell, "-n", path], check=True)


def test_quotes_in_a_help_text_cannot_end_the_word(verbs: list) -> None:
    from nearfar.cli.completion import Option, Verb

    script = fish([Verb("v", "it's", (Option("--o", False, (), "a \\ and a '"),), ())])
    assert "-d 'it\\'s'" in script
    assert "-d 'a \\\\ and a \\''" in script
