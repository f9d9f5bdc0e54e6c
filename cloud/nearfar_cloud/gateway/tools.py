"""Functions that a model may call: how it is told of them, the schema its call must follow, what the call was.

No model is trusted to write a call: the form is enforced by a grammar, so a call names a function that there is and
its arguments fit the function's parameters.  An answer that begins with a brace is a call, any other is text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nearfar import forms
from nearfar_cloud.gateway.fields import Fields, checked_json
from nearfar_cloud.gateway.grammar import MAX_BYTES, MAX_DEPTH
from nearfar_cloud.gateway.refusal import Refusal, invalid

MAX_TOOLS = 64


@dataclass(frozen=True, slots=True)
class Tool:
    """One function: `parameters` is a JSON schema."""

    name: str
    description: str
    parameters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """What a model wants done; `arguments` is JSON."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a call is written: nano has its own words for it, other models get the common ones."""

    name: str
    arguments: str

    def schema(self, tools: tuple[Tool, ...]) -> dict[str, Any]:
        """Of a call to one of `tools`."""
        calls = [
            {
                "type": "object",
                "properties": {self.name: {"const": tool.name}, self.arguments: dict(tool.parameters)},
                "required": [self.name, self.arguments],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        return calls[0] if len(calls) == 1 else {"anyOf": calls}

    def read(self, text: str) -> Call | None:
        """The call that an answer is; None where it was cut before its end."""
        try:
            value = json.loads(text)
            arguments = value[self.arguments]
            if self is NANO:
                arguments = forms.tight(arguments)
            return Call(value[self.name], json.dumps(arguments, ensure_ascii=False))
        except (ValueError, KeyError, TypeError):
            return None

    def write(self, call: Call) -> str:
        """An earlier call, as the model reads it."""
        arguments = json.loads(call.arguments)
        if self is NANO:
            return forms.call_json(call.name, arguments)
        return json.dumps({self.name: call.name, self.arguments: arguments}, ensure_ascii=False)


NANO, COMMON = CallForm("call", "args"), CallForm("name", "arguments")


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions of a request.  `must`: the answer has to be a call."""

    tools: tuple[Tool, ...]
    must: bool

    def told(self, form: CallForm) -> str:
        """What the system text says of them."""
        if form is NANO:
            return forms.service_line("tools", {t.name: tuple(t.parameters.get("properties", {})) for t in self.tools})
        lines = [
            json.dumps(
                {"name": t.name, "description": t.description, "parameters": dict(t.parameters)}, ensure_ascii=False
            )
            for t in self.tools
        ]
        how = 'To call a function, answer with nothing but {"name": ..., "arguments": {...}}.'
        return "\n".join(["You can call these functions:", *lines, how])


def read_tools(f: Fields, *, flat: bool) -> Tools | None:
    """`tools` and `tool_choice` of a body; `flat`: as the responses route writes them.  Raises Refusal (400)."""
    f.flag("parallel_tool_calls", True)  # one call comes at a time, which either value allows
    tools = tuple(
        _tool(Fields(item, f.name(f"tools[{i}]")), flat) for i, item in enumerate(f.items("tools", MAX_TOOLS) or [])
    )
    names = [tool.name for tool in tools]
    if len(set(names)) < len(names):
        raise invalid(f.name("tools"), f"{f.name('tools')}: two functions have the same name")
    choice = f.any("tool_choice")
    if choice in (None, "none", "auto", "required"):
        if choice == "required" and not tools:
            raise invalid(f.name("tool_choice"), "tool_choice: required, and there are no tools")
        return Tools(tools, choice == "required") if tools and choice != "none" else None
    named = Fields(choice, f.name("tool_choice"))
    named.choice("type", ("function",), "function")
    inner = named if flat else named.inner("function")
    name = inner.needed("name", 64) if inner is not None else ""
    chosen = tuple(tool for tool in tools if tool.name == name)
    if not chosen:
        raise invalid(f.name("tool_choice"), "tool_choice: expected the name of one of the tools")
    return Tools(chosen, True)


def _tool(f: Fields, flat: bool) -> Tool:
    f.choice("type", ("function",), "function")
    inner = f if flat else f.inner("function")
    if inner is None:
        raise f.refuse("function", "an object")
    name = inner.needed("name", 64)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise inner.refuse("name", "letters, digits, _ and -")
    inner.flag("strict")  # calls always follow their schema
    parameters = inner.any("parameters")
    parameters = {"type": "object"} if parameters is None else parameters
    if not isinstance(parameters, dict):
        raise inner.refuse("parameters", "a JSON schema")
    checked_json(parameters, inner.name("parameters"), MAX_BYTES, MAX_DEPTH)
    if "$ref" in json.dumps(parameters):
        message = f"{inner.name('parameters')}: references ($ref) are not served in a function's parameters"
        raise Refusal(400, "unsupported_parameter", message, param=inner.name("parameters"))
    tool = Tool(name, inner.text("description", 10_000) or "", parameters)
    inner.done()
    f.done()
    return tool
