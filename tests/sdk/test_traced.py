"""NEARFAR_DEBUG changes what is said, not what is computed."""

from __future__ import annotations

from pathlib import Path

import pytest

from nearfar import LLM
from tests.tiny import write_tiny


@pytest.mark.parametrize("backend", ["numpy", "native"])
@pytest.mark.parametrize("level", ["1", "2", "4"])
def test_each_level_says_more_and_computes_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], level: str, backend: str
) -> None:
    if backend == "native":
        pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
    path = write_tiny(tmp_path / "m.gguf", exits=(2,), tau=0.02)
    quiet = LLM.open(path, backend=backend).generate("the inn", max_tokens=6)
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("NEARFAR_DEBUG", level)
    loud = LLM.open(path, backend=backend).generate("the inn", max_tokens=6)
    said = capsys.readouterr().err
    assert loud.ids == quiet.ids
    assert "ms  layers [0, 2)" in said
    assert ("largest probability" in said) == (level != "1")
    assert ("layer   1 crc" in said) == (level == "4")
    assert "inn" not in said
