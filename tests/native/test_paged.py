"""Paged attention through the binding: the readable form's results, and arguments that do not fit are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("nearfar_native._core")

import torch

from nearfar_cloud.model.attention import KVStore, NativeAttention, Spans, TorchAttention

# Sums of up to 200 products of order 1, in other orders.
MAX_ERROR = 2e-6


def batch(dtype: torch.dtype) -> tuple[KVStore, Spans, tuple[torch.Tensor, ...]]:
    rng = torch.Generator().manual_seed(0)
    store = KVStore((0, 1), 12, 2, 32, dtype)
    pieces = [(70, 0, [3, 7]), (1, 0, [1]), (64, 0, [11]), (130, 0, [0, 5, 9])]
    spans = Spans.of([(n, start, np.array(blocks, np.int32)) for n, start, blocks in pieces])
    rows = sum(n for n, _, _ in pieces)
    heads = tuple(torch.randn(rows, h, 32, generator=rng).to(dtype).float() for h in (6, 2, 2))
    return store, spans, heads


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_compiled_form_is_the_readable_one(dtype: torch.dtype) -> None:
    store, spans, heads = batch(dtype)
    wanted = TorchAttention(store)(0, *heads, spans)
    written = store.read(torch.arange(12))
    store.restore(torch.arange(12), [torch.zeros_like(x) for x in written])
    found = NativeAttention(store, 6, 2, 32)(0, *heads, spans)
    assert float((found - wanted).abs().max()) < MAX_ERROR
    assert all(torch.equal(a, b) for a, b in zip(store.read(torch.arange(12)), written, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((265, 5, 32), np.float32)}, "rows: expected"),
        ({"q": np.zeros((265, 6, 16), np.float32)}, "rows: expected"),
        ({"q": np.zeros((264, 6, 32), np.float32)}, "spans: "),
        ({"k": np.zeros((12, 2, 32, 63), np.float32)}, "blocks: expected K"),
        ({"k": np.zeros((11, 2, 32, 64), np.float32)}, "blocks: expected K"),
        ({"table": np.array([[0, 1, 64, 0]], np.int64), "blocks": np.array([1], np.int32)}, "spans: "),
        ({"table": np.array([[-1, 1, 0, 0]], np.int64)}, "spans: "),
        ({"table": np.array([[0, 0, 0, 0]], np.int64)}, "spans: "),
        ({"table": np.array([[0, 1, 2**62, 0]], np.int64)}, "spans: "),
        ({"table": np.array([[0, 1, 0, -1]], np.int64)}, "spans: "),
        ({"table": np.array([[0, 1, 0]], np.int64)}, "spans: "),
        ({"blocks": np.array([3, 7, 1, 11, 0, 5, 12], np.int32)}, "a number that the store does not have"),
        ({"blocks": np.array([3, 7, 1, 11, 0, 5, -1], np.int32)}, "a number that the store does not have"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    from nearfar_native import _core

    store, spans, (q, _, _) = batch(torch.float32)
    given = {"q": q.numpy(), "k": store.k[0].numpy(), "v": store.v[0].numpy()}
    given |= {"table": spans.table, "blocks": spans.blocks} | change
    attention = _core.PagedAttention(6, 2, 32, 1)
    with pytest.raises(ValueError, match=message):
        attention.attend(given["q"], given["k"], given["v"], given["table"], given["blocks"])


@pytest.mark.parametrize("sizes", [(5, 2, 32), (4, 0, 32), (4, 2, 20), (4, 2, 0), (0, 1, 16), (1 << 20, 1, 16)])
def test_heads_that_do_not_fit_are_refused(sizes: tuple[int, int, int]) -> None:
    from nearfar_native import _core

    with pytest.raises(ValueError, match="multiple of the KV heads"):
        _core.PagedAttention(*sizes, 1)
