"""Traces and decisions against the engine itself: what is computed offline is what a run with exits does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nearfar import forms
from nearfar.config import ExitConfig
from nearfar.errors import UsageError
from nearfar.eval import exits
from nearfar.eval.tasks import Row, Task
from nearfar.forms import ROWS_VERSION
from nearfar.llm import LLM
from tests.tiny import write_tiny

TEXTS = ["ab", "the other on", "in and an er", "x" * 40, "a", "th e on on on"]
CONF_TOLERANCE = 1e-5  # numpy sums rows of another batch in another order


@pytest.fixture(scope="module", params=["numpy", "native"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """Random weights, six layers, thresholds that some tokens pass at each exit and some do not.

    Ternary for native, whose rows do not depend on their batch; float for numpy, where a last bit of a row in another
    batch would move an int8 activation, or an f16 key, across a rounding boundary.
    """
    if request.param == "native":
        pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
    path = tmp_path_factory.mktemp("exits") / "m.gguf"
    weight_type, embedding = ("TQ2_0", "Q8_0") if request.param == "native" else ("F32", "F32")
    options = {"n_layers": 6, "exits": (2, 4), "tau": 0.045, "embedding_type": embedding, "seed": 4}
    write_tiny(path, "bitnet", weight_type, extra={"nearfar.rows": ROWS_VERSION}, **options)
    return LLM.open(path, backend=request.param, kv_dtype="f16" if request.param == "native" else "f32")


def task(texts: list[str] = TEXTS) -> Task:
    rows = [Row(f"row {i}", text, {}) for i, text in enumerate(texts)]
    return Task(
        name="tiny",
        split="",
        rows=rows,
        prompt=lambda row: (forms.Part(row.text),),
        schema=lambda row: {},
        score=lambda rows, predictions: [],
        instruction="",
        max_tokens=16,
    )


@pytest.fixture(scope="module")
def traces(llm: LLM) -> list[exits.Trace]:
    return [t for _, t in exits.answers_at_full_depth(llm, [task()])]


def test_a_trace_sees_what_generation_saw(llm: LLM, traces: list[exits.Trace]) -> None:
    for row, trace in zip(task().rows, traces, strict=True):
        made = llm.generate(task().prompt(row), max_tokens=16, exits=False)
        assert trace.tokens.tolist() == made.ids
        np.testing.assert_allclose(trace.sure, [e.conf for e in made.events], atol=CONF_TOLERANCE)
        assert {layer: rows.shape for layer, rows in trace.rows.items()} == dict.fromkeys((2, 4), (len(made.ids), 256))


def test_decisions_are_those_of_the_engine_until_a_token_differs(llm: LLM, traces: list[exits.Trace]) -> None:
    assert llm.config is not None
    taus = [e.tau for e in llm.config.exits]
    names, n_early = ["exit.2", "exit.4", "full"], 0
    for row, trace in zip(task().rows, traces, strict=True):
        seen = exits.views(exits.engine_of(llm).lower, [trace], llm.config.exits)[0]
        made = llm.generate(task().prompt(row), max_tokens=16, exits=True)
        decided = [names[i] for i in exits.decide(seen, taus)]
        same = [a == b for a, b in zip(made.ids, trace.tokens.tolist(), strict=False)]
        upto = (
            same.index(False) + 1 if False in same else len(same)
        )  # the first token that differs is still decided alike
        assert [e.source for e in made.events][:upto] == decided[:upto]
        n_early += sum(name != "full" for name in decided[:upto])
        if exits.loss(seen, taus) == 0:
            assert made.ids == trace.tokens.tolist()
    assert n_early > 5  # the comparison had something to compare


def test_views_of_many_traces_are_those_of_each(llm: LLM, traces: list[exits.Trace]) -> None:
    lower = exits.engine_of(llm).lower
    mapped = [ExitConfig(2, 1.5, (0.0, 0.5, 1.0), (0.1, 0.2, 0.9)), ExitConfig(4)]
    for one, t in zip(exits.views(lower, traces, mapped), traces, strict=True):
        alone = exits.views(lower, [t], mapped)[0]
        assert (one.agree == alone.agree).all()
        np.testing.assert_allclose(one.conf, alone.conf, atol=CONF_TOLERANCE)
        assert one.conf.shape == (2, len(t.tokens))
        assert one.conf[0].min() >= 0.1


def test_the_figures_add_up(llm: LLM, traces: list[exits.Trace]) -> None:
    lower = exits.engine_of(llm).lower
    assert llm.config is not None
    seen = exits.views(lower, traces, llm.config.exits)
    found = {f.metric: f.interval.value for f in exits.figures(seen, llm.config.exits)}
    n = sum(len(t.tokens) for t in traces)
    assert found["exit.4 agrees with full depth"] == pytest.approx(sum(v.agree[1].sum() for v in seen) / n)
    left = [k for k in found if k.startswith("tokens that leave")]
    decided = np.concatenate([exits.decide(v, [e.tau for e in llm.config.exits]) for v in seen])
    assert sum(found[k] for k in left) == pytest.approx((decided < 2).mean())
    assert found["answers unchanged"] == pytest.approx(np.mean([exits.loss(v, (0.045, 0.045)) == 0 for v in seen]))
    silent = [ExitConfig(e.layer) for e in llm.config.exits]
    assert len(exits.figures(exits.views(lower, traces, silent), silent)) == 2  # nothing leaves: agreement only


def test_loss_counts_what_left_and_differs() -> None:
    agree = np.array([[True, False, False, True]])
    seen = exits.View(1, agree, np.array([[0.9, 0.9, 0.1, 0.9]]))
    assert exits.loss(seen, (0.5,)) == 1 / 4  # the third differs but did not leave
    assert exits.loss(seen, (0.95,)) == 0
    assert exits.loss(seen, (0.05,)) == 2 / 4


def test_confidences_multiply_over_the_answer(llm: LLM) -> None:
    prompt = (forms.Part("the"),)
    made = llm.generate(prompt, max_tokens=5, exits=False)
    found = exits.confidences(llm, prompt, made.ids)
    assert set(found) == {"exit.2", "exit.4", "full"}
    assert found["full"] == pytest.approx(np.prod([e.conf for e in made.events]), rel=1e-3)


def test_speed_is_a_ratio_of_times(llm: LLM) -> None:
    found = exits.speed_up(llm, [task(["ab", "on", "an"])], 3)
    assert 0 < found.low <= found.value <= found.high
    assert found.n == 2  # the first row warms up


def test_models_without_exits_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no early exits"):
        exits.engine_of(LLM.open(write_tiny(tmp_path / "m.gguf", n_layers=1), backend="numpy"))
    with pytest.raises(UsageError, match="--backend native or numpy"):
        exits.engine_of(object())
