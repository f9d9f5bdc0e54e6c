"""The decoder that training sees: llama.cpp's `bitnet` block with exits.  Follows bitlinear.py; losses.py comes next.

    x + wo(sub_norm(attention(rope(q), rope(k), v)))        q, k, v from norm(x), grouped heads, rotation on halves
    x + down(sub_norm(silu(gate) * up))                     gate, up from norm(x)

Every matrix is a BitLinear; the head is the embedding; exit e is an RMSNorm of its own before that same head.
The exported file computes the same numbers (tests/cloud/test_export.py).
"""

from __future__ import annotations

from collections.abc import Collection
from hashlib import sha256

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nearfar_cloud.training.bitlinear import BitLinear
from nearfar_cloud.training.recipe import Shape

Q8_BLOCK = 32  # numbers of one Q8_0 block


def inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where that is not finite: the scale of a block of zeros."""
    one_over = 1 / d
    return torch.where(one_over.isfinite(), one_over, 0.0)


def q8_0(x: Tensor) -> Tensor:
    """x f32 [N, K] -> the numbers that GGUF's Q8_0 holds of it: blocks of 32, an f16 scale, halves away from zero."""
    blocks = x.unflatten(-1, (-1, Q8_BLOCK))
    d = blocks.abs().amax(-1, keepdim=True) / 127
    y = blocks * inverse(d)
    whole = y.abs().floor()
    codes = torch.copysign(whole + (y.abs() - whole >= 0.5), y)
    hard: Tensor = (codes * d.half().float()).flatten(-2)
    return hard


def fake_q8_0(x: Tensor) -> Tensor:
    """x [N, K] as `q8_0`, gradients straight through."""
    rounded: Tensor = x + (q8_0(x.detach().float()) - x.detach())
    return rounded


def rotation(pos: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """pos [B, T] -> cos, sin [B, 1, T, head_dim / 2], f32 (RoFormer, arXiv 2104.09864)"""
    rates = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=pos.device) / head_dim)
    angles = (pos.float().unsqueeze(-1) * rates).unsqueeze(1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, H, T, head_dim]: number i turns with number i + head_dim / 2."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def visible(doc: Tensor) -> Tensor:
    """doc [B, T] -> bool [B, 1, T, T]: a row sees itself and what came before it in its own document."""
    same = doc.unsqueeze(-1) == doc.unsqueeze(-2)
    return same.tril().unsqueeze(1)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [B, H, T, d], k and v [B, KV, T, d], mask bool [B, 1, T, T] -> [B, H, T, d]; H / KV heads share one k, v."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class RMSNorm(nn.Module):
    """x [..., D] -> f32 [..., D]"""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.gain


class Block(nn.Module):
    """One layer: attention and gated feed-forward, each behind a norm, with sub-norms before `wo` and `down`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d, ff, eps = shape.d_model, shape.d_ff, shape.norm_eps
        self.n_heads, self.n_kv_heads = shape.n_heads, shape.n_kv_heads
        std, ternary = d**-0.5, shape.weights == "ternary"
        self.attn_norm, self.attn_sub_norm = RMSNorm(d, eps), RMSNorm(d, eps)
        self.ffn_norm, self.ffn_sub_norm = RMSNorm(d, eps), RMSNorm(ff, eps)
        self.qkv = BitLinear(d, {"attn_q": d, "attn_k": shape.d_kv, "attn_v": shape.d_kv}, std, ternary=ternary)
        self.wo = BitLinear(d, {"attn_output": d}, std, ternary=ternary)
        self.gate_up = BitLinear(d, {"ffn_gate": ff, "ffn_up": ff}, std, ternary=ternary)
        self.down = BitLinear(ff, {"ffn_down": d}, ff**-0.5, ternary=ternary)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """x f32 [B, T, D] -> f32 [B, T, D]"""
        q, k, v = self.qkv(self.attn_norm(x), dtype)
        q = rotate(self.heads(q, self.n_heads), cos, sin)
        k = rotate(self.heads(k, self.n_kv_heads), cos, sin)
        v = self.heads(v, self.n_kv_heads)
        rows = attention(q, k, v, mask).transpose(1, 2).flatten(-2)
        x = x + self.wo(self.attn_sub_norm(rows), dtype)[0].float()
        gate, up = self.gate_up(self.ffn_norm(x), dtype)
        gated = F.silu(gate.float()) * up.float()
        out: Tensor = x + self.down(self.ffn_sub_norm(gated), dtype)[0].float()
        return out

    @staticmethod
    def heads(x: Tensor, n: int) -> Tensor:
        """[B, T, n * head_dim] -> [B, n, T, head_dim]"""
        out: Tensor = x.unflatten(-1, (n, -1)).transpose(1, 2)
        return out


class Decoder(nn.Module):
    """ids [B, T] -> normed rows of the final head and of each exit; `embedding` [V, D] turns rows into logits."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.randn(shape.n_vocab, shape.d_model) * shape.d_model**-0.5)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.output_norm = RMSNorm(shape.d_model, shape.norm_eps)
        self.exit_norms = nn.ModuleDict({str(e): RMSNorm(shape.d_model, shape.norm_eps) for e in shape.exits})

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embedding.device

    @property
    def sha256(self) -> str:
        """Fingerprint of all weights."""
        digest = sha256()
        for name, tensor in self.state_dict().items():
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def exit_gain(self, e: int) -> Tensor:
        """The gain f32 [D] of the exit after layer `e`."""
        return self.exit_norms[str(e)].get_parameter("gain")

    def head(self, *, q8_embedding: bool) -> Tensor:
        """The embedding f32 [V, D], as the file will hold it or as it is."""
        return fake_q8_0(self.embedding) if q8_embedding else self.embedding

    def forward(
        self,
        ids: Tensor,
        pos: Tensor,
        doc: Tensor,
        head: Tensor,
        dtype: torch.dtype = torch.float32,
        exits: Collection[int] | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """ids, pos, doc int64 [B, T], head f32 [V, D] -> final rows f32 [B, T, D], and by layer those of `exits`.

        Left out, `exits` are all that the shape has.
        """
        wanted = self.shape.exits if exits is None else exits
        cos, sin = rotation(pos, self.shape.head_dim, self.shape.rope_base)
        mask = visible(doc)
        x = F.embedding(ids, head)
        early: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks, start=1):
            x = block(x, cos, sin, mask, dtype)
            if i in wanted:
                early[i] = self.exit_norms[str(i)](x)
        return self.output_norm(x), early
