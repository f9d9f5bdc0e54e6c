"""The engine behind the gateway: one thread that steps it, and mailboxes from which the event loop reads.

event loop   submit, abort ──> engine's inbox ──> thread: step, step, ...   sleeps where there is nothing to do
             mailboxes     <── call_soon_threadsafe <── outputs
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

from nearfar_cloud.engine import Engine
from nearfar_cloud.gateway.refusal import Refusal
from nearfar_cloud.types import LogitsHook, Output, Request

if TYPE_CHECKING:
    from nearfar_cloud.fleet.supervisor import Fleet

MAX_UNREAD = 1024  # outputs of one answer that wait for its reader
REST_S = 0.01  # after an engine's step that could do nothing: memory or a policy has to change first

log = logging.getLogger(__name__)

Core: TypeAlias = "Engine | Fleet"  # what a gateway stands on: one engine here, or several in processes of their own


def speed(core: Core) -> float:
    """Rows per second so far, 0 before the first step; workers run side by side, so their seconds overlap."""
    counts = core.counts
    n_engines = 1 if isinstance(core, Engine) else len(core.loads)
    return n_engines * counts.rows / counts.run_s if counts.run_s else 0.0


class Reader(Protocol):
    """What outputs are for; called on the event loop."""

    @property
    def ended(self) -> bool: ...
    def put(self, out: Output) -> None: ...
    def end(self, reason: Refusal) -> None: ...


class Mailbox:
    """What was decided for one answer, in order; read by one task of the event loop."""

    def __init__(self) -> None:
        self._waiting: deque[Output] = deque()
        self._end: Refusal | None = None
        self._news = asyncio.Event()

    @property
    def ended(self) -> bool:
        return self._end is not None

    def put(self, out: Output) -> None:
        if len(self._waiting) >= MAX_UNREAD:
            self.end(Refusal(500, "slow_reader", f"{MAX_UNREAD} tokens wait unread: the answer was ended"))
        if self._end is None:
            self._waiting.append(out)
        self._news.set()

    def end(self, reason: Refusal) -> None:
        """Nothing more comes; the reader gets `reason` instead of what it has not read yet."""
        if self._end is None:
            self._end = reason
        self._waiting.clear()
        self._news.set()

    async def get(self) -> Output:
        """The next output.  Raises the Refusal that ended the answer."""
        while not self._waiting:
            if self._end is not None:
                raise self._end
            self._news.clear()
            await self._news.wait()
        return self._waiting.popleft()


class Service:
    """Owns the thread of an engine.  Every method but the thread's own is for the event loop.

    `on_step` is called in the engine's thread after each step.
    """

    def __init__(self, engine: Core, on_step: Callable[[Core], None] = lambda engine: None) -> None:
        self.engine, self.on_step = engine, on_step
        self.failure: str | None = None  # the type of what stopped the thread, if something did
        self._mailboxes: dict[int, Reader] = {}
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """From the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._wake.set()  # a fleet has its workers to watch from the start
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its step."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    @property
    def n_open(self) -> int:
        """Sequences that somebody waits for."""
        return len(self._mailboxes)

    def submit(self, req: Request, mailbox: Mailbox, hooks: Sequence[LogitsHook | None]) -> list[int]:
        """Queue as many answers to a request as there are hooks, with seeds from its own on; outputs go to `mailbox`.

        Raises what Engine.submit_branches raises, Refusal if the engine has stopped.
        """
        self._check()
        seqs = self.engine.submit_branches(req, len(hooks), hooks)
        self._mailboxes |= dict.fromkeys(seqs, mailbox)  # outputs come through the event loop: none can be missed
        self._wake.set()
        return seqs

    @property
    def outside(self) -> Engine:
        """Whom to tell about sequences whose positions come from outside; to be heard at its next step."""
        assert isinstance(self.engine, Engine)  # a fleet refuses devices at the start
        return self.engine

    def open(self, req: Request, reader: Reader) -> int:
        """Begin such a sequence.  Raises what Engine.submit raises, Refusal if the engine has stopped."""
        self._check()
        seq = self.outside.submit(req)
        self._mailboxes[seq] = reader
        return seq

    def wake(self) -> None:
        """There is something to compute."""
        self._wake.set()

    def _check(self) -> None:
        if self.failure is not None or self._thread is None:
            raise Refusal(503, "engine_failed", "the engine has stopped: this server has to be started again")

    def abort(self, seq: int) -> None:
        """Stop a sequence; its last output still comes."""
        self.engine.abort(seq)
        self._wake.set()

    def forget(self, seq: int) -> None:
        """Stop a sequence that nobody reads any longer."""
        if self._mailboxes.pop(seq, None) is not None:
            self.abort(seq)

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._wake.wait()
                self._wake.clear()
                while self.engine.has_work and not self._stopping:
                    self._step()
        except Exception as error:  # a fault of ours: whoever waits must hear of it
            log.exception("the engine's thread has ended")
            self.failure = type(error).__name__
            self._post(self._fail)

    def _step(self) -> None:
        before = self.engine.counts.steps
        outputs = self.engine.step()
        self.on_step(self.engine)
        if outputs:
            self._post(lambda: self._deliver(outputs))
        elif isinstance(self.engine, Engine) and self.engine.counts.steps == before and self._wake.wait(REST_S):
            self._wake.clear()  # a fleet has waited within its step, and what comes next may be there

    def _post(self, call: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop has been closed: nobody reads any longer
            self._stopping = True

    def _deliver(self, outputs: list[Output]) -> None:
        for out in outputs:
            mailbox = self._mailboxes.get(out.seq)
            if mailbox is None:
                continue
            if out.finish is not None:
                del self._mailboxes[out.seq]
            mailbox.put(out)
            if mailbox.ended:
                self.forget(out.seq)

    def _fail(self) -> None:
        for mailbox in set(self._mailboxes.values()):
            mailbox.end(Refusal(500, "engine_failed", "the engine has stopped"))
        self._mailboxes.clear()
