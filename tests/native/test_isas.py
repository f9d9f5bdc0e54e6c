"""A model computes the same bits on every kernel set that this machine can force."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nearfar.options import EngineOptions
from nearfar.weights import Weights
from tests.tiny import ARCHITECTURES, WEIGHT_TYPES, write_tiny

_core = pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
lower_native = pytest.importorskip("nearfar.lower_native", reason="the compiled engine is not built")

IDS = (np.arange(21) * 37 % 320).astype(np.int32)


def logits(weights: Weights) -> np.ndarray:
    """Of a prompt in two parts, then of one token: many rows, few rows and one row a product."""
    lower = lower_native.NativeLower(weights, EngineOptions(threads=1))
    kv, depth = lower.new_kv(64), lower.config.n_layers
    parts = (IDS[:17], IDS[17:20], IDS[20:])
    return np.concatenate([lower.logits(lower.forward(lower.embed(part), kv, 0, depth)) for part in parts])


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
def test_every_isa_computes_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    arch = ARCHITECTURES[WEIGHT_TYPES.index(kind) % len(ARCHITECTURES)]
    weights = Weights.open(write_tiny(tmp_path / "m.gguf", arch, kind, n_layers=2, d_model=256, d_ff=256))
    found = {}
    for isa in _core.isas_available():
        monkeypatch.setenv("NEARFAR_ISA", isa)
        found[isa] = logits(weights)
    truth = found.pop("ref")
    for isa, z in found.items():
        assert np.array_equal(z, truth), isa
