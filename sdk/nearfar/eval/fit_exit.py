"""A better exit for a finished file: it learns what the layers above it would say, from texts that they wrote.

    openings -> full depth goes on -> rows behind layer e, normed rows at full depth -> residual and gain -> a copy

The model stays as the file has it, rounding included; what is new is `n + up silu(down n)` before the exit's norm
(`lower_numpy.bend`) and the norm's gain.  The loss is the divergence of the exit's distribution from full depth's,
position by position (EE-Tuning, 2402.00518, with the model as its own teacher).  The texts are the model's own, greedy
and drawn: drafts are asked for along such texts, and an exit fitted on books alone gains a fraction of it.
Plain numpy; gradients by hand, checked against differences in the tests.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.engine import Engine
from nearfar.errors import DataError, UsageError
from nearfar.gguf_reader import GGUFFile, ValueType
from nearfar.gguf_writer import GGUFWriter
from nearfar.lower import Lower
from nearfar.lower_numpy import bend, rms_norm
from nearfar.sampling import Sampling

Array = NDArray[np.float32]

TEMPERATURES = (0.0, 1.0, 0.7, 0.0)  # of the answers, in turn: half of them greedy
WORDS = (4, 16)  # of an opening, drawn from a sentence's first words
HELD_OUT = 10  # every tenth answer is not trained on: the figures are of those
BATCH, RATE, WARM_UP = 512, 2e-3, 50  # rows, Adam's step, steps until it is that large
BETAS, TINY = (0.9, 0.99), 1e-8


@dataclass(frozen=True, slots=True)
class Head:
    """What an exit computes with: gain [D], down [R, D], up [D, R]."""

    gain: Array
    down: Array
    up: Array

    @classmethod
    def start(cls, gain: Array, rank: int, seed: int) -> Head:
        """The exit as it is: up is zero, so the residual adds nothing yet."""
        d = len(gain)
        down = np.random.default_rng(seed).standard_normal((rank, d), np.float32) / np.float32(np.sqrt(d))
        return cls(gain.copy(), down, np.zeros((d, rank), np.float32))

    @property
    def arrays(self) -> tuple[Array, Array, Array]:
        return self.gain, self.down, self.up

    def rows(self, h: Array, eps: float) -> Array:
        """h [M, D] behind the exit's layer -> [M, D], what the shared head multiplies."""
        return rms_norm(bend(h, self.down, self.up, eps), self.gain, eps)


@dataclass(frozen=True, slots=True)
class Examples:
    """N positions of answers: rows behind the exit's layer, and the rows that full depth's head multiplied; [N, D]."""

    rows: Array
    taught: Array

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True, slots=True)
class Fit:
    """The exit, and how often its likeliest token was full depth's on answers held out, before and after."""

    head: Head
    before: float
    after: float
    n_trained: int
    n_held_out: int
    epochs: float


# ---------------------------------------------------------------- examples


def openings(text: str, n: int, seed: int, *, held_out: bool = False) -> Iterator[str]:
    """The first words of `n` sentences of a text, drawn.  Raises DataError where there are no sentences.

    `held_out`: of every third one, which nothing is trained on and thresholds may be chosen with; else of the others.
    """
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", text) if s.count(" ") >= WORDS[0]]
    sentences = [s for i, s in enumerate(sentences) if (i % 3 == 2) == held_out]
    if not sentences:
        raise DataError(
            f"a text of {len(text)} characters without a sentence of {WORDS[0]} words: nothing to go on from"
        )
    rng = np.random.default_rng(seed)
    for _ in range(n):
        words = sentences[int(rng.integers(len(sentences)))].split()
        yield " ".join(words[: int(rng.integers(*WORDS))])


def gather(
    model: Any, layer: int, prompts: Iterable[Sequence[int]], max_tokens: int, seed: int
) -> tuple[Examples, Examples]:
    """Full depth continues the prompts; the positions of those answers, to train on and held out.

    Raises UsageError for a model of another engine, ContextError for a prompt too long.
    """
    lower = lower_of(model, layer)
    kept: tuple[list[tuple[Array, Array]], ...] = ([], [])
    i = -1
    for i, (prompt, t) in enumerate(zip(prompts, cycle(TEMPERATURES), strict=False)):
        sampling = Sampling(t, seed=seed + i)
        ids = model.generate(list(prompt), max_tokens=max_tokens, exits=False, sampling=sampling).ids
        if ids:
            kept[i % HELD_OUT == HELD_OUT - 1].append(positions(lower, layer, [*prompt, *ids], len(prompt)))
    train, held = (Examples(*(np.concatenate(column) for column in zip(*p, strict=True))) if p else None for p in kept)
    if train is None or held is None:
        raise DataError(f"{i + 1} openings: expected {HELD_OUT} that the model goes on from, or more")
    return train, held


def positions(lower: Lower, layer: int, ids: Sequence[int], n_prompt: int) -> tuple[Array, Array]:
    """Rows behind `layer`, and normed rows at full depth, of the positions whose next token is the answer's."""
    x = np.asarray(ids[:-1], np.int32)
    kv = lower.new_kv(len(x))
    h = lower.forward(lower.embed(x), kv, 0, layer)
    final = lower.forward(h, kv, layer, lower.config.n_layers)
    return h[n_prompt - 1 :], lower.norm(np.ascontiguousarray(final[n_prompt - 1 :]))


# ---------------------------------------------------------------- training


