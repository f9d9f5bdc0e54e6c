"""The linear layer of a ternary model: integers are multiplied, scales come afterwards.  Used by model.py.

Quantisation-aware training in the manner of BitNet b1.58 (arXiv 2402.17764): weights are rounded to {-1, 0, 1} times
one scale a matrix, activations to int8 with one scale a row; gradients pass the rounding unchanged (straight through).
Trits and |q| <= 127 are exact in bf16 and their sums are exact in f32, so the product only loses bits where it is
written out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# Whether this CPU multiplies int8 at four times the rate of f32; the result is the same to the last bit (in f32).
HAS_INT8 = bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())
SMALLEST_SCALE = 1e-5  # floor of both scales: an all-zero row or matrix quantises to zeros


def weight_scale(latent: Tensor) -> Tensor:
    """latent [N, K] -> mean |w|, f32 [], rounded to f16 as the file stores it."""
    return latent.detach().abs().mean().clamp_min(SMALLEST_SCALE).half().float()


def trits(latent: Tensor, scale: Tensor) -> Tensor:
    """latent [N, K] -> f32 [N, K] of -1, 0, 1"""
    return (latent.detach() / scale).round().clamp(-1, 1)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] -> whole numbers -127..127 as f32 [..., K] and one scale a row, f32 [..., 1]."""
    x = x.float()
    step = x.abs().amax(-1, keepdim=True).clamp_min(SMALLEST_SCALE) / 127
    return (x / step).round(), step


class _IntegerProduct(torch.autograd.Function):
    """y = (q @ t^T) * step * scale with straight-through gradients to x and to the latents.

    With q ~ x / step and t ~ W / scale, dx = (g * scale) @ t and dW = (g * step)^T @ q.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, latent: Tensor, t: Tensor, scale: Tensor) -> Tensor:
        q, step = quantize_rows(x)
        q8, t8 = q.to(torch.int8), t.to(torch.int8)
        ctx.save_for_backward(q8, step, t8, scale)
        ctx.x_dtype, ctx.dtype = x.dtype, t.dtype
        if HAS_INT8 and x.device.type == "cpu":
            y = torch._int_mm(q8.flatten(0, -2), t8.mT).unflatten(0, q.shape[:-1]).float()
        else:
            y = torch.matmul(q.to(t.dtype), t.mT).float()
        out: Tensor = (y * (step * scale)).to(t.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        q8, step, t8, scale = ctx.saved_tensors
        q, t = q8.to(ctx.dtype), t8.to(ctx.dtype)
        dx = torch.matmul((grad.float() * scale).to(t.dtype), t)
        dw = torch.matmul((grad.float() * step).to(t.dtype).flatten(0, -2).mT, q.flatten(0, -2))
        return dx.to(ctx.x_dtype), dw.float(), None, None


class BitLinear(nn.Module):
    """Several matrices [n, K], one per name, that share their input: x [..., K] -> one [..., n] each.

    Their latents lie under each other in one parameter, so that the input is quantised once and multiplied once;
    each matrix keeps a scale of its own.  With `ternary=False` nothing is rounded: the float twin of the layer.
    """

    def __init__(self, n_in: int, outputs: dict[str, int], init_std: float, *, ternary: bool = True) -> None:
        super().__init__()
        self.ternary = ternary
        self.names, self.sizes = tuple(outputs), tuple(outputs.values())
        self.latent = nn.Parameter(torch.randn(sum(self.sizes), n_in) * init_std)

    def matrices(self) -> dict[str, tuple[Tensor, float]]:
        """name -> (trits int8 [n, K], scale): what the file holds."""
        out = {}
        for name, part in zip(self.names, self.latent.detach().split(self.sizes), strict=True):
            scale = weight_scale(part)
            out[name] = (trits(part, scale).to(torch.int8), float(scale))
        return out

    def forward(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """x [..., K] -> one [..., n] of `dtype` (of the product) a name"""
        if not self.ternary:
            return torch.split(x.to(dtype) @ self.latent.to(dtype).mT, list(self.sizes), dim=-1)
        parts = self.latent.detach().split(self.sizes)
        scales = [weight_scale(p) for p in parts]
        t = torch.cat([trits(p, s) for p, s in zip(parts, scales, strict=True)]).to(dtype)
        row_scales = torch.cat([s.expand(n) for s, n in zip(scales, self.sizes, strict=True)])  # [N]
        y: Tensor = _IntegerProduct.apply(x, self.latent, t, row_scales)  # type: ignore[no-untyped-call]
        return tuple(torch.split(y, list(self.sizes), dim=-1))
