"""What /metrics tells: counts and times, by names of ours alone.  No label comes from a request."""

from __future__ import annotations

import asyncio
import contextlib
import resource
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from nearfar_cloud.counts import Counts
from nearfar_cloud.engine import Engine
from nearfar_cloud.fleet.load import freeness, load_of, total
from nearfar_cloud.gateway.limits import Limits
from nearfar_cloud.gateway.service import Core
from nearfar_cloud.gateway.streams import Tapes

if TYPE_CHECKING:
    from nearfar_cloud.gateway.contexts import Contexts

PREFIX = "nearfar_cloud_"
Families = type[CounterMetricFamily] | type[GaugeMetricFamily]
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
RATIOS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 1.5, 2, 4, 10)
STATM = Path("/proc/self/statm")  # pages: all, resident, ...


class Metrics:
    """Owns a registry, so that two servers in one process do not mix."""

    def __init__(self, engine: Core, limits: Limits, tapes: Tapes) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # process_resident_memory_bytes and its kin
        self._seen = Counts()
        self.ttft = self._histogram("ttft_s", "from the request to its first token")
        self.tbt = self._histogram("tbt_s", "between tokens of an answer")
        self.e2e = self._histogram("e2e_s", "from the request to the end of its answer")
        self.queue = self._histogram("queue_s", "from the request to its first memory")
        self.step_s = self._histogram("step_s", "one step of the engine")
        self.plan_s = self._histogram("plan_s", "planning a step")
        self.commit_s = self._histogram("commit_s", "committing a step")
        self.step_rows = self._histogram("step_rows", "rows of a step", ROWS)
        self.cost_error = self._histogram("cost_error_ratio", "what a step took by what was expected", RATIOS)
        self.requests = self._counter("requests", "requests answered or refused", "route", "code")
        self.refusals = self._counter("refusals", "requests refused, by code", "reason")
        self.grammar = self._counter("grammar", "schemas", "what")
        self.resumed = self._counter("resumed", "streams read on, from what was kept or computed again", "how")
        self.ask_wait = self._histogram(
            "ask_wait_s", "from an ask of a device to its verdict, without the engine's steps"
        )
        self.registry.register(_OfEngine(engine, limits, tapes))

    def add_devices(self, contexts: Contexts) -> None:
        """What devices that ask hold is told, too."""
        self.registry.register(_OfDevices(contexts))

    def step(self, engine: Core) -> None:
        """After each step, in the engine's thread."""
        now, before = engine.counts, self._seen
        if now.steps > before.steps:
            plan, commit = now.plan_s - before.plan_s, now.commit_s - before.commit_s
            self.plan_s.observe(plan)
            self.commit_s.observe(commit)
            ran, expected = now.run_s - before.run_s, now.expected_s - before.expected_s
            self.step_s.observe(plan + commit + ran)
            if expected > 0:
                self.cost_error.observe(ran / expected)
            self.step_rows.observe(now.rows - before.rows)
        self._seen = replace(now)

    def text(self) -> bytes:
        """In the text format of Prometheus."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...] = SECONDS) -> Histogram:
        return Histogram(PREFIX + name, what, registry=self.registry, buckets=buckets)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, what, labels, registry=self.registry)


class _OfEngine(Collector):
    """What the engine counts itself, read when somebody asks."""

    def __init__(self, engine: Core, limits: Limits, tapes: Tapes) -> None:
        self._engine, self._limits, self._tapes = engine, limits, tapes

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        e, c = self._engine, self._engine.counts
        loads = {0: load_of(e)} if isinstance(e, Engine) else e.loads
        load = total(loads.values())
        tokens = {
            "prompt": c.prompt_tokens,
            "cached": c.cached_tokens,
            "generated": c.generated_tokens,
            "drafted": c.drafted,
            "accepted": c.accepted,
        }
        yield _family(CounterMetricFamily, "tokens", "tokens", "kind", tokens)
        how = {"swap": c.swapped, "recompute": c.preempted - c.swapped}
        yield _family(CounterMetricFamily, "preemptions", "sequences that had to give memory up", "how", how)
        yield CounterMetricFamily(PREFIX + "poisoned", "sequences that failed", value=c.failed)
        yield CounterMetricFamily(PREFIX + "cancelled", "sequences stopped before their end", value=c.cancelled)
        yield CounterMetricFamily(
            PREFIX + "steps_after_cancel", "steps that cancelled sequences saw", value=c.steps_after_cancel
        )
        found = {"hit": c.prefix_hits, "miss": c.prefix_misses, "evicted": c.prefix_evicted}
        yield _family(CounterMetricFamily, "prefix_blocks", "full blocks of prompts", "what", found)
        found = {"hit": c.row_hits, "miss": c.row_misses}
        yield _family(CounterMetricFamily, "prefix_row_blocks", "of these such as came as rows", "what", found)
        early = {"run": c.early_rows, "lost": c.early_lost}
        yield _family(CounterMetricFamily, "early_rows", "positions of devices run before they asked", "what", early)
        status = {"waiting": load.n_waiting, "running": load.n_running, "swapped": load.n_swapped}
        yield _family(GaugeMetricFamily, "seqs", "sequences", "status", status)
        yield GaugeMetricFamily(
            PREFIX + "queue_tokens", "tokens that requests under way may take", self._limits.n_tokens
        )
        blocks = {"free": load.n_free, "cached": load.n_cached, "used": load.n_used}
        yield _family(GaugeMetricFamily, "kv_blocks", "blocks of keys and values", "state", blocks)
        yield GaugeMetricFamily(PREFIX + "kept_streams", "streams that nobody reads", value=self._tapes.n_parked)
        yield GaugeMetricFamily(PREFIX + "kept_bytes", "memory of these", value=self._tapes.n_bytes)
        with contextlib.suppress(RuntimeError):  # asked for from outside an event loop
            yield GaugeMetricFamily(PREFIX + "tasks", "tasks of the event loop", value=len(asyncio.all_tasks()))
        if STATM.exists():  # Linux
            resident = int(STATM.read_text().split()[1]) * resource.getpagesize()
            yield GaugeMetricFamily(PREFIX + "resident_bytes", "memory of the process", value=resident)
        free = {str(i): freeness(one) for i, one in loads.items()}
        yield _family(GaugeMetricFamily, "freeness", "positions for each sequence until memory is full", "worker", free)
        n_restarts = 0 if isinstance(e, Engine) else e.n_restarts
        yield CounterMetricFamily(PREFIX + "worker_restarts", "workers that were lost", value=n_restarts)


class _OfDevices(Collector):
    """What contexts count themselves, and what they hold now."""

    def __init__(self, contexts: Contexts) -> None:
        self._contexts = contexts

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        contexts, c = self._contexts, self._contexts.counts
        n_away = len(contexts) - contexts.n_connected
        sessions = {"connected": contexts.n_connected, "away": n_away}
        yield _family(GaugeMetricFamily, "device_sessions", "answers of devices", "state", sessions)
        yield GaugeMetricFamily(PREFIX + "device_positions", "positions they hold", value=contexts.total.n_positions)
        yield GaugeMetricFamily(PREFIX + "device_bytes", "rows or ids of these", value=contexts.total.n_bytes)
        asking = sum(context.is_asking for context in contexts)
        yield GaugeMetricFamily(PREFIX + "device_asking", "asks that the engine works on", value=asking)
        counted = {name: float(value) for name, value in asdict(c).items()}
        yield _family(CounterMetricFamily, "device_events", "what devices and their contexts did", "what", counted)


def _family(kind: Families, name: str, what: str, label: str, values: Mapping[str, float]) -> Metric:
    family = kind(PREFIX + name, what, labels=[label])
    for value, n in values.items():
        family.add_metric([value], n)
    return family
