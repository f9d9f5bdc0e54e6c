"""Answers of two machines while everything that can fail does, each compared with the oracle.

    split ─> for each codec: server ─> lanes (device, link) ─> answers with faults ─> = oracle? = journal? each once?
                                └──────── in the end: everything that answers took up is given back

What goes wrong is drawn from the seed (plan.py), in tokens: an answer that fails is run again with fewer and fewer
faults, and its schedule is told with the seed.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from nearfar.bench.collab.prompts import OPENINGS, prompts
from nearfar.bench.collab.systems import Files, oracle
from nearfar.chaos.handset import Handset
from nearfar.chaos.lane import Lane
from nearfar.chaos.other_weights import write_other
from nearfar.chaos.plan import Plan, Task
from nearfar.chaos.pressure import Pressure
from nearfar.chaos.profiles import PROFILES, Profile
from nearfar.chaos.proxy import running
from nearfar.chaos.schedule import Schedule
from nearfar.chaos.shrink import shrink
from nearfar.chaos.told import Told
from nearfar.chaos.upper_process import KEEP_S, UpperProcess, serving
from nearfar.halves import split
from nearfar.llm import LLM
from nearfar.sampling import Sampling
from nearfar.share import how_of
from nearfar.weights import Weights
from nearfar.wire.fingerprint import model_fp, parts
from nearfar.wire.messages import ClientHello, CodecSpec

CODECS = ("fp16", "int8", "int4", "ids")
SLACK_S = 15.0  # beyond the time after which a server gives up what a device has left behind
MAX_FAILURES = 3  # then there is enough to look at
MAX_RERUNS = 24  # of an answer that fails, to find out which faults matter


@dataclass(frozen=True, slots=True)
class Setting:
    """What is run.  `tau`: of the exits, None as calibrated; `n_tokens`: of all codecs together.

    `rows_at`: the layer that hidden rows enter; None: k, where the device half ends.
    """

    model: Path
    k: int
    plan: Plan
    codecs: tuple[str, ...] = CODECS
    mode: str = "lossless"
    tau: float | None = None
    n_tokens: int = 100_000
    n_lanes: int = 3
    profile: Profile = PROFILES["lan"]
    rows_at: int | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """An answer that was not as it must be, and the fewest faults with which it still was not."""

    codec: str
    answer: int
    wrong: list[str]
    schedule: Schedule


@dataclass(slots=True)
class Leg:
    """What was seen with one codec.  `counts`: those of `SharedStats`, added up."""

    codec: str
    tokens: int = 0
    answers: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)
    kept: dict[str, tuple[float, float]] = field(default_factory=dict)  # not given back: (now, at the beginning)
    refused: int = 0  # times that a device would not go on with other weights, and later did with the right ones
    strangers_got: dict[str, float] = field(default_factory=dict)  # by a server with other weights, all the same
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        return not self.failures and not self.kept and not self.strangers_got


Right = Callable[[Task], list[int]]  # the oracle's ids
Progress = Callable[[Leg, int], None]  # the leg so far, and the tokens that it will have


def run(setting: Setting, progress: Progress | None = None) -> list[Leg]:
    """All codecs, one after the other.  Raises UsageError, FileError, NearfarError where something does not start."""
    legs: list[Leg] = []
    with TemporaryDirectory(prefix="nearfar-chaos-") as name, Weights.open(setting.model) as whole:
        folder = Path(name)
        has_exit = setting.k in [e.layer for e in whole.config.exits]
        halves = split(whole, setting.k, folder, rows_at=setting.rows_at, make_exit=not has_exit)
        files = Files(setting.model, halves.device, halves.upper)
        for codec in setting.codecs:
            legs.append(_Run(setting, files, codec, folder, progress).leg())
            if legs[-1].failures:
                break
    return legs


@contextmanager
def oracle_of(files: Files, codec: CodecSpec) -> Iterator[tuple[LLM, Right]]:
    """The composed model in this process; one answer at a time."""
    turn = threading.Lock()
    with oracle(files, codec) as llm:

        def right(task: Task) -> list[int]:
            sampling = Sampling(temperature=task.temperature, seed=task.seed)
            with turn:
                return llm.generate(task.prompt, max_tokens=task.max_tokens, sampling=sampling, exits=False).ids

        yield llm, right


class _Run:
    """One codec: lanes take answers until there are enough tokens."""

    def __init__(self, setting: Setting, files: Files, codec: str, folder: Path, progress: Progress | None) -> None:
        self.setting, self.files, self.codec, self.folder = setting, files, codec, folder
        self.progress = progress or (lambda leg, n: None)
        self.seen = Leg(codec)
        self.n_tokens = setting.n_tokens // len(setting.codecs)
        self._number = 0
        self._turn = threading.Lock()
        self._errors: list[BaseException] = []
        self._began = time.monotonic()

    def leg(self) -> Leg:
        with Weights.open(self.files.device) as weights:
            rows, packed = ("ids", "int8") if self.codec == "ids" else ("hidden", self.codec)
            how, config, found = how_of(weights, self.setting.mode, rows, packed), weights.config, parts(weights)
        hello = ClientHello(model_fp(found), found, (how.codec,))
        served = self.files.full if how.by_ids else self.files.upper
        other = write_other(served, self.folder / "other.gguf") if "swap" in self.setting.plan.kinds else None
        with serving(served, self.folder, self.setting.n_lanes * config.n_ctx, other=other) as upper:
            baseline = upper.held()
            layer = 0 if how.by_ids else config.row_layer
            pressure = Pressure(upper, hello, how.codec, layer, config.d_model, config.n_ctx)
            with oracle_of(self.files, how.codec) as (llm, right):
                asked = asked_of(llm, self.setting.model, self.setting.plan.seed)
                take = partial(self.setting.plan.task, prompts=asked, room=llm.max_len, name=self.codec)
                self._lanes(upper, pressure, take, right)
            upper.wait()
            self.seen.strangers_got = dict(upper.strangers_got)
            if not self.seen.failures:
                self.seen.kept = upper.settled(baseline, KEEP_S + SLACK_S)
        self.seen.seconds = time.monotonic() - self._began
        return self.seen

    def _lanes(self, upper: UpperProcess, pressure: Pressure, take: Callable[[int], Task], right: Right) -> None:
        with ExitStack() as stack:
            lanes = [self._lane(stack, i, upper, pressure) for i in range(self.setting.n_lanes)]
            threads = [threading.Thread(target=self._work, args=(lane, take, right), daemon=True) for lane in lanes]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        for lane in lanes:
            self.seen.faults += lane.faults
        if self._errors:
            raise self._errors[0]

    def _lane(self, stack: ExitStack, i: int, upper: UpperProcess, pressure: Pressure) -> Lane:
        seed = self.setting.plan.seed * 1000 + i
        link = stack.enter_context(running(("127.0.0.1", upper.port), self.setting.profile, seed))
        settings = {
            "file": str(self.files.device),
            "upper": [f"grpc://{link.address[0]}:{link.address[1]}"],
            "codec": self.codec,
            "mode": self.setting.mode,
            "tau": self.setting.tau,
            "token": upper.token,
        }
        device = stack.enter_context(Handset(settings, self.folder / f"device-{self.codec}-{i}.log"))
        return Lane(device, link, upper, pressure, self.folder / f"answer-{i}", self.setting.n_lanes)

    def _work(self, lane: Lane, take: Callable[[int], Task], right: Right) -> None:
        """Answers on one lane."""
        try:
            while (number := self._next()) is not None:
                task = take(number)
                told = _checked(lane, task, task.faults, right)
                self._note(task, told)
                if told.wrong:
                    self._fail(lane, task, told, right)
        except BaseException as error:  # told to whoever waits for all lanes
            self._errors.append(error)

    def _next(self) -> int | None:
        with self._turn:
            if self.seen.tokens >= self.n_tokens or len(self.seen.failures) >= MAX_FAILURES or self._errors:
                return None
            self._number += 1
            return self._number - 1

    def _note(self, task: Task, told: Told) -> None:
        with self._turn:
            self.seen.tokens += len(told.ids)
            self.seen.answers += 1
            self.seen.refused += told.n_refused
            self.seen.counts.update(told.end or {})
            self.seen.seconds = time.monotonic() - self._began
            self.progress(self.seen, self.n_tokens)

    def _fail(self, lane: Lane, task: Task, told: Told, right: Right) -> None:
        """Which of the faults it takes."""
        happened = lane.faults.copy()
        smallest = shrink(task.faults, lambda s: bool(_checked(lane, task, s, right).wrong), MAX_RERUNS)
        lane.faults = happened  # those of the search do not count
        with self._turn:
            self.seen.failures.append(Failure(self.codec, task.number, told.wrong, smallest))


def _checked(lane: Lane, task: Task, schedule: Schedule, right: Right) -> Told:
    """An answer, and whether it is the right one."""
    told = lane.answer(task, schedule)
    if not told.wrong:
        told.compare(right(task))
    return told


def asked_of(llm: LLM, model: Path, seed: int) -> Sequence[Sequence[int]]:
    """Prompts as ids: openings of text, requests where the model knows their form, and ids of chance."""
    draws, n = Random(f"{seed} prompts"), llm.tokenizer.n_vocab
    texts = [llm.tokenizer.encode(text) for text in OPENINGS]
    chance = [[draws.randrange(n) for _ in range(draws.randrange(1, 40))] for _ in OPENINGS]
    found = [ids for pair in zip(texts, chance, strict=True) for ids in pair]
    if model.stem == "nano":
        home = [llm.tokenizer.encode_parts(list(p)) for p in prompts("home", len(found))]  # type: ignore[arg-type]
        found = [ids for pair in zip(found, home, strict=True) for ids in pair]
    return found
