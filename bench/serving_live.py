"""One server in a process of its own, given requests at their times: what serving_bursts.py compares.

    python bench/serving_live.py PEER FOLDER FORM THREADS

The first line that it prints says that the model is loaded.  Then each line in, {"requests": [[arrival_s, [ids], n]],
"cpu_time": false}, is a workload: at its time each request is handed over, and gets `n` tokens greedily whatever they
are.  Each line out, {"token_s": [[...]], "cpu": s}, says when each token came, in seconds from the start, and the CPU
time of all that.  With "cpu_time" the clock is the CPU time of this process and jumps to the next arrival when nothing
is to do: on a shared machine a server of one thread gets the figures that it would have on a core of its own.

Nobody talks HTTP here: all are called in the process.  Prefix caches are off, everyone may keep as many positions
(`POSITIONS`), and how many rows a step has is each one's own default.  Runs in the environment of its peer and imports
nothing of ours unless we are the peer.
"""

from __future__ import annotations

import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from serving_peers import cpu_seconds

POSITIONS = 512 * 64  # that the keys and values of all sequences take together
MOST_SEQS = 256
MOST_S = 0.05  # to wait for a server that computes in threads of its own

Came = tuple[int, int, float]  # request, how many tokens of it, when


class Clock:
    """Seconds: the wall's, or those of CPU time of this process, idle times skipped."""

    def __init__(self) -> None:
        self.cpu_time, self.skipped = False, 0.0

    def __call__(self) -> float:
        return time.process_time() + self.skipped if self.cpu_time else time.perf_counter()

    def wait_until(self, moment: float) -> None:
        left = max(0.0, moment - self())
        if self.cpu_time:
            self.skipped += left
        else:
            time.sleep(left)


clock = Clock()


class Live(Protocol):
    """A server that takes requests while others run."""

    def add(self, number: int, ids: list[int], n: int) -> None: ...

    def step(self, most_s: float) -> list[Came]: ...  # go on; what came.  No longer, if it computes in its own threads


