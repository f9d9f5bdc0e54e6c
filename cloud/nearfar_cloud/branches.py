"""Several answers to one prompt: requests that differ in their seeds, and what they have in common."""

from __future__ import annotations

from dataclasses import replace

from nearfar.errors import UsageError
from nearfar_cloud.kv.pool import BLOCK
from nearfar_cloud.types import Request, Seq


def n_shareable(s: Seq) -> int:
    """Blocks that the prompt fills, but for its last row, which everyone runs for its logits."""
    return (s.n_prompt - 1) // BLOCK


def branches_of(req: Request, n: int, n_hooks: int) -> list[Request]:
    """`n` requests that differ in their seeds.  Raises UsageError for what has no branches, or not so many hooks."""
    if req.outside:
        raise UsageError("an outside sequence is alone, and of an engine in this process: Engine.submit")
    if n < 1 or n_hooks != n or (n > 1 and req.pooled):  # a mean needs all rows
        raise UsageError(f"{n} answers with {n_hooks} hooks: expected ids, n >= 1 and a hook (or None) for each")
    seeds = [(req.sampling.seed + i) % (1 << 64) for i in range(n)]
    return [replace(req, sampling=replace(req.sampling, seed=seed)) for seed in seeds]
