"""Drafts decide about time, never about tokens: with them and without, every token and its confidence are the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import nearfar
from nearfar import LLM, Cancel, Sampling
from nearfar.engine import Engine, Token
from nearfar.errors import Cancelled, UsageError
from nearfar.forms import home_prompt
from nearfar.home import demo_home
from nearfar.lower import Lower, open_lower
from nearfar.options import EngineOptions
from nearfar.sequence import Sequence
from nearfar.speculate import Speculative
from nearfar.weights import Weights
from tests.tiny import ARCHITECTURES, WEIGHT_TYPES, write_tiny

PROMPTS = ([5, 17, 3, 99, 42], [7], list(range(30)))
CHOICES = (
    Sampling(),
    Sampling(temperature=0.05, seed=3),
    Sampling(temperature=0.05, seed=9, top_p=0.9, repetition_penalty=1.3),
)
REQUESTS = ("turn off the kitchen lights in ten minutes", "open the blinds", "what is the temperature in the bedroom")


class CancelAt(Cancel):
    """Pressed by itself at the n-th look."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


def tiny(folder: Path, arch: str, kind: str, backend: str) -> Lower:
    """Small layers over a large embedding: the exit is right often, but not always."""
    path = write_tiny(folder / f"{arch}-{kind}.gguf", arch, kind, exits=(2,), seed=3, embedding_type="F32")
    return open_lower(Weights.open(path), backend, EngineOptions(threads=1))


@pytest.fixture(scope="module")
def numpy_lower(tmp_path_factory: pytest.TempPathFactory) -> Lower:
    # F32: numpy adds in another order when rows share a call, which int8 activations would amplify
    return tiny(tmp_path_factory.mktemp("numpy"), "llama", "F32", "numpy")


@pytest.fixture(scope="module", params=[(a, k) for a in ARCHITECTURES for k in WEIGHT_TYPES], ids="-".join)
def native_lower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lower:
    pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
    return tiny(tmp_path_factory.mktemp("native"), *request.param, "native")


def plain(lower: Lower, ids: list[int], sampling: Sampling, n: int) -> list[Token]:
    engine = Engine(lower, max_len=128)
    s = engine.new_sequence(sampling, use_exits=False)
    s.ids = list(ids)
    return [engine.step(s) for _ in range(n)]


def drafted(
    lower: Lower, ids: list[int], sampling: Sampling, n: int, n_drafts: int = 7
) -> tuple[Sequence, list[Token]]:
    stepper = Speculative(Engine(lower, max_len=128), n_drafts, least_sure=0.0)
    s = stepper.new_sequence(sampling)
    s.ids = list(ids)
    return s, [stepper.step(s) for _ in range(n)]


def same(expected: list[Token], found: list[Token]) -> None:
    assert [t.id for t in found] == [t.id for t in expected]
    assert [t.conf for t in found] == pytest.approx([t.conf for t in expected], abs=1e-5)


@pytest.mark.parametrize("sampling", CHOICES, ids=["greedy", "sampled", "penalised"])
def test_the_tokens_are_those_of_full_depth(native_lower: Lower, sampling: Sampling) -> None:
    for ids in PROMPTS:
        expected = plain(native_lower, ids, sampling, 24)
        _, found = drafted(native_lower, ids, sampling, 24)
        same(expected, found)
        assert [t.conf for t in found] == [t.conf for t in expected]  # to the bit


@pytest.mark.parametrize("n_drafts", range(1, 8))
def test_any_number_of_drafts_gives_the_same_tokens(numpy_lower: Lower, n_drafts: int) -> None:
    for sampling in CHOICES:
        same(plain(numpy_lower, PROMPTS[0], sampling, 40), drafted(numpy_lower, PROMPTS[0], sampling, 40, n_drafts)[1])


