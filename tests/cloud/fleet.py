"""Workers of small models, real ones and scripted ones: what the tests of the fleet stand on."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from nearfar.errors import NearfarError
from nearfar_cloud.counts import Counts
from nearfar_cloud.engine import Engine
from nearfar_cloud.executors.base import ModelFacts
from nearfar_cloud.executors.transport import Frame, Link
from nearfar_cloud.fleet.load import Load
from nearfar_cloud.fleet.messages import Out, Ready, Submit, ToFront, Told, ToWorker
from nearfar_cloud.fleet.process import ProcessWorker
from nearfar_cloud.fleet.supervisor import Fleet
from nearfar_cloud.fleet.worker import MakeHook
from nearfar_cloud.types import Finish, Logprobs, Output, Request
from tests.cloud import serving
from tests.processes import parents

POISON = (3, 311, 4)  # a prompt that kills whoever runs it
FACTS = ModelFacts("scripted", 4, 64, 320, 1024)


# ------------------------------------------------------------ real workers of the random model


def open_random(seed: int | None, poisoned: bool, threads: int = 1) -> tuple[Engine, MakeHook]:
    """In the worker: the engine of `serving`; `seed`: its schedules are chance, None: a server's."""
    import torch

    torch.set_num_threads(threads)
    policies: tuple[object, ...] = ()
    if seed is not None:
        from tests.cloud.test_serving_engine import Chaos

        policies = (Chaos(random.Random(seed)),)
    engine = serving.engine(*policies, n_blocks=40)
    if poisoned:
        run = engine.executor.run

        def run_or_die(batch: Sequence[Any]) -> Any:
            if any(w.ids is not None and (w.start, *w.ids[:3]) == (0, *POISON) for w in batch):
                os.kill(os.getpid(), signal.SIGKILL)
            return run(batch)

        engine.executor.run = run_or_die  # type: ignore[method-assign]
    return engine, no_hook


def open_slowly(begun: str) -> tuple[Engine, MakeHook]:
    """In the worker: a model that takes its time; the file `begun` says that it has begun."""
    Path(begun).touch()
    time.sleep(600)
    raise AssertionError("nobody stopped it")


def open_nothing() -> tuple[Engine, MakeHook]:
    """In the worker: a model that cannot be loaded."""
    raise NearfarError("model.gguf: cut short")


def no_hook(source: str) -> Any:
    raise AssertionError(f"no hook was asked for: {source}")


def random_fleet(n: int, *, chaos: bool = True, poisoned: bool = False, **options: float) -> Fleet:
    def start(number: int, closing: threading.Event) -> ProcessWorker:
        settings = {"seed": number if chaos else None, "poisoned": poisoned}
        return ProcessWorker("tests.cloud.fleet:open_random", settings)

    return Fleet(start, n, **options)


class Answer(NamedTuple):
    """All that was told of a sequence."""

    ids: tuple[int, ...] = ()
    logprobs: tuple[Logprobs, ...] = ()
    finish: Finish | None = None
    error: str = ""

    def and_then(self, out: Output) -> Answer:
        return Answer(self.ids + out.ids, self.logprobs + out.logprobs, out.finish, out.error)


def alone(req: Request, branch: int = 0) -> Answer:
    """What one engine tells of one request."""
    e = serving.engine(serving.Whole(), prefix_cache=False)
    e.submit(replace(req, sampling=replace(req.sampling, seed=req.sampling.seed + branch)))
    answer = Answer()
    while answer.finish is None:
        for out in e.step():
            answer = answer.and_then(out)
    return answer


def collect(
    fleet: Fleet, seqs: Sequence[int], each_step: Callable[[dict[int, Answer]], None] = lambda answers: None
) -> dict[int, Answer]:
    """Step until all sequences have ended."""
    answers = {seq: Answer() for seq in seqs}
    until = time.monotonic() + 120
    while any(a.finish is None for a in answers.values()):
        assert time.monotonic() < until, answers
        for out in fleet.step():
            assert answers[out.seq].finish is None, out  # nothing comes after the end
            answers[out.seq] = answers[out.seq].and_then(out)
        each_step(answers)
    return answers


def step_until(fleet: Fleet, what: Callable[[], bool]) -> list[Output]:
    """The outputs until then."""
    found: list[Output] = []
    until = time.monotonic() + 60
    while not what():
        assert time.monotonic() < until, "it did not come to that"
        found += fleet.step()
    return found


# ------------------------------------------------------------ scripted workers


class Scripted:
    """A place whose worker is the test: it reads `far` and says there what it likes."""

    def __init__(self, *, n_blocks: int = 64, facts: ModelFacts = FACTS) -> None:
        ours, theirs = socket.socketpair()
        self.link: Link[ToFront] = Link(ours, ToFront)
        self.raw = theirs
        self.far: Link[ToWorker] = Link(theirs, ToWorker)
        self.n_blocks, self.killed, self.closed = n_blocks, False, threading.Event()
        self.n_received = 0
        self.far.post(Ready(1, facts, n_blocks))

    def kill(self) -> None:
        self.killed = True
        self.far.close()

    def close(self) -> None:
        self.link.close()
        self.far.close()
        self.closed.set()

    def heard(self) -> list[Frame[ToWorker]]:
        """What the front has sent since."""
        found: list[Frame[ToWorker]] = []
        while self.far.wait(0):
            found += self.far.read()
        self.n_received += sum(isinstance(f.message, Submit) for f in found)
        return found

    def submitted(self) -> list[int]:
        """The sequences that came since."""
        return [seq for f in self.heard() if isinstance(f.message, Submit) for seq in f.message.seqs]

    def tell(self, *outputs: Out, used: int = 0, running: int = 0) -> None:
        load = Load(self.n_blocks, self.n_blocks - used, 0, 0, 0, running, 0)
        self.far.post(Told(outputs, Counts(), self.n_received, load))


def a_token(seq: int, token: int = 7, finish: Finish | None = None) -> Out:
    return Out(seq, (token,), finish, (), "", None, None)


# ------------------------------------------------------------ what a process holds


def children() -> set[int]:
    """Processes that this one has started and that have not been waited for."""
    return {pid for pid, parent in parents().items() if parent == os.getpid()}


def descriptors() -> set[str]:
    """Open files and sockets, by what they are."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except OSError:  # the one of the listing itself
            continue
    return found
