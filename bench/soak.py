"""A server for a long time under everything that clients do: what is left in it afterwards is what was there before.

    python bench/soak.py --minutes 20
    python bench/soak.py --minutes 1 --rounds 3 --seed 5
    python bench/soak.py --minutes 1 --rounds 3 --workers 2

`nearfar cloud serve nano` in a process of its own, with keys and quotas and little memory; eight clients at random on
all routes: whole, streamed, with schemas and tools, left in the middle and read on, cancelled, late, over their quota,
and bad in every way (soak_requests.py).  Rounds: after each the server is left alone until nothing is under way, and
its metrics are read.  After the last one SIGTERM comes while streams are under way.  Prints a JSON object; exit code 1
if an answer was not allowed or not the same as before, or if blocks, sequences, tasks, threads, open files or memory
are not back where they were after the first round.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, TextIO

from soak_requests import ACTIONS, FULL, KEEP_S, Person, Result

from line import machine, say

CLIENTS = 8
QUIET_S = 60.0  # to come to rest
MAX_GROWTH = 24 << 20  # bytes of a process after the first round: heaps are not returned whole, caches fill up
MAX_THREADS = 24  # in front: the engine's, the event loop's and the pools of both at their largest
PEOPLE = (
    {"tenant": "alice", "priority": 5, "metrics": True},
    {"tenant": "bob", "requests_per_minute": 300, "tokens_per_minute": 30_000},
    {"tenant": "carol", "concurrent": 2},
)


@dataclass
class Sample:
    """A server at rest: what is under way or held, by /metrics.  All but the last four are to be zero.

    Tasks and threads are those of the process in front, files and memory those of its workers, too.
    """

    seqs: float
    queue_tokens: float
    blocks_used: float
    kept_streams: float
    tasks: float
    threads: float
    open_fds: float
    resident_bytes: float


def main() -> int:
    args = parse()
    say(machine())
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder) / "keys.json"
        told = [p | {"sha256": hashlib.sha256(str(p["tenant"]).encode()).hexdigest()} for p in PEOPLE]
        keys.write_text(json.dumps({"keys": told}))
        # What it says aside goes to a file: nobody reads a pipe meanwhile.
        with (Path(folder) / "said").open("w+") as said, Server(keys, said, args.workers) as server:
            found = soak(server, args)
    found["faults"] += verdict(found["samples"], 1 + (args.workers or 0))
    print(json.dumps(found, indent=1, default=asdict))
    return 1 if found["faults"] else 0


class Server:
    """The process, and what it says of itself."""

    def __init__(self, keys: Path, said: TextIO, workers: int | None) -> None:
        command = [sys.executable, "-m", "nearfar.cli.main", "cloud", "serve", "nano", "--port", "0", "--json"]
        options = ["--threads", "1", "--kv-memory", "4", "--max-queued", "24", "--keep", str(KEEP_S), "--grace", "1"]
        options += [] if workers is None else ["--workers", str(workers)]
        self.said = said
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [*command, *options, "--key-file", str(keys)], stdout=subprocess.PIPE, stderr=self.said, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the server did not start: {self.words()}")
        self.start_s = time.perf_counter() - started
        self.port = int(json.loads(line)["url"].split(":")[2].split("/")[0])

    def words(self) -> str:
        """What it said aside."""
        self.said.seek(0)
        return self.said.read()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def metrics(self) -> dict[str, float]:
        """By name, with labels as they stand there."""
        _, text = Person(self.port, "alice", random.Random()).send("GET", "/metrics")
        lines = [line.rpartition(" ") for line in str(text).splitlines() if not line.startswith("#")]
        return {name.removeprefix("nearfar_cloud_"): float(value) for name, _, value in lines}

    def sample(self) -> Sample:
        m = self.metrics()
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        workers = children(self.process.pid)
        return Sample(
            seqs=sum(n for name, n in m.items() if name.startswith("seqs{")),
            queue_tokens=m["queue_tokens"],
            blocks_used=m['kv_blocks{state="used"}'],
            kept_streams=m["kept_streams"],
            tasks=m["tasks"],
            threads=float(status.split("Threads:")[1].split()[0]),
            open_fds=m["process_open_fds"] + sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in workers),
            resident_bytes=m["resident_bytes"] + sum(map(resident_bytes, workers)),
        )

    def at_rest(self) -> Sample:
        """Once nothing is under way; as it is after `QUIET_S` otherwise."""
        until = time.monotonic() + QUIET_S
        while True:
            time.sleep(0.5)
            found = self.sample()
            held = found.seqs + found.queue_tokens + found.blocks_used + found.kept_streams
            if not held or time.monotonic() > until:
                return found


def children(pid: int) -> list[int]:
    """Processes that this one has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def soak(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    known: dict[str, str] = {}
    faults: list[str] = []
    samples: list[Sample] = []
    for i in range(args.rounds):
        until = time.monotonic() + 60 * args.minutes / args.rounds
        with ThreadPoolExecutor(CLIENTS) as threads:
            asked = [
                threads.submit(client, server.port, args.seed + CLIENTS * i + j, until, known, counts, faults)
                for j in range(CLIENTS)
            ]
            for one in asked:
                one.result()
        samples.append(server.at_rest())
        s = samples[-1]
        say(
            f"round {i + 1} of {args.rounds}: {sum(counts.values())} requests, {s.open_fds:.0f} files,"
            f" {s.tasks:.0f} tasks, {s.threads:.0f} threads, {s.resident_bytes / 2**20:.1f} MiB, {len(faults)} faults"
        )
    m = server.metrics()
    faults += ended(server)
    codes: Counter[str] = Counter()
    for name, n in sorted(counts.items()):
        codes[name.partition(" ")[2]] += n
    return {
        "machine": machine(),
        "seed": args.seed,
        "minutes": args.minutes,
        "start_s": round(server.start_s, 2),
        "requests": sum(counts.values()),
        "by_code": dict(sorted(codes.items())),
        "by_action": dict(sorted(counts.items())),
        "preempted": sum(n for name, n in m.items() if name.startswith("preemptions_total")),
        "cancelled": m["cancelled_total"],
        "steps_after_cancel": m["steps_after_cancel_total"],
        "resumed": {how: m.get(f'resumed_total{{how="{how}"}}', 0) for how in ("kept", "again")},
        "generated_tokens": m['tokens_total{kind="generated"}'],
        "samples": samples,
        "faults": sorted(set(faults)),
    }


def client(port: int, seed: int, until: float, known: dict[str, str], counts: Counter[str], faults: list[str]) -> None:
    """One action after the other."""
    rng = random.Random(seed)
    actions, weights = list(ACTIONS), [weight for weight, _ in ACTIONS.values()]
    while time.monotonic() < until:
        person = Person(port, str(rng.choice(PEOPLE)["tenant"]), rng, known)
        (action,) = rng.choices(actions, weights)
        try:
            result = action(person)
        except (OSError, HTTPException) as error:  # nothing that a client does may close a connection without a word
            faults.append(f"{action.__name__}: {type(error).__name__}: {error}")
            continue
        with _lock:
            counts[f"{action.__name__} {result.status} {result.code}".strip()] += 1
        if result not in ACTIONS[action][1] | FULL:
            faults.append(f"{action.__name__}: {result.status} {result.code}")
        faults += [f"{action.__name__}: {wrong}" for wrong in person.wrong]


_lock = threading.Lock()


def ended(server: Server) -> list[str]:
    """SIGTERM while six streams are under way: what is wrong with how it ends."""
    alice = Person(server.port, "alice", random.Random(0))
    streams = [alice.stream("completions", {"prompt": "once", "max_tokens": 400, "n": 2}) for _ in range(6)]
    server.process.send_signal(signal.SIGTERM)
    faults = []
    for stream in streams:
        if isinstance(stream, Result):
            faults.append(f"SIGTERM: a stream did not begin: {stream}")
            continue
        try:
            for _ in stream:
                pass
        except (OSError, HTTPException) as error:
            faults.append(f"SIGTERM: {type(error).__name__}: {error}")
            continue
        if not (stream.is_whole or (stream.code == "shutting_down" and stream.cursor)):
            faults.append(f"SIGTERM: a stream ended with {stream.code or 'nothing'}")
        stream.leave()
    try:
        code = server.process.wait(30)
    except subprocess.TimeoutExpired:
        return [*faults, "SIGTERM: the server did not end"]
    said = server.words()
    if code or said:
        faults.append(f"SIGTERM: exit code {code}; it said: {said[:2000]}")
    return faults


def verdict(samples: list[Sample], n_processes: int = 1) -> list[str]:
    """What is not back where it was after the first round."""
    first, last = samples[0], samples[-1]
    faults = [f"at rest {name} is {value:g}, expected 0" for name, value in list(asdict(last).items())[:4] if value]
    for name in ("tasks", "open_fds"):
        before, after = getattr(first, name), getattr(last, name)
        if after > before:
            faults.append(f"at rest {name} is {after:g}, was {before:g}")
    if last.threads > MAX_THREADS:
        faults.append(f"{last.threads:g} threads, expected at most {MAX_THREADS}")
    if last.resident_bytes > first.resident_bytes + n_processes * MAX_GROWTH:
        faults.append(f"memory grew from {first.resident_bytes:g} to {last.resident_bytes:g} bytes")
    return faults


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=10, help="each ends with a look at what is left (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, metavar="N", help="engines in processes of their own (default: none)")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds: expected 2 or more, for the last one is compared with the first")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
