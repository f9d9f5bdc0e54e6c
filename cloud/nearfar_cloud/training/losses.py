"""What a step minimises: weighted cross entropy at full depth and at one exit, in one go.  Follows model.py.

The vocabulary is wide and the model narrow, so logits are the largest tensors of a step.  `HeadLoss` walks over the
rows in chunks that stay in the cache, and takes each chunk's gradient while its probabilities are at hand; nothing
of size [rows, V] outlives its chunk.  `plain_head_loss` is the same sum in four lines, for the tests.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 256  # rows whose logits are held at a time
IGNORED = -100  # a target that carries no loss


def chunk_loss(
    final: Tensor, early: Tensor, table: Tensor, targets: Tensor, weights: Tensor, exit_weight: float, kl: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """final, early [M, D], table [V, D] -> sums of the loss f32 [3] (see HeadLoss) and its gradients to the three."""
    t, w = targets.unsqueeze(1), weights.unsqueeze(1)
    log_pf = torch.log_softmax((final @ table.mT).float(), -1)
    log_pe = torch.log_softmax((early @ table.mT).float(), -1)
    pf, pe = log_pf.exp(), log_pe.exp()
    hit = (torch.arange(table.shape[0], device=t.device) == t).float()  # [M, V]
    ce_final, ce_exit = -(w * log_pf.gather(1, t)).sum(), -(w * log_pe.gather(1, t)).sum()
    total = ce_final + exit_weight * (1 - kl) * ce_exit
    if kl:
        total = total + exit_weight * kl * (w * (pf * (log_pf - log_pe))).sum()
    g_final = ((pf - hit) * w).to(table.dtype)
    g_early = ((pe - (1 - kl) * hit - kl * pf) * (exit_weight * w)).to(table.dtype)
    d_head = g_final.mT @ final + g_early.mT @ early
    return torch.stack((total, ce_final, ce_exit)), g_final @ table, g_early @ table, d_head


class HeadLoss(torch.autograd.Function):
    """(final [N, D], early [N, D], head [V, D], targets [N], weights [N]) -> three sums over rows, f32 [3]:

    0: what is minimised: sum_i w_i * (CE_final + exit_weight * ((1 - kl) * CE_exit + kl * KL(p_final || p_exit)))
    1, 2: sum_i w_i * CE of the final head and of the exit, to report; only [0] carries a gradient.
    p_final is the teacher of the exit and gets no gradient from it.  N is a multiple of CHUNK.
    """

    @staticmethod
    def forward(
        ctx: Any,
        final: Tensor,
        early: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        options: tuple[float, float, torch.dtype, Any],
    ) -> Tensor:
        exit_weight, kl, dtype, chunk = options
        table = head.detach().to(dtype)
        f, e = final.detach().to(dtype), early.detach().to(dtype)
        d_final, d_early, d_head = torch.empty_like(final), torch.empty_like(early), torch.zeros_like(head)
        sums = torch.zeros(3, device=final.device)
        for start in range(0, len(targets), CHUNK):
            rows = slice(start, start + CHUNK)
            part, d_final[rows], d_early[rows], d = chunk(
                f[rows], e[rows], table, targets[rows], weights[rows], exit_weight, kl
            )
            sums += part
            d_head += d
        ctx.save_for_backward(d_final, d_early, d_head)
        return sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_final, d_early, d_head = ctx.saved_tensors
        return grad[0] * d_final, grad[0] * d_early, grad[0] * d_head, None, None, None


def head_loss(
    final: Tensor,
    early: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    exit_weight: float,
    kl: float = 0.0,
    dtype: torch.dtype = torch.float32,
    chunk: Any = chunk_loss,
) -> Tensor:
    """Rows [B, T, D], targets and weights [B, T] -> the sums of `HeadLoss`, f32 [3]; rows without weight cost nothing.

    `chunk` is `chunk_loss` or its compiled twin.
    """
    keep = ((targets != IGNORED) & (weights > 0)).flatten().nonzero().squeeze(1)
    spare = -len(keep) % CHUNK
    pick = [F.pad(x.flatten(0, 1).index_select(0, keep), (0, 0, 0, spare)) for x in (final, early)]
    flat = [F.pad(x.flatten().index_select(0, keep), (0, spare)) for x in (targets, weights)]
    sums: Tensor = HeadLoss.apply(  # type: ignore[no-untyped-call]
        *pick, head, *flat, (exit_weight, kl, dtype, chunk)
    )
    return sums


def plain_head_loss(
    final: Tensor, early: Tensor, head: Tensor, targets: Tensor, weights: Tensor, exit_weight: float, kl: float
) -> Tensor:
    """The first sum of `HeadLoss` as autograd would do it: rows [N, D], targets and weights [N]."""
    lf, le = final @ head.mT, early @ head.mT
    divergence = F.kl_div(le.log_softmax(-1), lf.detach().log_softmax(-1), reduction="none", log_target=True).sum(-1)
    early_loss = (1 - kl) * F.cross_entropy(le, targets, reduction="none") + kl * divergence
    return (weights * (F.cross_entropy(lf, targets, reduction="none") + exit_weight * early_loss)).sum()
