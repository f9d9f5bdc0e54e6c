"""The main job, with the shipped model: the request of the README becomes a checked call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nearfar.cli.run import README_REQUEST
from nearfar.cli.verbs import shipped_path
from tests.cli.conftest import Nearfar

pytestmark = pytest.mark.skipif(not shipped_path().is_file(), reason="nano.gguf is not trained yet")


def test_the_request_of_the_readme_becomes_a_checked_call(nearfar: Nearfar) -> None:
    done = nearfar("run", "--json", README_REQUEST)
    facts = json.loads(done.out)
    assert done.code == 0
    assert facts["call"] == {
        "intent": "HassStartTimer",
        "slots": {"minutes": 10, "conversation_command": "turn off the kitchen lights"},
    }
    assert facts["delay_s"] == 600
    assert facts["changes"] == ["in 10 minutes: turn off the kitchen lights"]
    assert facts["reply"]


def test_some_tokens_leave_early_and_the_call_stays_the_same(nearfar: Nearfar) -> None:
    early, full = (json.loads(nearfar("run", "--json", *extra, README_REQUEST).out) for extra in ([], ["--no-exits"]))
    assert early["call"] == full["call"]
    assert any(token["source"].startswith("exit.") for token in early["tokens"])
    assert {token["source"] for token in full["tokens"]} == {"full"}


def test_requests_from_a_file_are_handled_one_by_one(nearfar: Nearfar, tmp_path: Path) -> None:
    path = tmp_path / "requests.txt"
    path.write_text("turn on the fan\nturn off the kitchen lights\n")
    found = [json.loads(line) for line in nearfar("run", "--json", "--file", path).out.splitlines()]
    assert [f["call"]["intent"] for f in found] == ["HassTurnOn", "HassTurnOff"]
    assert all(f["check"]["ok"] for f in found)


def test_nano_talks_in_its_own_form(nearfar: Nearfar) -> None:
    done = nearfar("chat", "--json", "--max-tokens", "16", stdin=b"hello\n")
    assert done.code == 0, done.err
    assert json.loads(done.out)["text"]
