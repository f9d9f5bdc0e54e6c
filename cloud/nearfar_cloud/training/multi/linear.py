"""A decoder whose matrices can be read at several widths.  Follows rounding.py; trainer.py gives the assignments.

    inside   y = q(x) Q_b(W + B_b A_b)^T            ours: nothing is left beside the packed matrix
    beside   y = q(x) Q_b(W)^T + (x A_b^T) B_b^T    the paper's form: the pair stays, and costs bytes

W is frozen and has bf16's numbers, because the master stores those; B_b begins as zeros, so that training begins at
post-hoc rounding.  Gradients pass the rounding unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar.errors import ConfigError
from nearfar.master import EMBEDDING, EMBEDDING_WIDTHS, WIDTHS, Matrix, is_assignment
from nearfar.quant import ACTIVATION_GRAIN
from nearfar_cloud.training.bitlinear import BitLinear
from nearfar_cloud.training.model import Block, Decoder
from nearfar_cloud.training.multi.rounding import rounded, rounded_rows, with_pair
from nearfar_cloud.training.recipe import TQ_BLOCK

Form = Literal["inside", "beside"]
RANK = 4


class _Rounded(torch.autograd.Function):
    """(W, A, B, width) -> Q_width(W + B A); the gradient is that of W + B A."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, a: Tensor, b: Tensor, width: str) -> Tensor:
        ctx.save_for_backward(a, b)
        return rounded(with_pair(w.bfloat16().float(), a, b), width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        return grad if ctx.needs_input_grad[0] else None, b.mT @ grad, grad @ a.mT, None


class MultiLinear(nn.Module):
    """Stands where a BitLinear stood: several matrices with one input, each at the width of `widths` (by its name)."""

    def __init__(self, parent: BitLinear, rank: int, form: Form) -> None:
        super().__init__()
        self.names, self.sizes, self.form = parent.names, parent.sizes, form
        self.latent = nn.Parameter(parent.latent.detach().bfloat16().float(), requires_grad=False)
        n_in = self.latent.shape[1]
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for name, n in zip(self.names, self.sizes, strict=True):
            for width in WIDTHS:
                self.a[name + width] = nn.Parameter(torch.randn(rank, n_in) * n_in**-0.5)
                self.b[name + width] = nn.Parameter(torch.zeros(n, rank))
        self.widths = dict.fromkeys(self.names, "8")
        self.kept: dict[str, Tensor] | None = None  # matrices rounded before, while nothing trains

    def latent_of(self, name: str) -> Tensor:
        """W [n, K] of one matrix."""
        latent: Tensor = self.latent.split(self.sizes)[self.names.index(name)]
        return latent

    def matrix(self, name: str, width: str) -> Tensor:
        """What is multiplied with, f32 [n, K]."""
        key = name + width
        if self.kept is not None and key in self.kept:
            return self.kept[key]
        a, b = self.a[key], self.b[key]
        if self.form == "beside":
            a, b = a[:0], b[:, :0]
        hard: Tensor = _Rounded.apply(self.latent_of(name), a, b, width)  # type: ignore[no-untyped-call]
        if self.kept is not None:
            self.kept[key] = hard.detach()
        return hard

    def forward(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """x [..., K] -> one [..., n] of `dtype` a name"""
        rows: dict[int | None, Tensor] = {}
        out = []
        for name in self.names:
            width = self.widths[name]
            grain = ACTIVATION_GRAIN[WIDTHS[width]]
            if grain not in rows:
                rows[grain] = rounded_rows(x, width).to(dtype)
            y = F.linear(rows[grain], self.matrix(name, width).to(dtype))
            if self.form == "beside":
                a, b = self.a[name + width], self.b[name + width]
                y = y + F.linear(F.linear(x.to(dtype), a.to(dtype)), b.to(dtype))
            out.append(y)
        return tuple(out)


class MultiDecoder(Decoder):
    """A parent's decoder, frozen, with one pair a matrix and width.  `assign` says which widths are computed with.

    `train_shared` lets latents, embedding and norms train as well: no longer the paper's setting, but what a model
    trained for one assignment alone would do.  Raises ConfigError for shapes that the widths' blocks do not fit.
    """

    def __init__(self, parent: Decoder, *, rank: int = RANK, form: Form = "inside", train_shared: bool = False) -> None:
        shape = parent.shape
        if not shape.packs:
            raise ConfigError(
                f"d_model={shape.d_model}, d_ff={shape.d_ff}: a master needs multiples of {TQ_BLOCK}, the block of "
                "its ternary and 3-bit types"
            )
        super().__init__(shape)
        self.load_state_dict(parent.state_dict())
        self.rank, self.form = rank, form
        self.requires_grad_(train_shared)
        with torch.no_grad():
            self.embedding.copy_(self.embedding.bfloat16().float())
        for block in self.blocks:
            for name in ("qkv", "wo", "gate_up", "down"):
                linear = MultiLinear(getattr(block, name), rank, form)
                linear.latent.requires_grad_(train_shared)
                setattr(block, name, linear)
        self.embedding_width = "8"
        self._kept_head: dict[str, Tensor] | None = None
        self.matrices = tuple(self._matrices())

    def linears(self) -> Iterator[tuple[int, MultiLinear]]:
        """(layer, module) in the order of the file."""
        for i, block in enumerate(self.blocks):
            for module in cast(Block, block).children():
                if isinstance(module, MultiLinear):
                    yield i, module

    def _matrices(self) -> Iterator[Matrix]:
        """The same as `nearfar.master.matrices` of the exported header."""
        yield Matrix(EMBEDDING, (self.shape.n_vocab, self.shape.d_model))
        for i in range(len(self.blocks)):
            shapes = {}
            for layer, linear in self.linears():
                if layer == i:
                    for name, n in zip(linear.names, linear.sizes, strict=True):
                        shapes[name] = Matrix(f"blk.{i}.{name}", (n, linear.latent.shape[1]))
            yield from (shapes[name] for name in ORDER)

    def assign(self, assignment: str) -> None:
        """Compute with these widths from now on; one letter a matrix, as `matrices` names them."""
        assert is_assignment(assignment, self.matrices), assignment
        widths = {m.name: width for m, width in zip(self.matrices, assignment, strict=True)}
        self.embedding_width = widths[EMBEDDING]
        for i, linear in self.linears():
            linear.widths = {name: widths[f"blk.{i}.{name}"] for name in linear.names}

    def keep(self, kept: bool) -> None:
        """Keep rounded matrices (while nothing trains: search, evaluation), or forget them."""
        self._kept_head = {} if kept else None
        for _, linear in self.linears():
            linear.kept = {} if kept else None

    def head(self, *, q8_embedding: bool = True) -> Tensor:
        """The embedding f32 [V, D] at its width; it is always rounded here."""
        width = self.embedding_width
        assert width in EMBEDDING_WIDTHS
        if self._kept_head is not None and width in self._kept_head:
            return self._kept_head[width]
        nothing = self.embedding.new_zeros(0, self.shape.d_model)
        hard: Tensor = _Rounded.apply(  # type: ignore[no-untyped-call]
            self.embedding, nothing, self.embedding.new_zeros(self.shape.n_vocab, 0), width
        )
        if self._kept_head is not None:
            self._kept_head[width] = hard.detach()
        return hard


# The order of matrices within a layer, as nearfar.weights.layer_tensors has it.
ORDER = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
