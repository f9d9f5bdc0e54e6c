"""One answer on the terminal: its tokens as they are made, then who decided them and how fast it went."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from nearfar.chat import render
from nearfar.cli.interrupt import ctrl_c_cancels
from nearfar.cli.terminal import Paint, alarm, colours_wanted, print_marks, printable, shares, speed
from nearfar.errors import Cancelled
from nearfar.llm import LLM, Completion, Prompt, TokenEvent
from nearfar.sequence import Notice


def paint_for(llm: LLM) -> Paint:
    exits = [e.layer for e in llm.config.exits] if llm.config else []
    return Paint(exits, llm.config.n_layers if llm.config else 0, colours_wanted(sys.stdout))


def stream_answer(llm: LLM, prompt: Prompt, paint: Paint | None, **options: Any) -> Completion:
    """Stream an answer to stdout (`paint=None`: print nothing).  Ctrl-C raises Cancelled after the line is ended."""
    with ctrl_c_cancels() as cancel:
        stream = llm.stream(prompt, cancel=cancel, on_notice=notices(paint), **options)
        for event in stream:
            if paint is not None:
                sys.stdout.write(paint.token(event))
                sys.stdout.flush()
    if paint is not None:
        print(flush=True)
    if cancel.is_set():
        raise Cancelled("stopped")
    return stream.completion


def notices(paint: Paint | None) -> Callable[[Notice], None] | None:
    """Tells a person on stderr why no token comes; programs (`paint=None`) get the counts at the end."""
    if paint is None:
        return None

    def say(notice: Notice) -> None:
        if words := in_words(notice):
            print(paint.dim(words), end="", file=sys.stderr, flush=True)

    return say


def in_words(notice: Notice) -> str:
    """What a person wants to know of it, or ""."""
    words = {
        "waiting": "[the upper side is late: {} ms]",
        "degraded": "[the link is lost]",
        "back": "[the link is back]",
        "rebuilding": "[{} rows are sent again]",
        "mode_changed": "[rows take too long: ids from here on]",
    }
    return words.get(notice.kind, "").format(notice.n)


def print_summary(completion: Completion, paint: Paint) -> None:
    """Which head decided how many tokens; without colours also a line of marks under the text."""
    if not paint.on:
        print_marks(completion.events, sys.stdout, text_is_shown="\n" not in printable(completion.text))
    stats = completion.stats
    print(f"{paint.decided(stats)} · {speed(stats)}")
    if stats.shared is not None:
        print(f"{stats.total_ms:,.0f} ms in all · {shares(stats.shared, stats.n_generated)}")
        if stats.shared.alarm:
            print(paint.dim(alarm(stats.shared)))


def in_chat_form(llm: LLM, text: str) -> Prompt:
    """As a user's message where the file has a chat template, else as it is."""
    if "tokenizer.chat_template" not in llm.metadata:
        return text
    return render([{"role": "user", "content": text}], llm.metadata, llm.tokenizer)


def answer_facts(completion: Completion) -> dict[str, Any]:
    """The answer for `--json`."""
    return {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "tokens": [token_facts(event) for event in completion.events],
        "stats": asdict(completion.stats),
    }


def token_facts(event: TokenEvent) -> dict[str, Any]:
    return {
        "id": event.id,
        "text": event.text,
        "source": event.source,
        "where": event.where,
        "conf": round(event.conf, 6),
        "ms": round(event.ms, 3),
    }
