"""Where the tests find things: the repository and the reference data beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the reference data is not at {SHARED}")

NANO = ROOT / "sdk" / "nearfar" / "models" / "nano.gguf"
needs_nano = pytest.mark.skipif(not NANO.is_file(), reason=f"{NANO.name} is not trained yet")