def test_some_drafts_are_right_and_some_are_wrong(numpy_lower: Lower) -> None:
    """Else the tests of this file show little."""
    _, tokens = drafted(numpy_lower, PROMPTS[0], CHOICES[1], 60)
    n_right = sum(t.source == "draft.2" for t in tokens)
    assert 0 < n_right < sum(t.n_drafted for t in tokens)
    assert {t.source for t in tokens} == {"draft.2", "full"}


def test_an_exit_that_is_never_sure_is_asked_less_and_less(numpy_lower: Lower) -> None:
    stepper = Speculative(Engine(numpy_lower, max_len=128), least_sure=1.1)
    s = stepper.new_sequence(Sampling())
    s.ids = list(PROMPTS[0])
    pauses, found = [], []
    for _ in range(40):
        found.append(stepper.step(s))
        pauses.append(s.pause.left)
    assert pauses[:20] == [0, 1, 0, 2, 1, 0, 4, 3, 2, 1, 0, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    same(plain(numpy_lower, PROMPTS[0], Sampling(), 40), found)


def test_every_layer_runs_every_position_once(numpy_lower: Lower) -> None:
    s, _ = drafted(numpy_lower, PROMPTS[0], Sampling(), 20)
    lengths = {s.kv.length(layer) for layer in range(4)}
    assert lengths == {s.n_run + len(s.ahead)}
    assert s.n_run == len(s.ids) - 1


def test_a_full_context_is_filled_to_its_end(numpy_lower: Lower) -> None:
    ids = list(range(120))
    same(plain(numpy_lower, ids, Sampling(), 9), drafted(numpy_lower, ids, Sampling(), 9)[1])


def test_a_long_prompt_is_not_delayed_by_drafts(numpy_lower: Lower) -> None:
    _, tokens = drafted(numpy_lower, list(range(30)), Sampling(), 2)
    assert (tokens[0].n_drafted, tokens[0].source) == (0, "full")
    assert tokens[1].n_drafted == 7


@pytest.mark.parametrize("looks", range(0, 24, 3))
def test_a_cancelled_step_changes_nothing(numpy_lower: Lower, looks: int) -> None:
    expected = plain(numpy_lower, PROMPTS[0], CHOICES[1], 25)
    stepper = Speculative(Engine(numpy_lower, max_len=128), least_sure=0.0)
    s = stepper.new_sequence(CHOICES[1])
    s.ids = list(PROMPTS[0])
    found, n_cancelled, cancel = [], 0, CancelAt(looks)
    while len(found) < len(expected):
        before = list(s.ids)
        try:
            found.append(stepper.step(s, cancel=cancel))
        except Cancelled:
            n_cancelled += 1
            assert s.ids == before
            assert not s.ahead
            found.append(stepper.step(s))
            cancel = CancelAt(looks)
    assert n_cancelled > 0
    same(expected, found)


def test_going_back_forgets_what_was_run_ahead(numpy_lower: Lower) -> None:
    stepper = Speculative(Engine(numpy_lower, max_len=128), least_sure=0.0)
    s = stepper.new_sequence(Sampling())
    s.ids = list(PROMPTS[0])
    while not s.ahead:
        stepper.step(s)
    ids = [*s.ids[:-1], 77, 78]
    assert s.continue_with(ids) == len(ids) - 2
    same(plain(numpy_lower, ids, Sampling(), 20), [stepper.step(s) for _ in range(20)])


def test_a_model_without_exits_and_an_odd_number_are_refused(numpy_lower: Lower, tmp_path: Path) -> None:
    bare = open_lower(Weights.open(write_tiny(tmp_path / "m.gguf")), "numpy")
    with pytest.raises(UsageError, match="no early exits"):
        Speculative(Engine(bare, max_len=16))
    with pytest.raises(UsageError, match=r"1\.\.7"):
        Speculative(Engine(numpy_lower, max_len=16), 8)


# ---- through the face, with the shipped model, whose exits are trained ----


@pytest.fixture(scope="module")
def nano() -> Iterator[LLM]:
    pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
    with nearfar.load("nano") as llm:
        yield llm


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=4)], ids=["greedy", "sampled"])
def test_nano_answers_the_same_in_fewer_passes(nano: LLM, request_: str, sampling: Sampling) -> None:
    prompt = home_prompt(demo_home().setting(), request_)
    expected = nano.generate(prompt, max_tokens=64, sampling=sampling, exits=False)
    found = nano.generate(prompt, max_tokens=64, sampling=sampling, speculate=True)
    assert (found.ids, found.text, found.finish_reason) == (expected.ids, expected.text, expected.finish_reason)
    assert [e.conf for e in found.events] == [e.conf for e in expected.events]
    assert set(found.stats.by_source) == {"draft.2", "full"}
    n_right = found.stats.by_source["draft.2"]
    assert found.stats.n_generated / 3 < n_right <= found.stats.n_drafted  # trained exits foresee most tokens


