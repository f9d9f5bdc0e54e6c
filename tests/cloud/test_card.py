"""The model card: every fact of the run on the page, evaluated figures with their baselines beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nearfar.errors import WeightsError
from nearfar.eval.baselines import Baseline
from nearfar.eval.intervals import Interval
from nearfar.eval.report import Section, as_json
from nearfar.eval.tasks import Figure
from nearfar.gguf_writer import GGUFWriter
from nearfar_cloud.training.card import card, markdown, page
from nearfar_cloud.training.recipe import RECIPES

FIGURES = {
    f"{key}.{head}": 0.5 for key in ("loss", "exact", "label", "agree") for head in ("final", "exit.2", "exit.4")
}


def made() -> dict[str, Any]:
    source = {
        "source": "songs",
        "licence": "CC BY 4.0",
        "credit": "A | B",
        "tokens_there_are": None,
        "tokens_seen": {"stable": 1500, "decay": 500},
        "share": {"stable": 0.25, "decay": 0.75},
    }
    return card(
        RECIPES["nano"],
        facts={"tokens": 123_456, "seconds": 12.5, "machine": "an abacus"},
        sources=[source],
        held_out={"intents": {"rows": 7.0, **FIGURES}},
    )


def evaluation() -> dict[str, Any]:
    ours = {"free": [Figure("intent", Interval(0.81, 0.78, 0.83, 1076))]}
    ours["schema"] = [Figure("intent", Interval(float("nan"), float("nan"), float("nan"), 0))]
    baseline = Baseline("SVM", [Figure("intent", Interval(0.875, 0.85, 0.89, 1076))])
    return as_json([Section("hwu64", "test", 1076, ours, baseline)], model="nano")


def test_the_page_tells_facts_sources_and_held_out_figures() -> None:
    text = markdown(made())
    for fact in (
        "123,456",
        "an abacus",
        RECIPES["nano"].sha256,
        "CC BY 4.0",
        "A \\| B",
        "no end",
        "2,000",
        "25 % / 75 %",
    ):
        assert fact in text
    assert "| intents | 7 | exit.4 | 0.500 | 50.0 % | 50.0 % | 50.0 % |" in text
    assert "nearfar eval" not in text


def test_evaluated_figures_stand_beside_their_baseline(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf")
    writer.add("nearfar.card", json.dumps(made()))
    writer.write()
    (tmp_path / "eval.json").write_text(json.dumps(evaluation()))
    text = page(tmp_path / "m.gguf", tmp_path / "eval.json")
    row = "| hwu64, test | intent | 81.0 % [78.0, 83.0] n 1076 | n/a | 87.5 % [85.0, 89.0] n 1076 (SVM) |"
    assert row in text
    assert "| task | metric | free | schema | baseline |" in text
    assert page(tmp_path / "m.gguf") == markdown(made())


def test_a_file_without_a_card_is_refused(tmp_path: Path) -> None:
    GGUFWriter(tmp_path / "m.gguf").write()
    with pytest.raises(WeightsError, match="carries no card"):
        page(tmp_path / "m.gguf")
