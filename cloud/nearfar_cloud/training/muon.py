"""Muon: momentum whose matrix is made orthogonal before it is added.  The optimizer of the ternary matrices.

Keller Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024); the update is scaled to the size
that AdamW's would have, so that both share one learning rate (Moonlight, arXiv 2502.16982, equation 4).

    m = momentum * m + (1 - momentum) * g        u = orthogonal(g + momentum * (m - g))
    W = (1 - lr * weight_decay) * W - lr * 0.2 * sqrt(max(N, K)) * u

torch.optim.Muon (torch 2.9) does the same a matrix at a time in bf16.  Matrices of one shape go together here, in f32
where a CPU has no unit that multiplies matrices of bf16: there that is several times as fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: steep at 0, so that five rounds bring 0.01 near 1
ROUNDS = 5
# A CPU with AMX takes less than half of f32's time for bf16.
HAS_BF16_TILES = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
ADAM_RMS = 0.2  # root mean square of an entry in a typical update of AdamW


def orthogonal(x: Tensor) -> Tensor:
    """x [B, N, K] -> [B, N, K] of its dtype, each matrix with its singular values moved near 1 (0.7 to 1.2).

    Newton-Schulz iteration of a quintic polynomial on the shorter side.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon over parameters [N, K] that hold several matrices under each other; `rows` says where each ends.

    `groups`: {"params": [...], "rows": [(256, 128, 128), ...]}, one tuple for each parameter.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p, rows in zip(group["params"], group["rows"], strict=True):
                if p.grad is None:
                    continue
                state = self.state[p]
                m = state.setdefault("momentum", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                looked_ahead = p.grad.lerp(m, group["momentum"])
                for w, u in zip(p.split(rows), looked_ahead.split(rows), strict=True):
                    by_shape.setdefault(w.shape, []).append((w, u))
            for shape, pairs in by_shape.items():
                stack = torch.stack([u for _, u in pairs])
                tiles = stack.is_cuda or HAS_BF16_TILES
                updates = orthogonal(stack.bfloat16() if tiles else stack).float()
                scale = group["lr"] * ADAM_RMS * max(shape) ** 0.5
                for (w, _), u in zip(pairs, updates, strict=True):
                    w.mul_(1 - group["lr"] * group["weight_decay"]).sub_(u, alpha=scale)
