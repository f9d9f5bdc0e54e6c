"""bench/codec_fidelity.py on a model of four layers: what is the same counts as the same, what is lost as lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from nearfar.lower_numpy import NumpyLower
from nearfar.weights import Weights
from tests.arrows import ROOT
from tests.tiny import write_tiny

TEXTS = [np.arange(10, 30, dtype=np.int32), np.arange(40, 47, dtype=np.int32)]


@pytest.fixture(autouse=True)
def _scripts_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))


@pytest.fixture(scope="module")
def lower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NumpyLower]:
    with Weights.open(write_tiny(Path(tmp_path_factory.mktemp("model")) / "tiny.gguf")) as weights:
        yield NumpyLower(weights)


@pytest.mark.parametrize("k", [1, 3])
def test_rows_that_arrive_as_they_were_change_nothing(lower: NumpyLower, k: int) -> None:
    from codec_fidelity import Split, Way, measure

    (f,) = measure(lower, Split("tiny", "ids", k), [Way("f32", (), 0, np.copy)], TEXTS)
    assert (f.n_tokens, f.error, f.agreement, f.lead, f.rise) == (19 + 6, 0.0, 1.0, 0.0, 0.0)


def test_rows_that_are_lost_change_tokens_and_perplexity(lower: NumpyLower) -> None:
    from codec_fidelity import Split, Way, measure

    (f,) = measure(lower, Split("tiny", "ids", 2), [Way("lost", (), 0, np.zeros_like)], TEXTS)
    assert f.error == 1
    assert f.agreement < 0.5
    assert f.lead > 0
    assert f.rise != 0


def test_each_way_has_a_column_of_the_table(lower: NumpyLower, capsys: pytest.CaptureFixture[str]) -> None:
    from codec_fidelity import COLUMNS, Split, all_ways, measure, show, show_heading

    ways = list(all_ways(lower.config.d_model, (3, 200)))
    assert [(way.name, bool(way.outliers)) for way in ways] == list(COLUMNS.values())
    found = list(measure(lower, Split("tiny", "ids", 2), ways, TEXTS))
    errors = [f.error for f in found]
    assert errors[0] < errors[1] < errors[2] < errors[4]  # f32, fp16, int8, int4
    show_heading()
    show(found, as_json=False)
    heading, _, row = capsys.readouterr().out.splitlines()
    assert heading.count("|") == row.count("|")
    assert row.count("%,") == len(ways)
