"""What a model is made of: the frozen facts that a GGUF header states.  Imports errors only.

`ModelConfig.from_metadata` is the door: a header that cannot be run is refused here, with the key, the value
found and what was expected; behind it nothing is checked again and nothing is filled in later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

from nearfar.errors import UnsupportedError, WeightsError

ARCHITECTURES = ("llama", "qwen2", "qwen3", "bitnet", "bitnet-b1.58")
MASTER = "nearfar-master"  # what `nearfar pack` makes models of (master.py); no engine runs it
SPLIT_VERSION = 1  # nearfar.version: of the keys that a split model has

# What a file holds of its model: all of it, or one of the two halves that `nearfar split` makes (halves.py).
Role = Literal["full", "device", "upper"]

MAX_RANK = 4096  # of an exit's residual: beyond that a layer more would be the better exit

# Larger than any model in use; smaller than anything that would make a size overflow or an allocation absurd.
_LIMITS = {"n_layers": 1024, "d_model": 1 << 16, "n_heads": 1024, "d_ff": 1 << 20, "n_vocab": 1 << 22, "n_ctx": 1 << 24}


@dataclass(frozen=True, slots=True)
class ExitConfig:
    """An early exit after layer `layer`: RMSNorm of its own, then the shared head.

    `rank` above 0: before that norm stands a low-rank residual of that width (`lower_numpy.bend`).
    `temperature` and the isotonic map (x: raw max-softmax, y: measured agreement with full depth) turn the exit's
    logits into a confidence; `tau` is the calibrated threshold (1.0 = this exit never fires), `tau_loose` the one for a
    looser promise, while an upper side has too much to do (None: there is none).
    """

    layer: int
    temperature: float = 1.0
    isotonic_x: tuple[float, ...] = ()
    isotonic_y: tuple[float, ...] = ()
    tau: float = 1.0
    rank: int = 0
    tau_loose: float | None = None

    def __post_init__(self) -> None:
        name = f"nearfar.exit.{self.layer}"
        if not 0 <= self.rank <= MAX_RANK:
            raise WeightsError(f"{name}.rank={self.rank}: expected 0..{MAX_RANK}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise WeightsError(f"{name}.temperature={self.temperature}: expected a positive number")
        if not (math.isfinite(self.tau) and 0 <= self.tau <= 1):
            raise WeightsError(f"{name}.tau={self.tau}: expected 0..1")
        if self.tau_loose is not None and not 0 <= self.tau_loose <= self.tau:
            raise WeightsError(f"{name}.tau_loose={self.tau_loose}: expected 0..tau ({self.tau})")
        if len(self.isotonic_x) != len(self.isotonic_y):
            raise WeightsError(
                f"{name}: isotonic_x has {len(self.isotonic_x)} points, isotonic_y {len(self.isotonic_y)}"
            )
        for points in (self.isotonic_x, self.isotonic_y):
            if any(not math.isfinite(p) for p in points) or any(b < a for a, b in pairwise(points)):
                raise WeightsError(f"{name}: isotonic points must be finite and must not fall")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and variants of one decoder-only transformer, and which of its layers the file holds.

        role      layers              begins with                  ends with
        full      [0, n_layers)       the embedding                the final norm and the head
        device    [0, split_layer)    the embedding                an exit after its last layer
        upper     [row_layer, L)      rows that the device made    the final norm and the head

    Layers keep the numbers that they have in the whole model.  Where row_layer < split_layer, rows leave the device
    before its last layers, which both halves have then.
    """

    arch: str
    n_layers: int  # of the whole model
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    n_vocab: int
    n_ctx: int  # positions the model was trained for
    norm_eps: float = 1e-5
    rope_base: float = 10_000.0
    rope_scale: float = 1.0  # positions are multiplied by it (linear scaling: 1 / factor)
    ffn_act: str = "silu"  # "silu": silu(gate) * up; "relu2": relu(gate)^2 * up
    exits: tuple[ExitConfig, ...] = ()
    role: Role = "full"
    split_layer: int = 0  # where the device half ends; 0: the model was not cut
    row_layer: int = 0  # the layer whose inputs travel from one half to the other

    @property
    def layers(self) -> tuple[int, int]:
        """The layers [first, last) that the file holds."""
        if self.role == "full":
            return 0, self.n_layers
        return (0, self.split_layer) if self.role == "device" else (self.row_layer, self.n_layers)

    @property
    def last_exit(self) -> ExitConfig | None:
        """The exit behind the last layer of a device half, where every token ends at the latest."""
        return self.exits[-1] if self.role == "device" else None

    @property
    def last_head(self) -> str:
        """The head behind the last layer: "final", or that exit's."""
        return "final" if self.last_exit is None else f"exit.{self.last_exit.layer}"

    @property
    def d_kv(self) -> int:
        """Width of one position's keys (or values) of one layer."""
        return self.n_kv_heads * self.head_dim

    @property
    def d_q(self) -> int:
        """Width of the queries: the same as d_model in most models, not in all."""
        return self.n_heads * self.head_dim

    @property
    def rope_pairs(self) -> str:
        """Which two numbers rotate together: "adjacent" (2i, 2i+1) or "halves" (i, i + head_dim/2)."""
        return "adjacent" if self.arch == "llama" else "halves"

    @property
    def has_sub_norms(self) -> bool:
        """RMSNorm before wo and before down."""
        return self.arch.startswith("bitnet")

    @property
    def has_qk_norms(self) -> bool:
        """Per-head RMSNorm on q and k before the rotation."""
        return self.arch == "qwen3"

    @property
    def has_qkv_bias(self) -> bool:
        return self.arch == "qwen2"

    def engine_spec(self, rope_pairs: str | None = None) -> dict[str, Any]:
        """What the compiled engine is told of a model, by its names.  `rope_pairs`: of a file with another order."""
        return {
            "n_layers": self.n_layers,
            "d_model": self.d_model,
            "n_heads": self.n_heads,
            "n_kv_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "d_ff": self.d_ff,
            "n_vocab": self.n_vocab,
            "norm_eps": self.norm_eps,
            "rope_base": self.rope_base,
            "rope_scale": self.rope_scale,
            "rope_adjacent": (rope_pairs or self.rope_pairs) == "adjacent",
            "relu2": self.ffn_act == "relu2",
            "has_sub_norms": self.has_sub_norms,
            "has_qk_norms": self.has_qk_norms,
        }

    @classmethod
    def from_metadata(cls, meta: Mapping[str, Any], n_vocab: int) -> ModelConfig:
        """Read the keys of a GGUF header.

        `n_vocab` is the row count of `token_embd.weight`.  Raises UnsupportedError for an architecture or a rope
        scaling that this engine does not run, WeightsError for a key that is missing or out of range.
        """
        arch = meta.get("general.architecture")
        if not isinstance(arch, str):
            raise WeightsError("the file has no general.architecture: it holds no model")
        if arch == MASTER:
            raise UnsupportedError("this is a master, not a model: `nearfar pack` makes models of it")
        if arch not in ARCHITECTURES:
            raise UnsupportedError(
                f"architecture {arch[:40]!r}: the nearfar engine runs {', '.join(ARCHITECTURES)}; "
                "pip install 'nearfar[llama]' runs the others"
            )
        keys = _Keys(meta, arch)
        d_model, n_heads = keys.whole("embedding_length", "d_model"), keys.whole("attention.head_count", "n_heads")
        head_dim = keys.whole("attention.key_length", "d_model", default=d_model // n_heads)
        config = cls(
            arch=arch,
            n_layers=keys.whole("block_count", "n_layers"),
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=keys.whole("attention.head_count_kv", "n_heads", default=n_heads),
            head_dim=head_dim,
            d_ff=keys.whole("feed_forward_length", "d_ff"),
            n_vocab=n_vocab,
            n_ctx=keys.whole("context_length", "n_ctx"),
            norm_eps=keys.number("attention.layer_norm_rms_epsilon", 0.0, 1.0),
            rope_base=keys.number("rope.freq_base", 1.0, 1e12, default=10_000.0),
            rope_scale=keys.rope_scale(),
            ffn_act=keys.choice("nearfar.ffn_act", ("silu", "relu2"), "relu2" if arch == "bitnet-b1.58" else "silu"),
            exits=keys.exits(),
            **keys.half(),
        )
        keys.check_shapes(config)
        return config


class _Keys:
    """Typed, bounded look-ups in a GGUF header."""

    def __init__(self, meta: Mapping[str, Any], arch: str) -> None:
        self.meta, self.arch = meta, arch

    def whole(self, key: str, limit: str, default: int | None = None) -> int:
        value = self.meta.get(f"{self.arch}.{key}", default)
        if value is None:
            raise WeightsError(f"the header lacks {self.arch}.{key}")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LIMITS[limit]:
            raise WeightsError(f"{self.arch}.{key}={str(value)[:40]}: expected a whole number 1..{_LIMITS[limit]}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.meta.get(f"{self.arch}.{key}", default)
        if value is None:
            raise WeightsError(f"the header lacks {self.arch}.{key}")
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            raise WeightsError(f"{self.arch}.{key}={str(value)[:40]}: expected a number {low:g}..{high:g}")
        return float(value)

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        value = self.meta.get(key, default)
        if value not in allowed:
            raise UnsupportedError(f"{key}={str(value)[:40]!r}: this engine knows {', '.join(allowed)}")
        return str(value)

    def rope_scale(self) -> float:
        kind = self.meta.get(f"{self.arch}.rope.scaling.type", "none")
        if kind == "none":
            return 1.0
        if kind != "linear":
            raise UnsupportedError(
                f"{self.arch}.rope.scaling.type={str(kind)[:40]!r}: this engine knows none and linear; "
                "pip install 'nearfar[llama]' runs the others"
            )
        return 1.0 / self.number("rope.scaling.factor", 1e-3, 1e3)

    def half(self) -> dict[str, Any]:
        """role, split_layer and row_layer."""
        role = self.choice("nearfar.role", get_args(Role), "full")
        if role == "full":
            return {}
        version, split = self.meta.get("nearfar.version"), self.meta.get("nearfar.split_layer")
        if version != SPLIT_VERSION:
            raise UnsupportedError(
                f"nearfar.version={str(version)[:40]}: this build reads split models of version {SPLIT_VERSION}; "
                "split the whole model again"
            )
        if type(split) is not int:
            raise WeightsError(f"nearfar.split_layer={str(split)[:40]}: expected the layer where the model was cut")
        if type(rows := self.meta.get("nearfar.row_layer", split)) is not int:
            raise WeightsError(f"nearfar.row_layer={str(rows)[:40]}: expected the layer that rows enter")
        return {"role": role, "split_layer": split, "row_layer": rows}

    def exits(self) -> tuple[ExitConfig, ...]:
        layers = self.meta.get("nearfar.exit_layers", ())
        if not isinstance(layers, (list, tuple)) or not all(isinstance(e, int) and e > 0 for e in layers):
            raise WeightsError("nearfar.exit_layers: expected a list of whole numbers")
        if list(layers) != sorted(set(layers)) or len(layers) > 64:
            raise WeightsError(f"nearfar.exit_layers={list(layers)[:8]}: expected at most 64 rising layer numbers")
        return tuple(self._exit(e) for e in layers)

    def _exit(self, layer: int) -> ExitConfig:
        prefix = f"nearfar.exit.{layer}"
        kind = self.choice(f"{prefix}.kind", ("norm", "lowrank"), "norm")
        self.choice(f"{prefix}.head", ("tied",), "tied")
        rank = self.meta.get(f"{prefix}.rank", 0) if kind == "lowrank" else 0
        if kind == "lowrank" and (type(rank) is not int or not 1 <= rank <= MAX_RANK):
            raise WeightsError(f"{prefix}.rank={str(rank)[:40]}: expected a whole number 1..{MAX_RANK}")

        def real(key: str, default: float) -> float:
            value = self.meta.get(f"{prefix}.{key}", default)
            if not isinstance(value, (int, float)):
                raise WeightsError(f"{prefix}.{key}: expected a number")
            return float(value)

        def reals(key: str) -> tuple[float, ...]:
            values = self.meta.get(f"{prefix}.{key}", ())
            if not isinstance(values, (list, tuple)) or not all(isinstance(v, (int, float)) for v in values):
                raise WeightsError(f"{prefix}.{key}: expected a list of numbers")
            return tuple(float(v) for v in values)

        maps = reals("isotonic_x"), reals("isotonic_y")
        tau_loose = real("tau_loose", 1.0) if f"{prefix}.tau_loose" in self.meta else None
        return ExitConfig(layer, real("temperature", 1.0), *maps, real("tau", 1.0), rank, tau_loose)

    def check_shapes(self, c: ModelConfig) -> None:
        if c.n_heads % c.n_kv_heads:
            raise WeightsError(f"{c.n_heads} heads cannot share {c.n_kv_heads} key-value heads evenly")
        if c.head_dim % 2:
            raise WeightsError(f"head size {c.head_dim}: rotation needs an even number")
        value_dim = self.meta.get(f"{self.arch}.attention.value_length", c.head_dim)
        if value_dim != c.head_dim:
            raise UnsupportedError(f"value heads of {value_dim} beside key heads of {c.head_dim}")
        rope_dim = self.meta.get(f"{self.arch}.rope.dimension_count", c.head_dim)
        if rope_dim != c.head_dim:
            raise UnsupportedError(f"rotation of {rope_dim} out of {c.head_dim} numbers a head")
        self.check_half(c)
        if c.exits and c.exits[-1].layer >= c.n_layers:
            raise WeightsError(f"exit after layer {c.exits[-1].layer} of a model with {c.n_layers} layers")
        if self.meta.get(f"{self.arch}.expert_count", 0):
            raise UnsupportedError("a mixture of experts: pip install 'nearfar[llama]' runs it")

    def check_half(self, c: ModelConfig) -> None:
        if c.role == "full":
            return
        if not 0 < c.split_layer < c.n_layers:
            raise WeightsError(f"nearfar.split_layer={c.split_layer}: expected 1..{c.n_layers - 1}")
        if not 0 < c.row_layer <= c.split_layer:
            raise WeightsError(
                f"nearfar.row_layer={c.row_layer}: expected 1..{c.split_layer}, a layer of the device half or the one "
                "above it"
            )
        if c.role == "device" and (not c.exits or c.exits[-1].layer != c.split_layer):
            raise WeightsError(
                f"a device half cut at layer {c.split_layer} with exits after {[e.layer for e in c.exits]}: "
                f"expected the last one after layer {c.split_layer}, where every token ends"
            )
        if c.role == "upper" and c.exits:
            raise WeightsError(f"an exit after layer {c.exits[0].layer} in an upper half: exits belong to the device's")
