"""What is shown of a call that passed the check, and of what follows from it."""

from __future__ import annotations

import pytest

from nearfar.cli.request import Handled, checked, facts, print_outcome, reply_to
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


class Says:
    """A model that replies with one sentence."""

    def __init__(self, text: str) -> None:
        self.text = text

    def generate(self, prompt: object, **options: object) -> Completion:
        return Completion(self.text, [1], "eos", [], Stats(1, 0, 1, 1.0, 1.0, {}))


@pytest.mark.parametrize(
    ("written", "reply", "by_model"),
    [
        ("It is 21 degrees.", "It is 21 degrees.", True),
        ("It is 2 degrees.", "It is 21 degrees.", False),
        ("Open.", "It is 21 degrees.", False),
        ("", "It is 21 degrees.", False),
    ],
)
def test_a_reply_that_leaves_out_what_was_found_is_not_said(written: str, reply: str, by_model: bool) -> None:
    state = HomeState(demo_home())
    call = '{"intent":"HassClimateGetTemperature","slots":{"area":"hallway"}}'
    action = check(call, state.home, "how warm is it in the hallway")
    assert reply_to(Says(written), (), call, action, state) == (reply, by_model)  # type: ignore[arg-type]


def test_what_the_home_does_not_know_is_not_made_up() -> None:
    state = HomeState(demo_home())
    call = '{"intent":"HassGetState","slots":{"name":"front door","domain":"lock"}}'
    action = check(call, state.home, "is the front door locked")
    assert reply_to(Says("Open."), (), call, action, state) == ("I do not know.", False)  # type: ignore[arg-type]
