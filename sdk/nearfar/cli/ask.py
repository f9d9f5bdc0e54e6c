"""`nearfar ask`: one question, one JSON answer that satisfies a schema.  stdout carries the JSON and nothing else."""

from __future__ import annotations

import argparse
import json
from typing import Any

from nearfar import forms
from nearfar.cli.answer import answer_facts, in_chat_form, stream_answer
from nearfar.cli.request import makes_home_calls
from nearfar.cli.verbs import (
    SHIPPED,
    Verbs,
    add_depth_options,
    add_engine_options,
    add_sampling_options,
    depth_of,
    new_parser,
    open_model,
    sampling_of,
)
from nearfar.cli.words import checked_text, read_text
from nearfar.errors import ContextError, NearfarError, SchemaError
from nearfar.llm import LLM, Completion, Prompt


def add_verb(verbs: Verbs) -> None:
    parser = new_parser(
        verbs,
        "ask",
        "ask for JSON that satisfies a schema",
        'nearfar ask --schema light.json "turn on the lamp in the hall"',
        'echo "wake me at six" | nearfar ask --schema alarm.json',
        "nearfar ask --schema s.json --model model.gguf --json \"who wrote 'Faust'?\"",
        detail="The answer is constrained token by token (llguidance), so it always parses and always fits.",
    )
    parser.add_argument("text", nargs="?", help="the question (default: stdin)")
    parser.add_argument("--schema", required=True, metavar="FILE", help="a JSON schema")
    parser.add_argument("--model", default=SHIPPED, help="path of a GGUF file (default: the shipped model)")
    add_depth_options(parser)
    add_sampling_options(parser, max_tokens=512)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    text = checked_text(read_text("-") if args.text is None else args.text)
    schema = read_schema(args.schema)
    with open_model(args, args.model) as llm:
        answer = stream_answer(
            llm,
            question(llm, text, schema),
            None,
            schema=schema,
            **depth_of(args),
            max_tokens=args.max_tokens,
            sampling=sampling_of(args),
        )
        value = parsed(answer, llm.max_len)
    facts = {"answer": value, **answer_facts(answer)} if args.json else value
    print(json.dumps(facts, ensure_ascii=False))
    return 0


def read_schema(path: str) -> dict[str, Any]:
    """Raises FileError, SchemaError."""
    try:
        schema = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, NearfarError):
            raise
        raise SchemaError(f"{path} is not JSON: {error}") from None
    if not isinstance(schema, dict):
        raise SchemaError(f"{path}: expected a JSON object that is a schema, found {type(schema).__name__}")
    return schema


def question(llm: LLM, text: str, schema: dict[str, Any]) -> Prompt:
    """In the form the model was trained on: nano's rows, a chat template, or plain text."""
    if makes_home_calls(llm):
        return (*forms.dialogue("", [forms.Turn("u", text)]), forms.Part(forms.CALL, control=True))
    wish = f"{text}\n\nAnswer with JSON that satisfies this schema:\n{json.dumps(schema, ensure_ascii=False)}"
    return in_chat_form(llm, wish) if "tokenizer.chat_template" in llm.metadata else f"{wish}\n\n"


def parsed(answer: Completion, max_len: int) -> Any:
    """The JSON value.  Raises ContextError or NearfarError where the answer was cut before its end."""
    if answer.finish_reason == "length":
        if answer.stats.n_prompt + answer.stats.n_generated >= max_len:
            raise ContextError(f"the context of {max_len} tokens was full before the answer was complete")
        raise NearfarError(f"{answer.stats.n_generated} tokens did not complete the answer; raise --max-tokens")
    return json.loads(answer.text)
