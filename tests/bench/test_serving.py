"""bench/serving.py on a model of two layers: its forms hold the same weights, its servers take turns."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")
pytest.importorskip("safetensors", reason="safetensors is not installed (extra [cloud])")

from nearfar_cloud.engine import Engine  # noqa: E402
from nearfar_cloud.executors.local import LocalExecutor  # noqa: E402
from nearfar_cloud.model.hf import load_folder  # noqa: E402
from nearfar_cloud.model.loader import Loaded, load_gguf  # noqa: E402
from nearfar_cloud.scheduling.budget import Arrival, ChunkedPrefill  # noqa: E402
from nearfar_cloud.scheduling.compose import Composer  # noqa: E402
from nearfar_cloud.types import Request  # noqa: E402
from tests.arrows import ROOT  # noqa: E402

BENCH = ROOT / "bench"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sys.path.insert(0, str(BENCH))
    try:
        from serving_anchor import TINY, make
    finally:
        sys.path.remove(str(BENCH))
    return make(tmp_path_factory.mktemp("serving") / "tiny", TINY)


def test_the_folder_and_the_file_hold_the_same_model(folder: Path) -> None:
    def tokens(loaded: Loaded) -> tuple[int, ...]:
        engine = Engine(LocalExecutor(loaded, n_blocks=8), Composer((Arrival(), ChunkedPrefill())))
        engine.submit(Request(ids=tuple(range(5, 40)), max_tokens=12))
        found: tuple[int, ...] = ()
        while engine.has_work:
            for out in engine.step():
                assert not out.error
                found += out.ids
        return found

    # The numbers of the folder are bf16; the file was rounded to bf16 from the same f32.
    assert tokens(load_folder(folder / "hf", "fp32")) == tokens(load_gguf(folder / "BF16.gguf", "fp32"))
    for name in ("Q8_0", "Q4_0"):
        ours = load_gguf(folder / f"{name}.gguf").tensors["blk.1.ffn_down.weight"]
        theirs = load_folder(folder / "hf").tensors["blk.1.ffn_down.weight"]
        error = float((ours - theirs).norm() / theirs.norm())
        assert error < (0.01 if name == "Q8_0" else 0.15)


def test_servers_take_turns_and_one_that_is_not_there_is_named(folder: Path) -> None:
    command = [sys.executable, str(BENCH / "serving.py"), "--tiny", "--folder", str(folder.parent), "--json"]
    options = ["--peers", "nearfar:bf16,nearfar:fp32,vllm:none", "--tasks", "B", "--threads", "1", "--rounds", "1"]
    done = subprocess.run(
        [*command, *options, "--envs", str(folder / "none")], check=True, capture_output=True, text=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["peer"] for r in rows] == ["nearfar:bf16", "nearfar:fp32"]
    assert rows[0]["ours_over_it"] == 1
    assert all(np.isfinite([r["median"], r["per_core_second"]]).all() and r["median"] > 0 for r in rows)
    assert "without vllm:none ended with 1" in done.stderr