def loss_and_gradients(head: Head, h: Array, taught: Array, table: Array, eps: float) -> tuple[float, Head]:
    """Mean KL(full depth || exit) over rows h [B, D] and its gradients; table [V, D] makes logits of rows."""
    n = rms_norm(h, np.ones(1, np.float32), eps)  # [B, D]
    a = n @ head.down.T  # [B, R]
    gate = 1 / (1 + np.exp(-a))
    s = a * gate
    y = n + s @ head.up.T
    scale = 1 / np.sqrt(np.mean(y * y, axis=1, keepdims=True) + np.float32(eps))
    normed = y * scale
    log_q, log_p = _log_softmax((normed * head.gain) @ table.T), _log_softmax(taught @ table.T)  # [B, V]
    p = np.exp(log_p)
    loss = float((p * (log_p - log_q)).sum(1).mean())

    dx = ((np.exp(log_q) - p) @ table) / np.float32(len(h))  # [B, D]
    d_normed = dx * head.gain
    dy = scale * (d_normed - normed * np.mean(d_normed * normed, axis=1, keepdims=True))
    da = (dy @ head.up) * (gate + s * (1 - gate))  # silu' = g + a g (1 - g)
    return loss, Head((dx * normed).sum(0), da.T @ n, dy.T @ s)


def _log_softmax(z: Array) -> Array:
    z = z - z.max(1, keepdims=True)
    y: Array = z - np.log(np.exp(z).sum(1, keepdims=True))
    return y


def fit(
    start: Head,
    train: Examples,
    held: Examples,
    table: Array,
    eps: float,
    *,
    steps: int,
    seconds: float = float("inf"),
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Fit:
    """`steps` of Adam (1412.6980) on batches of BATCH rows, or as many as `seconds` allow; the rate falls to 0.

    The better of start and end on the answers held out is kept.
    """
    rng, began = np.random.default_rng(seed), time.perf_counter()
    head, order, at, done = start, rng.permutation(len(train)), 0, 0
    moments = [(np.zeros_like(x), np.zeros_like(x)) for x in head.arrays]
    while done < steps and (spent := (time.perf_counter() - began) / seconds) < 1:
        if at + BATCH > len(order):
            order, at = rng.permutation(len(train)), 0
        rows = order[at : at + BATCH]
        at, done = at + BATCH, done + 1
        loss, gradients = loss_and_gradients(head, train.rows[rows], train.taught[rows], table, eps)
        rate = RATE * min(1.0, done / WARM_UP) * (1 - max(spent, (done - 1) / steps))
        head = Head(*(_adam(*x, rate, done) for x in zip(head.arrays, gradients.arrays, moments, strict=True)))
        if progress is not None:
            progress(done, loss)
    before, after = (agreement(h, held, table, eps) for h in (start, head))
    return Fit(head if after > before else start, before, after, len(train), len(held), done * BATCH / len(train))


def _adam(x: Array, gradient: Array, moments: tuple[Array, Array], rate: float, step: int) -> Array:
    for moment, beta, new in zip(moments, BETAS, (gradient, gradient * gradient), strict=True):
        moment *= np.float32(beta)
        moment += np.float32(1 - beta) * new
    first, second = (m / np.float32(1 - beta**step) for m, beta in zip(moments, BETAS, strict=True))
    y: Array = x - np.float32(rate) * first / (np.sqrt(second) + np.float32(TINY))
    return y


def agreement(head: Head, examples: Examples, table: Array, eps: float) -> float:
    """Share of the positions at which the exit's likeliest token is full depth's."""
    same = 0
    for i in range(0, len(examples), BATCH):
        part = slice(i, i + BATCH)
        said = (head.rows(examples.rows[part], eps) @ table.T).argmax(1)
        same += int((said == (examples.taught[part] @ table.T).argmax(1)).sum())
    return same / len(examples)


# ---------------------------------------------------------------- into the file


def write_exit(file: GGUFFile, out: Path, layer: int, head: Head) -> Path:
    """A copy of `file` whose exit after `layer` is `head`.  Raises FileError.

    No exit fires in it: thresholds are chosen together, and for one exact file.
    """
    exits = sorted({*file.metadata.get("nearfar.exit_layers", ()), layer})
    prefix, names = f"nearfar.exit.{layer}.", {f"exit.{layer}.{part}.weight" for part in ("norm", "down", "up")}
    anew = {
        "general.alignment",
        "nearfar.exit_layers",
        *(f"nearfar.exit.{e}.{tau}" for e in exits for tau in ("tau", "tau_loose")),
    }
    writer = GGUFWriter(out)
    for key in file.metadata:
        is_old = key.startswith((prefix, "nearfar.calibration.")) or key in anew
        if not is_old:
            writer.add_encoded(key, file.encoded(key))
    writer.add("nearfar.exit_layers", exits, ValueType.U32)
    for name, value in (("kind", "lowrank"), ("head", "tied"), ("rank", len(head.down))):
        writer.add(prefix + name, value)
    for e in exits:
        writer.add(f"nearfar.exit.{e}.tau", 1.0)
    writer.add(f"{prefix}norm", head.gain)
    for name, info in file.tensors.items():
        if name not in names:
            writer.add_tensor(name, file.raw(name), info.type, info.shape)
    writer.add_tensor(f"exit.{layer}.down.weight", head.down)
    writer.add_tensor(f"exit.{layer}.up.weight", head.up)
    return writer.write()


def lower_of(model: Any, layer: int) -> Lower:
    """The engine behind an LLM, which may have no exit yet.  Raises UsageError where it can have none after `layer`."""
    stepper = getattr(model, "stepper", None)
    if not isinstance(stepper, Engine):
        raise UsageError("exits live in nearfar's own engine: open the model with --backend native or numpy")
    lower, c = stepper.lower, stepper.lower.config
    if c.role != "full":
        raise UsageError(f"a {c.role} half: expected the whole model, whose full depth teaches; split it afterwards")
    if not 0 < layer < c.n_layers:
        raise UsageError(f"--at {layer}: the model has {c.n_layers} layers, expected 1..{c.n_layers - 1}")
    return lower
