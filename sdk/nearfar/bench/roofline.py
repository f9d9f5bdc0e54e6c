"""The machine's roofs, and how near to them kernels and whole models come: one record a measurement.

A computation that does Q operations (a multiply-add is 2) for B bytes read runs at most at
min(int8 peak, bandwidth * Q / B): the roofline model (Williams, Waterman and Patterson, 2009).

    roofs -> kernels from L2, L3, memory -> models: decode under the bandwidth, prefill under the peak
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from nearfar.bench.turn import Turn, measure
from nearfar.errors import UsageError

Record = dict[str, Any]  # a line of JSON; "what" says which: machine, read, int8, kernel, decode, prefill

LEVELS = ("l2", "l3", "dram")
ROWS = (1, 2, 4, 8, 128)
PASS = 128  # rows that read the weights together; longer prompts go in passes of so many
COLUMNS = 2560  # of the kernels' matrices
MANY_ROWS = 32  # from here on the multiplier binds: fewer bytes from memory say the same sooner


@dataclass(frozen=True, slots=True)
class Caches:
    """Bytes of one core's L2, of the last level, and of memory that is free."""

    l2: int
    last: int
    free: int

    def n_bytes(self, level: str, *, quick: bool = False) -> int:
        """How much to read so that it comes from `level`: half of L2, beyond every L2 but well inside the last
        level, or four times the last level, if a quarter of the free memory holds it."""
        if level == "l2":
            return self.l2 // 2
        if level == "l3":
            return max(min(self.last // 2, 16 << 20), 2 * self.l2)
        return max(min((64 << 20) if quick else 4 * self.last, self.free // 4), 4 << 20)


def caches() -> Caches:
    """As the system reports them; 1 MiB and 32 MiB where it does not."""
    sizes: dict[int, int] = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, size = int((index / "level").read_text()), (index / "size").read_text().strip()
            sizes[level] = int(size.removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    l2 = sizes.get(2, 1 << 20)
    return Caches(l2, max(sizes.get(max(sizes, default=3), 32 << 20), l2), _free_memory())


def _free_memory() -> int:
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 2 << 30


@dataclass(frozen=True, slots=True)
class Roofs:
    """What `threads` threads reach at most: GB/s read from each level, and GOPS multiplied."""

    threads: int
    read_gb_s: Mapping[str, float]
    int8_gops: float

    def limit(self, level: str, ops_per_byte: float) -> float:
        """GOPS that a computation of this intensity reaches at most."""
        return min(self.int8_gops, self.read_gb_s[level] * ops_per_byte)


def measure_roofs(
    threads: int, levels: Sequence[str], *, cpu_time: bool = False, quick: bool = False
) -> tuple[Roofs, list[Record]]:
    from nearfar.lower_native import int8_peak, read_bandwidth

    records: list[Record] = []
    read: dict[str, float] = {}
    for level in levels:
        n_bytes = caches().n_bytes(level, quick=quick)
        read[level] = read_bandwidth(threads, n_bytes, n_passes=3 if quick else 9, cpu_time=cpu_time)
        records.append({"what": "read", "threads": threads, "from": level, "n_bytes": n_bytes, "gb_s": read[level]})
    instruction, peak = int8_peak(threads, n_passes=2 if quick else 9, cpu_time=cpu_time)
    records.append({"what": "int8", "threads": threads, "instruction": instruction, "gops": peak})
    return Roofs(threads, read, peak), records


def measure_kernels(
    roofs: Roofs,
    kinds: Sequence[str],
    rows: Sequence[int],
    *,
    seconds: float = 0.3,
    cpu_time: bool = False,
    quick: bool = False,
) -> Iterator[Record]:
    """Each kind of packed matrix, from each level whose bandwidth `roofs` knows, times each number of rows."""
    from nearfar.lower_native import product_speed

    for level in roofs.read_gb_s:
        n_bytes = caches().n_bytes(level, quick=quick)
        for kind in kinds:
            for m in rows:
                size = min(n_bytes, 64 << 20) if m >= MANY_ROWS else n_bytes
                p = product_speed(kind, COLUMNS, size, m, roofs.threads, seconds=seconds, cpu_time=cpu_time)
                ops = 2 * m * p.rows * p.cols
                gops, limit = ops / p.seconds / 1e9, roofs.limit(level, ops / p.n_bytes)
                yield {
                    "what": "kernel",
                    "kind": kind,
                    "m": m,
                    "from": level,
                    "threads": roofs.threads,
                    "rows": p.rows,
                    "cols": p.cols,
                    "n_bytes": p.n_bytes,
                    "us": p.seconds * 1e6,
                    "gb_s": p.n_bytes / p.seconds / 1e9,
                    "gops": gops,
                    "ops_per_byte": ops / p.n_bytes,
                    "limit_gops": limit,
                    "share": gops / limit,
                }


@dataclass(frozen=True, slots=True)
class Work:
    """What a model's matrices cost: bytes that a token reads, multiply-adds of the layers and of the head."""

    n_bytes: int
    layer_weights: int
    head_weights: int

    def prefill_ops(self, n_tokens: int) -> int:
        """Every token goes through the layers, the last one through the head."""
        return 2 * (n_tokens * self.layer_weights + self.head_weights)


def measure_model(
    roofs: Roofs,
    path: Path,
    name: str,
    *,
    options: Mapping[str, Any],
    prompts: Sequence[int],
    n_tokens: int,
    rounds: int,
    cpu_time: bool = False,
) -> Iterator[Record]:
    """Decode (after a short prompt) and prefill of a whole model; `options` are those of `LLM.open`."""
    from nearfar.llm import LLM
    from nearfar.sampling import Sampling

    depth = min(32, *prompts)
    with LLM.open(
        path, backend="native", threads=roofs.threads, n_ctx=max(*prompts, depth + n_tokens) + 8, **options
    ) as llm:
        work = work_of(llm)
        facts: Record = {
            "model": name,
            "threads": roofs.threads,
            "options": dict(options),
            "bytes_a_token": work.n_bytes,
        }
        sequence = llm.stepper.new_sequence(Sampling(), use_exits=False)
        seeds = iter(range(1, 1 << 20))

        def turns(n_prompt: int, n: int) -> list[Turn]:
            return [
                measure(llm, n_prompt, n, cpu_time=cpu_time, sequence=sequence, seed=next(seeds)) for _ in range(rounds)
            ]

        shared = roofs.threads if cpu_time else 1  # CPU time is of all threads
        measure(llm, depth, 4, sequence=sequence, seed=next(seeds))  # warm-up: pages, threads
        speeds = [t.decode * shared for t in turns(depth, n_tokens)]
        tokens_s = median(speeds)
        ops = 2 * (work.layer_weights + work.head_weights)
        limit = roofs.limit("dram", ops / work.n_bytes)
        yield facts | {
            "what": "decode",
            "m": 1,
            "tokens_s": tokens_s,
            "turns": speeds,
            "gb_s": tokens_s * work.n_bytes / 1e9,
            "share_of_read": tokens_s * work.n_bytes / 1e9 / roofs.read_gb_s["dram"],
            "gops": tokens_s * ops / 1e9,
            "ops_per_byte": ops / work.n_bytes,
            "limit_gops": limit,
            "share": tokens_s * ops / 1e9 / limit,
        }
        for n_prompt in prompts:
            speeds = [t.prefill * shared for t in turns(n_prompt, 0)]
            tokens_s = median(speeds)
            gops = tokens_s / n_prompt * work.prefill_ops(n_prompt) / 1e9
            intensity = work.prefill_ops(n_prompt) / (work.n_bytes * -(-n_prompt // PASS))
            limit = roofs.limit("dram", intensity)
            yield facts | {
                "what": "prefill",
                "m": n_prompt,
                "tokens_s": tokens_s,
                "turns": speeds,
                "gops": gops,
                "share_of_int8": gops / roofs.int8_gops,
                "ops_per_byte": intensity,
                "limit_gops": limit,
                "share": gops / limit,
            }


def work_of(llm: Any) -> Work:
    """Raises UsageError where the engine does not say what it reads."""
    lower = llm.stepper.lower
    if not hasattr(lower, "panels"):
        raise UsageError(f"the engine {llm.backend} keeps no packed matrices: expected native")
    layers = [p for p in lower.panels() if p.name.startswith("blk.")]
    heads = [p for p in lower.panels() if not p.name.startswith("blk.")]
    # A screened head is there twice: a token reads the smaller copy, and hardly anything of the other.
    head = min(heads, key=lambda p: p.n_bytes)
    return Work(
        sum(p.n_bytes for p in layers) + head.n_bytes, sum(p.rows * p.cols for p in layers), head.rows * head.cols
    )
