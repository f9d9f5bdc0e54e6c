"""`ask`: stdout carries JSON that satisfies the schema, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Nearfar

pytest.importorskip("llguidance", reason="llguidance is not installed (extra [schema])")

LIGHT = {
    "type": "object",
    "properties": {"room": {"enum": ["hall", "attic"]}, "on": {"type": "boolean"}},
    "required": ["room", "on"],
    "additionalProperties": False,
}


@pytest.fixture
def schema(tmp_path: Path) -> Path:
    path = tmp_path / "light.json"
    path.write_text(json.dumps(LIGHT))
    return path


@pytest.mark.parametrize("which", ["model", "story_model"])
def test_the_answer_satisfies_the_schema(
    nearfar: Nearfar, schema: Path, which: str, request: pytest.FixtureRequest
) -> None:
    done = nearfar(
        "ask", "--model", request.getfixturevalue(which), "--schema", schema, "the lamp in the hall", "--n-ctx=400"
    )
    answer = json.loads(done.out)
    assert set(answer) == {"room", "on"}
    assert answer["room"] in ("hall", "attic")
    assert isinstance(answer["on"], bool)
    assert (done.code, done.err) == (0, "")


def test_the_question_may_come_from_stdin(nearfar: Nearfar, model: Path, schema: Path) -> None:
    words = ["ask", "--model", model, "--schema", schema]
    assert nearfar(*words, stdin=b"light in the attic\n").out == nearfar(*words, "light in the attic").out


def test_json_adds_the_tokens_and_their_heads(nearfar: Nearfar, model: Path, schema: Path) -> None:
    facts = json.loads(nearfar("ask", "--model", model, "--schema", schema, "--json", "attic").out)
    assert set(facts["answer"]) == {"room", "on"}
    assert json.loads("".join(token["text"] for token in facts["tokens"])) == facts["answer"]


def test_an_answer_that_is_cut_is_no_answer(nearfar: Nearfar, model: Path, schema: Path) -> None:
    done = nearfar("ask", "--model", model, "--schema", schema, "--max-tokens", "3", "attic")
    assert (done.code, done.out) == (1, "")
    assert "--max-tokens" in done.err


def test_a_context_that_is_full_says_so(nearfar: Nearfar, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text('{"type": "string", "minLength": 400}')
    done = nearfar("ask", "--model", model, "--schema", path, "--n-ctx", "60", "attic")
    assert done.code == 5
    assert "60 tokens" in done.err
