"""The readable cache: lengths, truncation, forks; and how the forward pass treats it when things go wrong."""

from __future__ import annotations

import numpy as np
import pytest

from nearfar.cancel import Cancel
from nearfar.config import ModelConfig
from nearfar.errors import Cancelled, ContextError, UsageError
from nearfar.kv_cache import KVCache
from nearfar.lower import Lower, open_lower
from nearfar.weights import Weights
from tests.tiny import write_tiny

CONFIG = ModelConfig("llama", 2, 8, 2, 1, 4, 16, 32, 64)


def rows(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 1, 4)).astype(np.float32)


def filled(n: int) -> KVCache:
    kv = KVCache(CONFIG, 200, "f32")
    for layer in range(2):
        kv.append(layer, rows(n), rows(n, 1))
    return kv


def test_rows_come_back_rounded_to_the_caches_dtype() -> None:
    kv = KVCache(CONFIG, 100, "f16")
    kv.append(0, rows(3), rows(3, 1))
    kv.append(0, rows(70, 2), rows(70, 3))
    k, v = kv.read(0)
    assert np.array_equal(k, np.concatenate([rows(3), rows(70, 2)]).astype(np.float16).astype(np.float32))
    assert len(v) == kv.length(0) == 73
    assert kv.length(1) == 0


def test_a_fork_and_its_origin_live_on_alone() -> None:
    kv = filled(10)
    other = kv.fork(6)
    assert [kv.length(0), other.length(0), other.length(1)] == [10, 6, 6]
    other.append(0, rows(1, 9), rows(1, 9))
    assert np.array_equal(kv.read(0)[0], rows(10))
    kv.truncate(0)
    assert np.array_equal(other.read(0)[0], np.concatenate([rows(10)[:6], rows(1, 9)]))


def test_truncating_leaves_shorter_layers_alone() -> None:
    kv = filled(10)
    kv.append(0, rows(4), rows(4))
    kv.truncate(12)
    assert [kv.length(0), kv.length(1)] == [12, 10]


def test_the_limit_is_named() -> None:
    kv = KVCache(CONFIG, 5, "f16")
    with pytest.raises(ContextError, match="holds 5"):
        kv.append(0, rows(6), rows(6))
    with pytest.raises(UsageError, match="f8"):
        KVCache(CONFIG, 5, "f8")  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["numpy", "native"])
def lower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lower:
    if request.param == "native":
        pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
    return open_lower(
        Weights.open(write_tiny(tmp_path_factory.mktemp("kv") / "m.gguf", "qwen2", "Q8_0")), request.param
    )


def embed(lower: Lower, *ids: int) -> np.ndarray:
    return lower.embed(np.array(ids, np.int32))


def test_truncate_and_rerun_gives_the_same_rows(lower: Lower) -> None:
    kv = lower.new_kv(64)
    lower.forward(embed(lower, 1, 2, 3, 4), kv, 0, 4)
    expected = lower.forward(embed(lower, 5), kv, 0, 4)
    kv.truncate(4)
    assert np.array_equal(lower.forward(embed(lower, 5), kv, 0, 4), expected)


def test_a_fork_continues_as_its_origin_would(lower: Lower) -> None:
    kv = lower.new_kv(200)
    lower.forward(embed(lower, *range(70)), kv, 0, 4)
    other = kv.fork(67)
    lower.forward(embed(lower, 9, 9, 9), kv, 0, 4)
    again = lower.forward(embed(lower, 67), other, 0, 4)
    del kv
    fresh = lower.new_kv(200)
    lower.forward(embed(lower, *range(67)), fresh, 0, 4)
    np.testing.assert_allclose(again, lower.forward(embed(lower, 67), fresh, 0, 4), atol=2e-2)


def test_layers_of_unequal_length_cannot_run_together(lower: Lower) -> None:
    kv = lower.new_kv(64)
    h = lower.forward(embed(lower, 1, 2), kv, 0, 2)
    with pytest.raises(UsageError, match="differ"):
        lower.forward(h, kv, 0, 4)
    lower.forward(h, kv, 2, 4)
    assert kv.length(3) == 2


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (0, 5), (2, 2), (3, 1)])
def test_a_range_outside_the_model_is_refused(lower: Lower, first: int, last: int) -> None:
    with pytest.raises(UsageError, match="layers"):
        lower.forward(embed(lower, 1), lower.new_kv(8), first, last)


def test_a_context_that_is_full_leaves_the_cache_as_it_was(lower: Lower) -> None:
    kv = lower.new_kv(3)
    lower.forward(embed(lower, 1, 2), kv, 0, 4)
    with pytest.raises(ContextError, match="3"):
        lower.forward(embed(lower, 3, 4), kv, 0, 4)
    assert [kv.length(i) for i in range(4)] == [2, 2, 2, 2]
    lower.forward(embed(lower, 3), kv, 0, 4)


def test_a_cancelled_call_leaves_the_cache_as_it_was(lower: Lower) -> None:
    kv, cancel = lower.new_kv(64), Cancel()
    lower.forward(embed(lower, 1, 2), kv, 0, 4, cancel)
    cancel.set()
    with pytest.raises(Cancelled):
        lower.forward(embed(lower, 3), kv, 0, 4, cancel)
    assert [kv.length(i) for i in range(4)] == [2, 2, 2, 2]


@pytest.mark.parametrize("ids", [[], [-1], [320]])
def test_ids_outside_the_vocabulary_are_refused(lower: Lower, ids: list[int]) -> None:
    with pytest.raises(UsageError):
        lower.embed(np.array(ids, np.int32))


@pytest.mark.parametrize("k", range(1, 4))
def test_splitting_at_any_layer_gives_the_same_rows(lower: Lower, k: int) -> None:
    ids = (7, 8, 9, 10)
    whole = lower.forward(embed(lower, *ids), lower.new_kv(8), 0, 4)
    kv = lower.new_kv(8)
    parts = lower.forward(lower.forward(embed(lower, *ids), kv, 0, k), kv, k, 4)
    assert np.array_equal(whole, parts)
