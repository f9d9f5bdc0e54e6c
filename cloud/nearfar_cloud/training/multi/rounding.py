"""What the file and the engine make of a number, in torch: the same bits as nearfar.quant.  First stop of the walk.

    rounding -> linear -> sampling -> trainer -> search -> master -> run

`rounded` is `dequantize(pack_matrix(w, width))`, `rounded_rows` is `fake_quantize_activations`; tests compare them bit
for bit.  Sums are taken in the same order, products before sums, halves to even or away from zero as there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nearfar.master import WIDTHS
from nearfar.quant import ACTIVATION_GRAIN, F16_SCALE_GRAIN, SMALLEST_MAX, SMALLEST_TRIT_SCALE
from nearfar_cloud.training.model import inverse, q8_0


def rounded(w: Tensor, width: str) -> Tensor:
    """w f32 [N, K] -> f32 [N, K] of the numbers that the file holds at `width`, a letter of `WIDTHS`."""
    return {"t": _trits, "3": _q3_k, "4": _q4_0, "8": q8_0}[width](w.detach())


def rounded_rows(x: Tensor, width: str) -> Tensor:
    """x [..., K] -> f32 [..., K], int8 and back, as the engine takes rows to a matrix of `width`; straight through."""
    grain = ACTIVATION_GRAIN[WIDTHS[width]] or x.shape[-1]
    x = x.float()
    groups = x.detach().unflatten(-1, (-1, grain))
    top = groups.abs().amax(-1, keepdim=True)
    live = top >= float(SMALLEST_MAX)
    q = (groups * torch.where(live, 127 / top, 0.0)).round().clamp(-127, 127)
    scale = torch.where(live, top / 127, 0.0)
    if grain == F16_SCALE_GRAIN:
        scale = torch.where(scale < 65504, scale.half().float(), scale)
    through: Tensor = _Through.apply(x, (q * scale).flatten(-2))  # type: ignore[no-untyped-call]
    return through


class _Through(torch.autograd.Function):
    """(soft, hard) -> hard, exactly; the gradient goes to `soft`."""

    @staticmethod
    def forward(ctx: Any, soft: Tensor, hard: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def with_pair(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """W [N, K], A [r, K], B [N, r] -> W + B A in the order of `nearfar.master.with_pair`; no gradient."""
    w, a, b = w.detach(), a.detach(), b.detach()
    for i in range(len(a)):
        w = w + b[:, i : i + 1] * a[i : i + 1]
    return w


def _trits(w: Tensor) -> Tensor:
    mean = w.abs().double().mean().float()
    scale = mean.clamp_min(float(SMALLEST_TRIT_SCALE)).half().float()
    hard: Tensor = (w / scale).round().clamp(-1, 1) * scale
    return hard


def _q4_0(w: Tensor) -> Tensor:
    x = w.unflatten(-1, (-1, 32))
    d = _widest(x) / -8
    codes = (x * inverse(d) + 8.5).trunc().clamp(0, 15)
    hard: Tensor = (d.half().float() * (codes - 8)).flatten(-2)
    return hard


def _q3_k(w: Tensor) -> Tensor:
    x = w.unflatten(-1, (-1, 16, 16))
    u = x * (-4 * inverse(_widest(x)))
    codes = u.round().clamp(-4, 3)
    weight = u * u
    above, below = _folded(weight * x * codes), _folded(weight * codes * codes)
    best = torch.where(below > 0, above / below, 0.0)  # [..., 16]
    widest = _widest(best)
    whole = (best * (-32 * inverse(widest))).round().clamp(-32, 31)
    step = ((widest / -32).half().float() * whole).unsqueeze(-1)
    q = torch.where(step != 0, x / step, 0.0).round().clamp(-4, 3)
    return (step * q).flatten(-3)


def _widest(x: Tensor) -> Tensor:
    """[..., n] -> [..., 1]: the number of largest magnitude, of equals the first."""
    widest: Tensor = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    return widest


def _folded(x: Tensor) -> Tensor:
    for half in (8, 4, 2, 1):
        x = x[..., :half] + x[..., half:]
    return x[..., 0]
