"""Runs batches on a model in this process.

Rows enter where their work begins and leave where it ends, so a batch is cut at those layers:

    layer 0 ....... k ........... L
    A     |---------------------->|  logits
    B     |-------->|                parked
    C               |------------>|  logits          rows from outside, or parked before
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nearfar.errors import UnsupportedError, UsageError
from nearfar_cloud.executors.base import BatchWork, Ids, ModelFacts, Result, Uppers
from nearfar_cloud.kv.pool import Room
from nearfar_cloud.model.attention import KVStore, Spans
from nearfar_cloud.model.decoder import Decoder
from nearfar_cloud.model.loader import Loaded
from nearfar_cloud.model.packed import NativeDecoder, Packed
from nearfar_cloud.model.sampler import decide
from nearfar_cloud.scheduling.cost import Experts
from nearfar_cloud.types import Array

Array64 = NDArray[np.float64]


KV = Literal["auto", "int8"]
NO_UPPERS = Uppers()


def kv_dtype(loaded: Loaded | Packed, kv: KV) -> torch.dtype:
    """Of keys and values: as the model's form has them, or int8 with a scale for each position of a head.

    Raises UnsupportedError where int8 is not there: in torch, and for heads that are no multiple of 32.
    """
    if kv == "auto":
        return loaded.kv_dtype
    if not isinstance(loaded, Packed):
        raise UnsupportedError(
            "keys and values in int8 need the compiled engine: not weights in fp32, no mixture of experts; "
            "choose other weights, or keys and values as they have them"
        )
    if loaded.config.head_dim % 32:
        raise UnsupportedError(
            f"keys and values in int8: expected heads of 32, 64, ... numbers, this model has heads of "
            f"{loaded.config.head_dim}"
        )
    return torch.int8


class LocalExecutor:
    """Owns the model, the blocks, the rows that wait between layers, sums of rows and copies of swapped blocks.

    `uppers`: how many of the blocks have no memory in the lower layers; UsageError where there are no such layers.
    """

    def __init__(
        self,
        loaded: Loaded | Packed,
        n_blocks: int,
        *,
        kv: KV = "auto",
        swap_bytes: int = 1 << 30,
        attention_name: str = "auto",
        prefix_cache: bool = True,
        uppers: Uppers = NO_UPPERS,
    ) -> None:
        c = loaded.config
        if uppers.n and not c.layers[0] < uppers.first < c.layers[1]:
            raise UsageError(
                f"blocks for layers from {uppers.first} on: expected {c.layers[0] + 1}..{c.layers[1] - 1} of a model "
                f"with layers [{c.layers[0]}, {c.layers[1]})"
            )
        self.uppers = uppers
        dtype = kv_dtype(loaded, kv)
        self.store = KVStore(c.layers, n_blocks, c.n_kv_heads, c.head_dim, dtype, is_sparse=uppers.n > 0)
        self.model: Decoder | NativeDecoder
        if isinstance(loaded, Packed):
            self.model = NativeDecoder(loaded)
            self.attention = self.model.attach(self.store)
        else:
            self.model = Decoder(loaded)
            self.attention = self.model.attach(self.store, attention_name)
        self.n_blocks, self.swap_bytes = n_blocks, swap_bytes
        experts = None
        if isinstance(loaded, Loaded) and (mixture := loaded.experts) is not None:
            experts = Experts(mixture.n, mixture.n_used, 3 * mixture.d_ff * c.d_model * loaded.dtype.itemsize)
        sizes = c.n_layers, c.d_model, c.n_vocab, c.n_ctx
        self.facts = ModelFacts(self._fingerprint(loaded), *sizes, prefix_cache, experts, first_layer=c.layers[0])
        self._parked: dict[tuple[int, int], tuple[int, Tensor]] = {}  # sequence, layer -> first position, [n, D]
        self._copies: dict[int, list[Tensor]] = {}
        self._sums: dict[int, Array64] = {}  # sequence -> f64 [D], of the normed last rows so far

    def _fingerprint(self, loaded: Loaded | Packed) -> str:
        """Of all that tokens depend on: weights, how keys and values are kept, whose bits of bf16 these are."""
        kernels = loaded.kernels(self.store) if isinstance(loaded, Packed) else "torch"
        return sha256(f"{loaded.fingerprint} {self.store.k[0].dtype} {kernels}".encode()).hexdigest()

    @torch.inference_mode()
    def run(self, batch: Sequence[BatchWork]) -> list[Result]:
        """Results in the order of the batch; a work without an ask has an empty one."""
        for w in batch:
            assert w.layers.first >= self.uppers.first or self._first_layer(w.blocks) == self.store.first, w.layers
        rows = self._inputs(batch)
        cuts = sorted({at for w in batch for at in w.layers})
        for first, last in pairwise(cuts):
            active = [i for i, w in enumerate(batch) if w.layers.first <= first and last <= w.layers.last]
            if not active:
                continue
            x = torch.cat([rows[i] for i in active])
            spans = Spans.of([(batch[i].n, batch[i].start, batch[i].blocks) for i in active])
            x = self.model.forward(x, spans, first, last)
            for i, part in zip(active, x.split([s.n for s in spans.items]), strict=True):
                rows[i] = part
        for w, x in zip(batch, rows, strict=True):
            if w.layers.last < self.facts.n_layers:
                self._park(w, x)
        results = self._decide(batch, rows)
        self._unpark(batch)
        return [
            result._replace(pooled=self._pool(w, x)) if w.pooled and w.layers.last == self.facts.n_layers else result
            for w, x, result in zip(batch, rows, results, strict=True)
        ]

    def _pool(self, w: BatchWork, x: Tensor) -> Array | None:
        """The mean of a sequence's last rows [n, D], once the work that decides has come.

        Row after row in f64, so that the sum is the same however the prompt was cut.
        """
        normed = self.model.normed(x).float().numpy().astype(np.float64)
        before = self._sums.get(w.seq)
        total = np.add.reduce(normed if before is None else np.vstack([before, normed]), axis=0)
        self._sums[w.seq] = total
        return None if w.ask is None else (total / (w.start + w.n)).astype(np.float32)

    def _unpark(self, batch: Sequence[BatchWork]) -> None:
        """Rows that the layers above have run need not wait any longer."""
        for w in batch:
            if w.ids is None and w.rows is None:
                start, parked = self._parked.pop((w.seq, w.layers.first))
                left = parked[w.start + w.n - start :]
                if len(left):
                    self._parked[w.seq, w.layers.first] = (w.start + w.n, left)

    def _inputs(self, batch: Sequence[BatchWork]) -> list[Tensor]:
        """The rows of each work where it enters; all ids are embedded at once."""
        ids = [w.ids for w in batch if w.ids is not None]
        embedded: Iterator[Tensor] = iter(())
        if ids:
            together = self.model.embed(torch.from_numpy(np.concatenate(ids)).long())
            embedded = iter(together.split([len(x) for x in ids]))
        return [next(embedded) if w.ids is not None else self._rows(w) for w in batch]

    def _rows(self, w: BatchWork) -> Tensor:
        """Rows from outside, or such as waited for these layers."""
        if w.rows is not None:
            return torch.from_numpy(w.rows.take(w.start, w.n)).to(self.model.dtype)
        start, parked = self._parked[w.seq, w.layers.first]
        return parked[w.start - start : w.start - start + w.n]

    def _park(self, w: BatchWork, x: Tensor) -> None:
        """Keep rows for the layers above.

        What is parked at or behind their first position, or with a gap between, are rows of drafts that were wrong.
        """
        start, before = self._parked.get((w.seq, w.layers.last), (w.start, x[:0]))
        if not start <= w.start <= start + len(before):
            start, before = w.start, x[:0]
        self._parked[w.seq, w.layers.last] = (start, torch.cat([before[: w.start - start], x]))

    def _decide(self, batch: Sequence[BatchWork], rows: list[Tensor]) -> list[Result]:
        asking = [(i, w.ask) for i, w in enumerate(batch) if w.ask is not None]
        results = [Result()] * len(batch)
        if asking:
            last = torch.cat([rows[i][-1 - len(ask.drafts) :] for i, ask in asking])
            decided = decide(self.model.logits(last), [ask for _, ask in asking])
            for (i, ask), result in zip(asking, decided, strict=True):
                if ask.wants_hidden and not result.error:
                    at = len(rows[i]) - 1 - len(ask.drafts) + len(result.ids) - 1
                    result = result._replace(hidden=rows[i][at].float().numpy().copy())
                results[i] = result
        return results

    # ------------------------------------------------------------ memory

    def bytes_of(self, room: Room) -> int:
        """Of so many blocks of each group."""
        return room.whole * self.store.block_bytes + room.upper * (
            self.store.bytes_from(self.uppers.first) if self.uppers.n else 0
        )

    def can_swap(self, n_blocks: int) -> bool:
        used = sum(x.nbytes for copies in self._copies.values() for x in copies)
        return used + n_blocks * self.store.block_bytes <= self.swap_bytes

    def swap_out(self, seq: int, blocks: Ids) -> None:
        self._copies[seq] = self.store.read(torch.from_numpy(blocks).long(), self._first_layer(blocks))

    def swap_in(self, seq: int, blocks: Ids) -> None:
        self.store.restore(torch.from_numpy(blocks).long(), self._copies.pop(seq), self._first_layer(blocks))

    def _first_layer(self, blocks: Ids) -> int:
        """From which on all of `blocks` have memory."""
        n_whole = self.n_blocks - self.uppers.n
        return self.uppers.first if self.uppers.n and len(blocks) and blocks.max() >= n_whole else self.store.first

    def drop(self, seq: int) -> None:
        self._copies.pop(seq, None)
        self._sums.pop(seq, None)
        for key in [key for key in self._parked if key[0] == seq]:
            del self._parked[key]
