"""What a conversation is to the model: messages of a body -> the turns of its chat form -> token ids.

system, user, assistant, tool  ──>  nano: <|s|> <|u|> <|a|> <|c|> <|r|>     others: the form of the file
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nearfar.chat import chat_parts
from nearfar.errors import NearfarError, UnsupportedError
from nearfar.forms import CALL, ROWS_VERSION, Part
from nearfar.tokenizer import Tokenizer
from nearfar_cloud.gateway.fields import Fields
from nearfar_cloud.gateway.refusal import Refusal, invalid, of_error
from nearfar_cloud.gateway.tools import COMMON, NANO, Call, CallForm, Tools

MAX_MESSAGES, MAX_CHARS = 10_000, 1 << 24


@dataclass(frozen=True, slots=True)
class Message:
    """One message: text, and for an assistant the calls it made; `call_id` says which call a tool's text answers."""

    role: str  # system, user, assistant, tool
    text: str
    calls: tuple[Call, ...] = ()


class ChatPrompts:
    """Turns conversations into ids, for one model."""

    def __init__(self, meta: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        self._meta, self._tokenizer = meta, tokenizer
        self.is_nano = meta.get("nearfar.rows") == ROWS_VERSION
        self.calls: CallForm = NANO if self.is_nano else COMMON

    def ids(self, messages: Sequence[Message], tools: Tools | None, param: str, *, constrained: bool) -> list[int]:
        """Up to where the answer begins.  `constrained`: the answer will be JSON, which nano writes as a call.

        Raises Refusal (400): a model without a chat form, messages that its form cannot hold.
        """
        told = list(messages)
        if tools is not None:
            said = tools.told(self.calls)
            if told and told[0].role == "system":
                joint = "; " if self.is_nano else "\n\n"
                told[0] = Message("system", f"{told[0].text}{joint}{said}")
            else:
                told.insert(0, Message("system", said))
        turns = [turn for message in told for turn in self._turns(message)]
        try:
            parts = chat_parts(turns, self._meta, self._tokenizer)
            if self.is_nano and constrained:
                parts[-1] = Part(CALL, control=True)
            return self._tokenizer.encode_parts(parts, add_bos=False)
        except UnsupportedError:
            message = "this model has no chat form that this server knows: use /v1/completions"
            raise Refusal(400, "no_chat_form", message, param=param) from None
        except NearfarError as error:
            raise of_error(error, param) from None

    def _turns(self, message: Message) -> list[dict[str, str]]:
        if message.role == "tool":
            role = "tool" if self.is_nano else "user"  # forms of others have no turn for results
            return [{"role": role, "content": message.text}]
        if not message.calls:
            return [{"role": message.role, "content": message.text}]
        calls = [self.calls.write(call) for call in message.calls]
        if self.is_nano:
            spoken = [{"role": "assistant", "content": message.text}] if message.text else []
            return spoken + [{"role": "call", "content": call} for call in calls]
        return [{"role": "assistant", "content": "\n".join(([message.text] if message.text else []) + calls)}]


def read_messages(f: Fields) -> tuple[Message, ...]:
    """`messages` of a chat body.  Raises Refusal (400)."""
    items = f.items("messages", MAX_MESSAGES)
    if not items:
        raise f.refuse("messages", "at least one message")
    return tuple(_message(Fields(item, f.name(f"messages[{i}]"))) for i, item in enumerate(items))


def _message(f: Fields) -> Message:
    role = f.choice("role", ("system", "developer", "user", "assistant", "tool"), "")
    if not role:
        raise f.refuse("role", "a role")
    calls = tuple(
        _call(Fields(item, f.name(f"tool_calls[{i}]"))) for i, item in enumerate(f.items("tool_calls", 64) or [])
    )
    if calls and role != "assistant":
        raise f.refuse("tool_calls", "none: only an assistant calls")
    text = read_text(f, "content", ("text",), needed=not calls)
    f.text("tool_call_id", 200)
    f.only("refusal")
    f.only("audio")
    f.only("annotations", [])
    f.done()
    return Message("system" if role == "developer" else role, text, calls)


def read_text(f: Fields, field: str, kinds: tuple[str, ...], *, needed: bool = True) -> str:
    """A text, or a list of parts that are text."""
    value = f.any(field)
    if value is None and not needed:
        return ""
    if isinstance(value, str) and len(value) <= MAX_CHARS:
        return value
    if not isinstance(value, list):
        raise f.refuse(field, "a text or a list of parts")
    texts = []
    for i, item in enumerate(value):
        part = Fields(item, f.name(f"{field}[{i}]"))
        kind = part.any("type")
        if kind not in kinds:
            message = f"{part.name('type')}: only {' and '.join(kinds)} is served"
            raise Refusal(400, "unsupported_parameter", message, param=part.name("type"))
        text = part.text("text", MAX_CHARS)
        if text is None:
            raise part.refuse("text", "a text")
        part.only("annotations", [])
        part.only("logprobs", [])
        part.done()
        texts.append(text)
    return "".join(texts)


def _call(f: Fields) -> Call:
    f.choice("type", ("function",), "function")
    f.text("id", 200)
    inner = f.inner("function")
    if inner is None:
        raise f.refuse("function", "an object")
    call = read_call(inner)
    inner.done()
    f.done()
    return call


def read_call(f: Fields) -> Call:
    """`name` and `arguments` of an earlier call."""
    name, arguments = f.needed("name", 64), f.needed("arguments", MAX_CHARS)
    try:
        if not isinstance(json.loads(arguments), dict):
            raise ValueError
    except (ValueError, RecursionError):
        raise invalid(f.name("arguments"), f"{f.name('arguments')}: expected a JSON object as a text") from None
    return Call(name, arguments)
