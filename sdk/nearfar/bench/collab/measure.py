"""One way to share an answer, and what an answer of it took; summary.py makes figures of many."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from nearfar.bench.collab.energy import Meter
from nearfar.llm import LLM, Prompt
from nearfar.sampling import Sampling
from nearfar.sequence import SharedStats
from nearfar.wire.messages import CodecSpec

COUNTS = (  # of `SharedStats`
    "asks",
    "bytes_up",
    "bytes_down",
    "device_ms",
    "upper_ms",
    "link_ms",
    "accepted",
    "retracted",
    "reopened",
    "replayed",
)


@dataclass(slots=True)
class Answer:
    """One answer: its ids, when each was there (seconds from the call), and what both sides did."""

    ids: list[int]
    at_s: list[float]
    confs: list[float] = field(default_factory=list)  # of the device, for each token; 0: it had no opinion
    n_asked: int = 0  # tokens that the upper side decided or checked
    asks: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    device_ms: float = 0.0
    upper_ms: float = 0.0  # steps of the upper side's engine that this answer had rows in
    link_ms: float = 0.0
    accepted: int = 0
    retracted: int = 0
    reopened: int = 0
    replayed: int = 0
    row_layers: int = 0  # rows times layers that the upper side ran
    energy_j: float | None = None  # of this whole machine meanwhile; None: nobody counts it

    @property
    def total_s(self) -> float:
        return self.at_s[-1]

    @property
    def gaps_ms(self) -> list[float]:
        """Between tokens that a reader sees; the first one is another matter."""
        return [1000 * (b - a) for a, b in zip(self.at_s, self.at_s[1:], strict=False)]

    @property
    def stall_ms(self) -> float:
        """The longest time, once text had begun, in which a reader saw nothing new."""
        return max(self.gaps_ms, default=0.0)


@dataclass(frozen=True, slots=True)
class System:
    """A row of the table: how to open it, and what its tokens are compared with."""

    name: str
    open: Callable[[], LLM]
    codec: CodecSpec  # the oracle is the model with rows packed like this; IDS: the full model
    upper_layers: int  # that a row passes there; 0: no upper side
    resend: bool = False  # the whole context travels for every token


def ask(llm: LLM, system: System, prompt: Prompt, max_tokens: int, sampling: Sampling, meter: Meter) -> Answer:
    """One answer, timed from the call."""
    before = meter.read()
    answer = (_resend if system.resend else _stream)(llm, system, prompt, max_tokens, sampling)
    answer.energy_j = meter.joules(before)
    return answer


def _stream(llm: LLM, system: System, prompt: Prompt, max_tokens: int, sampling: Sampling) -> Answer:
    """As tokens come."""
    started, answer = time.perf_counter(), Answer([], [])
    stream = llm.stream(prompt, max_tokens=max_tokens, sampling=sampling)
    for event in stream:
        answer.ids.append(event.id)
        answer.at_s.append(time.perf_counter() - started)
        answer.confs.append(event.conf)
        answer.n_asked += event.where != "device"
    shared = stream.completion.stats.shared
    if shared is None:  # the device did all of it
        answer.device_ms = 1000 * answer.total_s
    else:
        _add(answer, shared, system)
    return answer


def _resend(llm: LLM, system: System, prompt: Prompt, max_tokens: int, sampling: Sampling) -> Answer:
    """Token by token, each in a session of its own that gets all rows again."""
    started, answer = time.perf_counter(), Answer([], [])
    text = llm._ids(prompt)
    while len(answer.ids) < max_tokens:
        stream = llm.stream([*text, *answer.ids], max_tokens=1, sampling=sampling)
        for event in stream:
            answer.ids.append(event.id)
            answer.at_s.append(time.perf_counter() - started)
            answer.confs.append(event.conf)
            answer.n_asked += event.where != "device"
        assert stream.completion.stats.shared is not None  # there is an upper side
        _add(answer, stream.completion.stats.shared, system)
        if stream.completion.finish_reason == "eos":
            break
    return answer


def _add(answer: Answer, shared: SharedStats, system: System) -> None:
    for name in COUNTS:
        setattr(answer, name, getattr(answer, name) + getattr(shared, name))
    answer.row_layers += shared.rows_asked * system.upper_layers
