"""The forward pass over a flat batch: rows of many sequences beside each other, through any layers.

    x + wo(attention(rope(q), rope(k), v))      q, k, v from norm(x), grouped heads
    x + down(act(gate) * up)                    gate, up from norm(x)

The variants (biases, head norms, sub-norms, which numbers rotate together) are those of `nearfar.config`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nearfar.config import ModelConfig
from nearfar_cloud.model.attention import Attention, KVStore, Spans, attention
from nearfar_cloud.model.linear import Linear
from nearfar_cloud.model.loader import Loaded
from nearfar_cloud.model.moe import Mixture


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x [..., D], gain f32 [D] -> the same shape and dtype, computed in f32 (1910.07467 eq. 4)"""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * gain
    return y.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
    """x [R, H, hd], cos and sin f32 [R, 1, hd/2] -> f32 [R, H, hd] (2104.09864)"""
    x = x.float()
    if pairs == "halves":
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


@dataclass(slots=True)
class Layer:
    """The parameters of one layer; gains in f32."""

    attn_norm: Tensor
    qkv: Linear
    wo: Linear
    ffn_norm: Tensor
    feed: FeedForward | Mixture
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    attn_sub_norm: Tensor | None = None


class FeedForward:
    """down(norm(act(gate) * up)), the norm where the family has one."""

    def __init__(self, c: ModelConfig, gate_up: Linear, down: Linear, sub_norm: Tensor | None) -> None:
        self.config, self.gate_up, self.down, self.sub_norm = c, gate_up, down, sub_norm

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, D] -> [R, D]"""
        gate, up = self.gate_up(x).float().chunk(2, dim=-1)
        gated = F.relu(gate).square() if self.config.ffn_act == "relu2" else F.silu(gate)
        y = (gated * up).to(x.dtype)
        if self.sub_norm is not None:
            y = rms_norm(y, self.sub_norm, self.config.norm_eps)
        return self.down(y)


class Decoder:
    """Layers, embedding and head of one loaded model; keys and values lie in the store that is attached.

    The upper half of a model has layers from `first` on, and no ids to look up.
    """

    def __init__(self, loaded: Loaded) -> None:
        self.config, self.pairs, self.dtype = loaded.config, loaded.rope_pairs, loaded.dtype
        get = loaded.tensors.get
        self.embedding = get("token_embd.weight")
        head = get("output.weight", self.embedding)
        assert head is not None
        self.head = Linear(head)
        self.output_norm = loaded.tensors["output_norm.weight"].float()
        self.first = self.config.layers[0]
        self.layers = [_layer(loaded, i) for i in range(*self.config.layers)]
        half = self.config.head_dim // 2
        frequency = self.config.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
        factors = get("rope_freqs.weight")
        self.frequency = frequency if factors is None else frequency / factors.double()
        self.attend: Attention | None = None

    def attach(self, store: KVStore, attention_name: str = "auto") -> str:
        """Keep keys and values there; the name of the attention."""
        self.attend = attention(store, self.config.n_heads, attention_name)
        return self.attend.name

    def embed(self, ids: Tensor) -> Tensor:
        """ids int64 [R] -> [R, D]"""
        assert self.embedding is not None, "an upper half: ModelFacts.check refuses ids"
        return self.embedding[ids]

    def angles(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """position int64 [R] -> cos, sin f32 [R, 1, hd/2]; angles in double, for positions near a million."""
        angle = (position.double() * self.config.rope_scale).unsqueeze(-1) * self.frequency
        return angle.cos().float().unsqueeze(1), angle.sin().float().unsqueeze(1)

    def forward(self, x: Tensor, spans: Spans, first: int, last: int) -> Tensor:
        """x [R, D] of the spans -> [R, D] behind the layers [first, last)"""
        assert self.attend is not None, "attach a store first"
        angles = self.angles(spans.positions())
        for i in range(first, last):
            x = self.layer(i, x, angles, self.attend, spans)
        return x

    def layer(self, i: int, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attention, spans: Spans) -> Tensor:
        """x [R, D] of the spans -> [R, D]; their keys and values go into the store behind `attend`."""
        c, p = self.config, self.layers[i - self.first]
        q, k, v = p.qkv(rms_norm(x, p.attn_norm, c.norm_eps)).split((c.d_q, c.d_kv, c.d_kv), dim=-1)
        q, k = q.unflatten(-1, (c.n_heads, c.head_dim)), k.unflatten(-1, (c.n_kv_heads, c.head_dim))
        v = v.unflatten(-1, (c.n_kv_heads, c.head_dim))
        if p.q_norm is not None and p.k_norm is not None:
            q, k = rms_norm(q, p.q_norm, c.norm_eps), rms_norm(k, p.k_norm, c.norm_eps)
        q, k = rotate(q, *angles, self.pairs), rotate(k, *angles, self.pairs)
        o = attend(i, q, k, v.float(), spans).to(x.dtype)
        if p.attn_sub_norm is not None:
            o = rms_norm(o, p.attn_sub_norm, c.norm_eps)
        x = x + p.wo(o)
        return x + p.feed(rms_norm(x, p.ffn_norm, c.norm_eps))

    def normed(self, x: Tensor) -> Tensor:
        """Rows of the last layer [S, D] -> as the head reads them [S, D]"""
        return rms_norm(x, self.output_norm, self.config.norm_eps)

    def logits(self, x: Tensor) -> Tensor:
        """x [S, D] -> f32 [S, V]"""
        return self.head(self.normed(x)).float()


def _layer(loaded: Loaded, i: int) -> Layer:
    get = loaded.tensors.get

    def matrix(*names: str) -> Linear:
        """The matrices of one input under each other."""
        weight = torch.cat([loaded.tensors[f"blk.{i}.{name}.weight"] for name in names])
        biases = [get(f"blk.{i}.{name}.bias") for name in names]
        bias = torch.cat([b for b in biases if b is not None]) if biases[0] is not None else None
        return Linear(weight, bias)

    def gain(name: str) -> Tensor:
        return loaded.tensors[f"blk.{i}.{name}.weight"].float()

    def optional(name: str) -> Tensor | None:
        found = get(f"blk.{i}.{name}.weight")
        return None if found is None else found.float()

    feed: FeedForward | Mixture
    if loaded.experts is None:
        feed = FeedForward(loaded.config, matrix("ffn_gate", "ffn_up"), matrix("ffn_down"), optional("ffn_sub_norm"))
    else:
        parts = (
            loaded.tensors[f"blk.{i}.ffn_{part}.weight"] for part in ("gate_inp", "gate_exps", "up_exps", "down_exps")
        )
        feed = Mixture(loaded.experts, *parts)
    return Layer(
        attn_norm=gain("attn_norm"),
        qkv=matrix("attn_q", "attn_k", "attn_v"),
        wo=matrix("attn_output"),
        ffn_norm=gain("ffn_norm"),
        feed=feed,
        q_norm=optional("attn_q_norm"),
        k_norm=optional("attn_k_norm"),
        attn_sub_norm=optional("attn_sub_norm"),
    )
