"""What cannot be served is refused at the door: an HTTP error names the field, and nothing reaches the engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("fastapi", reason="fastapi is not installed (extra [cloud])")

from nearfar_cloud.gateway import app
from tests.cloud.gateway import TINY, Client, check_quiet, serving, tiny

pytestmark = pytest.mark.usefixtures("one_thread")

USER = [{"role": "user", "content": "a question"}]


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving(tiny(16)) as (client, gateway, _):
        yield client
        check_quiet(gateway)
        assert gateway.served.engine.counts.prompt_tokens == 0  # nothing was let in


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


def schema_of(schema: Any) -> dict[str, Any]:
    return {"messages": USER, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


def tool(**changes: Any) -> dict[str, Any]:
    return {"messages": USER, "tools": [{"type": "function", "function": {"name": "f"} | changes}]}


def wide(n: int) -> dict[str, Any]:
    """A schema whose alternatives multiply."""
    schema: dict[str, Any] = {"type": "string"}
    for i in range(n):
        schema = {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": schema if j == 0 else {}}} for j in range(8)]}] * 2}
    return schema


# (route, fields, code, the field that is named)
BAD: list[tuple[str, dict[str, Any], str, str | None]] = [
    ("completions", {"temperature": -1}, "invalid_value", "temperature"),
    ("completions", {"temperature": 2.5}, "invalid_value", "temperature"),
    ("completions", {"temperature": "hot"}, "invalid_value", "temperature"),
    ("completions", {"temperature": True}, "invalid_value", "temperature"),
    ("completions", {"top_p": 0}, "invalid_value", "top_p"),
    ("completions", {"top_p": 1.5}, "invalid_value", "top_p"),
    ("completions", {"top_k": -1}, "invalid_value", "top_k"),
    ("completions", {"min_p": 2}, "invalid_value", "min_p"),
    ("completions", {"repetition_penalty": 0}, "invalid_value", "repetition_penalty"),
    ("completions", {"seed": 1 << 70}, "invalid_value", "seed"),
    ("completions", {"seed": 0.5}, "invalid_value", "seed"),
    ("completions", {"n": 0}, "invalid_value", "n"),
    ("completions", {"n": 9}, "invalid_value", "n"),
    ("completions", {"best_of": 4}, "unsupported_parameter", "best_of"),
    ("completions", {"max_tokens": 0}, "invalid_value", "max_tokens"),
    ("completions", {"max_tokens": -5}, "invalid_value", "max_tokens"),
    ("completions", {"max_tokens": 10**9}, "invalid_value", "max_tokens"),
    ("completions", {"max_tokens": 1024}, "context_length_exceeded", "prompt"),
    ("completions", {"prompt": "the " * 4000}, "context_length_exceeded", "prompt"),
    ("completions", {"prompt": "x" * 500_000}, "context_length_exceeded", "prompt"),
    ("completions", {"prompt": [5] * 1024}, "context_length_exceeded", "prompt"),
    ("completions", {"prompt": ""}, "invalid_value", "prompt"),
    ("completions", {"prompt": []}, "invalid_value", "prompt"),
    ("completions", {"prompt": None}, "invalid_value", "prompt"),
    ("completions", {"prompt": 5}, "invalid_value", "prompt"),
    ("completions", {"prompt": ["a", 5]}, "invalid_value", "prompt"),
    ("completions", {"prompt": ["a"] * 65}, "invalid_value", "prompt"),
    ("completions", {"prompt": [320]}, "invalid_value", "prompt"),
    ("completions", {"prompt": [-1]}, "invalid_value", "prompt"),
    ("completions", {"stop": [""]}, "invalid_value", "stop"),
    ("completions", {"stop": ["x"] * 17}, "invalid_value", "stop"),
    ("completions", {"stop": 5}, "invalid_value", "stop"),
    ("completions", {"logprobs": 21}, "invalid_value", "logprobs"),
    ("completions", {"echo": True}, "unsupported_parameter", "echo"),
    ("completions", {"suffix": "end"}, "unsupported_parameter", "suffix"),
    ("completions", {"logit_bias": {"5": 1}}, "unsupported_parameter", "logit_bias"),
    ("completions", {"frequency_penalty": 0.5}, "unsupported_parameter", "frequency_penalty"),
    ("completions", {"presence_penalty": -1}, "unsupported_parameter", "presence_penalty"),
    ("completions", {"wishes": 3}, "unsupported_parameter", "wishes"),
    ("completions", {"stream": "yes"}, "invalid_value", "stream"),
    ("completions", {"stream_options": {"include_usage": True}}, "invalid_value", "stream_options"),
    ("completions", {"stream": True, "stream_options": {"more": 1}}, "unsupported_parameter", "stream_options.more"),
    ("completions", {"model": "another"}, "model_not_found", "model"),
    ("completions", {"model": None}, "model_not_found", "model"),
    ("completions", {"nearfar": {"priority": 1000}}, "invalid_value", "nearfar.priority"),
    ("completions", {"nearfar": {"deadline_ms": 0}}, "invalid_value", "nearfar.deadline_ms"),
    ("completions", {"nearfar": {"tenant": "me"}}, "unsupported_parameter", "nearfar.tenant"),
    ("completions", {"nearfar": {"wishes": 1}}, "unsupported_parameter", "nearfar.wishes"),
    ("completions", {"nearfar": {"program": 7}}, "invalid_value", "nearfar.program"),
    ("completions", {"nearfar": {"program": ""}}, "invalid_value", "nearfar.program"),
    ("completions", {"nearfar": {"program": "x" * 201}}, "invalid_value", "nearfar.program"),
    ("completions", {"nearfar": {"program": "a", "program_end": 1}}, "invalid_value", "nearfar.program_end"),
    ("completions", {"nearfar": {"program_end": True}}, "invalid_value", "nearfar.program_end"),
    ("completions", {"nearfar": {"allow": "semantic"}}, "invalid_value", "nearfar.allow"),
    ("completions", {"nearfar": {"allow": ["semantic", "everything"]}}, "invalid_value", "nearfar.allow"),
    ("completions", {"nearfar": {"allow": [["semantic"]]}}, "invalid_value", "nearfar.allow"),
    ("completions", {"nearfar": []}, "invalid_value", "nearfar"),
    ("chat/completions", {"messages": []}, "invalid_value", "messages"),
    ("chat/completions", {"messages": "hello"}, "invalid_value", "messages"),
    ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, "invalid_value", "messages[0].role"),
    ("chat/completions", {"messages": [{"role": "user"}]}, "invalid_value", "messages[0].content"),
    ("chat/completions", {"messages": [*USER, {"role": "assistant", "content": "x"}]}, "invalid_value", "messages"),
    (
        "chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "unsupported_parameter",
        "messages[0].content[0].type",
    ),
    ("chat/completions", {"messages": USER, "top_logprobs": 3}, "unsupported_parameter", "top_logprobs"),
    ("chat/completions", {"messages": USER, "reasoning_effort": "high"}, "unsupported_parameter", "reasoning_effort"),
    ("chat/completions", {"messages": USER, "modalities": ["audio"]}, "unsupported_parameter", "modalities"),
    ("chat/completions", {"messages": USER, "store": True}, "unsupported_parameter", "store"),
    ("chat/completions", {"messages": USER, "tool_choice": "required"}, "invalid_value", "tool_choice"),
    ("chat/completions", tool(name="a b"), "invalid_value", "tools[0].function.name"),
    ("chat/completions", tool(parameters=5), "invalid_value", "tools[0].function.parameters"),
    (
        "chat/completions",
        tool(parameters={"$ref": "#/$defs/x"}),
        "unsupported_parameter",
        "tools[0].function.parameters",
    ),
    ("chat/completions", tool(parameters=nested(40)), "schema_too_complex", "tools[0].function.parameters"),
    ("chat/completions", tool() | schema_of({}), "invalid_value", "response_format"),
    ("chat/completions", schema_of(nested(40)), "schema_too_complex", "response_format"),
    ("chat/completions", schema_of({"enum": ["x" * 70_000]}), "schema_too_complex", "response_format"),
    ("chat/completions", schema_of(wide(4)), "schema_too_complex", "response_format"),
    ("chat/completions", schema_of({"type": "no such type"}), "invalid_schema", "response_format"),
    ("chat/completions", schema_of({"enum": []}), "invalid_schema", "response_format"),
    ("chat/completions", schema_of(5), "invalid_value", "response_format.json_schema.schema"),
    (
        "chat/completions",
        {"messages": USER, "response_format": {"type": "xml"}},
        "invalid_value",
        "response_format.type",
    ),
    ("responses", {"input": ""}, "invalid_value", "input"),
    ("responses", {"input": "x", "previous_response_id": "resp_1"}, "unsupported_parameter", "previous_response_id"),
    ("responses", {"input": "x", "background": True}, "unsupported_parameter", "background"),
    ("responses", {"input": "x", "store": True}, "unsupported_parameter", "store"),
    ("responses", {"input": "x", "tools": [{"type": "web_search"}]}, "invalid_value", "tools[0].type"),
    ("responses", {"input": [{"type": "reasoning"}]}, "invalid_value", "input[0].type"),
    ("embeddings", {"input": ""}, "invalid_value", "input"),
    ("embeddings", {"input": "x", "dimensions": 8}, "unsupported_parameter", "dimensions"),
    ("embeddings", {"input": "x", "encoding_format": "int8"}, "invalid_value", "encoding_format"),
]


@pytest.mark.parametrize(("path", "body", "code", "param"), BAD, ids=[f"{p} {i}" for i, (p, *_) in enumerate(BAD)])
def test_what_is_not_served_is_an_error_that_names_the_field(
    client: Client, path: str, body: dict[str, Any], code: str, param: str | None
) -> None:
    needed = {"completions": {"prompt": "x"}, "chat/completions": {"messages": USER}}.get(path, {})
    reply = client.send("POST", f"/v1/{path}", {"model": TINY} | needed | body)
    assert reply.status == (404 if body.get("model") else 400)
    error = reply.json["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == "invalid_request_error"
    assert "x" * 50 not in error["message"]  # what was written does not come back


@pytest.mark.parametrize(
    ("raw", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"[1, 2]", 400, "invalid_value"),
        (b'{"model": "tiny", "prompt": "x"', 400, "invalid_json"),
        (b'{"model": "tiny", "prompt": "\xff"}', 400, "invalid_json"),
        (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400, "invalid_json"),
        (b'{"model": "tiny", "prompt": "x", "temperature": -Infinity}', 400, "invalid_json"),
        (b'{"model": "tiny", "prompt": "x", "temperature": 1e999}', 400, "invalid_value"),
        (b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (b'{"a":' * 100_000, 400, "invalid_json"),
        (b"[" * 1_000_000, 400, "invalid_json"),
    ],
)
def test_a_body_that_is_no_object_of_json_is_refused(client: Client, raw: bytes, status: int, code: str) -> None:
    reply = client.send("POST", "/v1/completions", raw)
    assert (reply.status, reply.code) == (status, code)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "temperature: expected a number 0..2, found -1"),
        ({"n": 1.5}, "n: expected a whole number 1..8, found 1.5"),
        ({"seed": "one"}, f"seed: expected a whole number {-(1 << 63)}..{(1 << 64) - 1}, found a text of 3 characters"),
        ({"prompt": [320]}, "prompt: token 320, expected 0..319"),
        ({"prompt": [5] * 2000}, "the context holds 1024 tokens, the answer included; 2000 tokens leave no room"),
        ({"prompt": [5], "max_tokens": 1024}, "1024 tokens, the answer included; a prompt of 1 and an answer of 1024"),
        (
            {"nearfar": {"allow": ["all"]}},
            "nearfar.allow: expected a list of semantic or examples or kv_share, found a text of 3 characters in it",
        ),
    ],
)
def test_a_refusal_says_what_was_expected_and_what_was_found(
    client: Client, fields: dict[str, Any], message: str
) -> None:
    reply = client.send("POST", "/v1/completions", {"model": TINY, "prompt": "x"} | fields)
    assert reply.status == 400
    assert message in reply.json["error"]["message"]


def test_a_body_without_end_is_not_read_to_its_end(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MAX_BODY", 1000)
    reply = client.send("POST", "/v1/completions", b" " * 2000)
    assert (reply.status, reply.code) == (413, "body_too_large")


def test_a_web_page_cannot_ask_unasked(client: Client) -> None:
    """A form posts without asking the server first, but not as JSON; a page of another name has that name in Host."""
    body = json.dumps({"model": TINY, "prompt": "x"}).encode()
    reply = client.send("POST", "/v1/completions", body, **{"content-type": "text/plain"})
    assert (reply.status, reply.code) == (415, "unsupported_media_type")
    reply = client.send("GET", "/v1/models", host="attacker.example:80")
    assert (reply.status, reply.code) == (403, "wrong_host")


def test_routes_that_are_not_there_say_so(client: Client) -> None:
    for method, path, status in (("POST", "/v1/audio/speech", 404), ("GET", "/v1/completions", 405), ("GET", "/", 404)):
        reply = client.send(method, path)
        assert reply.status == status
        assert reply.json["error"]["type"] == "invalid_request_error"
    assert client.send("DELETE", "/v1/completions/cmpl-0").code == "not_found"


def test_a_model_without_a_chat_form_says_so() -> None:
    with serving(tiny(16, chat=False)) as (client, _, _):
        for path, body in (("chat/completions", {"messages": USER}), ("responses", {"input": "x"})):
            reply = client.post(path, **body)
            assert (reply.status, reply.code) == (400, "no_chat_form")
            assert "/v1/completions" in reply.json["error"]["message"]
        assert client.post("completions", prompt="x", max_tokens=1).status == 200


def test_harmless_fields_are_read_and_not_kept(client: Client) -> None:
    """They pass the door: what is refused is the number of tokens."""
    body = {"user": "me", "metadata": {"a": "b"}, "service_tier": "auto", "logit_bias": {}, "frequency_penalty": 0.0}
    reply = client.post("chat/completions", messages=USER, parallel_tool_calls=True, max_tokens=5000, **body)
    assert reply.code == "context_length_exceeded"
