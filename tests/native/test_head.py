"""The head by fewer bytes: of 4.5 bits as the reference has it, or screened with the very same tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import nearfar
from nearfar import LLM, Sampling
from nearfar.errors import UsageError
from nearfar.forms import home_prompt
from nearfar.gguf_reader import TensorType
from nearfar.home import demo_home
from nearfar.lower_numpy import NumpyLower
from nearfar.options import EngineOptions
from nearfar.weights import Weights
from tests.tiny import WEIGHT_TYPES, write_tiny

lower_native = pytest.importorskip("nearfar.lower_native", reason="the compiled engine is not built")

MAX_ERROR = 5e-5  # of logits, in their standard deviations: f32 sums in another order
SCREENED = ("F32", "F16", "BF16", "Q8_0", "Q6_K")  # types of more than six bits whose blocks have no mins
REQUESTS = ("turn off the kitchen lights in ten minutes", "open the blinds", "good night")


def rows(n: int, d: int = 256) -> np.ndarray:
    return np.random.default_rng(5).normal(0, 1, (n, d)).astype(np.float32)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", WEIGHT_TYPES)
def test_a_requantised_head_is_that_of_the_reference(tmp_path: Path, kind: str, tied: bool) -> None:
    path = write_tiny(tmp_path / "m.gguf", "llama", "F32", exits=(1,), embedding_type=kind, tied=tied, n_layers=2)
    weights, options = Weights.open(path), EngineOptions(threads=1, head="q4")
    native, numpy = lower_native.NativeLower(weights, options), NumpyLower(weights, options)
    assert native.panels()[-1].kind == "q4"
    for head in ("final", "exit.1"):
        expected = numpy.logits(rows(5), head)
        assert np.abs(native.logits(rows(5), head) - expected).max() < MAX_ERROR * expected.std()
    if kind != "Q4_0":
        assert not np.array_equal(NumpyLower(weights).logits(rows(5)), numpy.logits(rows(5)))
    ids = np.arange(9, dtype=np.int32)
    assert np.array_equal(native.embed(ids), numpy.embed(ids))  # the embedding stays as it is


@pytest.mark.parametrize("kind", WEIGHT_TYPES)
def test_a_screened_head_chooses_what_the_whole_head_does(tmp_path: Path, kind: str) -> None:
    path = write_tiny(tmp_path / "m.gguf", "llama", "F32", exits=(1,), embedding_type=kind, n_layers=2, n_vocab=700)
    weights = Weights.open(path)
    screened = lower_native.NativeLower(weights, EngineOptions(threads=2, head="screened"))
    whole = lower_native.NativeLower(weights, EngineOptions(threads=1))
    assert screened.screens == (kind in SCREENED)
    clear = 2 * weights.f32("token_embd.weight")[:20] * 16 + 0.1 * rows(20)  # rows that one token stands out for
    for h in (rows(20), clear):
        for head in ("final", "exit.1"):
            z = whole.logits(h, head)
            assert np.array_equal(screened.logits(h, head), z)
            ids, sure, n_panels = screened.screen(h, head)
            assert np.array_equal(ids, z.argmax(axis=1))
            assert (n_panels <= 11).all()
            exact = 1 / np.exp(z - z.max(axis=1, keepdims=True)).sum(axis=1)
            assert np.abs(sure - exact).max() < (0.1 if screened.screens else 1e-4)  # logits of 4.5 bits are near
            alone = [screened.screen(row[None], head) for row in h]
            assert [int(i[0]) for i, _, _ in alone] == list(ids)
            assert [float(p[0]) for _, p, _ in alone] == list(sure)
            assert np.array_equal(NumpyLower(weights).greedy(h, head)[0], NumpyLower(weights).logits(h, head).argmax(1))


@pytest.mark.parametrize("request_", REQUESTS)
def test_nano_answers_the_same_with_a_screened_head(request_: str) -> None:
    prompt = home_prompt(demo_home().setting(), request_)
    with nearfar.load("nano", head="screened") as screened, nearfar.load("nano") as whole:
        for options in ({"exits": False}, {"exits": True}, {"speculate": True}):
            expected, found = (llm.generate(prompt, max_tokens=48, **options) for llm in (whole, screened))
            assert found.ids == expected.ids
            assert [e.source for e in found.events] == [e.source for e in expected.events]
            conf = np.array([(a.conf, b.conf) for a, b in zip(found.events, expected.events, strict=True)])
            assert np.abs(conf[:, 0] - conf[:, 1]).max() < 0.2
        warm = Sampling(temperature=0.7, seed=1)  # needs all logits: the screen stays out of it
        expected, found = (llm.generate(prompt, max_tokens=48, sampling=warm, exits=False) for llm in (whole, screened))
        assert [(e.id, e.conf) for e in found.events] == [(e.id, e.conf) for e in expected.events]


def test_most_tokens_of_a_sure_model_read_little_of_its_head() -> None:
    prompt = home_prompt(demo_home().setting(), REQUESTS[0])
    with nearfar.load("nano", head="screened") as llm:
        ids = [*llm._ids(prompt), *llm.generate(prompt, max_tokens=48, exits=False).ids]
        lower = llm.stepper.lower
        h = lower.forward(lower.embed(np.array(ids, np.int32)), lower.new_kv(256), 0, lower.config.n_layers)
        _, _, n_panels = lower.screen(h[len(llm._ids(prompt)) - 1 : -1])
        assert np.median(n_panels) <= 4  # of 64


def test_other_words_and_another_backend_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="file, q4, screened"):
        EngineOptions(head="q5")  # type: ignore[arg-type]
    path = write_tiny(tmp_path / "m.gguf", "llama", "F32")
    with pytest.raises(UsageError, match="own engine"):
        LLM.open(path, backend="llama", head="q4")
    assert Weights.open(path).raw("token_embd.weight")[0] is TensorType.F32
