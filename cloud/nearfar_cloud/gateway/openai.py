"""Bodies of the OpenAI routes, read into one `Query`.  What changes the meaning of an answer and is not served is a
400 that names the field; nothing in a body is passed over in silence.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nearfar.sampling import Sampling
from nearfar_cloud.gateway.fields import Fields
from nearfar_cloud.gateway.limits import MAX_PRIORITY
from nearfar_cloud.gateway.prompts import MAX_CHARS, Message, read_call, read_messages, read_text
from nearfar_cloud.gateway.refusal import Refusal, invalid
from nearfar_cloud.gateway.tools import Tools, read_tools
from nearfar_cloud.types import Objective

MAX_CHOICES, MAX_PROMPTS, MAX_STOPS, MAX_STOP_CHARS, MAX_LOGPROBS = 8, 64, 16, 1000, 20
MAX_TOKENS = 1 << 24
MAX_PROGRAM = 200
LOSSY = ("semantic", "examples", "kv_share")  # what an answer may be made from where its asker allows it
DAY_MS = 86_400_000.0

Prompt = str | tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Query:
    """What a body asks for.  Either `prompts`, or `messages` of one conversation."""

    param: str  # the field that they stand in
    prompts: tuple[Prompt, ...] = ()
    messages: tuple[Message, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    max_tokens: int | None = None  # None: as many as the context holds
    stops: tuple[str, ...] = ()
    n_logprobs: int | None = None  # alternatives told with each token; None: no log-probabilities
    schema: Mapping[str, Any] | None = None
    schema_param: str = "response_format"
    tools: Tools | None = None
    stream: bool = False
    include_usage: bool = False
    objective: Objective = field(default_factory=Objective)
    base64: bool = False  # embeddings as text


def read_chat(f: Fields, model: str) -> Query:
    """/v1/chat/completions.  Raises Refusal (400, 404)."""
    _model(f, model)
    messages = read_messages(f)
    old, new = f.whole("max_tokens", 1, MAX_TOKENS), f.whole("max_completion_tokens", 1, MAX_TOKENS)
    if old is not None and new is not None and old != new:
        raise invalid("max_tokens", "max_tokens and max_completion_tokens differ: expected one of them")
    n_logprobs = None
    if f.flag("logprobs"):
        n_logprobs = f.whole("top_logprobs", 0, MAX_LOGPROBS, 0)
    else:
        f.only("top_logprobs", 0)
    stream, usage = _stream(f)
    tools, schema = read_tools(f, flat=False), _response_format(f)
    if tools is not None and schema is not None:
        raise invalid("response_format", "response_format and tools: only one of them can give the answer its form")
    query = Query(
        param="messages",
        messages=messages,
        sampling=_sampling(f),
        n=f.whole("n", 1, MAX_CHOICES, 1) or 1,
        max_tokens=old or new,
        stops=_stops(f),
        n_logprobs=n_logprobs,
        schema=schema,
        tools=tools,
        stream=stream,
        include_usage=usage,
        objective=_objective(f),
    )
    f.only("modalities", ["text"])
    _harmless(f)
    f.done()
    return query


def read_completion(f: Fields, model: str) -> Query:
    """/v1/completions.  Raises Refusal (400, 404)."""
    _model(f, model)
    prompts = _prompts(f, "prompt")
    n = f.whole("n", 1, MAX_CHOICES, 1) or 1
    if (best := f.whole("best_of", 1, MAX_CHOICES, n)) != n:
        raise Refusal(400, "unsupported_parameter", f"best_of: only n={n} is served, found {best}", param="best_of")
    stream, usage = _stream(f)
    query = Query(
        param="prompt",
        prompts=prompts,
        sampling=_sampling(f),
        n=n,
        max_tokens=f.whole("max_tokens", 1, MAX_TOKENS, 16),
        stops=_stops(f),
        n_logprobs=f.whole("logprobs", 0, MAX_LOGPROBS),
        schema=_response_format(f),
        stream=stream,
        include_usage=usage,
        objective=_objective(f),
    )
    f.only("echo", False)
    f.only("suffix", "")
    _harmless(f)
    f.done()
    return query


def read_embeddings(f: Fields, model: str) -> Query:
    """/v1/embeddings.  Raises Refusal (400, 404)."""
    _model(f, model)
    query = Query(
        param="input",
        prompts=_prompts(f, "input"),
        max_tokens=1,
        base64=f.choice("encoding_format", ("float", "base64"), "float") == "base64",
        objective=_objective(f),
    )
    f.only("dimensions")
    _harmless(f)
    f.done()
    return query


def read_response(f: Fields, model: str) -> Query:
    """/v1/responses.  Answers are not kept, so nothing can be continued by its id.  Raises Refusal (400, 404)."""
    _model(f, model)
    messages = _input(f)
    if instructions := f.text("instructions", MAX_CHARS):
        messages = (Message("system", instructions), *messages)
    tools = read_tools(f, flat=True)
    text = f.inner("text")
    schema = None
    if text is not None:
        schema = _format(text, "format", flat=True)
        text.only("verbosity", "medium")
        text.done()
    if tools is not None and schema is not None:
        raise invalid("text.format", "text.format and tools: only one of them can give the answer its form")
    query = Query(
        param="input",
        messages=messages,
        sampling=_sampling(f),
        max_tokens=f.whole("max_output_tokens", 1, MAX_TOKENS),
        schema=schema,
        schema_param="text.format",
        tools=tools,
        stream=f.flag("stream"),
        objective=_objective(f),
    )
    f.only("previous_response_id")
    f.only("conversation")
    f.only("prompt")
    f.only("background", False)
    f.only("include", [])
    f.only("reasoning", {})
    f.only("top_logprobs", 0)
    f.only("truncation", "disabled")
    f.only("max_tool_calls")
    f.only("stream_options", {}, {"include_obfuscation": False})
    _harmless(f)
    f.done()
    return query


# ---------------------------------------------------------------- what routes have in common


def _model(f: Fields, model: str) -> None:
    found = f.text("model", 1000)
    if found != model:
        message = f"model: this server has {model!r}" + ("" if found else ", expected its name")
        raise Refusal(404 if found else 400, "model_not_found", message, param="model")


def _sampling(f: Fields) -> Sampling:
    """OpenAI's ranges and defaults; top_k, min_p and repetition_penalty as other servers name them."""
    f.only("frequency_penalty", 0)
    f.only("presence_penalty", 0)
    f.only("logit_bias", {})
    top_p = f.real("top_p", 0, 1, 1.0)
    if not top_p:
        raise f.refuse("top_p", "a number above 0, up to 1")
    seed = f.whole("seed", -(1 << 63), (1 << 64) - 1)
    return Sampling(
        temperature=_or(f.real("temperature", 0, 2), 1.0),
        top_k=f.whole("top_k", 0, 1 << 22, 0) or 0,
        top_p=top_p,
        min_p=_or(f.real("min_p", 0, 1), 0.0),
        repetition_penalty=_or(f.real("repetition_penalty", 0.1, 10), 1.0),
        seed=secrets.randbits(63) if seed is None else seed % (1 << 64),
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _objective(f: Fields) -> Objective:
    """The extension object `nearfar`.  The tenant is not in it: it comes from the key."""
    extension = f.inner("nearfar")
    if extension is None:
        return Objective()
    seconds = {}
    for name in ("ttft_ms", "tbt_ms", "deadline_ms"):
        ms = extension.real(name, 1, DAY_MS)
        seconds[name] = None if ms is None else ms / 1000
    objective = Objective(
        ttft_s=seconds["ttft_ms"],
        tbt_s=seconds["tbt_ms"],
        deadline_s=seconds["deadline_ms"],
        priority=extension.whole("priority", -MAX_PRIORITY, MAX_PRIORITY, 0) or 0,
    )
    _program(extension)
    extension.done()
    return objective


def _program(extension: Fields) -> None:
    """Checked and not kept: no policy of this server looks at programs, and nothing that `allow` permits is done."""
    program = extension.text("program", MAX_PROGRAM)
    if program == "":
        raise extension.refuse("program", f"a text of 1..{MAX_PROGRAM} characters")
    if extension.flag("program_end") and program is None:
        raise invalid("nearfar.program_end", "nearfar.program_end: expected nearfar.program beside it, found none")
    extension.words("allow", LOSSY)


def _stream(f: Fields) -> tuple[bool, bool]:
    """Whether to stream, and whether the usage comes with the stream."""
    stream, options = f.flag("stream"), f.inner("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise invalid("stream_options", "stream_options: expected only with stream=true")
    usage = options.flag("include_usage")
    options.only("include_obfuscation", False)
    options.done()
    return stream, usage


def _stops(f: Fields) -> tuple[str, ...]:
    value = f.any("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS:
        raise f.refuse("stop", f"a text or a list of at most {MAX_STOPS}")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise invalid("stop", f"stop: expected texts of 1..{MAX_STOP_CHARS} characters")
    return tuple(stops)


def _response_format(f: Fields) -> Mapping[str, Any] | None:
    return _format(f, "response_format", flat=False)


def _format(f: Fields, field: str, *, flat: bool) -> Mapping[str, Any] | None:
    """The schema that an answer has to follow; None: any text."""
    format_ = f.inner(field)
    if format_ is None:
        return None
    kind = format_.choice("type", ("text", "json_object", "json_schema"), "")
    if not kind:
        raise format_.refuse("type", "text, json_object or json_schema")
    schema: Any = {"type": "object"} if kind == "json_object" else None
    if kind == "json_schema":
        inner = format_ if flat else format_.inner("json_schema")
        schema = None if inner is None else inner.any("schema")
        if inner is None or not isinstance(schema, dict):
            raise (inner or format_).refuse("schema" if inner else "json_schema", "a JSON schema")
        inner.text("name", 64)
        inner.text("description", 10_000)
        inner.flag("strict")  # a schema is always enforced
        inner.done()
    format_.done()
    return schema  # type: ignore[no-any-return]


def _prompts(f: Fields, field: str) -> tuple[Prompt, ...]:
    """A text, a list of ids, or a list of these."""
    value = f.any(field)
    items: list[Any]
    if isinstance(value, list) and value and not all(_is_id(item) for item in value):
        items = value
    else:
        items = [value]
    if len(items) > MAX_PROMPTS:
        raise invalid(f.name(field), f"{f.name(field)}: {len(items)} prompts, expected at most {MAX_PROMPTS}")
    return tuple(_prompt(f, field, item) for item in items)


def _is_id(item: Any) -> bool:
    return isinstance(item, int) and not isinstance(item, bool)


def _prompt(f: Fields, field: str, item: Any) -> Prompt:
    if isinstance(item, str) and item and len(item) <= MAX_CHARS:
        return item
    if isinstance(item, list) and item and all(_is_id(i) for i in item):
        return tuple(item)
    raise invalid(
        f.name(field), f"{f.name(field)}: expected a text, a list of token ids, or a list of these; none empty"
    )


def _input(f: Fields) -> tuple[Message, ...]:
    """`input` of the responses route: a text, or items."""
    value = f.any("input")
    if isinstance(value, str) and value:
        return (Message("user", value),)
    if not isinstance(value, list) or not value:
        raise f.refuse("input", "a text or a list of items")
    return tuple(_item(Fields(item, f.name(f"input[{i}]"))) for i, item in enumerate(value))


def _item(f: Fields) -> Message:
    kind = f.choice("type", ("message", "function_call", "function_call_output"), "message")
    f.text("id", 200)
    f.text("status", 40)
    if kind == "message":
        role = f.choice("role", ("system", "developer", "user", "assistant"), "")
        if not role:
            raise f.refuse("role", "a role")
        message = Message(
            "system" if role == "developer" else role, read_text(f, "content", ("input_text", "output_text"))
        )
    else:
        f.text("call_id", 200)
        if kind == "function_call":
            message = Message("assistant", "", (read_call(f),))
        else:
            message = Message("tool", f.text("output", MAX_CHARS) or "")
    f.done()
    return message


def _harmless(f: Fields) -> None:
    """What changes nothing about an answer: read, and not kept."""
    for name in ("user", "safety_identifier", "prompt_cache_key", "service_tier"):
        f.text(name, 1000)
    f.inner("metadata")
    f.only("store", False)
