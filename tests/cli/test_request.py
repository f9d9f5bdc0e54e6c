"""What is shown of a call that passed the check, and of what follows from it."""

from __future__ import annotations

import pytest

from nearfar.cli.request import Handled, checked, facts, print_outcome
from nearfar.cli.terminal import Paint
from nearfar.home import HomeState, check, demo_home
from nearfar.llm import Completion, Stats, TokenEvent

REQUEST = "turn off the kitchen lights in ten minutes"
CALL = '{"intent":"HassStartTimer","slots":{"minutes":10,"conversation_command":"turn off the kitchen lights"}}'


def handled(call: str, request: str) -> tuple[Handled, HomeState]:
    state = HomeState(demo_home())
    action = check(call, state.home, request)
    events = [TokenEvent(0, 1, call, "exit.2", 0.99, 0.1)]
    completion = Completion(call, [1], "eos", events, Stats(40, 0, 1, 1.5, 900.0, {"exit.2": 1}))
    changes = state.execute(action) if action else []
    return Handled(request, completion, action, "", changes, "Done.", True), state


def test_a_delayed_command_says_when_and_what() -> None:
    done, _ = handled(CALL, REQUEST)
    assert checked(done.action) == "HassStartTimer in 10 minutes"
    found = facts(done)
    assert found["call"]["slots"] == {"minutes": 10, "conversation_command": "turn off the kitchen lights"}
    assert found["delay_s"] == 600
    assert found["changes"] == ["in 10 minutes: turn off the kitchen lights"]


def test_a_call_on_an_area_names_its_targets_and_changes(capsys: pytest.CaptureFixture[str]) -> None:
    call = '{"intent":"HassTurnOn","slots":{"area":"kitchen","domain":"light"}}'
    done, _ = handled(call, "turn on the kitchen lights")
    print_outcome(done, Paint([2], 4, on=False))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2" + "·" * (len(call) - 1)
    assert lines[1] == "exit 2: 1 of 1 tokens · 900 tokens/s · 1.5 ms to the first token"
    assert lines[2:] == [
        "checked  HassTurnOn on ceiling light (kitchen)",
        "change   ceiling light (kitchen): off -> on",
        "reply    Done.",
    ]
