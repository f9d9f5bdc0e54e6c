"""A small model whose header says that it speaks nano's rows, and the command line as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import write_tiny

Nearfar = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, an exit after layer 2 that fires often: the calls are nonsense, the way they take is real."""
    path = tmp_path_factory.mktemp("cli") / "tiny.gguf"
    rows = {"nearfar.rows": 1}
    return write_tiny(path, "bitnet", "TQ2_0", exits=(2,), tau=0.1, embedding_type="Q8_0", extra=rows)


@pytest.fixture(scope="session")
def story_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another maker: no exits, no rows."""
    return write_tiny(tmp_path_factory.mktemp("cli") / "story.gguf", "llama", "Q8_0", n_ctx=128)


@pytest.fixture(scope="session")
def nearfar() -> Nearfar:
    """`nearfar ARGS...` in a process of its own; `stdin` is bytes."""

    def run(*args: str | Path | bytes, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[str]:
        words = [os.fsdecode(a) for a in args]
        done = subprocess.run(
            [sys.executable, "-m", "nearfar.cli.main", *words],
            input=stdin,
            capture_output=True,
            timeout=120,
            env={**os.environ, **env},
        )
        return subprocess.CompletedProcess(words, done.returncode, done.stdout.decode(), done.stderr.decode())

    return run
