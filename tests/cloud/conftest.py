"""What the tests of the cloud share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in one order: torch on one thread for a test."""
    torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
