"""Held-out rows during training: loss and exact answers, by source and head.  Called by the run beside each checkpoint.

Greedy decoding writes exactly the answer if and only if the likeliest token is the right one at every place of it, so a
single forward pass over packed rows tells exact matches; nothing is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nearfar_cloud.training.model import Decoder

Encoded = tuple[NDArray[Any], NDArray[np.bool_]]  # ids [n], "the model writes this" [n]


@dataclass(frozen=True)
class DevRows:
    """Rows of one source, packed: all [B, T] as in mix.Batch, and `answer`: the target is written by the model."""

    ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    answer: NDArray[np.bool_]
    pos: NDArray[np.int64]
    doc: NDArray[np.int64]
    n_rows: int  # that go through the model at a time; B is a multiple of it
    marks: NDArray[np.bool_]  # answer tokens up to and including the first one that ends the label


def pack(rows: Sequence[Encoded], seq_len: int, n_rows: int, pad_id: int, label_end: set[int]) -> DevRows:
    """Place rows one after the other; the number of sequences is filled up to a multiple of `n_rows`."""
    sequences: list[list[Encoded]] = [[]]
    used = 0
    for ids, written in rows:
        if len(ids) > seq_len:
            continue
        if used + len(ids) > seq_len:
            sequences.append([])
            used = 0
        sequences[-1].append((ids, written))
        used += len(ids)
    shape = (len(sequences) + -len(sequences) % n_rows, seq_len)
    out = DevRows(
        ids=np.full(shape, pad_id, np.int64),
        targets=np.full(shape, -100, np.int64),
        answer=np.zeros(shape, bool),
        pos=np.zeros(shape, np.int64),
        doc=np.full(shape, -1, np.int64),
        n_rows=n_rows,
        marks=np.zeros(shape, bool),
    )
    for b, sequence in enumerate(sequences):
        at = 0
        for d, (ids, written) in enumerate(sequence):
            here = slice(at, at + len(ids))
            out.ids[b, here], out.pos[b, here], out.doc[b, here] = ids, np.arange(len(ids)), d
            out.targets[b, at : at + len(ids) - 1] = ids[1:]
            out.answer[b, at : at + len(ids) - 1] = written[1:]
            for i in range(len(ids) - 1):
                if written[i + 1]:
                    out.marks[b, at + i] = True
                    if int(ids[i + 1]) in label_end:
                        break
            at += len(ids)
    return out


def evaluate(model: Decoder, rows: DevRows, dtype: torch.dtype, *, q8: bool) -> dict[str, float]:
    """Per head: loss of answer tokens (nats), share of rows with the exact answer, with the exact label."""
    heads = ["final", *(f"exit.{e}" for e in model.shape.exits)]
    loss = dict.fromkeys(heads, 0.0)
    agree = dict.fromkeys(heads, 0.0)
    exact: dict[str, list[bool]] = {h: [] for h in heads}
    label: dict[str, list[bool]] = {h: [] for h in heads}
    n = 0
    with torch.no_grad():
        head = model.head(q8_embedding=q8)
        table = head.to(dtype)
        for start in range(0, len(rows.ids), rows.n_rows):
            part = slice(start, start + rows.n_rows)
            ids, pos, doc = (torch.from_numpy(x[part]).to(model.device) for x in (rows.ids, rows.pos, rows.doc))
            final, exits = model(ids, pos, doc, head, dtype)
            answer, targets = rows.answer[part], rows.targets[part]
            n += int(answer.sum())
            b, t = np.nonzero(answer)
            full_pick: NDArray[Any] | None = None
            for name, h in zip(heads, [final, *exits.values()], strict=True):
                logits = (h[torch.from_numpy(b), torch.from_numpy(t)].to(dtype) @ table.mT).float().cpu()
                want = torch.from_numpy(targets[b, t])
                loss[name] += float(torch.nn.functional.cross_entropy(logits, want, reduction="sum"))
                pick = logits.argmax(-1).numpy()
                full_pick = pick if full_pick is None else full_pick
                agree[name] += float((pick == full_pick).sum())
                right = np.ones(answer.shape, bool)
                right[b, t] = pick == targets[b, t]
                exact[name] += _per_row(right, answer, rows.doc[part])
                label[name] += _per_row(right, rows.marks[part], rows.doc[part])
    figures: dict[str, float] = {"tokens": float(n), "rows": float(len(exact["final"]))}
    for h in heads:
        figures[f"loss.{h}"] = loss[h] / max(n, 1)
        figures[f"exact.{h}"] = float(np.mean(exact[h])) if exact[h] else 0.0
        figures[f"label.{h}"] = float(np.mean(label[h])) if label[h] else 0.0
        figures[f"agree.{h}"] = agree[h] / max(n, 1)
    return figures


def _per_row(right: NDArray[np.bool_], which: NDArray[np.bool_], doc: NDArray[np.int64]) -> list[bool]:
    """For each row that has tokens of `which`: are all of them right?"""
    out = []
    for b in range(len(doc)):
        for d in range(doc[b].max() + 1):
            mine = which[b] & (doc[b] == d)
            if mine.any():
                out.append(bool(right[b][mine].all()))
    return out
