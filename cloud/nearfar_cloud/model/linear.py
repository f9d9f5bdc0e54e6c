"""Matrix products whose rows do not depend on how many rows there are.

A library picks its kernel by the shape, so that a row computed alone may differ in its last bits from the same row
computed among others; then what somebody is told would depend on who else is served.  `row_floor` finds by trial from
how many rows on the bits stay the same, and fewer rows are padded up to it.

Weights are packed once where torch has the operator for it (a private one: tried, and left where it fails): `F.linear`
packs them again at every call, which for few rows takes longer than the product, and in fp32 its rows are not the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 64  # rows that stand for many
TRIED = (*range(1, 18), 23, 31, 32, 33, 48)

Product = Callable[[Tensor], Tensor]


def plain(weight: Tensor, bias: Tensor | None) -> Product:
    """x [R, K] -> x W^T + b [R, N], the readable form."""
    return lambda x: F.linear(x, weight, bias)


def prepacked(weight: Tensor, bias: Tensor | None) -> Product:
    """The same with `weight` packed once.  Raises what torch raises where it can't."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    product = torch.ops.mkldnn._linear_pointwise
    return lambda x: product(x, packed, bias, "none", [], "")


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch packs weights of `dtype` and multiplies them rightly."""
    w, x = torch.randn(48, 32).to(dtype), torch.randn(5, 32).to(dtype)
    try:
        return torch.allclose(prepacked(w, None)(x).float(), F.linear(x, w).float(), rtol=1e-2, atol=1e-2)
    except (RuntimeError, AttributeError, TypeError):
        return False


@cache
def row_floor(n_out: int, n_in: int, dtype: torch.dtype, n_threads: int) -> int:
    """The smallest number of rows from which on a product with a matrix [n_out, n_in] gives each row the same bits."""
    rng = torch.Generator().manual_seed(0)
    product = _best(torch.randn(n_out, n_in, generator=rng).to(dtype), None)
    x = torch.randn(MOST, n_in, generator=rng).to(dtype)
    whole = product(x)
    return max((n + 1 for n in TRIED if not torch.equal(product(x[:n]), whole[:n])), default=1)


def _best(weight: Tensor, bias: Tensor | None) -> Product:
    return (prepacked if can_pack(weight.dtype) else plain)(weight, bias)


class Linear:
    """y = x W^T + b for W [N, K] and b [N] in the model's dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._product = _best(weight.contiguous(), bias)
        self._floor = row_floor(*weight.shape, weight.dtype, torch.get_num_threads())

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, K] -> [R, N]"""
        n = x.shape[0]
        if n < self._floor:
            return self._product(F.pad(x, (0, 0, 0, self._floor - n)))[:n]
        return self._product(x)
