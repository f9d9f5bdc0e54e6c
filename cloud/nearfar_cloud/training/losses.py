"""What a step minimises: weighted cross entropy at full depth and at one exit, in one go.  Follows model.py.

The vocabulary is wide and the model narrow, so logits are the largest tensors of a step.  `HeadLoss` walks over the
rows in chunks that stay in the cache, and takes each chunk's gradient while its probabilities are at hand; nothing
of size [rows, V] outlives its chunk.  `plain_head_loss` is the same sum in four lines, for the tests.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 256  # rows whose logits are held at a time
IGNORED = -100  # a target that carries no loss


def chunk_loss(
    final: Tensor,
    early: Tensor | None,
    table: Tensor,
    targets: Tensor,
    weights: Tensor,
    exit_weight: float,
    kl: float,
    teacher: tuple[Tensor, Tensor] | None = None,
    distill: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """final, early [M, D], table [V, D] -> sums of the loss f32 [3] (see HeadLoss) and its gradients to the three.

    `teacher`: its rows [M, E] and its table [V, E].
    """
    t, w = targets.unsqueeze(1), weights.unsqueeze(1)
    log_pf = torch.log_softmax((final @ table.mT).float(), -1)
    pf = log_pf.exp()
    hit = (torch.arange(table.shape[0], device=t.device) == t).float()  # [M, V]
    ce_final = -(w * log_pf.gather(1, t)).sum()
    total, d_logits = ce_final, pf - hit
    if teacher is not None:
        log_pt = torch.log_softmax((teacher[0] @ teacher[1].mT).float(), -1)
        pt = log_pt.exp()
        total = (1 - distill) * ce_final + distill * (w * (pt * (log_pt - log_pf))).sum()
        d_logits = pf - (1 - distill) * hit - distill * pt
    g_final = (d_logits * w).to(table.dtype)
    if early is None:
        return torch.stack((total, ce_final, torch.zeros_like(total))), g_final @ table, None, g_final.mT @ final
    log_pe = torch.log_softmax((early @ table.mT).float(), -1)
    pe = log_pe.exp()
    ce_exit = -(w * log_pe.gather(1, t)).sum()
    total = total + exit_weight * (1 - kl) * ce_exit
    if kl:
        total = total + exit_weight * kl * (w * (pf * (log_pf - log_pe))).sum()
    g_early = ((pe - (1 - kl) * hit - kl * pf) * (exit_weight * w)).to(table.dtype)
    d_head = g_final.mT @ final + g_early.mT @ early
    return torch.stack((total, ce_final, ce_exit)), g_final @ table, g_early @ table, d_head


class HeadOptions(NamedTuple):
    """What HeadLoss does beside its tensors; `teacher_table` [V, E] turns the teacher's rows into logits."""

    exit_weight: float
    kl: float
    dtype: torch.dtype
    chunk: Any
    teacher_table: Tensor | None
    distill: float


class HeadLoss(torch.autograd.Function):
    """(final [N, D], early [N, D], head [V, D], targets [N], weights [N], taught [N, E]) -> sums over rows, f32 [3]:

    0: what is minimised: sum_i w_i * (L_final + exit_weight * ((1 - kl) * CE_exit + kl * KL(p_final || p_exit)))
       L_final = CE_final; with a teacher (1 - distill) * CE_final + distill * KL(p_teacher || p_final)
    1, 2: sum_i w_i * CE of the final head and of the exit, to report; only [0] carries a gradient.
    p_final is the teacher of the exit and gets no gradient from it.  N is a multiple of CHUNK.  Without an exit `early`
    is None, without a teacher `taught`, its rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        final: Tensor,
        early: Tensor | None,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        taught: Tensor | None,
        o: HeadOptions,
    ) -> Tensor:
        table, f = head.detach().to(o.dtype), final.detach().to(o.dtype)
        e = None if early is None else early.detach().to(o.dtype)
        d_final, d_head = torch.empty_like(final), torch.zeros_like(head)
        d_early = None if early is None else torch.empty_like(early)
        sums = torch.zeros(3, device=final.device)
        for start in range(0, len(targets), CHUNK):
            rows = slice(start, start + CHUNK)
            teacher = () if taught is None else ((taught[rows], o.teacher_table), o.distill)
            part, d_final[rows], d_e, d = o.chunk(
                f[rows],
                None if e is None else e[rows],
                table,
                targets[rows],
                weights[rows],
                o.exit_weight,
                o.kl,
                *teacher,
            )
            if d_early is not None:
                d_early[rows] = d_e
            sums += part
            d_head += d
        ctx.save_for_backward(d_final, d_early, d_head)
        return sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_final, d_early, d_head = (None if d is None else grad[0] * d for d in ctx.saved_tensors)
        return d_final, d_early, d_head, None, None, None, None


def head_loss(
    final: Tensor,
    early: Tensor | None,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    *,
    exit_weight: float,
    kl: float = 0.0,
    dtype: torch.dtype = torch.float32,
    chunk: Any = chunk_loss,
    teacher: tuple[Tensor, Tensor] | None = None,
    distill: float = 0.0,
) -> Tensor:
    """Rows [B, T, D], targets and weights [B, T] -> the sums of `HeadLoss`, f32 [3]; rows without weight cost nothing.

    `chunk` is `chunk_loss` or its compiled twin; `teacher`: its rows [B, T, E] and its table [V, E].
    """
    keep = ((targets != IGNORED) & (weights > 0)).flatten().nonzero().squeeze(1)
    spare = -len(keep) % CHUNK

    def kept(rows: Tensor | None) -> Tensor | None:
        """[B, T, D] -> [N, D]"""
        return None if rows is None else F.pad(rows.flatten(0, 1).index_select(0, keep), (0, 0, 0, spare))

    flat = [F.pad(x.flatten().index_select(0, keep), (0, spare)) for x in (targets, weights)]
    taught, teacher_table = (kept(teacher[0].to(dtype)), teacher[1].to(dtype)) if teacher else (None, None)
    options = HeadOptions(exit_weight, kl, dtype, chunk, teacher_table, distill)
    sums: Tensor = HeadLoss.apply(kept(final), kept(early), head, *flat, taught, options)  # type: ignore[no-untyped-call]
    return sums


def plain_head_loss(
    final: Tensor,
    early: Tensor | None,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    exit_weight: float,
    kl: float,
    teacher_logits: Tensor | None = None,
    distill: float = 0.0,
) -> Tensor:
    """The first sum of `HeadLoss` as autograd would do it: rows [N, D], targets and weights [N], logits [N, V]."""
    lf = final @ head.mT
    loss = F.cross_entropy(lf, targets, reduction="none")
    if teacher_logits is not None:
        loss = (1 - distill) * loss + distill * _divergence(teacher_logits, lf)
    if early is not None:
        le = early @ head.mT
        early_loss = (1 - kl) * F.cross_entropy(le, targets, reduction="none") + kl * _divergence(lf.detach(), le)
        loss = loss + exit_weight * early_loss
    return (weights * loss).sum()


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of logits [N, V] -> [N]"""
    return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="none", log_target=True).sum(-1)
