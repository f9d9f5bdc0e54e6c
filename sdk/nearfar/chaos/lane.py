"""One device on its own link, an answer at a time, with what goes wrong meanwhile.

device.py ──> proxy: reset, cut, stall, half-open, blackout ──> server: kill, stop, evict, swap
   device: SIGKILL, and the same answer again from its journal; so too when it has refused other weights
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nearfar.chaos.handset import Handset
from nearfar.chaos.plan import Task
from nearfar.chaos.pressure import QUIET_S, Pressure
from nearfar.chaos.proxy import RunningLink
from nearfar.chaos.schedule import LINK_FAULTS, Fault, Schedule
from nearfar.chaos.told import Told
from nearfar.chaos.upper_process import UpperProcess
from nearfar.errors import NearfarError

SILENT_S = 180.0  # a device that says nothing for so long hangs: longer than its own patience


@dataclass(slots=True)
class Lane:
    """`n_lanes`: that share the server, so as many sessions fill what devices may hold together."""

    device: Handset
    link: RunningLink
    upper: UpperProcess
    pressure: Pressure
    journal: Path
    n_lanes: int = 1
    faults: Counter[str] = field(default_factory=Counter)  # that happened, by kind
    _n_swapped_back: int = 0  # swaps of the server that were over when the device was asked

    def answer(self, task: Task, schedule: Schedule | None = None) -> Told:
        """Ask, and let the faults happen when as many tokens have been told.  A later token waits for no fault."""
        told, due = Told(), deque((schedule or task.faults).faults)
        self.journal.unlink(missing_ok=True)
        try:
            self._ask(task)
            while not told.is_over:
                while due and due[0].at <= len(told.ids) and not told.is_over:
                    self._inject(due.popleft(), task, told)
                if not told.is_over:
                    self._hear(task, told)
        except NearfarError as error:
            told.wrong.append(str(error))
        if told.wrong:  # whatever it is at: the next answer begins with a new process
            self.device.kill()
        return told

    def _ask(self, task: Task) -> None:
        self._n_swapped_back = self.upper.victim.n_swapped_back
        self.device.ask(self._words(task))

    def _hear(self, task: Task, told: Told) -> None:
        """One line.  Who refused other weights is asked again when the right ones are back, or, every other time, a new
        process in its place: the journal knows where it was.
        """
        line = self.device.next(SILENT_S)
        told.hear(line)
        if "refused" not in line or told.is_over:
            return
        if self.upper.victim.n_swaps == self._n_swapped_back:
            told.wrong.append("the device refused the server although nobody had swapped its weights")
            return
        self.upper.wait()
        if task.number % 2:
            self.device.kill()
        self._ask(task)

    def _words(self, task: Task) -> dict[str, Any]:
        return {
            "prompt": task.prompt,
            "max_tokens": task.max_tokens,
            "temperature": task.temperature,
            "seed": task.seed,
            "journal": str(self.journal),
        }

    def _inject(self, fault: Fault, task: Task, told: Told) -> None:
        if fault.kind in LINK_FAULTS:
            self.link.inject(fault)
        elif fault.kind == "device":
            self._kill_device(task, told)
        elif fault.kind == "evict":
            if not self._evict():
                return
        else:
            self.upper.inject(fault)
        self.faults[fault.kind] += 1

    def _kill_device(self, task: Task, told: Told) -> None:
        """What it had said before counts as told."""
        for line in self.device.kill():
            told.hear(line)
        if told.ids and not told.is_over and not self.journal.exists():
            told.end = {}  # the answer was over, journal and all, before its last word: the tokens show whether it was
        if not told.is_over:
            self._ask(task)

    def _evict(self) -> bool:
        """The device sleeps for a moment, and others need the room; whether somebody had to make it."""
        self.device.pause()
        try:
            time.sleep(QUIET_S)
            return self.pressure.evict(self.n_lanes + 1)
        finally:
            self.device.wake()
