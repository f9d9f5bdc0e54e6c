"""What the clients of bench/soak.py do to a server: everything that is served, and what goes wrong in the world.

An action makes one request (or a few that belong together) and says what came of it: (name, status, code).  The
statuses and codes that it may come to stand beside it in `ACTIONS`; anything else is a fault of the server.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

KEEP_S = 2  # how long the server keeps streams: short, so that it happens often
HOST = "127.0.0.1"
WORDS = "the light in kitchen turn off please set timer for ten minutes once upon a time there was story of cat".split()
COLOURS = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]}
HOME = {"role": "system", "content": " kitchen: light ceiling light; bedroom: fan fan"}
FULL = {(429, "rate_limit_exceeded"), (503, "overloaded")}  # whatever is asked for may come to this
DONE = {(200, "")}


class Result(NamedTuple):
    """Of one request; the code is that of an error, in the reply or as the last event of its stream."""

    status: int
    code: str = ""


class Stream:
    """The events of an open stream: data as it stands there, and the last cursor."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection, self._response = connection, response
        self.cursor, self.code = "", ""
        self.text: list[str] = []  # of choice 0
        self.is_whole = False

    def __iter__(self) -> Iterator[None]:
        """One turn for each event."""
        while line := self._response.readline():
            if line.startswith(b"id: "):
                self.cursor = line[4:].strip().decode()
            elif line.startswith(b"data: [DONE]"):
                self.is_whole = True
            elif line.startswith(b"data: "):
                self._take(json.loads(line[6:]))
                yield

    def _take(self, event: dict[str, Any]) -> None:
        kind = event.get("type", "")
        if "error" in event or kind == "error":
            self.code = (event.get("error") or event)["code"]
        self.is_whole = self.is_whole or kind in ("response.completed", "response.incomplete")
        for choice in event.get("choices", ()):
            if choice["index"] == 0:
                self.text.append(choice["text"] if "text" in choice else choice["delta"].get("content") or "")

    def leave(self) -> None:
        self._response.close()
        self._connection.close()


