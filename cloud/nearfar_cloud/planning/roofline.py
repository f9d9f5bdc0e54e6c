"""What a step must cost at least: operations and bytes of each operator of a layer, against a machine's two roofs.

    time = operations / min(peak, bandwidth * operations / bytes)        (LLM-Viewer, arXiv 2402.16363)

A multiply-add is two operations.  Weights are read once a step, keys and values once a sequence, activations go in and
out; norms, rotations and activation functions are left out, so a measured step is longer.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from nearfar.config import ModelConfig
from nearfar.errors import DataError, FileError, MissingExtraError, UsageError
from nearfar.machine import cpu_name
from nearfar_cloud.planning.profile import CERTAIN
from nearfar_cloud.scheduling.cost import SCALE, CostModel

MODELS = {  # sizes to plan with before there is a file
    "llama-100m": ModelConfig("llama", 12, 768, 12, 4, 64, 2048, 16_000, 4096),
    "llama-1b": ModelConfig("llama", 16, 2048, 32, 8, 64, 8192, 128_256, 131_072, rope_base=500_000.0),
    "llama-8b": ModelConfig("llama", 32, 4096, 32, 8, 128, 14_336, 128_256, 131_072, rope_base=500_000.0),
    "qwen-0.5b": ModelConfig("qwen2", 24, 896, 14, 2, 64, 4864, 151_936, 32_768, rope_base=1_000_000.0),
}


@dataclass(frozen=True, slots=True)
class Hardware:
    """A machine: bytes a second from memory, and operations a second of a product with so many rows.

    `peaks`: (rows, operations a second), rising; between them the logarithms are interpolated, outside the nearest
    counts.  One pair is a machine whose peak is said to hold always.
    """

    name: str
    source: str  # "measured ..." or "data sheet"
    bandwidth: float
    peaks: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        rows = [m for m, _ in self.peaks]
        speeds = [self.bandwidth, *(p for _, p in self.peaks)]
        if not rows or rows != sorted(set(rows)) or rows[0] < 1 or not all(0 < s < float("inf") for s in speeds):
            raise DataError(f"hardware {self.name}: expected a bandwidth and peaks over rising numbers of rows")

    def peak(self, rows: float) -> float:
        """Operations a second of products with `rows` rows."""
        x, y = zip(*self.peaks, strict=True)
        return float(np.exp(np.interp(np.log(rows), np.log(x), np.log(y))))

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Hardware:
        """Raises FileError (missing), DataError (not a row of hardware)."""
        try:
            found = json.loads(Path(path).read_bytes())
            peaks = tuple((int(m), float(p)) for m, p in found["peaks"])
            return cls(str(found["name"]), str(found["source"]), float(found["bandwidth"]), peaks)
        except OSError as error:
            raise FileError(f"{path}: {error.strerror}") from None
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path}: expected JSON with name, source, bandwidth, peaks ({error!r})") from None


HARDWARE = {
    h.name: h
    for h in (
        Hardware("zen5-core", "measured, bf16", 40e9, ((1, 60e9), (32, 430e9), (256, 495e9))),
        Hardware("a100-40g", "data sheet, dense bf16", 1555e9, ((1, 312e12),)),
        Hardware("h100-sxm", "data sheet, dense bf16", 3350e9, ((1, 989e12),)),
    )
}


@dataclass(frozen=True, slots=True)
class Widths:
    """Bytes of a weight, of a number of the KV cache, of an activation."""

    weight: float = 2.0
    kv: float = 2.0
    activation: float = 2.0


@dataclass(frozen=True, slots=True)
class Stage:
    """A step: each of `batch` sequences runs `rows` positions behind `context` others, and decides one token."""

    batch: int
    rows: int
    context: int

    def __post_init__(self) -> None:
        if self.batch < 1 or self.rows < 1 or self.context < 0:
            raise UsageError(f"{self}: expected batch >= 1, rows >= 1, context >= 0")

    @classmethod
    def prefill(cls, batch: int, n_prompt: int) -> Stage:
        return cls(batch, n_prompt, 0)

    @classmethod
    def decode(cls, batch: int, context: int) -> Stage:
        return cls(batch, 1, context)


class Operator(NamedTuple):
    """One operator of a step; run `times` times (a layer's, once a layer)."""

    name: str
    times: int
    ops: float
    weight_bytes: float
    kv_bytes: float
    activation_bytes: float
    bound: str  # compute or memory
    seconds: float

    @property
    def n_bytes(self) -> float:
        return self.weight_bytes + self.kv_bytes + self.activation_bytes

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.ops / self.n_bytes


def operators(c: ModelConfig, stage: Stage, hardware: Hardware, widths: Widths = Widths()) -> list[Operator]:
    """The operators of one layer, and the head."""
    rows = stage.batch * stage.rows
    read = stage.batch * (stage.context + stage.rows)  # positions whose keys and values are read
    pairs = stage.batch * (stage.rows * stage.context + stage.rows * (stage.rows + 1) / 2)
    d, q, kv, f = c.d_model, c.d_q, 2 * c.d_kv, c.d_ff

    def product(name: str, count: int, m: int, k: int, n: int, *, kv_out: int = 0) -> Operator:
        """[m, k] times [k, n]; `kv_out` of the n columns go into the cache."""
        activations = m * (k + n - kv_out) * widths.activation
        ops, peak = 2.0 * m * k * n, hardware.peak(m)
        return _operator(name, count, ops, k * n * widths.weight, m * kv_out * widths.kv, activations, peak, hardware)

    attention = _operator(
        "attention",
        c.n_layers,
        4.0 * pairs * q,  # q k, and p v
        0.0,
        read * kv * widths.kv,
        2 * rows * q * widths.activation,
        hardware.peak(rows),
        hardware,
    )
    return [
        product("qkv", c.n_layers, rows, d, q + kv, kv_out=kv),
        attention,
        product("o", c.n_layers, rows, q, d),
        product("gate, up", c.n_layers, rows, d, 2 * f),
        product("down", c.n_layers, rows, f, d),
        product("head", 1, stage.batch, d, c.n_vocab),
    ]


def _operator(
    name: str, count: int, ops: float, weights: float, kv: float, activations: float, peak: float, hardware: Hardware
) -> Operator:
    n_bytes = weights + kv + activations
    reachable = min(peak, hardware.bandwidth * ops / n_bytes)
    bound = "compute" if reachable == peak else "memory"
    return Operator(name, count, ops, weights, kv, activations, bound, ops / reachable)


def totals(found: list[Operator], stage: Stage) -> dict[str, float]:
    """Of a whole step, and of each of its positions: tokens decided in a step that decodes, else tokens of prompts."""
    tokens = stage.batch * stage.rows
    sums = {
        "seconds": sum(o.times * o.seconds for o in found),
        "ops": sum(o.times * o.ops for o in found),
        "bytes": sum(o.times * o.n_bytes for o in found),
    }
    each = {f"{name}_a_token": value / tokens for name, value in sums.items()}
    weights = sum(o.times * o.weight_bytes for o in found)
    return sums | each | {"tokens_s": tokens / sums["seconds"], "weight_bytes": weights}


def cost_model(c: ModelConfig, hardware: Hardware, widths: Widths = Widths()) -> CostModel:
    """A cost model of a machine that is only known by its roofs: the lower bound that a simulation starts from.

    Up to the knee a step reads the weights of the layers, above it rows cost their operations; at the knee both take as
    long.  The head is read once a step: rows of prompts do not go through it.
    """
    layers = c.n_layers * (c.d_model * (2 * c.d_q + 2 * c.d_kv) + 3 * c.d_model * c.d_ff)
    peak = hardware.peaks[-1][1]
    head = c.d_model * c.n_vocab * widths.weight / hardware.bandwidth
    read, row = layers * widths.weight / hardware.bandwidth, 2 * layers / peak
    key = c.n_layers * 2 * c.d_kv * widths.kv / hardware.bandwidth
    pair = c.n_layers * 4 * c.d_q / peak
    cost = CostModel(c.n_layers, knee=max(1, int(read / row)))
    for regime, seconds in zip(cost.regimes, ((head + read, 0.0, key, pair), (head, row, key, pair)), strict=True):
        regime.coefficients = np.array(seconds) * SCALE
        regime.covariance = np.eye(len(SCALE)) * CERTAIN
        regime.n = len(SCALE)
    return cost


# ------------------------------------------------------------ the row of this machine

ROWS = (1, 8, 32, 256)
SHAPE = (2048, 768)  # of the matrix: that of a feed-forward layer of a small model


def measure_hardware(dtype: str = "bf16", *, threads: int | None = None, seconds: float = 0.3) -> Hardware:
    """This machine's row: products by `model/linear.py` for some numbers of rows, and a copy four times L3 wide.

    A copy reads and writes, and both count.  `seconds` for each figure.  Raises MissingExtraError without torch.
    """
    if find_spec("torch") is None:
        raise MissingExtraError("torch", "cloud", "the measurement of this machine")
    import torch

    from nearfar_cloud.model.linear import Linear
    from nearfar_cloud.model.loader import DTYPES

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        with torch.inference_mode():
            linear = Linear(torch.randn(*SHAPE).to(DTYPES[dtype]))
            peaks = []
            for m in ROWS:
                x = torch.randn(m, SHAPE[1]).to(DTYPES[dtype])
                peaks.append((m, 2 * m * SHAPE[0] * SHAPE[1] / _seconds(lambda x=x: linear(x), seconds)))  # type: ignore[misc]
            source = torch.ones(1 << 25)  # 128 MiB
            target = torch.empty_like(source)
            bandwidth = 2 * source.nbytes / _seconds(lambda: target.copy_(source), seconds)
    finally:
        torch.set_num_threads(before)
    return Hardware(
        "this machine", f"measured, {dtype}, {threads or before} threads, {cpu_name()}", bandwidth, tuple(peaks)
    )


def _seconds(work: Callable[[], Any], seconds: float) -> float:
    """The median time of a call, of as many as fit into `seconds`, at least three."""
    work()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < seconds:
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return median(taken)


# ------------------------------------------------------------ for people


def table(found: list[Operator], stage: Stage, hardware: Hardware) -> str:
    """A line an operator, then the step."""
    total = totals(found, stage)
    lines = [
        f"{hardware.name} ({hardware.source}): {hardware.bandwidth / 1e9:.0f} GB/s, "
        + ", ".join(f"{p / 1e9:,.0f} GFLOP/s of {m} rows" for m, p in hardware.peaks),
        f"batch {stage.batch}, {stage.rows} rows each behind {stage.context}",
        f"{'operator':<10} {'times':>5} {'MFLOP':>10} {'weights MB':>11} {'KV MB':>8} {'act. MB':>8} {'FLOP/B':>8}  "
        f"{'bound':<8} {'us':>10} {'share':>6}",
        *(_line(o, total["seconds"]) for o in found),
        f"a step: {total['seconds'] * 1e3:.3f} ms, {total['ops'] / 1e9:.2f} GFLOP, {total['bytes'] / 1e6:.1f} MB; "
        f"{total['tokens_s']:,.0f} tokens/s, {total['bytes_a_token'] / 1e6:.2f} MB a token",
    ]
    return "\n".join(lines)


def _line(o: Operator, seconds: float) -> str:
    return (
        f"{o.name:<10} {o.times:>5} {o.ops / 1e6:>10.3f} {o.weight_bytes / 1e6:>11.3f} {o.kv_bytes / 1e6:>8.3f} "
        f"{o.activation_bytes / 1e6:>8.3f} {o.intensity:>8.2f}  {o.bound:<8} {o.seconds * 1e6:>10.1f} "
        f"{o.times * o.seconds / seconds:>6.1%}"
    )
