"""`nearfar run`: with the shipped model a request becomes a checked call to a home; other models answer a text."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from typing import Any

from nearfar.cli.answer import answer_facts, in_chat_form, paint_for, print_summary, stream_answer
from nearfar.cli.request import facts, handle, makes_home_calls, print_outcome, read_home
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
from nearfar.cli.words import checked_text, lines, read_text
from nearfar.errors import Cancelled, NearfarError, UsageError
from nearfar.home import HomeState
from nearfar.llm import LLM

README_REQUEST = "turn off the kitchen lights in ten minutes"


def add_verb(verbs: Verbs) -> None:
    parser = new_parser(
        verbs,
        "run",
        "turn a request into a checked call, or complete a text",
        f'nearfar run "{README_REQUEST}"',
        "nearfar run                                # type requests, one a line",
        "nearfar run --file requests.txt --json     # one request a line, one JSON object a line",
        'nearfar run --model nano-device.gguf --upper grpc://127.0.0.1:9090 "is the door open"',
        'nearfar run --model model.gguf "Once upon a time" --raw --max-tokens 100',
        detail="The shipped model makes calls to a home; each is checked before anything is done.",
    )
    parser.add_argument("text", nargs="?", help="the request (default: the lines of stdin)")
    parser.add_argument("--file", metavar="FILE", help="take the requests from a file, one a line")
    parser.add_argument("--model", default=SHIPPED, help="path of a GGUF file (default: the shipped model)")
    parser.add_argument("--raw", action="store_true", help="complete the text as it is: no home, no chat form")
    parser.add_argument("--home", metavar="FILE", help="a home of your own, as JSON (docs/cli.md draws it)")
    parser.add_argument("--schema", action="store_true", help="allow only calls of the home's table, token by token")
    add_depth_options(parser)
    add_sampling_options(parser, max_tokens=128)
    add_upper_options(parser)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.text is not None:
        checked_text(args.text, "the request")
        if args.file is not None:
            raise UsageError("a request and --file: expected one of them")
    with open_model(args, args.model, **upper_of(args)) as llm:
        return complete(llm, args) if args.raw or not makes_home_calls(llm) else serve(llm, args)


def serve(llm: LLM, args: argparse.Namespace) -> int:
    """Each line is a request to one home; 1 if the check refused a call (a person has seen it: 0)."""
    state = read_home(args.home)
    person = args.text is None and args.file is None and sys.stdin.isatty() and not args.json
    if person:
        print(f"This home has {state.home.setting()}.")
        print(f"Type a request, for example: {README_REQUEST}.  Ctrl-D leaves.")
    n, refused = 0, 0
    for n, request in enumerate(requests(args, person), 1):  # noqa: B007
        try:
            refused += not serve_one(llm, args, state, request)
        except NearfarError as error:
            if not person:
                raise
            print("stopped" if isinstance(error, Cancelled) else error)
    if not n and not person:
        raise UsageError(f"{args.file or 'stdin'} holds no request; expected one a line")
    return 1 if refused and not person else 0


def requests(args: argparse.Namespace, person: bool) -> Iterator[str]:
    if args.text is not None:
        yield args.text
    elif args.file is not None:
        yield from (line.strip() for line in read_text(args.file).splitlines() if line.strip())
    else:
        yield from lines("> " if person else "")


def serve_one(llm: LLM, args: argparse.Namespace, state: HomeState, request: str) -> bool:
    """Answer one request on stdout; whether its call passed the check."""
    paint = paint_for(llm)
    options: dict[str, Any] = {
        **depth_of(args),
        "max_tokens": args.max_tokens,
        "sampling": sampling_of(args),
        "constrained": args.schema,
    }
    done = handle(llm, state, request, None if args.json else paint, **options)
    if args.json:
        print(json.dumps(facts(done), ensure_ascii=False), flush=True)
        return done.understood
    print_outcome(done, paint)
    if done.action is not None and done.action.delay_s:
        command = str(done.action.slots["conversation_command"])
        print(paint.dim(f"when the time has come, the home will ask: {command}"))
        print_outcome(handle(llm, copy.deepcopy(state), command, paint, **options), paint)
    print(flush=True)
    return done.understood


def complete(llm: LLM, args: argparse.Namespace) -> int:
    """The whole input is one prompt."""
    prompt = args.text if args.text is not None else checked_text(read_text(args.file or "-"))
    paint = paint_for(llm)
    answer = stream_answer(
        llm,
        prompt if args.raw else in_chat_form(llm, prompt),
        None if args.json else paint,
        **depth_of(args),
        max_tokens=args.max_tokens,
        sampling=sampling_of(args),
    )
    if args.json:
        print(json.dumps({"prompt": prompt, "backend": llm.backend, **answer_facts(answer)}, ensure_ascii=False))
    else:
        print_summary(answer, paint)
    return 0
