"""`nearfar chat`: a conversation in the terminal; each token shows which head decided it."""

from __future__ import annotations

import argparse
import json
import sys

from nearfar.cli.answer import answer_facts, in_words, notices, paint_for, print_summary
from nearfar.cli.interrupt import ctrl_c_cancels
from nearfar.cli.live import LiveText
from nearfar.cli.terminal import Paint
from nearfar.cli.verbs import (
    SHIPPED,
    Verbs,
    add_depth_options,
    add_engine_options,
    add_sampling_options,
    add_upper_options,
    depth_of,
    new_parser,
    open_model,
    sampling_of,
    upper_of,
)
from nearfar.cli.words import checked_text, lines
from nearfar.errors import ContextError
from nearfar.llm import LLM, Completion
from nearfar.sequence import Notice

Message = dict[str, str]

KEEP_S = 300  # that the upper side is asked to keep a turn for the next one


def add_verb(verbs: Verbs) -> None:
    parser = new_parser(
        verbs,
        "chat",
        "talk with a model in the terminal",
        "nearfar chat",
        'nearfar chat model.gguf --system "Answer in one sentence." --temperature 0.7',
        'printf "hello\\nthank you\\n" | nearfar chat --json',
        "nearfar chat nano-device.gguf --upper grpcs://box.local:9090 --ca ca.pem --token-file key",
        detail="Tokens are coloured by who decided them: an exit, an exit that the upper side has confirmed, the upper "
        "side. Without colours a line of marks follows.",
    )
    parser.add_argument("model", nargs="?", default=SHIPPED, help="path of a GGUF file (default: the shipped model)")
    parser.add_argument("--system", metavar="TEXT", help="a system message before the conversation")
    parser.add_argument("--template", metavar="NAME", help="a chat form for a file that carries none")
    add_depth_options(parser)
    add_sampling_options(parser, max_tokens=512)
    add_upper_options(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    person = sys.stdin.isatty() and not args.json
    opening = [{"role": "system", "content": checked_text(args.system, "--system")}] if args.system else []
    with open_model(args, args.model, **upper_of(args, KEEP_S)) as llm:
        paint = paint_for(llm)
        messages = list(opening)
        if person:
            print(f"{args.model} on {llm.backend}.  /quit leaves, /new starts over, Ctrl-C stops an answer.")
        for line in lines("you> " if person else ""):
            if line == "/quit":
                break
            if line == "/new":
                messages = list(opening)
                continue
            messages.append({"role": "user", "content": line})
            try:
                answer = answer_turn(llm, args, messages, None if args.json else paint)
            except ContextError as error:
                if not person:
                    raise
                messages.pop()
                print(f"{error}; /new starts over")
                continue
            messages.append({"role": "assistant", "content": answer.text})  # also what Ctrl-C cut short
            if args.json:
                print(json.dumps({"request": line, **answer_facts(answer)}, ensure_ascii=False), flush=True)
            else:
                print_summary(answer, paint)
    return 0


def answer_turn(llm: LLM, args: argparse.Namespace, messages: list[Message], paint: Paint | None) -> Completion:
    """Stream the answer to `messages`; Ctrl-C ends it and keeps what there is.

    With an upper side a terminal also shows what is not final yet.
    """
    live = LiveText(paint, sys.stdout) if paint is not None and paint.on and args.upper else None

    def on_notice(notice: Notice) -> None:
        assert live is not None
        if notice.kind == "retract":
            live.retract(notice.n)
        elif words := in_words(notice):
            live.say(words)

    try:
        with ctrl_c_cancels() as cancel:
            stream = llm.stream_chat(
                messages,
                template=args.template,
                **depth_of(args),
                max_tokens=args.max_tokens,
                sampling=sampling_of(args),
                cancel=cancel,
                on_notice=notices(paint) if live is None else on_notice,
                provisional=live is not None,
            )
            for event in stream:
                if live is not None:
                    live.on(event)
                elif paint is not None:
                    sys.stdout.write(paint.token(event))
                    sys.stdout.flush()
    finally:
        if live is not None:
            live.close()
    if paint is not None:
        print()
    return stream.completion