class Nearfar:
    """Our engine.  FORM is weights@policy, of `planning/simulate.py`: w8@standard."""

    def __init__(self, folder: Path, form: str, threads: int) -> None:
        import torch

        from nearfar_cloud.engine import Engine
        from nearfar_cloud.executors.local import LocalExecutor
        from nearfar_cloud.model.hf import load_folder
        from nearfar_cloud.model.packed import FORMS, pack_folder
        from nearfar_cloud.planning.simulate import POLICIES
        from nearfar_cloud.scheduling.compose import Composer

        torch.set_num_threads(threads)
        weights, _, policy = form.partition("@")
        model = pack_folder(folder / "hf", weights) if weights in FORMS else load_folder(folder / "hf", weights)
        executor = LocalExecutor(model, POSITIONS // 64)
        self.engine = Engine(executor, Composer(POLICIES[policy or "standard"](256)), prefix_cache=False)
        self.numbers: dict[int, int] = {}
        self.facts = f"nearfar {weights}, {policy or 'standard'}"

    def add(self, number: int, ids: list[int], n: int) -> None:
        from nearfar_cloud.types import Request

        self.numbers[self.engine.submit(Request(ids=tuple(ids), max_tokens=n))] = number

    def step(self, most_s: float) -> list[Came]:
        outputs, now = self.engine.step(), clock()
        assert not any(out.error for out in outputs), outputs
        return [(self.numbers[out.seq], len(out.ids), now) for out in outputs]


class Openvino:
    """OpenVINO GenAI's continuous batching with its own scheduler (split and fused prompts, 256 tokens a step)."""

    def __init__(self, folder: Path, form: str, threads: int) -> None:
        import openvino_genai as lib

        scheduler = lib.SchedulerConfig()
        scheduler.num_kv_blocks, scheduler.max_num_seqs = POSITIONS // 32, MOST_SEQS
        scheduler.enable_prefix_caching = False
        options = {"INFERENCE_NUM_THREADS": threads}
        self.pipe = lib.ContinuousBatchingPipeline(str(folder / f"{form}.gguf"), scheduler, "CPU", options)
        self.open: dict[int, Any] = {}
        self.facts = f"openvino-genai {lib.__version__} {form}"

    def add(self, number: int, ids: list[int], n: int) -> None:
        import numpy as np
        import openvino
        import openvino_genai as lib

        config = lib.GenerationConfig(max_new_tokens=n, min_new_tokens=n, ignore_eos=True, do_sample=False)
        self.open[number] = self.pipe.add_request(number, openvino.Tensor(np.array([ids], np.int64)), config)

    def step(self, most_s: float) -> list[Came]:
        import openvino_genai as lib

        self.pipe.step()
        now, came = clock(), []
        for number, handle in list(self.open.items()):
            while handle.can_read():
                (out,) = handle.read().values()
                came.append((number, len(out.generated_ids), now))
                if out.finish_reason != lib.GenerationFinishReason.NONE:
                    self.open.pop(number)
        return came


class LlamaServer:
    """llama.cpp's server with its slots and its own batches (2,048 tokens), as xllamacpp has it: without HTTP, too.

    A thread for each request waits for its tokens.  Those that end within a character are told with the next one.
    """

    def __init__(self, folder: Path, form: str, threads: int) -> None:
        import xllamacpp as lib

        p = lib.CommonParams()
        p.model.path, p.n_ctx, p.kv_unified = str(folder / f"{form}.gguf"), POSITIONS, True
        p.n_parallel = 64
        p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
        p.cache_prompt, p.cache_ram_mib = False, 0
        self.server = lib.Server(p)
        self.came: queue.SimpleQueue[Came | str] = queue.SimpleQueue()  # a word is what went wrong
        self.facts = f"llama.cpp server (xllamacpp {lib.__version__}) {form}"

    def add(self, number: int, ids: list[int], n: int) -> None:
        threading.Thread(target=self._serve, args=(number, ids, n), daemon=True).start()

    def _serve(self, number: int, ids: list[int], n: int) -> None:
        told, last = 0, None

        def tell(piece: Any) -> bool:
            nonlocal told, last
            now, last = clock(), piece if isinstance(piece, dict) else json.loads(piece)
            total = last["timings"]["predicted_n"] if "timings" in last else told
            if total > told:
                self.came.put((number, total - told, now))
            told = total
            return False

        asked = {"prompt": ids, "max_tokens": n, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
        self.server.handle_completions(asked | {"stream": True, "timings_per_token": True}, tell)
        if told < n:
            self.came.put(f"request {number} got {told} of {n} tokens: {last}")

    def step(self, most_s: float) -> list[Came]:
        came: list[Came] = []
        with suppress(queue.Empty):
            one = self.came.get(timeout=most_s)
            while not isinstance(one, str):
                came.append(one)
                one = self.came.get_nowait()
            raise RuntimeError(one)
        return came


PEERS: dict[str, Callable[[Path, str, int], Any]] = {
    "nearfar": Nearfar,
    "openvino": Openvino,
    "llama_server": LlamaServer,
}


def serve(server: Live, requests: list[tuple[float, list[int], int]]) -> list[list[float]]:
    """When each token of each request came, seconds from the start; requests stand in order of arrival."""
    token_s: list[list[float]] = [[] for _ in requests]
    n_come = n_done = 0
    started = clock()
    while n_done < len(requests):
        while n_come < len(requests) and started + requests[n_come][0] <= clock():
            server.add(n_come, *requests[n_come][1:])
            n_come += 1
        next_s = started + requests[n_come][0] if n_come < len(requests) else math.inf
        if n_done == n_come:
            clock.wait_until(next_s)
            continue
        for number, n, now in server.step(min(MOST_S, max(1e-3, next_s - clock()))):
            token_s[number] += [now - started] * n
            n_done += len(token_s[number]) == requests[number][2]
    return token_s


def main() -> int:
    name, folder, form, threads = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print what they like; answers go where they are waited for

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=out, flush=True)

    started = time.perf_counter()
    server = PEERS[name](folder, form, threads)
    say({"ready": time.perf_counter() - started, "facts": server.facts})
    for line in sys.stdin:
        question = json.loads(line)
        requests = [(float(at), ids, int(n)) for at, ids, n in question["requests"]]
        clock.cpu_time, cpu = question["cpu_time"], cpu_seconds()
        token_s = serve(server, requests)
        say({"token_s": token_s, "cpu": cpu_seconds() - cpu})
    out.flush()
    os._exit(0)  # threads of a library may still wait for something


if __name__ == "__main__":
    sys.exit(main())
