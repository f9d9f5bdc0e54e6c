"""Several workers that serve as one engine: whoever steps an Engine can step a Fleet.

    submit, abort ──> inbox ──> step:  held ──> the freest worker ──> link ──┐
                                 │                                           │ a worker: engine.step
                                 └ outputs <── what is told <── link <───────┘

A lost worker is no loss.  A token is a function of the ids before it, the seed and its position, so a sequence goes on
anywhere from its prompt and the tokens that were told: the same ones follow, after a pause.

Who was on a lost worker is *suspect* until it has told another token.  Suspects go before new requests and one at a
time to a worker, which gets nothing else meanwhile: it is on trial.  If it is lost and all others there had told a
token since they came, the suspect ends with an error; where another one was as silent, both are suspect.  So who takes
workers down before its first token costs two, as a rule.  Who tells tokens in between may cost MOST_CRASHES of them,
and may have a suspect blamed that was on trial beside it.
"""

from __future__ import annotations

import itertools
import logging
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from queue import Empty, SimpleQueue
from threading import Event
from typing import Any

import numpy as np

from nearfar.errors import NearfarError, UsageError
from nearfar_cloud.branches import branches_of
from nearfar_cloud.counts import Counts
from nearfar_cloud.executors.base import ModelFacts
from nearfar_cloud.executors.transport import Frame, LinkEnded, WireError
from nearfar_cloud.fleet.load import Load, freest
from nearfar_cloud.fleet.members import Member, Ongoing, Place
from nearfar_cloud.fleet.messages import Abort, Broken, Ready, Submit, ToFront
from nearfar_cloud.types import Facts, Finish, LogitsHook, Output, Request

POLL_S = 0.2  # a step that hears nothing ends after it
SILENCE_S = 60.0  # of a worker that says nothing within it: longer than any step
LOADING_S = 900.0  # for a model to be loaded
MOST_CRASHES = 8  # of its workers, whoever was to blame: then a request is given up
MOST_STARTS = 5  # of a worker in a row that came to nothing: it is given up
AGAIN_S = 0.5  # before such a start is tried again; twice as long each time

log = logging.getLogger(__name__)


