"""What `nearfar split` finds out of a whole model before it cuts it: the outlier channels of its rows, the self-test.

Both come from short texts that every tokenizer knows how to cut; a longer text of one's own makes better channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nearfar.lower import Lower
from nearfar.wire.codec import Codec, outlier_channels
from nearfar.wire.golden import N_GOLDEN, Golden
from nearfar.wire.messages import GROUPS, CodecId, CodecSpec

TEXTS = (
    "The capital of France is",
    "One, two, three, four,",
    "Once upon a time there was a",
    "Water boils at one hundred degrees",
    "turn off the kitchen lights in ten minutes",
    "The opposite of hot is",
    "def add(a, b):\n    return",
    "Monday, Tuesday, Wednesday,",
    "To be or not to be, that is the",
    "Dear Sir or Madam,\n\nI am writing to",
    "2 + 2 =",
    "The quick brown fox jumps over the lazy",
    "wake me up at seven tomorrow morning",
    "In the beginning",
    "She opened the door and saw",
    "Ingredients: flour, sugar, eggs and",
)
WINDOW = 512  # positions of a longer text that are run together
CODECS = (CodecId.FP16, CodecId.INT8_OS, CodecId.INT4_OS)


def channels(lower: Lower, k: int, texts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The outlier channels of the rows that enter layer `k`, from the ids of some texts."""
    return outlier_channels(np.concatenate([rows_at(lower, k, ids) for ids in texts if len(ids)]))


def rows_at(lower: Lower, k: int, ids: Sequence[int]) -> NDArray[np.float32]:
    """ids [T] -> f32 [T, D]: inputs of layer `k`, a window of the text at a time."""
    window = min(WINDOW, lower.config.n_ctx)
    parts = [np.asarray(ids[i : i + window], np.int32) for i in range(0, len(ids), window)]
    return np.concatenate([lower.forward(lower.embed(p), lower.new_kv(len(p)), 0, k) for p in parts])


def golden(lower: Lower, k: int, prompts: Sequence[Sequence[int]], outliers: Sequence[int]) -> list[Golden]:
    """Of the prompts the N_GOLDEN whose next token is the clearest: the same under every codec, by the widest margin.

    Where fewer are clear, the others follow; their token is that of the default codec.
    """
    c = lower.config
    codecs = [Codec.of(CodecSpec(i, outliers=tuple(outliers) if GROUPS[i] else ()), c.d_model) for i in CODECS]
    ranked = []
    for ids in (ids[: c.n_ctx - 1] for ids in prompts if len(ids)):
        rows = lower.forward(lower.embed(np.asarray(ids, np.int32)), lower.new_kv(len(ids)), 0, k)
        logits = [logits_above(lower, k, codec.round_trip(rows)) for codec in codecs]
        tokens = [int(z.argmax()) for z in logits]
        low, high = np.partition(logits[CODECS.index(CodecId.INT8_OS)], -2)[-2:]
        clear = len(set(tokens)) == 1
        ranked.append((not clear, -float(high - low), Golden(tuple(ids), tokens[CODECS.index(CodecId.INT8_OS)])))
    return [g for *_, g in sorted(ranked, key=lambda r: r[:2])[:N_GOLDEN]]


def logits_above(lower: Lower, k: int, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """rows f32 [T, D] of a text, inputs of layer `k` -> f32 [V]: what full depth says behind it."""
    h = lower.forward(rows, lower.new_kv(len(rows)), k, lower.config.n_layers)
    z: NDArray[np.float32] = lower.logits(h[-1:])[0]
    return z
