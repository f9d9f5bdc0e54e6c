"""Products of a linear layer in few bits, with Hadamard rotations (HALO, arXiv 2501.02625).  Numerics only.

With X [M, K] the rows, W [N, K] the matrix, E [M, N] the gradient of the output, H orthonormal Hadamard matrices of K
(right) and M (left), and Q a rounding to whole numbers times one scale:

    level   Y = X W^T              dX = E W                        dW = E^T X
    0       Q(X) Q(W)^T            Q(E) Q(W)                       Q(E)^T Q(X)
    1       Q(XH) Q(WH)^T          Q(E) Q(WH) H^T                  Q(E)^T Q(XH) H^T
    2       Q(XH) Q(WH)^T          H^T Q(HE) Q(WH) H^T             Q(E)^T Q(XH) H^T

H H^T = 1, so that without Q all three levels are the same layer.  A channel that sticks out of X, or a row that sticks
out of E, sets the scale of everything; rotated, it is spread over all channels or rows.

There is one scale a tensor: X is multiplied along K in the forward pass and along M for dW, W along K and along N, and
a scale that differs along the axis of the sum could not be taken out of a product of integers.  Rounding is to the
nearest.  Whole numbers are held in f32; sums of 8-bit products are exact up to 1,040 terms, and longer ones lose what
f32 loses.  Nothing here is fast: the point is what the numbers become.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nearfar_cloud.training.bitlinear import BitLinear

Level = Literal[0, 1, 2]
LARGEST = 128  # side of the Hadamard matrices that are multiplied; larger ones are their Kronecker products
SMALLEST_SCALE = 1e-30  # gradients are small; a tensor of zeros stays zeros


@cache
def _hadamard(n: int) -> Tensor:
    """f32 [n, n], orthonormal and symmetric; n a power of two."""
    from scipy.linalg import hadamard  # type: ignore[import-untyped]

    matrix: Tensor = torch.from_numpy(hadamard(n)).float() * n**-0.5
    return matrix


def rotate(x: Tensor) -> Tensor:
    """x f32 [..., n] -> x H, f32 [..., n]; H H = 1.

    H is Sylvester's Hadamard matrix where n is a power of two; otherwise one of the largest power of two that divides
    n, repeated along the diagonal.
    """
    n = x.shape[-1]
    power = n & -n
    if power < n:
        return rotate(x.unflatten(-1, (n // power, power))).flatten(-2)
    if n <= LARGEST:
        return x @ _hadamard(n).to(x.device)
    return rotate_rows(rotate(x.unflatten(-1, (n // LARGEST, LARGEST)))).flatten(-2)


def rotate_rows(e: Tensor) -> Tensor:
    """e f32 [..., M, N] -> H e, f32 [..., P, N], P the power of two from M on: the rows are filled up with zeros."""
    n = 1 << (e.shape[-2] - 1).bit_length()
    e = nn.functional.pad(e, (0, 0, 0, n - e.shape[-2]))
    if n <= LARGEST:
        return _hadamard(n).to(e.device) @ e
    # H of a * b is the Kronecker product of H of a and H of b.
    inner = rotate_rows(e.unflatten(-2, (n // LARGEST, LARGEST)))  # [..., a, b, N]
    whole: Tensor = rotate_rows(inner.flatten(-2)).unflatten(-1, inner.shape[-2:]).flatten(-3, -2)
    return whole


def quantize(x: Tensor, bits: int | None) -> tuple[Tensor, Tensor]:
    """x f32 -> whole numbers of `bits` bits in f32, symmetric about 0, and their scale f32 []; None: x itself and 1."""
    if bits is None:
        return x, x.new_ones(())
    largest = 2 ** (bits - 1) - 1
    scale = (x.abs().amax() / largest).clamp_min(SMALLEST_SCALE)
    return (x / scale).round(), scale


class _RotatedProduct(torch.autograd.Function):
    """(x [M, K], w [N, K], bits, level) -> y f32 [M, N], as drawn above."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bits: int | None, level: Level) -> Tensor:
        q_x, scale_x = quantize(rotate(x) if level else x, bits)
        q_w, scale_w = quantize(rotate(w) if level else w, bits)
        ctx.save_for_backward(q_x, scale_x, q_w, scale_w)
        ctx.bits, ctx.level = bits, level
        y: Tensor = (q_x @ q_w.mT) * (scale_x * scale_w)
        return y

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q_x, scale_x, q_w, scale_w = ctx.saved_tensors
        q_e, scale_e = quantize(e, ctx.bits)
        dw = (q_e.mT @ q_x) * (scale_e * scale_x)
        if ctx.level == 2:
            q_e, scale_e = quantize(rotate_rows(e), ctx.bits)
        dx = (q_e @ q_w) * (scale_e * scale_w)
        if ctx.level == 2:
            dx = rotate_rows(dx)[: len(e)]
        return (rotate(dx), rotate(dw), None, None) if ctx.level else (dx, dw, None, None)


def rotated_product(x: Tensor, w: Tensor, *, bits: int | None, level: Level) -> Tensor:
    """x f32 [..., K], w f32 [N, K] -> x w^T f32 [..., N]; forward and both gradients in whole numbers of `bits` bits.

    `bits` None rounds nothing: the rotations alone, which cancel.
    """
    rows = x.flatten(0, -2)
    y: Tensor = _RotatedProduct.apply(rows, w, bits, level).unflatten(0, x.shape[:-1])  # type: ignore[no-untyped-call]
    return y


class RotatedLinear(BitLinear):
    """Stands where a float BitLinear stood, with its latent: each of its matrices is one rotated product."""

    def __init__(self, parent: BitLinear, *, bits: int | None, level: Level) -> None:
        nn.Module.__init__(self)
        assert not parent.ternary
        self.ternary, self.names, self.sizes, self.latent = False, parent.names, parent.sizes, parent.latent
        self.bits, self.level = bits, level

    def forward(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """x [..., K] -> one [..., n] of `dtype` a name"""
        rows, matrices = x.to(dtype).float(), self.latent.split(self.sizes)
        return tuple(rotated_product(rows, w, bits=self.bits, level=self.level).to(dtype) for w in matrices)


def rotate_products(model: nn.Module, *, bits: int | None, level: Level) -> None:
    """From now on every float BitLinear of `model` computes with rotated products; its parameters stay the same."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BitLinear):
                setattr(parent, name, RotatedLinear(child, bits=bits, level=level))


def product_errors(x: Tensor, w: Tensor, e: Tensor, *, bits: int | None, level: Level) -> dict[str, float]:
    """Relative errors of one product against f32: |found - true| / |true|, Frobenius norms.

    x [M, K], w [N, K], e [M, N] the gradient of the output -> of "forward", "input_gradient" and "weight_gradient".
    """
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    true, found = x @ w.mT, rotated_product(x, w, bits=bits, level=level)
    wanted = (true.detach(), *torch.autograd.grad(true, (x, w), e))
    came = (found.detach(), *torch.autograd.grad(found, (x, w), e))
    names = ("forward", "input_gradient", "weight_gradient")
    return {name: float((b - a).norm() / a.norm()) for name, a, b in zip(names, wanted, came, strict=True)}
