"""Prompts cut by layers and not by rows (layered prefill, arXiv 2510.08055).

    step      1          2          3                        rows of a prompt wait between two layers
    layers    [0, 8)     [8, 16)    [16, 24) -> logits       sequences that generate run through all layers each step

A mixture of experts reads an expert once for all rows that meet in a layer: a prompt that passes whole meets each
expert once, a prompt in chunks once a chunk.  Loses where weights fit into the cache (chunks cost the same, and rows
that wait take memory), and for short prompts that come behind a long one.
"""

from __future__ import annotations

from nearfar_cloud.kv.pool import BLOCK
from nearfar_cloud.scheduling.budget import ChunkedPrefill, generates
from nearfar_cloud.scheduling.view import EngineView
from nearfar_cloud.types import Seq, Work


class LayeredPrefill(ChunkedPrefill):
    """All rows of a prompt through as many layers as the budget of ChunkedPrefill pays for, more in the next step.

    A prompt that is too long for one layer is cut by rows, too.
    """

    def deepest(self, s: Seq) -> int:
        """Its rows run beside each other, so the last position stands for all: never less than they cost."""
        return s.n_known

    def shape(self, work: Work, s: Seq, left: int, view: EngineView) -> Work | None:
        if generates(s) or work.rows(view.cost.n_layers) <= left:
            return work
        if left < BLOCK:
            return None  # who goes first always has more
        area = left * view.cost.n_layers  # rows times layers
        n = min(work.n, area)
        return work.narrowed(s, n, work.layers.first + area // n)
