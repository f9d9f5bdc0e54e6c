"""Both ends of `nearfar cloud serve --workers N`: what a worker loads, and the fleet of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from nearfar_cloud.engine import Engine
from nearfar_cloud.executors.local import KV
from nearfar_cloud.fleet.process import ProcessWorker
from nearfar_cloud.fleet.ray_cluster import RayCluster
from nearfar_cloud.fleet.supervisor import Fleet
from nearfar_cloud.fleet.worker import MakeHook
from nearfar_cloud.gateway.grammar import Grammars
from nearfar_cloud.gateway.served import Form, open_served

ENTRY = f"{__name__}:open_worker"


def open_worker(
    model: str, form: Form | None, kv: KV, kv_bytes: int, prefix_cache: bool, threads: int
) -> tuple[Engine, MakeHook]:
    """In the worker: as `open_served`, with so many threads."""
    torch.set_num_threads(threads)
    served = open_served(model, form=form, kv=kv, kv_bytes=kv_bytes, prefix_cache=prefix_cache)
    assert isinstance(served.engine, Engine)
    assert served.tokenizer is not None  # or `describe` in front would have said so
    return served.engine, Grammars(served.tokenizer).make


@contextmanager
def open_fleet(
    model: str,
    n: int,
    *,
    form: Form | None = None,
    kv: KV = "auto",
    kv_bytes: int = 1 << 29,
    prefix_cache: bool = True,
    threads: int | None = None,
    ray: str | None = None,
) -> Iterator[Fleet]:
    """In front: `n` workers, each with its part of the memory and of the threads; they end at the end.

    Processes of this machine, or actors of the Ray at address `ray` ("local": one that is started here).
    """
    path = Path(model)
    n_threads = max(1, (threads or torch.get_num_threads()) // n)
    settings = {
        "model": str(path.resolve()) if path.exists() else model,
        "form": form,
        "kv": kv,
        "kv_bytes": kv_bytes // n,
        "prefix_cache": prefix_cache,
        "threads": n_threads,
    }
    if ray is None:
        with closing(Fleet(lambda number, closing: ProcessWorker(ENTRY, settings), n)) as fleet:
            yield fleet
    else:
        with (
            closing(RayCluster(ray, n_cpus=n * n_threads)) as cluster,
            closing(Fleet(lambda number, closing: cluster.start(ENTRY, settings, n_threads, closing), n)) as fleet,
        ):
            yield fleet
