"""bench/collab_clients.py on a model of four layers: every device gets its own tokens, and a wrong one ends the run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("fastapi", reason="fastapi is not installed (extra [cloud])")
pytest.importorskip("grpc", reason="grpcio is not installed (extra [cloud])")
pytest.importorskip("nearfar_native", reason="the compiled extension is not built")

from tests.paths import ROOT
from tests.tiny import write_tiny


@pytest.mark.parametrize("codec", ["int8", "ids"])
def test_devices_of_a_tiny_model_get_their_own_tokens(codec: str, tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "tiny.gguf", n_ctx=128)
    script = ROOT / "bench" / "collab_clients.py"
    options = ["--devices", "1,3", "--seconds", "1", "--think-ms", "5", "--tokens", "20", "--codec", codec, "--json"]
    done = subprocess.run(
        [sys.executable, str(script), "--model", str(model), *options], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["devices"] for row in rows] == [1, 3]
    assert all(row["asks"] > 0 and row["tokens_per_s"] > 0 and row["p50"] <= row["p95"] for row in rows)
