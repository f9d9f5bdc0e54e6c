"""One way to share an answer, run over prompts; what each answer took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Any

from nearfar.llm import LLM, Prompt
from nearfar.sampling import Sampling
from nearfar.wire.messages import CodecSpec

Options = dict[str, Any]


@dataclass(slots=True)
class Answer:
    """One answer: its ids, when each was there (seconds from the call), and what both sides did."""

    ids: list[int]
    at_s: list[float]
    on_device: int = 0  # tokens that the device decided
    asks: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    device_ms: float = 0.0
    upper_ms: float = 0.0
    link_ms: float = 0.0
    drafted: int = 0
    accepted: int = 0
    retracted: int = 0
    reopened: int = 0
    replayed: int = 0
    row_layers: int = 0  # rows times layers that the upper side ran

    @property
    def total_s(self) -> float:
        return self.at_s[-1]

    @property
    def gaps_ms(self) -> list[float]:
        return [1000 * (b - a) for a, b in zip(self.at_s, self.at_s[1:], strict=False)]


@dataclass(frozen=True, slots=True)
class System:
    """A row of the table: how to open it, and what its tokens are compared with."""

    name: str
    open: Callable[[], LLM]
    codec: CodecSpec  # the oracle is the model with rows packed like this; IDS: the full model
    upper_layers: int  # that a row passes there; 0: no upper side
    resend: bool = False  # the whole context travels for every token


@dataclass(slots=True)
class Run:
    """All answers of one system on one link."""

    system: str
    answers: list[Answer] = field(default_factory=list)


def ask(llm: LLM, system: System, prompt: Prompt, max_tokens: int, sampling: Sampling) -> Answer:
    """One answer, timed from the call."""
    if system.resend:
        return _resend(llm, system, prompt, max_tokens, sampling)
    started = time.perf_counter()
    ids, at, on_device = [], [], 0
    stream = llm.stream(prompt, max_tokens=max_tokens, sampling=sampling)
    for event in stream:
        ids.append(event.id)
        at.append(time.perf_counter() - started)
        on_device += event.where == "device"
    answer = Answer(ids, at, on_device)
    _add(answer, stream.completion.stats.shared, system, stream.completion.stats.n_prompt)
    return answer


def _resend(llm: LLM, system: System, prompt: Prompt, max_tokens: int, sampling: Sampling) -> Answer:
    """Token by token, each in a session of its own that gets all rows again."""
    started = time.perf_counter()
    text = llm._ids(prompt)
    answer = Answer([], [])
    while len(answer.ids) < max_tokens:
        stream = llm.stream([*text, *answer.ids], max_tokens=1, sampling=sampling)
        for event in stream:
            answer.ids.append(event.id)
            answer.at_s.append(time.perf_counter() - started)
        _add(answer, stream.completion.stats.shared, system, len(text) + len(answer.ids) - 1)
        if stream.completion.finish_reason == "eos":
            break
    return answer


def _add(answer: Answer, shared: Any, system: System, n_prompt: int) -> None:
    if shared is None:
        return
    for name in ("asks", "bytes_up", "bytes_down", "device_ms", "upper_ms", "link_ms", "drafted", "accepted"):
        setattr(answer, name, getattr(answer, name) + getattr(shared, name))
    for name in ("retracted", "reopened", "replayed"):
        setattr(answer, name, getattr(answer, name) + getattr(shared, name))
    answer.row_layers += shared.rows_asked * system.upper_layers


def quantile(values: Sequence[float], q: float) -> float:
    """The value below which a share `q` lies (nearest rank)."""
    if not values:
        return 0.0
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def agreement(a: Answer, b: Answer) -> float:
    """Share of positions at which both have the same token, of the longer one."""
    n = max(len(a.ids), len(b.ids))
    return sum(x == y for x, y in zip(a.ids, b.ids, strict=False)) / n if n else 1.0


def summary(run: Run, oracle: Sequence[Answer], full: Sequence[Answer]) -> dict[str, float]:
    """What a row of the table says: means of answers, quantiles of gaps."""
    answers = run.answers
    n_tokens = sum(len(a.ids) for a in answers)
    gaps = [gap for a in answers for gap in a.gaps_ms]
    drafted = sum(a.accepted + a.retracted for a in answers)
    same = [agreement(a, b) for a, b in zip(answers, oracle, strict=True)]
    same_full = [agreement(a, b) for a, b in zip(answers, full, strict=True)]
    return {
        "total_s": mean(a.total_s for a in answers),
        "ttft_ms": median(1000 * a.at_s[0] for a in answers),
        "tbt_p50_ms": quantile(gaps, 0.5),
        "tbt_p95_ms": quantile(gaps, 0.95),
        "tbt_p99_ms": quantile(gaps, 0.99),
        "tokens_per_s": n_tokens / sum(a.total_s for a in answers),
        "asks_per_token": sum(a.asks for a in answers) / n_tokens,
        "bytes_up_per_token": sum(a.bytes_up for a in answers) / n_tokens,
        "bytes_down_per_token": sum(a.bytes_down for a in answers) / n_tokens,
        "kb_per_answer": mean(a.bytes_up + a.bytes_down for a in answers) / 1000,
        "device_s": mean(a.device_ms for a in answers) / 1000,
        "upper_s": mean(a.upper_ms for a in answers) / 1000,
        "link_s": mean(a.link_ms for a in answers) / 1000,
        "upper_row_layers_per_token": sum(a.row_layers for a in answers) / n_tokens,
        "acceptance": sum(a.accepted for a in answers) / drafted if drafted else 0.0,
        "retracted_per_token": sum(a.retracted for a in answers) / n_tokens,
        "on_device": sum(a.on_device for a in answers) / n_tokens,
        "agrees_with_oracle": mean(same),
        "agrees_with_full": mean(same_full),
        "exact_answers": mean(float(s == 1) for s in same),
        "reopened": sum(a.reopened for a in answers),
        "replayed_rows": sum(a.replayed for a in answers),
        "tokens": n_tokens,
    }