class Fleet:
    """Owns the workers.  `start` makes the place of worker i; it may take its time, in a thread beside.

    It gives up with an exception when the event that it gets is set: the fleet closes.
    """

    def __init__(self, start: Callable[[int, Event], Place], n_workers: int, *, silence_s: float = SILENCE_S) -> None:
        """Returns when all are ready.  Raises NearfarError with what the first one said that is not."""
        self._start, self.silence_s = start, silence_s
        self.members = {i: Member(i) for i in range(n_workers)}
        self.counts = Counts()  # of all workers, the lost ones too
        self.n_restarts = 0
        self.has_work = True  # there are always workers to watch
        self._facts: ModelFacts | None = None
        self.n_blocks = 0  # of the worker with the fewest
        self._numbers = itertools.count(1)
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake_out, self._wake_in = socket.socketpair()
        for end in (self._wake_out, self._wake_in):
            end.setblocking(False)
        self._beside = ThreadPoolExecutor(2, "places")
        self._closing = Event()
        self._heard: deque[tuple[Member, Place, Frame[ToFront] | NearfarError]] = deque()
        self._open: dict[int, Ongoing] = {}
        self._fresh: deque[list[Ongoing]] = deque()  # held until a worker is there; those of one prompt together
        self._suspects: deque[Ongoing] = deque()
        self._outputs: list[Output] = []
        self._first_error: str | None = None
        try:
            while not all(m.is_ready for m in self.members.values()):
                self.step()
                if self._first_error is not None:
                    raise NearfarError(f"a worker did not start: {self._first_error}")
        except BaseException:
            self.close()
            raise

    @property
    def facts(self) -> ModelFacts:
        assert self._facts is not None  # a worker was ready
        return self._facts

    @property
    def loads(self) -> dict[int, Load]:
        """Of the workers that take requests; from any thread."""
        return {m.number: load for m in list(self.members.values()) if (load := m.expected) is not None}

    # ------------------------------------------------------------ what other threads may call

    def submit_branches(self, req: Request, n: int, hooks: Sequence[LogitsHook | None] | None = None) -> list[int]:
        """As Engine.submit_branches.

        A hook has a text `source`, out of which a worker makes it again, and `n_followed`: the last so many ids of the
        request have led it to where it is.
        """
        hooks = [None] * n if hooks is None else hooks
        requests = branches_of(req, n, len(hooks))
        self.facts.check(req, self.n_blocks)
        if any(hook is not None and not hasattr(hook, "source") for hook in hooks):
            raise UsageError("a hook without a source: it cannot follow its sequence to a worker")
        now = time.monotonic()
        group = [
            Ongoing(next(self._numbers), r, getattr(hook, "source", None), getattr(hook, "n_followed", 0), now)
            for r, hook in zip(requests, hooks, strict=True)
        ]
        self._call(lambda: self._arrive(group))
        return [s.seq for s in group]

    def abort(self, seq: int) -> None:
        """Stop a sequence; its last output still comes.  One that is done already stays done."""
        self._call(lambda: self._abort(seq))

    def close(self) -> None:
        """End all workers, whatever they do; once no thread steps any more."""
        self._closing.set()
        for m in self.members.values():
            place = m.place
            if m.starting is not None and m.starting.exception() is None:  # waits for it
                place = m.starting.result()
            if place is not None:
                if not m.is_ready:  # it would load its model to the end
                    place.kill()
                place.link.close()
                self._beside.submit(place.close)
        self.members.clear()
        self._beside.shutdown()
        self._wake_in.close()
        self._wake_out.close()

    def _call(self, what: Callable[[], None]) -> None:
        self._inbox.put(what)
        self._wake()

    def _wake(self) -> None:
        with suppress(OSError):  # full: it will wake up; closed: nobody has to
            self._wake_in.send(b"x")

    # ------------------------------------------------------------ the loop

    def step(self) -> list[Output]:
        """Hear one worker, at most POLL_S long; what it told.  Raises NearfarError when no worker is left."""
        while True:
            try:
                self._inbox.get_nowait()()
            except Empty:
                break
        self._tend()
        if not any(isinstance(what, NearfarError) for _, _, what in self._heard):  # nothing for who is gone already
            self._dispatch()
        if not self._heard and not self._outputs:
            self._listen()
        if self._heard:  # one at a time: the counts move by one step of one engine
            member, place, what = self._heard.popleft()
            if member.place is place:
                self._hear(member, what)
        outputs, self._outputs = self._outputs, []
        return outputs

    def _listen(self) -> None:
        """What all links say."""
        poll = select.poll()
        poll.register(self._wake_out, select.POLLIN)
        at: dict[int, tuple[Member, Place]] = {}
        for m in self.members.values():
            if m.place is not None:
                at[m.place.link.fileno()] = m, m.place
                poll.register(m.place.link, select.POLLIN | (select.POLLOUT if m.place.link.n_unsent else 0))
        for descriptor, events in poll.poll(1000 * POLL_S):
            if descriptor not in at:
                self._wake_out.recv(1 << 12)
                continue
            m, place = at[descriptor]
            try:
                place.link.flush()
                if events & ~select.POLLOUT:
                    self._heard.extend((m, place, frame) for frame in place.link.read())
                    m.heard_at = time.monotonic()
            except (LinkEnded, WireError) as error:
                self._heard.append((m, place, error))
        now = time.monotonic()
        for m, place in at.values():  # what had come is read: who was not heard has not spoken
            if now > m.heard_at + (self.silence_s if m.is_ready else LOADING_S):
                self._heard.append((m, place, LinkEnded(f"it has said nothing for {now - m.heard_at:.0f} s")))

    def _hear(self, m: Member, what: Frame[ToFront] | NearfarError) -> None:
        if isinstance(what, NearfarError):
            self._lose(m, str(what))
            return
        message = what.message
        if isinstance(message, Broken):
            self._lose(m, message.error)
        elif isinstance(message, Ready):
            self._meet(m, message)
        else:
            self._count(m, message.counts)
            m.hear(message)
            try:
                outputs = [out.output(what.arrays) for out in message.outputs]
            except WireError as error:
                self._lose(m, str(error))
                return
            for out in outputs:
                self._tell(m, out)

    def _meet(self, m: Member, ready: Ready) -> None:
        """Another model than the others' would continue their texts with other tokens."""
        if self._facts is not None and ready.facts != self._facts:
            self._lose(m, "it has loaded another model than the other workers")
            return
        self._facts, m.is_ready, m.n_starts, m.pid = ready.facts, True, 0, ready.pid
        self.n_blocks = min(self.n_blocks or ready.n_blocks, ready.n_blocks)
        m.load = Load(ready.n_blocks, ready.n_blocks, 0, 0, 0, 0, 0)
        log.info("worker %d is ready: process %d", m.number, ready.pid)

    def _count(self, m: Member, counts: Counts) -> None:
        for f in fields(Counts):
            more = getattr(counts, f.name) - getattr(m.counts, f.name)
            setattr(self.counts, f.name, getattr(self.counts, f.name) + more)
        m.counts = counts

    def _tell(self, m: Member, out: Output) -> None:
        s = m.open.get(out.seq)
        if s is None:
            return
        s.told += out.ids
        if out.ids or out.finish is not None:
            s.is_suspect = s.is_silent = False
            m.trial = None if m.trial == s.seq else m.trial
        if out.finish is not None:
            del m.open[s.seq], self._open[s.seq]
        if (f := out.facts) is not None:
            cached = min(f.cached, len(s.req.ids))  # of what was told, and computed again, the client knows nothing
            out = out._replace(facts=Facts(f.queue_s + s.held_s, cached, *f[2:4], f.preempted + s.n_crashes))
        self._outputs.append(out)

    def _end(self, s: Ongoing, finish: Finish, error: str = "") -> None:
        """Of a sequence that no worker has."""
        del self._open[s.seq]
        facts = Facts(time.monotonic() - s.arrival, 0, 0, 0, s.n_crashes)
        self._outputs.append(Output(s.seq, (), finish, (), error, facts))

    # ------------------------------------------------------------ who goes where

    def _dispatch(self) -> None:
        while self._suspects and (m := self._freest()) is not None:
            s = self._suspects.popleft()
            m.trial = s.seq
            self._send(m, *s.submit(), [s])
        while self._fresh and (m := self._freest()) is not None:
            group = self._fresh.popleft()
            for s in group:
                s.held_s = time.monotonic() - s.arrival
            if len(group) > 1:  # their worker counts the seeds up, as `submit_branches` did
                numbers, hooks = tuple(s.seq for s in group), tuple(s.hook for s in group)
                message = Submit.of(group[0].req, numbers, hooks, group[0].n_followed)
                self._send(m, message, group[0].req.ids, group)
            else:
                self._send(m, *group[0].submit(), group)

    def _freest(self) -> Member | None:
        """Of those that are not on trial."""
        number = freest({i: load for i, load in self.loads.items() if self.members[i].trial is None})
        return None if number is None else self.members[number]

    def _send(self, m: Member, message: Submit, ids: Sequence[int], whose: list[Ongoing]) -> None:
        m.expect(len(ids), whose)
        if not self._post(m, message, [np.asarray(ids, np.int32)]):  # it never had them: no blame
            m.withdraw(whose)
            if whose[0].is_suspect:
                self._suspects.extendleft(whose)
            else:
                self._fresh.appendleft(whose)

    def _post(self, m: Member, message: Submit | Abort, arrays: Sequence[np.ndarray[Any, Any]] = ()) -> bool:
        """Whether the link took it; where it has ended, that is heard next."""
        assert m.place is not None
        try:
            m.place.link.post(message, arrays)
        except LinkEnded as error:
            self._heard.append((m, m.place, error))
            return False
        return True

    def _arrive(self, group: list[Ongoing]) -> None:
        self._open |= {s.seq: s for s in group}
        self._fresh.append(group)

    def _abort(self, seq: int) -> None:
        """Its worker hears of it; one that no worker has ends at once, and holds nothing until one is there."""
        if (s := self._open.get(seq)) is None:
            return
        if (m := next((m for m in self.members.values() if seq in m.open), None)) is not None:
            s.is_aborted = True
            self._post(m, Abort(seq))
        else:
            if s in self._suspects:
                self._suspects.remove(s)
            i = next((i for i, group in enumerate(self._fresh) if s in group), None)
            if i is not None:  # the others go alone: their worker counts seeds up, and one is missing
                groups = list(self._fresh)
                groups[i : i + 1] = [[other] for other in groups[i] if other is not s]
                self._fresh = deque(groups)
            self._end(s, "abort")

    # ------------------------------------------------------------ coming and going

    def _tend(self) -> None:
        """Start who is to be started, take in who has been."""
        now = time.monotonic()
        for m in list(self.members.values()):
            if m.place is None and m.starting is None and now >= m.start_at:
                m.starting = self._beside.submit(self._start, m.number, self._closing)
                m.starting.add_done_callback(lambda _: self._wake())
            elif m.starting is not None and m.starting.done():
                starting, m.starting = m.starting, None
                m.begin()
                if (error := starting.exception()) is not None:
                    self._failed(m, f"{type(error).__name__}: {error}")
                else:
                    m.place = starting.result()
        if not self.members:
            raise NearfarError("no worker is left")

    def _lose(self, m: Member, why: str) -> None:
        """A worker is gone, or good for nothing any more: its sequences go on elsewhere."""
        place, open_, was_ready = m.place, m.open, m.is_ready
        assert place is not None
        place.kill()
        self._beside.submit(place.close)
        m.place = None
        m.begin()
        n_silent = sum(s.is_silent for s in open_.values())
        for s in open_.values():
            s.n_crashes += 1
            if s.is_aborted:
                self._end(s, "abort")
            elif (s.is_suspect and n_silent == 1) or s.n_crashes >= MOST_CRASHES:
                log.error("sequence %d is given up: %d workers were lost while they had it", s.seq, s.n_crashes)
                self._end(s, "error", f"WorkerLost: {s.n_crashes} workers were lost while they had this request")
            else:
                s.is_suspect = True
                self._suspects.append(s)
        if was_ready:
            log.error("worker %d is lost: %s", m.number, why)
            self.n_restarts += 1
        else:
            self._failed(m, why)

    def _failed(self, m: Member, why: str) -> None:
        """A start came to nothing."""
        log.error("worker %d did not start: %s", m.number, why)
        self._first_error = self._first_error or why
        m.n_starts += 1
        m.start_at = time.monotonic() + AGAIN_S * 2**m.n_starts
        if m.n_starts == MOST_STARTS:
            log.error("worker %d is given up", m.number)
            del self.members[m.number]
