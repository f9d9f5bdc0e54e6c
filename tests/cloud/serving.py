"""Engines over a small random model, and requests by number: what the tests of the core stand on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from nearfar.sampling import Sampling
from nearfar_cloud.engine import Engine
from nearfar_cloud.executors.local import LocalExecutor
from nearfar_cloud.model.loader import Loaded, load_gguf
from nearfar_cloud.scheduling.budget import Arrival
from nearfar_cloud.scheduling.compose import Composer
from nearfar_cloud.scheduling.standard import standard
from nearfar_cloud.types import Output, Request
from tests.tiny import write_tiny

SIZES = {"n_layers": 4, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 128, "n_vocab": 320, "n_ctx": 1024}


@cache
def loaded(arch: str = "llama", dtype: str = "fp32", seed: int = 0) -> Loaded:
    """A random model of four layers."""
    path = Path(mkdtemp()) / f"{arch}.gguf"
    sizes = dict(SIZES) if not arch.startswith("bitnet") else SIZES | {"d_model": 256, "d_ff": 256}
    return load_gguf(write_tiny(path, arch, "F32", seed=seed, **sizes), dtype)  # type: ignore[arg-type]


def engine(*policies: object, n_blocks: int = 64, model: Loaded | None = None, **options: object) -> Engine:
    """An engine of its own blocks, with the policies of a server unless told otherwise."""
    preemption = options.pop("preemption", "recompute")
    chain = policies or standard()
    executor = LocalExecutor(model or loaded(), n_blocks, kv=options.pop("kv", "auto"))  # type: ignore[arg-type]
    return Engine(executor, Composer(chain, preemption), **options)  # type: ignore[arg-type]


def request(n: int, *, prompt: int | None = None, shared: int = 0, max_tokens: int | None = None) -> Request:
    """Request number `n`: a prompt of its own behind `shared` ids that all have, greedy or sampled."""
    rng = random.Random(n)
    length = prompt or rng.choice((1, 2, 17, 63, 64, 65, 130, 200))
    common = [random.Random(f"shared {i}").randrange(320) for i in range(shared)]
    sampling = Sampling(temperature=rng.choice((0.0, 0.0, 0.8)), top_k=rng.choice((0, 20)), seed=n)
    if rng.random() < 0.3:
        sampling = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.2, seed=n)
    ids = (*common, *(rng.randrange(320) for _ in range(length)))
    return Request(ids=ids, max_tokens=max_tokens or rng.randint(1, 24), sampling=sampling)


def drain(e: Engine, max_steps: int = 5_000) -> dict[int, tuple[int, ...]]:
    """Step until nothing is left; sequence -> its tokens."""
    found: dict[int, tuple[int, ...]] = {}
    for _ in range(max_steps):
        if not e.has_work and not e.seqs:
            return found
        for out in e.step():
            collect(found, out)
    raise AssertionError(f"{len(e.seqs)} sequences are still there after {max_steps} steps")


def collect(found: dict[int, tuple[int, ...]], out: Output) -> None:
    assert not out.error, out
    found[out.seq] = found.get(out.seq, ()) + out.ids


@cache
def alone(n: int, arch: str = "llama", shared: int = 0, branch: int = 0) -> tuple[int, ...]:
    """The tokens of request `n` alone, its prompt in one piece; `branch` is added to its seed."""
    e = engine(Whole(), model=loaded(arch), prefix_cache=False)
    r = request(n, shared=shared)
    seq = e.submit(replace(r, sampling=replace(r.sampling, seed=r.sampling.seed + branch)))
    return drain(e)[seq]


def check_empty(e: Engine) -> None:
    """Blocks, references, copies and parked rows are back where they were at the start."""
    e.pool.check([])
    assert e.pool.n_free == e.pool.n_blocks
    assert isinstance(e.executor, LocalExecutor)
    assert not e.executor._copies
    assert not e.executor._parked
    assert not e._chains
    assert not e.holding
    assert not e.branches
    assert len(e.waiting) == 0


class Whole(Arrival):
    """No limit on the rows of a step."""


def run(e: Engine, requests: Sequence[Request]) -> list[tuple[int, ...]]:
    seqs = [e.submit(r) for r in requests]
    found = drain(e)
    return [found[s] for s in seqs]


def run_all(e: Engine, requests: Sequence[Request]) -> list[tuple[int, ...]]:
    """Their tokens in an engine that has other sequences, too, of which nothing is told meanwhile."""
    seqs = [e.submit(r) for r in requests]
    found: dict[int, tuple[int, ...]] = {}
    n_open = len(seqs)
    while n_open:
        for out in e.step():
            collect(found, out)
            n_open -= out.finish is not None
    return [found[s] for s in seqs]
