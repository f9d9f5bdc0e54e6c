"""A mixture of experts: each row through the few feed-forward parts that its router likes best.

    g = softmax(router(x)) over all experts, the k largest stay, divided by their sum where the model was trained so
    y = sum over those experts, in the order of their numbers, of g_e * down_e(silu(gate_e(x)) * up_e(x))

The order of the sum is that of the experts, so a row's bits do not depend on who else is routed where.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfar_cloud.model.linear import Linear
from nearfar_cloud.model.loader import Experts


class Mixture:
    """router [E, D], gate and up [E, F, D], down [E, D, F]"""

    def __init__(self, experts: Experts, router: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> None:
        self.experts, self.router = experts, Linear(router)
        self.gate_up = [Linear(torch.cat([g, u])) for g, u in zip(gate, up, strict=True)]
        self.down = [Linear(d) for d in down]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [R, D] -> numbers of the experts int64 [R, k], their weights f32 [R, k]"""
        weights, chosen = torch.softmax(self.router(x).float(), -1).topk(self.experts.n_used, -1)
        if self.experts.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, D] -> [R, D]"""
        chosen, weights = self.route(x)
        out = torch.zeros(x.shape, dtype=torch.float32)
        for e in chosen.unique().tolist():
            rows, place = (chosen == e).nonzero(as_tuple=True)
            gate, up = self.gate_up[e](x[rows]).float().chunk(2, -1)
            y = self.down[e]((F.silu(gate) * up).to(x.dtype))
            out[rows] += y.float() * weights[rows, place].unsqueeze(-1)
        return out.to(x.dtype)
