"""One single-thread process of a study: takes a job, trains its arm, leaves the figures in the job's folder.

What the run prints goes to `job.log`, so that its last lines are there however the process ends.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from nearfar.errors import NearfarError
from nearfar_cloud.training.run import SAME_LOSS
from nearfar_cloud.training.studies.course import Course, batches, trainer_of
from nearfar_cloud.training.studies.study import ArmFailed, Job, Study

LAST_LINES = 12  # of a failed run's log that are shown
WARM_UP = "warm-up"  # the name of the arm that is timed and not trained to any end
WARM_UP_S = 4.0  # steps are timed for at least so long


def study_of(module: str) -> Study:
    """The STUDY of a module."""
    found = import_module(module).STUDY
    assert isinstance(found, Study)
    return found


class Worker:
    """The runner's end of one process."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None

    def begin(self, job: Job) -> None:
        job.folder.mkdir(parents=True, exist_ok=True)
        self.job = job
        self.connection.send(job)

    def end(self) -> tuple[Job, Any]:
        """The job that has ended and its figures.  ArmFailed with its last lines where it failed or was killed."""
        job, self.job = self.job, None
        assert job is not None
        try:
            answer = self.connection.recv()
        except EOFError:
            self.process.join(5)
            raise ArmFailed(
                f"{job.title}: its process ended with {self.process.exitcode} before the run did{_last_lines(job.log)}"
            ) from None
        if isinstance(answer, str):
            raise ArmFailed(f"{job.title}: {answer}{_last_lines(job.log)}")
        return job, answer

    def stop(self) -> None:
        """End the process: by itself where it waits for a job, at once where it is in the middle of one."""
        self.connection.close()
        if self.job is None:
            self.process.join(5)
        self.process.kill()
        self.process.join()


def _last_lines(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:] if log.is_file() else []
    return f"; the last lines of {log}:\n" + "\n".join(f"    {line}" for line in lines) if lines else ""


def _serve(connection: Connection) -> None:
    """Jobs until the runner is gone.  The answer to each: its figures, or what went wrong in one line."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the runner ends its workers
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        _print_to(job.log)
        try:
            connection.send(_done(job))
        except NearfarError as error:
            connection.send(str(error))
        except Exception as error:  # the boundary of a process: the log has it all, the runner a line
            traceback.print_exc()
            connection.send(f"{type(error).__name__}: {error}")
        sys.stdout.flush()
        sys.stderr.flush()


def _print_to(log: Path) -> None:
    """stdout and stderr of this process, also of code that is not Python, into the file."""
    with log.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)


def _done(job: Job) -> dict[str, Any]:
    if job.arm.name == WARM_UP:
        return warm_up(job)
    # Compiled code of one run fits the next of the same shapes; without this, torch gives up after eight variants.
    torch._dynamo.config.recompile_limit = 64
    begun = time.perf_counter()
    figures = study_of(job.study).train(job) | {"seconds": round(time.perf_counter() - begun, 2)}
    part = job.result.with_suffix(".part")
    part.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    part.replace(job.result)
    return figures


def warm_up(job: Job) -> dict[str, float]:
    """Seconds of set-up, of the first step (the compiler's), of a look, of the last look, of a token.

    "same": 1 where the first loss is that of f32 without the compiler, within what rounding does.
    """
    start = time.perf_counter()
    course, rows = Course(job), batches(job, job.recipe)
    ready = time.perf_counter()
    trainer = trainer_of(job, job.recipe, rows, job.tokens)
    position = rows.state()
    loss = trainer.step().loss
    course.look(trainer.model)
    compiled = time.perf_counter()
    course.look(trainer.model)
    looked = time.perf_counter()
    tokens = trainer.tokens
    while trainer.progress < 1 and time.perf_counter() < looked + WARM_UP_S:
        trainer.step()
    trained, tokens = time.perf_counter(), trainer.tokens - tokens
    rows.restore(position)
    slow = replace(job, lab=replace(job.lab, precision="fp32", compiled=False))
    plain = trainer_of(slow, job.recipe, rows, job.tokens).step().loss
    n_few, n_all = (sum(len(r.ids) for r in some.values()) for some in (course.few, course.rows))
    return {
        "setup_s": ready - start,
        "first_s": compiled - ready,
        "look_s": looked - compiled,
        "last_look_s": (looked - compiled) * n_all / n_few,
        "token_s": (trained - looked) / max(tokens, 1),
        "same": float(abs(loss - plain) < SAME_LOSS),
    }
