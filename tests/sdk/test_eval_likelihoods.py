"""Choices and running text: likelihoods of given text, against the plain way to compute them."""

from __future__ import annotations

import lzma

import numpy as np
import pytest

from nearfar.errors import ContextError, UsageError
from nearfar.eval import choices, language
from nearfar.eval.perplexity import losses_after, start_ids, token_losses
from nearfar.eval.tasks import Prediction, Row, lower_of
from nearfar.llm import LLM
from tests.paths import SHARED, needs_shared
from tests.tiny import write_tiny

SMALL = {"n_layers": 2, "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 32, "n_ctx": 96}
SUM_TOLERANCE = 1e-4  # rows of another batch are summed in another order


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM.open(write_tiny(tmp_path_factory.mktemp("m") / "m.gguf", seed=1, **SMALL), backend="numpy")


def test_a_context_run_once_gives_each_option_what_it_gets_alone(llm: LLM) -> None:
    lower = lower_of(llm)
    context, options = [5, 9, 40], [[7, 8, 60], [3], [61, 7, 8, 9]]
    for ids, found in zip(options, losses_after(lower, context, options), strict=True):
        whole = token_losses(lower, np.array([*context, *ids], np.int32))
        np.testing.assert_allclose(found, whole[len(context) - 1 :], atol=SUM_TOLERANCE)


def test_what_has_no_likelihood_is_refused(llm: LLM) -> None:
    with pytest.raises(UsageError, match="at least one token"):
        losses_after(lower_of(llm), [], [[1]])
    with pytest.raises(UsageError, match="at least one token"):
        losses_after(lower_of(llm), [1], [[1], []])
    with pytest.raises(ContextError, match="97 tokens; the model was trained for 96"):
        losses_after(lower_of(llm), [1] * 90, [[1] * 7])


def test_a_choice_is_the_likeliest_whole_text(llm: LLM) -> None:
    row = Row("a", "Q", {"choice": 0}, context=choices.Choice(("the one",) * 3, (" in", " the and", " x")))
    found = choices.choose(llm, row)
    sums = []
    for option in row.context.options:
        context, options = choices.option_ids(llm, "the one", (option,))
        ids = [*start_ids(llm.tokenizer), *llm.tokenizer.encode("the one" + option, add_bos=False)]
        assert [*context, *options[0]] == ids
        sums.append(-token_losses(lower_of(llm), np.array(ids, np.int32))[len(context) - 1 :].sum())
    assert found.text == str(int(np.argmax(sums)))
    assert list(found.scores.values()) == pytest.approx(sums, abs=1e-3)


def test_a_token_over_the_seam_belongs_to_the_option(llm: LLM) -> None:
    context, options = choices.option_ids(llm, "t", ("he", "x"))  # "th" and "the" are tokens
    assert context == start_ids(llm.tokenizer)
    assert llm.tokenizer.decode(options[0]) == "the"
    assert llm.tokenizer.decode(options[1]) == "tx"


def test_choices_are_scored_by_sum_and_by_byte() -> None:
    row = Row("a", "Q", {"choice": 1}, context=choices.Choice(("Q",) * 2, (" no", " certainly not")))
    p = Prediction("a", "0", scores={"0": -4.0, "1": -8.0})  # -2 and -0.6 a byte
    assert [f.interval.value for f in choices.score([row], [p], by_bytes=True)] == [0, 1]
    unanswered = choices.score([row], [Prediction("a", "", "context")], by_bytes=True)
    assert [f.interval.value for f in unanswered] == [0, 0]


@pytest.mark.parametrize(
    ("text", "number"), [("so 1,200.50 dollars.", "1200.5"), ("18", "18"), ("none", None), ("from 5 to -3.0", "-3")]
)
def test_the_last_number_is_the_answer(text: str, number: str | None) -> None:
    assert choices.last_number(text) == number


def test_chance_is_one_over_the_options() -> None:
    rows = [Row(str(n), "", {"choice": 0}, context=choices.Choice(("",) * n, ("x",) * n)) for n in (2, 4)]
    assert [f.interval.value for f in choices.chance(choices._task("t", "t", rows))] == [0.375]


def test_a_passage_costs_the_sum_of_its_tokens(llm: LLM) -> None:
    passage = language.Passage("the one in an", (), (), 13)
    found = language.read(llm, Row("a", passage.text, {}, language.STORIES, context=passage))
    ids = [*start_ids(llm.tokenizer), *llm.tokenizer.encode(passage.text, add_bos=False)]
    bits = token_losses(lower_of(llm), np.array(ids, np.int32)).sum() / np.log(2)
    assert found.scores["bits"] == pytest.approx(bits, abs=1e-3)


def test_xz_costs_what_the_packed_file_weighs() -> None:
    passages = [language.Passage("ab" * 200, (), (), 400), language.Passage("x" * 100, (), (), 100)]
    rows = [Row(str(i), p.text, {}, language.STORIES, context=p) for i, p in enumerate(passages)]
    interval = language.score(rows, language.packed(rows))[0].interval
    packed = 8 * len(lzma.compress(("ab" * 200 + "\n" + "x" * 100).encode(), preset=9 | lzma.PRESET_EXTREME))
    assert interval.value == pytest.approx(packed / 500)


@needs_shared
def test_the_controls_have_the_rows_that_the_table_names() -> None:
    sizes = {name: len(load(SHARED).rows) for name, load in choices.LOADERS.items()}
    assert sizes == {"arc_easy": 2376, "piqa": 1838, "winogrande": 1267, "blimp": 13400, "gsm8k": 1319}


@needs_shared
def test_running_text_is_cut_into_passages_of_three_kinds() -> None:
    rows = language.load(SHARED)[0].rows
    sizes = {kind: sum(r.kind == kind for r in rows) for kind in language.TEXTS}
    assert len(set(sizes.values())) == 1
    assert min(sizes.values()) > 100
    assert all(0 < r.context.n_chars <= len(r.text) < 3 * language.MAX_CHARS for r in rows)


@needs_shared
def test_stories260k_foretells_stories_better_than_xz() -> None:
    rows = [r for r in language.load(SHARED)[0].rows if r.kind == language.STORIES][:8]
    model, xz = (
        language.score(rows, p)[0].interval.value for p in (language.floor(rows, SHARED), language.packed(rows))
    )
    assert 0.5 < model < 1.2 < xz
