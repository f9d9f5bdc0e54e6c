"""`chat`: the conversation grows, and its answers are those of the library."""

from __future__ import annotations

import json
from pathlib import Path

from nearfar.llm import LLM
from tests.cli.conftest import Nearfar

CHAT = ["--template", "chatml", "--max-tokens", "8"]


def test_each_turn_sees_the_turns_before_it(nearfar: Nearfar, model: Path) -> None:
    done = nearfar("chat", model, *CHAT, "--json", stdin=b"the inn\nand then\n")
    turns = [json.loads(line) for line in done.out.splitlines()]
    with LLM.open(model) as llm:
        messages = [{"role": "user", "content": "the inn"}]
        first = llm.chat(messages, template="chatml", max_tokens=8)
        messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "and then"}]
        second = llm.chat(messages, template="chatml", max_tokens=8)
    assert [t["request"] for t in turns] == ["the inn", "and then"]
    assert [t["text"] for t in turns] == [first.text, second.text]


def test_new_forgets_and_quit_leaves(nearfar: Nearfar, model: Path) -> None:
    done = nearfar("chat", model, *CHAT, "--json", stdin=b"the inn\n/new\nthe inn\n/quit\nnever read\n")
    turns = [json.loads(line) for line in done.out.splitlines()]
    assert len(turns) == 2
    assert turns[0]["stats"]["n_prompt"] == turns[1]["stats"]["n_prompt"]
    assert turns[0]["text"] == turns[1]["text"]


def test_a_system_message_opens_the_conversation(nearfar: Nearfar, model: Path) -> None:
    plain, told = (
        json.loads(nearfar("chat", model, *CHAT, *extra, "--json", stdin=b"the inn\n").out)["stats"]["n_prompt"]
        for extra in ([], ["--system", "Be brief."])
    )
    assert told > plain


def test_every_answer_carries_marks_and_speed(nearfar: Nearfar, model: Path) -> None:
    out = nearfar("chat", model, *CHAT, stdin=b"the inn\n").out
    assert "tokens/s" in out
    assert "of 8 tokens" in out


def test_a_file_without_a_chat_form_says_what_to_do(nearfar: Nearfar, story_model: Path) -> None:
    done = nearfar("chat", story_model, stdin=b"hello\n")
    assert done.code == 4
    assert "chatml" in done.err


def test_a_conversation_longer_than_the_context_ends_with_5(nearfar: Nearfar, story_model: Path) -> None:
    done = nearfar("chat", story_model, *CHAT, stdin=b"the inn and the inn and the inn\n" * 9)
    assert done.code == 5
