"""A small model whose header says that it speaks nano's rows, and the command line as a function."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest

from nearfar.cli.main import main
from nearfar.forms import ROWS_VERSION
from tests.tiny import write_tiny


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Nearfar = Callable[..., Done]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, an exit after layer 2 that fires often: the calls are nonsense, the way they take is real."""
    path = tmp_path_factory.mktemp("cli") / "tiny.gguf"
    rows = {"nearfar.rows": ROWS_VERSION}
    return write_tiny(path, "bitnet", "TQ2_0", exits=(2,), tau=0.1, embedding_type="Q8_0", extra=rows)


@pytest.fixture(scope="session")
def story_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of another maker: no exits, no rows."""
    return write_tiny(tmp_path_factory.mktemp("cli") / "story.gguf", "llama", "Q8_0", n_ctx=128)


@pytest.fixture
def nearfar(monkeypatch: pytest.MonkeyPatch) -> Nearfar:
    """`nearfar ARGS...` in this process; `stdin` is bytes, keywords are environment variables."""

    def run(*args: str | Path | bytes, stdin: bytes = b"", **env: str) -> Done:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            try:
                code = main([os.fsdecode(a) for a in args])
            except SystemExit as ended:  # argparse
                code = int(ended.code or 0)
        return Done(code, out.getvalue(), err.getvalue())

    return run
