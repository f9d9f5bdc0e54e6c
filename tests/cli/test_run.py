"""`run`: a request becomes a call, is checked, is done, is answered; every token says which head decided it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nearfar.cli.request import makes_home_calls, read_home
from nearfar.cli.run import README_REQUEST
from nearfar.errors import DataError
from nearfar.llm import LLM
from tests.cli.conftest import Nearfar

SCHEMA = "llguidance is not installed (extra [schema])"


def test_a_request_is_streamed_with_marks_speed_and_check(nearfar: Nearfar, model: Path) -> None:
    done = nearfar("run", "--model", model, README_REQUEST)
    assert done.code == 1  # random weights make no call that passes the check
    assert "tokens/s" in done.out
    assert "ms to the first token" in done.out
    assert "exit 2: " in done.out
    assert "\nrefused  " in done.out
    assert "\x1b" not in done.out


def test_a_call_that_fits_the_home_is_done_and_answered(nearfar: Nearfar, model: Path) -> None:
    pytest.importorskip("llguidance", reason=SCHEMA)
    facts = json.loads(nearfar("run", "--model", model, "--schema", "--json", README_REQUEST).out)
    assert set(facts["call"]) <= {"intent", "slots"}  # the grammar of calls held, whatever the weights wanted
    assert facts["text"] == "".join(token["text"] for token in facts["tokens"])
    assert facts["stats"]["n_generated"] == len(facts["tokens"])
    assert set(facts["stats"]["by_source"]) <= {"exit.2", "full"}
    assert {token["source"] for token in facts["tokens"]} == set(facts["stats"]["by_source"])
    assert facts["check"]["ok"] == (facts["check"]["why_not"] is None)


def test_without_exits_every_token_is_computed_at_full_depth(nearfar: Nearfar, model: Path) -> None:
    facts = json.loads(nearfar("run", "--model", model, "--no-exits", "--json", README_REQUEST).out)
    assert set(facts["stats"]["by_source"]) == {"full"}


def test_drafts_change_no_token(nearfar: Nearfar, model: Path) -> None:
    full, drafted = (
        json.loads(nearfar("run", "--model", model, flag, "--json", README_REQUEST).out)
        for flag in ("--no-exits", "--speculate")
    )
    assert [token["id"] for token in drafted["tokens"]] == [token["id"] for token in full["tokens"]]
    assert set(drafted["stats"]["by_source"]) <= {"draft.2", "full"}
    assert "n_drafted" in drafted["stats"]


@pytest.mark.parametrize("way", ["stdin", "file"])
def test_each_line_is_a_request(nearfar: Nearfar, model: Path, tmp_path: Path, way: str) -> None:
    text = "turn on the fan\n\n  turn off the tv  \r\nopen the blinds"
    path = tmp_path / "requests.txt"
    path.write_bytes(text.encode())
    given = ["--file", path] if way == "file" else []
    done = nearfar("run", "--model", model, "--json", *given, stdin=text.encode())
    asked = [json.loads(line)["request"] for line in done.out.splitlines()]
    assert asked == ["turn on the fan", "turn off the tv", "open the blinds"]


def test_a_request_and_a_file_together_are_refused(nearfar: Nearfar, model: Path) -> None:
    done = nearfar("run", "--model", model, "--file", "x", "turn on the fan")
    assert done.code == 2
    assert "expected one of them" in done.err


def test_another_model_completes_the_text(nearfar: Nearfar, story_model: Path) -> None:
    done = nearfar("run", "--model", story_model, "--max-tokens", "12", "--json", "the inn")
    facts = json.loads(done.out)
    assert done.code == 0
    assert len(facts["tokens"]) == 12
    with LLM.open(story_model) as llm:
        assert facts["text"] == llm.generate("the inn", max_tokens=12).text
        assert not makes_home_calls(llm)


def test_the_whole_of_stdin_is_one_prompt_for_another_model(nearfar: Nearfar, story_model: Path) -> None:
    done = nearfar("run", "--model", story_model, "--max-tokens", "2", "--json", stdin=b"the inn\nand the inn")
    assert json.loads(done.out)["prompt"] == "the inn\nand the inn"


def test_the_same_seed_gives_the_same_text(nearfar: Nearfar, story_model: Path) -> None:
    words = ["run", "--model", story_model, "--max-tokens", "20", "--temperature", "1.5", "--json", "the inn"]
    first, again, other = (json.loads(nearfar(*words, "--seed", seed).out)["text"] for seed in ("4", "4", "5"))
    assert first == again != other


def test_a_window_lets_text_go_on_beyond_the_context(nearfar: Nearfar, story_model: Path) -> None:
    with LLM.open(story_model) as llm:
        beyond = llm.max_len + 20
    words = ["run", "--model", story_model, "--max-tokens", str(beyond), "--json", "the inn"]
    assert len(json.loads(nearfar(*words, "--window", "64", "--kv", "int8").out)["tokens"]) == beyond
    assert len(json.loads(nearfar(*words).out)["tokens"]) < beyond


@pytest.mark.parametrize(("option", "word"), [("--kv", "int4"), ("--window", "0"), ("--window", "wide")])
def test_a_cache_that_does_not_exist_is_refused(nearfar: Nearfar, model: Path, option: str, word: str) -> None:
    done = nearfar("run", "--model", model, option, word, "turn on the fan")
    assert done.code == 2
    assert word in done.err


def test_a_home_of_ones_own_is_read(tmp_path: Path) -> None:
    path = tmp_path / "home.json"
    path.write_text('{"entities": [{"name": "lamp", "area": "attic", "domain": "light"}]}')
    assert read_home(str(path)).home.setting() == "attic: light lamp"


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"entities": []}', '{"entities": [{"name": "lamp"}]}', '{"entities": [7]}', '{"rooms": []}']
)
def test_a_home_in_another_form_is_refused_with_the_form(tmp_path: Path, text: str) -> None:
    path = tmp_path / "home.json"
    path.write_text(text)
    with pytest.raises(DataError, match="expected"):
        read_home(str(path))
