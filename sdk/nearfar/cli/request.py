"""One request to the home, from the words to what changed: ask, check, do, reply.

Nothing that the model writes is done before `home.check` has found it possible.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nearfar.cli.answer import answer_facts, print_summary, stream_answer
from nearfar.cli.terminal import Paint, printable
from nearfar.cli.words import read_text
from nearfar.errors import DataError
from nearfar.forms import CALL_STOPS, ROWS_VERSION, Parts, home_prompt, home_reply_prompt, tight
from nearfar.home import (
    NO_INTENT,
    Action,
    BadCall,
    Entity,
    Home,
    HomeState,
    check,
    demo_home,
    reply,
    spoken_duration,
)
from nearfar.llm import LLM, Completion
from nearfar.splits import normalise

MAX_REPLY_TOKENS = 48


@dataclass(frozen=True)
class Handled:
    """A request with the call that the model made and what came of it."""

    request: str
    call: Completion
    action: Action | None
    refused: str  # why the call is not done; "" if it was
    changes: list[str]
    reply: str
    reply_by_model: bool

    @property
    def understood(self) -> bool:
        """The call passed the check, or the model said that the home has nothing of the kind."""
        return not self.refused


def makes_home_calls(llm: LLM) -> bool:
    """Whether the model was trained on the rows of nearfar.forms."""
    return bool(llm.metadata.get("nearfar.rows") == ROWS_VERSION)


def handle(
    llm: LLM, state: HomeState, request: str, paint: Paint | None, *, constrained: bool = False, **options: Any
) -> Handled:
    """Let the model turn `request` into a call, stream it, check it, do it in `state`, and have it answered.

    `constrained`: no token is chosen that would leave the table of calls (extra `[schema]`).
    """
    near = state.home.near(request)
    prompt = home_prompt(near.setting(), request)
    schema = None
    if constrained:
        from nearfar.eval.home import home_schema

        schema = home_schema()
    call = stream_answer(llm, prompt, paint, stop_ids=stop_ids(llm), schema=schema, **options)
    try:
        action, refused = check(call.text, near, request), ""
    except BadCall as error:
        action, refused = None, str(error)
    changes = state.execute(action) if action else []
    said, by_model = ("", False) if refused else reply_to(llm, prompt, call.text, action, state)
    return Handled(request, call, action, refused, changes, said, by_model)


def reply_to(llm: LLM, prompt: Parts, call: str, action: Action | None, state: HomeState) -> tuple[str, bool]:
    """The model's reply to the call's result, as (text, by the model).

    The fixed sentence stands in where the model writes nothing, or leaves out a word or a number of what was found.
    """
    result = state.answer(action) if action else NO_INTENT
    written = llm.generate(home_reply_prompt(prompt, call, result), max_tokens=MAX_REPLY_TOKENS).text.strip()
    if written and (result in ("ok", NO_INTENT) or set(normalise(result).split()) <= set(normalise(written).split())):
        return written, True
    if action is None:
        return reply(NO_INTENT, {}), False
    domain = action.targets[0].domain if action.targets else ""
    return reply(action.intent, action.slots, domain, result), False


def stop_ids(llm: LLM) -> tuple[int, ...]:
    """The control tokens that end a call."""
    return tuple(i for stop in CALL_STOPS for i in llm.tokenizer.encode(stop, add_bos=False, parse_special=True))


def print_outcome(done: Handled, paint: Paint) -> None:
    """What stands under the streamed call."""
    print_summary(done.call, paint)
    if done.refused:
        print(f"{paint.dim('refused')}  {printable(done.refused)}")
        return
    print(f"{paint.dim('checked')}  {checked(done.action)}")
    for change in done.changes:
        print(f"{paint.dim('change ')}  {printable(change)}")
    print(f"{paint.dim('reply  ')}  {printable(done.reply)}{'' if done.reply_by_model else '  (fixed sentence)'}")


def checked(action: Action | None) -> str:
    """`HassTurnOff on ceiling light (kitchen)`"""
    if action is None:
        return "the home has nothing of the kind; nothing is done"
    where = [f"{e.name} ({e.area})" if e.area else e.name for e in action.targets]
    wait = f" in {spoken_duration(action.slots)}" if action.delay_s else ""
    return printable(f"{action.intent}{wait}{' on ' + ', '.join(where) if where else ''}")


def facts(done: Handled) -> dict[str, Any]:
    """The request for `--json`."""
    try:
        call = tight(json.loads(done.call.text))
    except ValueError:
        call = None
    return {
        "request": done.request,
        "call": call,
        "check": {"ok": done.understood, "why_not": done.refused or None},
        "targets": [asdict(e) for e in done.action.targets] if done.action else [],
        "delay_s": done.action.delay_s if done.action else None,
        "changes": done.changes,
        "reply": done.reply,
        **answer_facts(done.call),
    }


def read_home(path: str | None) -> HomeState:
    """The home of a JSON file, or the demo home.  Raises FileError, DataError, UsageError.

    {"entities": [{"name": "ceiling light", "area": "kitchen", "domain": "light", "device_class": ""}, ...]}
    """
    if path is None:
        return HomeState(demo_home())
    expected = 'expected {"entities": [{"name": …, "area": …, "domain": …}, …]}'
    try:
        value = json.loads(read_text(path))
        entities = tuple(Entity(**entity) for entity in value["entities"])
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{Path(path)} is not JSON ({error}); {expected}") from None
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(f"{Path(path)}: {error}; {expected}") from None
    if not entities:
        raise DataError(f"{Path(path)}: a home without entities; {expected}")
    return HomeState(Home(entities))
