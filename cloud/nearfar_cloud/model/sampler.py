"""From logits to tokens: per request, a function of its own logits, seed and position, whoever else is in the batch.

A draft holds if and only if it is the token that is chosen, so drafts change no token at any temperature.  Whole rows
of greedy requests are decided together; the others go through `nearfar.sampling`, the same filters and noise as on a
device.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nearfar.sampling import sample
from nearfar_cloud.executors.base import Ask, Result
from nearfar_cloud.types import Array, Logprobs

try:
    from nearfar_native import _core as native
except ImportError:  # not built
    native = None  # type: ignore[assignment]


def decide(logits: Tensor, asks: list[Ask]) -> list[Result]:
    """logits f32 [S, V], 1 + drafts rows for each ask in turn -> one result for each."""
    largest, table = largest_of(logits), logits.numpy()
    results, at = [], 0
    for ask in asks:
        n = 1 + len(ask.drafts)
        rows = slice(at, at + n)
        if (largest[rows] < 0).any():
            results.append(Result(error="the logits are not finite"))
        else:
            try:
                results.append(_decide(table[rows], largest[rows], ask))
            except Exception as error:  # of a hook: running the others again would move their hooks twice
                results.append(Result(error=f"{type(error).__name__}: {error}"))
        at += n
    return results


def largest_of(logits: Tensor) -> NDArray[np.int32]:
    """logits f32 [S, V] -> i32 [S]: the likeliest id of each row, the lowest of equals; -1 if not all are finite."""
    if native is not None:
        return native.largest(np.ascontiguousarray(logits.numpy()))
    found = torch.where(torch.isfinite(logits).all(-1), logits.argmax(-1), -1)
    return found.numpy().astype(np.int32)


def _decide(logits: Array, largest: np.ndarray, ask: Ask) -> Result:
    plain = ask.sampling.temperature == 0 and ask.sampling.repetition_penalty == 1 and ask.hook is None
    ids: list[int] = []
    told: list[Logprobs] = []
    for j in range(len(logits)):
        z = logits[j] if ask.hook is None else ask.hook.apply(logits[j])
        recent = [*ask.recent, *ids]
        token = int(largest[j]) if plain else sample(z, ask.sampling, ask.position + j, recent)
        ids.append(token)
        if ask.n_logprobs:
            told.append(logprobs(z, token, ask.n_logprobs))
        if ask.hook is not None:
            ask.hook.accept(token)
        if j < len(ask.drafts) and ask.drafts[j] != token:
            break
    return Result(tuple(ids), tuple(told), margin=margin(z) if ask.wants_margin else 0.0)


def margin(z: Array) -> float:
    """Of logits f32 [V]: how far the largest is above the next one.  Near 0 another machine may decide otherwise."""
    second, first = np.partition(z, len(z) - 2)[-2:]
    return float(first - second)


def logprobs(z: Array, token: int, n: int) -> Logprobs:
    """Of logits f32 [V]: the token's log-probability and the `n` likeliest tokens with theirs."""
    normal = z.max() + np.log(np.exp(z - z.max(), dtype=np.float64).sum())
    top = np.argsort(-z, kind="stable")[:n]
    return Logprobs(float(z[token] - normal), tuple((int(i), float(z[i] - normal)) for i in top))
