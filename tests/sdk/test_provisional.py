"""Drafts that are told before they are final: whoever follows the events in order ends with the final text."""

from __future__ import annotations

import time
from pathlib import Path
from random import Random

import pytest

from nearfar.cancel import Cancel
from nearfar.collab_options import Collab
from nearfar.halves import Halves, split
from nearfar.llm import LLM, Completion, TokenEvent
from nearfar.lower import Lower, open_lower
from nearfar.sampling import Sampling
from nearfar.sequence import Notice
from nearfar.upper import LocalUpper, News
from nearfar.weights import Weights
from nearfar.wire.messages import CodecId, CodecSpec, Mode, Open, Up
from tests.sdk.test_collab import Flaky, FlakyLink
from tests.tiny import write_tiny

PROMPT, N, MAX_LEN = "the inn and the old", 24, 128
ROWS, IDS = CodecSpec(CodecId.INT8_OS), CodecSpec(CodecId.IDS)


class Model:
    """Two halves, and what stands above."""

    def __init__(self, folder: Path) -> None:
        whole = Weights.open(write_tiny(folder / "m.gguf", exits=(1, 2), tau=0.012, n_ctx=MAX_LEN))
        self.halves: Halves = split(whole, 2, folder)
        self.above: dict[CodecId, Lower] = {
            CodecId.IDS: open_lower(whole),
            CodecId.INT8_OS: open_lower(Weights.open(self.halves.upper)),
        }

    def open(self, codec: CodecSpec, seed: int = 0, p_fault: float = 0.0, window: int | None = None) -> LLM:
        upper = Moody(LocalUpper(self.above[codec.id], MAX_LEN, max_run=4), Random(seed), p_fault)
        return LLM.open(self.halves.device, upper=upper, collab=Collab(Mode.LOSSLESS, codec, window=window))


class Moody(Flaky):
    """Verdicts take their time, and now and then the link breaks and comes back."""

    def __init__(self, inner: LocalUpper, chance: Random, p_fault: float) -> None:
        super().__init__(inner, forgets=chance.random() < 0.5)
        self.chance, self.p_fault = chance, p_fault

    def open(self, opening: Open, cancel: Cancel | None = None) -> MoodyLink:
        return MoodyLink(self, opening)


class MoodyLink(FlakyLink):
    upper: Moody

    def send(self, message: Up) -> None:
        super().send(message)

    def receive(self, timeout_s: float) -> list[News]:
        chance = self.upper.chance
        if self.is_up and chance.random() < self.upper.p_fault:
            self.cut()
        elif not self.is_up and chance.random() < 0.3:
            self.mend()
        elif chance.random() < 0.6:  # nothing has come yet
            time.sleep(min(timeout_s, 0.001))
            return []
        return super().receive(timeout_s)


class Reader:
    """What a screen does."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.n_final = self.n_provisional = self.n_void = 0

    def on(self, event: TokenEvent) -> None:
        if event.state == "provisional":
            assert event.index == len(self.pieces) >= self.n_final
            self.pieces.append(event.text)
            self.n_provisional += 1
            return
        assert event.index == self.n_final
        self.pieces[event.index : event.index + 1] = [event.text]
        self.n_final += 1

    def notice(self, notice: Notice) -> None:
        if notice.kind == "retract":
            assert notice.n >= self.n_final
            self.n_void += len(self.pieces) - notice.n
            del self.pieces[notice.n :]


def read(llm: LLM, **options: object) -> tuple[Reader, Completion]:
    reader = Reader()
    stream = llm.stream(PROMPT, max_tokens=N, provisional=True, on_notice=reader.notice, **options)  # type: ignore[arg-type]
    for event in stream:
        reader.on(event)
    return reader, stream.completion


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("codec", [ROWS, IDS], ids=lambda c: c.id.name)
def test_whoever_follows_provisional_events_ends_with_the_final_text(model: Model, codec: CodecSpec) -> None:
    seen = Reader()
    for seed in range(10):
        sampling = Sampling(temperature=1.0, seed=seed)
        stop = ("e", "zz")[seed % 2]
        with model.open(codec) as llm:
            plain = llm.generate(PROMPT, max_tokens=N, sampling=sampling, stop=[stop])
        with model.open(codec, seed, p_fault=0.05, window=(None, 3, 8)[seed % 3]) as llm:
            reader, answer = read(llm, sampling=sampling, stop=[stop])
        assert answer.ids == plain.ids
        assert answer.finish_reason == plain.finish_reason
        assert "".join(reader.pieces) == answer.text == plain.text
        assert reader.n_final == len(answer.events)
        assert {event.state for event in answer.events} == {"final"}
        seen.n_provisional += reader.n_provisional
        seen.n_void += reader.n_void
    assert seen.n_provisional > 20
    assert seen.n_void > 5


def test_by_default_finals_alone_are_told(model: Model) -> None:
    with model.open(ROWS, 1) as llm:
        states = {event.state for event in llm.stream(PROMPT, max_tokens=N)}
    assert states == {"final"}


def test_what_is_provisional_when_an_answer_is_stopped_is_void(model: Model) -> None:
    with model.open(ROWS, 3, window=8) as llm:
        reader = Reader()
        stream = llm.stream(PROMPT, max_tokens=N, provisional=True, on_notice=reader.notice)
        for event in stream:
            reader.on(event)
            if len(reader.pieces) > reader.n_final + 1:
                stream.close()
        assert len(reader.pieces) == reader.n_final
        assert reader.n_void > 1
        follow, answer = read(llm)  # the next answer of the same cache begins anew
    assert "".join(follow.pieces) == answer.text


def test_no_draft_is_told_behind_the_last_token(model: Model) -> None:
    with model.open(ROWS, 5, window=16) as llm:
        reader = Reader()
        for event in llm.stream(PROMPT, max_tokens=3, provisional=True, on_notice=reader.notice):
            reader.on(event)
            assert len(reader.pieces) <= 3


def test_a_device_alone_has_nothing_provisional(model: Model) -> None:
    with LLM.open(model.halves.device) as llm:
        reader, answer = read(llm)
    assert reader.n_provisional == 0
    assert "".join(reader.pieces) == answer.text
