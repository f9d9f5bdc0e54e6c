"""A worker: one engine, driven by what comes over a link.  It ends when the link does.

link ──> submit, abort ──> engine.step ──> outputs, counts, load ──> link
              └ a hook is made beside the engine's thread, for a grammar may take a while to compile
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from typing import Any

from nearfar.errors import NearfarError, UsageError
from nearfar_cloud.engine import Engine
from nearfar_cloud.executors.transport import Frame, Link, LinkEnded
from nearfar_cloud.fleet.load import load_of
from nearfar_cloud.fleet.messages import Abort, Broken, Ready, Submit, Told, ToWorker, outs
from nearfar_cloud.types import LogitsHook, Output, Request

BEAT_S = 0.5  # between signs of life while there is nothing to do
LOAD_S = 0.05  # between two looks at the load while steps run
END_S = 10.0  # to end its step when its link has ended, before it is made to
REST_S = 0.005  # after a step that could do nothing, and while a hook is made

MakeHook = Callable[[str], LogitsHook]
log = logging.getLogger(__name__)


class Worker:
    """Owns the engine, the link, and which sequence of the engine is which of the front's."""

    def __init__(self, link: Link[ToWorker], engine: Engine, make_hook: MakeHook) -> None:
        self.link, self.engine, self.make_hook = link, engine, make_hook
        self._front_of: dict[int, int] = {}  # the engine's number -> the front's
        self._ours: dict[int, int] = {}  # and back
        self._making: dict[Future[list[LogitsHook | None]], tuple[Submit, Request]] = {}
        self._maker = ThreadPoolExecutor(1, "hooks")
        self._aborted: set[int] = set()
        self._failed: list[Output] = []  # what never came to the engine
        self._n_received = 0
        self._load_at = self._told_at = 0.0

    def run(self) -> None:
        """Until the link ends."""
        try:
            self.link.post(Ready(os.getpid(), self.engine.facts, self.engine.pool.n_blocks))
            pause = BEAT_S
            while True:
                if self.link.wait(pause):
                    for frame in self.link.read():
                        self._hear(frame)
                self._begin_made()
                before = self.engine.counts.steps
                outputs = self.engine.step() if self.engine.has_work else []
                stepped = self.engine.counts.steps > before
                self._tell(outputs, stepped=stepped)
                busy = self.engine.has_work or bool(self._making)
                pause = 0.0 if stepped else REST_S if busy else BEAT_S
        except LinkEnded:
            log.info("the front is gone")
        finally:
            self._maker.shutdown(wait=False, cancel_futures=True)
            self.link.close()

    # ------------------------------------------------------------ in

    def _hear(self, frame: Frame[ToWorker]) -> None:
        message = frame.message
        if isinstance(message, Abort):
            self._abort(message.seq)
            return
        self._n_received += 1
        try:
            req = message.request(frame.arrays)
        except UsageError as error:
            self._fail(message, error)
            return
        if any(message.hooks):
            followed = req.ids[len(req.ids) - message.n_followed :]
            self._making[self._maker.submit(self._make, message.hooks, followed)] = (message, req)
        else:
            self._begin(message, req, [None] * len(message.seqs))

    def _make(self, sources: tuple[str | None, ...], followed: tuple[int, ...]) -> list[LogitsHook | None]:
        """In the thread beside: hooks that have followed what was decided before."""
        hooks = [None if source is None else self.make_hook(source) for source in sources]
        for hook in hooks:
            for token in followed:
                if hook is not None:
                    hook.accept(token)
        return hooks

    def _begin_made(self) -> None:
        for future in [f for f in self._making if f.done()]:
            message, req = self._making.pop(future)
            if error := future.exception():
                self._fail(message, error)
            else:
                self._begin(message, req, future.result())

    def _begin(self, message: Submit, req: Request, hooks: list[LogitsHook | None]) -> None:
        try:
            ours = self.engine.submit_branches(req, len(message.seqs), hooks)
        except Exception as error:  # the boundary to what came over a link
            self._fail(message, error)
            return
        self._front_of |= dict(zip(ours, message.seqs, strict=True))
        self._ours |= dict(zip(message.seqs, ours, strict=True))
        for seq in self._aborted.intersection(message.seqs):
            self.engine.abort(self._ours[seq])
        self._aborted.difference_update(message.seqs)

    def _fail(self, message: Submit, error: BaseException) -> None:
        self._aborted.difference_update(message.seqs)
        self._failed += [Output(seq, (), "error", (), f"{type(error).__name__}: {error}") for seq in message.seqs]

    def _abort(self, seq: int) -> None:
        if seq in self._ours:
            self.engine.abort(self._ours[seq])
        elif any(seq in message.seqs for message, _ in self._making.values()):
            self._aborted.add(seq)  # it has no hook yet: it stops when it begins

    # ------------------------------------------------------------ out

    def _tell(self, outputs: list[Output], *, stepped: bool) -> None:
        """What a step came to, or that this worker is there; waits for a front that does not read."""
        now = time.monotonic()
        told, self._failed = [*(self._known(out) for out in outputs), *self._failed], []
        if not told and not stepped and now < self._told_at + BEAT_S:
            return
        load = None
        if now >= self._load_at + LOAD_S or not self.engine.has_work:
            self._load_at, load = now, load_of(self.engine)
        told_outs, arrays = outs(told)
        self.link.post(Told(told_outs, self.engine.counts, self._n_received, load), arrays)
        self.link.drain()
        self._told_at = now

    def _known(self, out: Output) -> Output:
        """Under the front's number; the last one of a sequence ends it here."""
        seq = self._front_of[out.seq]
        if out.finish is not None:
            del self._front_of[out.seq], self._ours[seq]
        return out._replace(seq=seq)


def run(
    link: Link[ToWorker], entry: str, settings: Mapping[str, Any], on_loaded: Callable[[], None] = lambda: None
) -> None:
    """Be a worker: `entry`, "module:function", makes an engine and what makes its hooks out of the settings."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait sleep; read when torch loads
    module, _, function = entry.partition(":")
    try:
        engine, make_hook = getattr(import_module(module), function)(**settings)
    except NearfarError as error:
        with suppress(LinkEnded):  # nobody is there to hear it
            link.post(Broken(str(error)))
            link.drain()
        link.close()
        return
    on_loaded()
    Worker(link, engine, make_hook).run()