def test_stops_limits_and_cancel_end_an_answer_at_the_same_token(nano: LLM) -> None:
    prompt = home_prompt(demo_home().setting(), REQUESTS[0])
    whole = nano.generate(prompt, max_tokens=64, exits=False)
    for n in range(1, 9):
        cut = nano.generate(prompt, max_tokens=n, speculate=True)
        assert (cut.ids, cut.finish_reason) == (whole.ids[:n], "length")
        stopped = nano.generate(prompt, max_tokens=64, stop_ids=[whole.ids[n]], speculate=True)
        assert stopped.ids == whole.ids[: whole.ids.index(whole.ids[n]) + 1]
        assert stopped.finish_reason == "eos"
        cancel = Cancel()
        stream = nano.stream(prompt, max_tokens=64, speculate=True, cancel=cancel)
        for event in stream:
            if event.index == n:
                cancel.set()
        assert stream.completion.ids == whole.ids[: n + 1]
        assert stream.completion.finish_reason == "cancelled"
    assert nano.generate(prompt, max_tokens=64, speculate=True).ids == whole.ids


def test_a_schema_binds_drafts_and_tokens(nano: LLM) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra [schema])")
    names = {"enum": ["hall", "attic", "kitchen cabinet"]}
    schema = {
        "type": "object",
        "additionalProperties": False,
        "required": ["rooms", "on"],
        "properties": {"rooms": {"type": "array", "items": names, "maxItems": 3}, "on": {"type": "boolean"}},
    }
    for seed in range(5):
        choose = Sampling(temperature=1.0, seed=seed)
        expected = nano.generate("light in the attic", max_tokens=64, sampling=choose, schema=schema, exits=False)
        found = nano.generate("light in the attic", max_tokens=64, sampling=choose, schema=schema, speculate=True)
        assert (found.ids, found.finish_reason) == (expected.ids, expected.finish_reason)
        if found.finish_reason == "stop":
            json.loads(found.text)
        assert found.stats.n_drafted > 0


def test_a_closed_model_and_llama_cpp_do_not_speculate(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "llama", "F32", exits=(1,))
    llm = LLM.open(path, backend="numpy")
    llm.close()
    with pytest.raises(UsageError, match="closed"):
        llm.stream([1, 2, 3], speculate=True)
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra [llama])")
    with pytest.raises(UsageError, match="llama backend"):
        LLM.open(path, backend="llama").stream([1, 2, 3], speculate=True)


def test_plain_steps_refuse_a_sequence_that_was_run_ahead(numpy_lower: Lower) -> None:
    engine = Engine(numpy_lower, max_len=128)
    stepper = Speculative(engine, least_sure=0.0)
    s = stepper.new_sequence(Sampling())
    s.ids = list(PROMPTS[0])
    while not s.ahead:
        stepper.step(s)
    with pytest.raises(AssertionError, match="rewind"):
        engine.step(s)
    s.rewind(s.n_run)
    assert isinstance(engine.step(s).id, int)
    assert np.isfinite(engine.step(s).conf)
