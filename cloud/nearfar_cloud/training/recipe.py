"""What is trained and how, frozen: the sizes of a model and the course of its run.  Stands at the start of the walk.

`RECIPES` names the shapes of the project.  A recipe's `sha256` goes into each checkpoint, so that a run is only ever
resumed with the recipe that it began with.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Literal

from nearfar.errors import ConfigError
from nearfar_cloud.training.mix import LONG_RUN, Shares

# An hour or two on two cores (10 to 40 M tokens): what the device is for comes first, language last.
DEVICE_FIRST = Shares(
    stable={"intents": 28, "home": 22, "journals": 8, "skills": 4}
    | {"sgd": 25, "stories": 4, "books": 4, "coffee": 3, "persona": 2},
    decay={"intents": 32, "home": 22, "journals": 10, "skills": 2}
    | {"sgd": 28, "stories": 2, "books": 1, "coffee": 2, "persona": 1},
)

TQ_BLOCK = 256  # weights in one block of GGUF's ternary types: every inner width is a multiple of it


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a bitnet decoder with exits.  The head is the embedding."""

    n_vocab: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    n_ctx: int
    exits: tuple[int, ...]  # an exit after each of these numbers of layers, or none; the device stops at the last one
    norm_eps: float = 1e-5
    rope_base: float = 10_000.0
    weights: Literal["ternary", "float"] = "ternary"  # of the matrices; float: nor are their inputs rounded

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads or self.head_dim % 2:
            raise ConfigError(
                f"{self.n_heads} heads ({self.n_kv_heads} for keys) do not split d_model={self.d_model} into even heads"
            )
        if list(self.exits) != sorted(set(self.exits)) or not all(0 < e < self.n_layers for e in self.exits):
            raise ConfigError(f"exits={self.exits}: expected rising layer numbers 1..{self.n_layers - 1}")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def d_kv(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def n_linear(self) -> int:
        """Weights of the ternary matrices."""
        return self.n_layers * (2 * self.d_model**2 + 2 * self.d_model * self.d_kv + 3 * self.d_model * self.d_ff)

    @property
    def n_embedding(self) -> int:
        return self.n_vocab * self.d_model

    @property
    def packs(self) -> bool:
        """Whether its matrices fit into GGUF's ternary blocks."""
        return not any(n % TQ_BLOCK for n in (self.d_model, self.d_ff))


@dataclass(frozen=True, slots=True)
class Recipe:
    """A shape and the course of its training: warm up, stay stable, decay (WSD), or one half wave down (cosine)."""

    name: str
    shape: Shape
    seq_len: int = 512  # columns of a batch row; documents are packed into it
    micro_rows: int = 4  # rows of one forward pass; larger batches accumulate
    short: tuple[int, int] | None = None  # rows and columns of a pass of its own for the sources with short rows
    batch_tokens: tuple[int, int] = (2048, 8192)  # at the start and at the end of the stable phase
    peak_lr: float = 3e-3
    final_lr: float = 0.02  # share of the peak that is left at the end
    warmup: float = 0.02  # share of the budget
    decay_from: float = 0.75  # share of the budget: from here on rows and loss weights are those of the decay
    schedule: Literal["wsd", "cosine"] = "wsd"  # of the rate alone
    optimizer: Literal["adamw", "muon"] = "adamw"  # of the matrices; everything else is AdamW's
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    weight_decay: float = 0.1  # on the matrices, and 0 in the decay
    exit_weight: float = 0.3
    exit_kl: float = 0.5  # in the decay: this share of the exit loss is the divergence from full depth
    distill: float = 0.5  # where there is a teacher: this share of the loss is the divergence from it
    prompt_weights: tuple[float, float] = (1.0, 0.1)  # of tokens that the model does not write: stable, decay
    prompt_stride: int = 1  # one prompt token in so many is looked at, and weighs that much more: the head is dear
    shares: Shares = LONG_RUN  # of the sources in the tokens
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: a few steps of each are timed, the faster one stays
    seed: int = 1

    def __post_init__(self) -> None:
        if self.seq_len > self.shape.n_ctx:
            raise ConfigError(f"seq_len={self.seq_len} exceeds the context of {self.shape.n_ctx}")
        if self.short and not 0 < self.short[1] <= self.seq_len:
            raise ConfigError(f"short={self.short}: expected rows of 1..{self.seq_len} columns")
        if not 0 <= self.distill <= 1:
            raise ConfigError(f"distill={self.distill}: expected a share, 0..1")
        if not 0 <= self.warmup < self.decay_from < 1:
            raise ConfigError(f"warmup={self.warmup}, decay_from={self.decay_from}: expected 0 <= warmup < decay < 1")

    @property
    def passes(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of the forward passes that one part of a batch takes: short rows, long rows."""
        return (*([self.short] if self.short else []), (self.micro_rows, self.seq_len))

    @property
    def micro_tokens(self) -> int:
        return sum(rows * columns for rows, columns in self.passes)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def _recipes() -> dict[str, Recipe]:
    pico = Shape(1024, 128, 4, 2, 1, 256, 256, (2,))
    xs = Shape(4096, 128, 6, 4, 2, 384, 512, (2, 4))
    nano = Shape(4096, 256, 6, 4, 2, 512, 512, (2, 4))
    small = Shape(8192, 512, 10, 8, 4, 1024, 1024, (3, 6))
    teacher = Shape(8192, 768, 12, 12, 4, 1536, 1024, (), weights="float")  # 2.4 times small
    return {
        r.name: r
        for r in (
            Recipe("pico", pico, peak_lr=4e-3, seq_len=256, micro_rows=8, decay_from=0.6, shares=DEVICE_FIRST),
            Recipe("xs", xs, peak_lr=4e-3),
            # An hour and more on two cores.  The long decay: at the full rate ternary weights flip so much that a tenth
            # of the loss is noise.
            Recipe(
                "nano",
                nano,
                short=(12, 192),
                micro_rows=3,
                batch_tokens=(3840, 3840),
                peak_lr=6e-3,
                optimizer="muon",
                decay_from=0.3,
                prompt_weights=(0.2, 0.1),
                prompt_stride=4,
                shares=DEVICE_FIRST,
            ),
            Recipe("small", small, peak_lr=1.5e-3, batch_tokens=(8192, 65536)),
            Recipe("teacher", teacher, peak_lr=6e-4, batch_tokens=(8192, 65536), precision="bf16"),
        )
    }


RECIPES: dict[str, Recipe] = _recipes()