@dataclass
class Person:
    """A client with a key, and texts that it has been told before: the same request has the same answer, always."""

    port: int
    key: str
    rng: random.Random
    known: dict[str, str] = field(default_factory=dict)  # body of a reference request -> its text
    wrong: list[str] = field(default_factory=list)  # what was not as it had been

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[Result, Any]:
        """A body of bytes goes as it is.  The reply, read as JSON where it is some."""
        connection, response = self._request(method, path, body, headers)
        try:
            return self._read(response)
        finally:
            connection.close()

    def post(self, path: str, body: dict[str, Any]) -> tuple[Result, Any]:
        return self.send("POST", f"/v1/{path}", {"model": "nano"} | body)

    def stream(self, path: str, body: dict[str, Any], cursor: str | None = None) -> Result | Stream:
        """An open stream, or why there is none."""
        headers = {} if cursor is None else {"last-event-id": cursor}
        return self._opened("POST", f"/v1/{path}", {"model": "nano", "stream": True} | body, headers)

    def read_on(self, path: str, cursor: str) -> Result | Stream:
        """A stream that is kept."""
        return self._opened("GET", f"/v1/{path}/{cursor.partition('.')[0]}", None, {"last-event-id": cursor})

    def _opened(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Result | Stream:
        connection, response = self._request(method, path, body, headers)
        if response.status == 200:
            return Stream(connection, response)
        try:
            return self._read(response)[0]
        finally:
            connection.close()

    def _request(
        self, method: str, path: str, body: Any, headers: dict[str, str]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=120)
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        own = {"content-type": "application/json", "authorization": f"Bearer {self.key}"}
        connection.request(method, path, raw, own | headers)
        return connection, connection.getresponse()

    @staticmethod
    def _read(response: http.client.HTTPResponse) -> tuple[Result, Any]:
        raw = response.read()
        is_json = "json" in response.headers.get("content-type", "")
        told = json.loads(raw) if is_json else raw.decode()
        code = told["error"]["code"] if is_json and "error" in told else ""
        return Result(response.status, code), told

    def text(self, most: int = 60) -> str:
        return " ".join(self.rng.choices(WORDS, k=self.rng.randint(1, most)))

    def same(self, body: dict[str, Any], text: str) -> None:
        """A whole text of a body with a seed: it has to be what it was before."""
        if text != self.known.setdefault(json.dumps(body, sort_keys=True), text):
            self.wrong.append(f"another answer to the same request: seed {body.get('seed')}")


def reference(i: int) -> dict[str, Any]:
    """One of few bodies whose answers never change."""
    return {"prompt": "once upon a time " * (1 + 9 * (i % 4)), "seed": i, "max_tokens": 24 + 12 * (i % 5)}


# ---------------------------------------------------------------- what is served


def whole(p: Person) -> Result:
    body = reference(p.rng.randrange(12))
    result, told = p.post("completions", body)
    if result.status == 200:
        p.same(body, told["choices"][0]["text"])
    return result


def completion(p: Person) -> Result:
    """Anything that the route takes."""
    body: dict[str, Any] = {"prompt": p.text(), "max_tokens": p.rng.randint(1, 60), "n": p.rng.choice([1, 1, 2, 4])}
    if p.rng.random() < 0.3:
        body |= {"prompt": [p.text(20) for _ in range(3)], "logprobs": p.rng.randint(0, 20)}
    if p.rng.random() < 0.3:
        body |= {"temperature": p.rng.choice([0, 0.5, 2]), "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.2}
    if p.rng.random() < 0.3:
        extension = {"priority": p.rng.randint(-5, 5), "ttft_ms": 500, "tbt_ms": 50, "program": "soak", "allow": []}
        body |= {"stop": ["the", "a "], "nearfar": extension}
    return p.post("completions", body)[0]


def chat(p: Person) -> Result:
    messages = [{"role": "user", "content": p.text(20)}]
    return drained(p.stream("chat/completions", {"messages": messages, "max_tokens": 40}))


def response(p: Person) -> Result:
    return drained(p.stream("responses", {"input": p.text(20), "max_output_tokens": 40}))


def call(p: Person) -> Result:
    """In nano's own form."""
    messages = [HOME, {"role": "user", "content": "turn off the kitchen lights"}]
    return p.post("chat/completions", {"messages": messages, "response_format": {"type": "json_object"}})[0]


def tool(p: Person) -> Result:
    function = {"name": p.rng.choice(["paint", "wait"]), "parameters": COLOURS | {"additionalProperties": False}}
    body = {"messages": [{"role": "user", "content": p.text(8)}], "tools": [{"type": "function", "function": function}]}
    return drained(p.stream("chat/completions", body | {"tool_choice": "required", "max_tokens": 80}))


def schema(p: Person) -> Result:
    """A few that are met again, and new ones without end."""
    names = [f"field{p.rng.randrange(3)}" if p.rng.random() < 0.5 else f"f{p.rng.randrange(10**6)}" for _ in range(2)]
    wanted = {"type": "object", "properties": {n: {"type": "boolean"} for n in names}, "required": names[:1]}
    format_ = {"type": "json_schema", "json_schema": {"schema": wanted | {"additionalProperties": False}}}
    body = {"messages": [{"role": "user", "content": p.text(8)}], "response_format": format_, "max_tokens": 60}
    return p.post("chat/completions", body)[0]


def embedding(p: Person) -> Result:
    return p.post("embeddings", {"input": [p.text() for _ in range(p.rng.randint(1, 4))]})[0]


def about(p: Person) -> Result:
    return p.send("GET", p.rng.choice(["/v1/models", "/v1/models/nano", "/metrics", "/health", "/ready"]))[0]


def drained(stream: Result | Stream) -> Result:
    if isinstance(stream, Result):
        return stream
    for _ in stream:
        pass
    stream.leave()
    return Result(200, stream.code or ("" if stream.is_whole else "cut"))


# ---------------------------------------------------------------- clients that leave


def leave(p: Person) -> Result:
    """In the middle of a stream, for good."""
    stream = p.stream("completions", {"prompt": p.text(), "max_tokens": 200, "n": p.rng.choice([1, 3])})
    if isinstance(stream, Result):
        return stream
    for _, _ in zip(range(p.rng.randint(0, 10)), stream, strict=False):
        pass
    stream.leave()
    return Result(200, stream.code)


def come_back(p: Person) -> Result:
    """Leave and read on, again and again, by GET or POST; the parts are the whole."""
    body = reference(p.rng.randrange(12))
    stream, text = p.stream("completions", body), ""
    for _ in range(100):
        if isinstance(stream, Result):
            return stream
        for _, _ in zip(range(p.rng.randint(1, 12)), stream, strict=False):
            pass
        text += "".join(stream.text)
        cursor, is_whole, code = stream.cursor, stream.is_whole, stream.code
        stream.leave()
        if code or is_whole:
            if is_whole:
                p.same(body, text)
            return Result(200, code)
        if is_late := p.rng.random() < 0.03:
            time.sleep(KEEP_S + 1)  # until nothing is kept any longer
        if is_late or p.rng.random() < 0.5:
            stream = p.stream("completions", body, cursor)
        else:
            stream = p.read_on("completions", cursor)
            if stream == Result(404, "not_found"):  # the machine was too busy to come back in time
                stream = p.stream("completions", body, cursor)
    return Result(200, "endless")


def impatient(p: Person) -> Result:
    """Does not wait for a whole reply, or not even for its own body to be sent."""
    raw = json.dumps({"model": "nano", "prompt": p.text(), "max_tokens": 300}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {HOST}\r\nauthorization: Bearer {p.key}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    with socket.create_connection((HOST, p.port), timeout=60) as s:
        s.sendall((head.encode() + raw)[: p.rng.choice([0, 20, len(head), len(head) + 10, None])])
        s.settimeout(p.rng.choice([0.001, 0.05, 0.2]))
        with contextlib.suppress(TimeoutError):
            s.recv(1)
    return Result(0)


def cancelled(p: Person) -> Result:
    """DELETE from another connection."""
    stream = p.stream("chat/completions", {"messages": [{"role": "user", "content": p.text(5)}], "max_tokens": 200})
    if isinstance(stream, Result):
        return stream
    next(iter(stream))
    p.send("DELETE", f"/v1/chat/completions/{stream.cursor.partition('.')[0]}")
    return drained(stream)


def late(p: Person) -> Result:
    return p.post("completions", {"prompt": p.text(), "max_tokens": 300, "nearfar": {"deadline_ms": 5}})[0]


# ---------------------------------------------------------------- bad input


def bomb(p: Person) -> Result:
    """A schema whose alternatives multiply, or one without end."""
    found: dict[str, Any] = {"type": "string"}
    for i in range(p.rng.choice([4, 40])):
        found = {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": found if j == 0 else {}}} for j in range(8)]}] * 2}
        if len(json.dumps(found)) > 100_000:
            break
    format_ = {"type": "json_schema", "json_schema": {"schema": found}}
    return p.post("chat/completions", {"messages": [{"role": "user", "content": "x"}], "response_format": format_})[0]


BAD: tuple[tuple[dict[str, Any] | bytes, str], ...] = (
    ({"temperature": -1}, "invalid_value"),
    ({"n": 10**9}, "invalid_value"),
    ({"max_tokens": -5}, "invalid_value"),
    ({"prompt": "x" * 500_000}, "context_length_exceeded"),
    ({"prompt": [5] * 600}, "context_length_exceeded"),
    ({"prompt": [10**9]}, "invalid_value"),
    ({"wishes": 3}, "unsupported_parameter"),
    ({"nearfar": {"tenant": "somebody"}}, "unsupported_parameter"),
    (b'{"prompt": "\xff"}', "invalid_json"),
    (b'{"a":' * 100_000, "invalid_json"),
    (b'{"model": "nano", "prompt": "x", "temperature": NaN}', "invalid_json"),
    (b" " * (9 << 20), "body_too_large"),
)


def bad(p: Person) -> Result:
    """Refused, and for the reason that it should be."""
    body, expected = p.rng.choice(BAD)
    raw = body if isinstance(body, bytes) else {"model": "nano", "prompt": "x"} | body
    try:
        result = p.send("POST", "/v1/completions", raw)[0]
    except (BrokenPipeError, ConnectionResetError):  # the server does not read what is too much to its end
        return Result(0)
    if result.status == 400 and result.code != expected:
        p.wrong.append(f"{expected} was refused as {result.code}")
    return result


def nobody(p: Person) -> Result:
    """No key of this server; no route of it; no cursor."""
    other = Person(p.port, "no key", p.rng)
    return p.rng.choice(
        [
            lambda: other.post("completions", {"prompt": "x"})[0],
            lambda: p.send("GET", "/v1/completions/cmpl-0")[0],
            lambda: p.send("POST", "/v1/audio/speech", {})[0],
        ]
    )()


Action = Callable[[Person], Result]

# What may be done, how often, and what it may come to beside FULL.
ACTIONS: dict[Action, tuple[int, set[tuple[int, str]]]] = {
    whole: (6, DONE),
    completion: (6, DONE),
    chat: (4, DONE),
    response: (4, DONE),
    call: (2, DONE),
    tool: (3, DONE),
    schema: (3, DONE),
    embedding: (3, DONE),
    about: (2, DONE | {(403, "not_allowed")}),
    leave: (6, DONE),
    come_back: (6, DONE),
    impatient: (4, {(0, "")}),
    cancelled: (3, DONE | {(200, "cancelled")}),
    late: (2, DONE | {(504, "deadline_exceeded")}),
    bomb: (1, {(400, "schema_too_complex")}),
    bad: (6, {(0, ""), (413, "body_too_large")} | {(400, code) for _, code in BAD}),
    nobody: (1, {(401, "invalid_api_key"), (404, "not_found")}),
}
