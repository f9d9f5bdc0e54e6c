"""A gateway over a real loopback socket, and a client of few words: what the tests of the gateway stand on."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

from nearfar_cloud.gateway.app import Gateway
from nearfar_cloud.gateway.served import Served, open_served
from nearfar_cloud.gateway.server import Server, bind
from tests.tiny import write_tiny

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
SIZES = {"n_layers": 4, "d_model": 64, "n_heads": 4, "n_kv_heads": 2, "d_ff": 128, "n_ctx": 1024}
A_BLOCK = 2 * 4 * 2 * 16 * 64 * 4  # bytes of a block of this model
TINY = "tiny"


@contextmanager
def nano_process(*options: str) -> Iterator[subprocess.Popen[str]]:
    """`nearfar cloud serve nano` in a process of its own; its first line is JSON and says where it listens."""
    command = [sys.executable, "-m", "nearfar.cli.main", "cloud", "serve", "nano", "--port", "0", "--json"]
    started = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield started
    finally:
        started.kill()
        started.wait()


@cache
def tiny_path(chat: bool = True) -> Path:
    """A random model of four layers, whose answers are bytes of all kinds; with a chat form or without."""
    extra: dict[str, object] = {"tokenizer.chat_template": CHATML} if chat else {}
    return write_tiny(Path(mkdtemp()) / f"{TINY}.gguf", "llama", "F32", extra=extra, **SIZES)


def tiny(n_blocks: int = 256, *, chat: bool = True) -> Served:
    return open_served(str(tiny_path(chat)), form="fp32", kv_bytes=n_blocks * A_BLOCK)


class Reply(NamedTuple):
    """What came back."""

    status: int
    headers: dict[str, str]
    raw: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.raw)

    @property
    def code(self) -> str:
        """Of an error."""
        return str(self.json["error"]["code"])


class Client:
    """Speaks to one server; every call is a connection of its own."""

    def __init__(self, port: int, key: str | None = None, model: str = TINY) -> None:
        self.port, self.model = port, model
        self.headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """A body that is bytes goes as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(method, path, raw, self.headers | headers)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Reply(response.status, found, response.read())
        finally:
            connection.close()

    def get(self, path: str) -> Reply:
        return self.send("GET", path)

    def post(self, path: str, **body: Any) -> Reply:
        return self.send("POST", f"/v1/{path}", self.asked(path, body))

    def asked(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """With a seed for what has one: one that is drawn ends an answer at its first token once in 300 times."""
        seed = {"seed": 1} if path.endswith("completions") else {}
        return {"model": self.model} | seed | body

    def ok(self, path: str, **body: Any) -> Any:
        """The reply of a request that must succeed."""
        reply = self.post(path, **body)
        assert reply.status == 200, reply.raw
        return reply.json

    def stream(self, path: str, **body: Any) -> list[Any]:
        """The events of a stream that must begin; the mark of its end is left out."""
        reply = self.post(path, **body, stream=True)
        assert reply.status == 200, reply.raw
        assert reply.headers["content-type"].startswith("text/event-stream")
        return list(events(reply.raw))

    def open_stream(self, path: str, cursor: str | None = None, receive_buffer: int = 0, **body: Any) -> Stream:
        """A stream that is read as it comes, from a cursor on."""
        return Stream(self, path, self.asked(path, body) | {"stream": True}, cursor, receive_buffer)

    def read_on(self, path: str, cursor: str) -> Reply:
        """What is kept of a stream, and what follows."""
        return self.send("GET", f"/v1/{path}/{cursor.partition('.')[0]}", **{"last-event-id": cursor})

    def metric(self, line: str) -> float:
        """The value of one line of /metrics; 0 where it is not there yet."""
        for found in self.get("/metrics").raw.decode().splitlines():
            if found.startswith(line + " "):
                return float(found.split()[-1])
        return 0.0


class Stream:
    """An open stream over a plain socket, so that it can be left as rudely as a client leaves."""

    def __init__(
        self, client: Client, path: str, body: dict[str, Any], cursor: str | None = None, receive_buffer: int = 0
    ) -> None:
        raw = json.dumps(body).encode()
        headers = client.headers | {"host": "127.0.0.1", "content-length": str(len(raw)), "connection": "close"}
        if cursor is not None:
            headers["last-event-id"] = cursor
        head = f"POST /v1/{path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items()) + "\r\n"
        self.cursor = cursor or ""  # the id of the last event
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(120)
        self.socket.connect(("127.0.0.1", client.port))
        self.socket.sendall(head.encode() + raw)
        self._response = http.client.HTTPResponse(self.socket, method="POST")
        self._response.begin()
        self.status = self._response.status

    def next(self) -> Any:
        """The next event, None for the mark of the end or the end itself."""
        while line := self._response.readline():
            if line.startswith(b"id: "):
                self.cursor = line[4:].strip().decode()
            if line.startswith(b"data: "):
                return None if line.strip() == b"data: [DONE]" else json.loads(line[6:])
        return None

    def rest(self) -> list[Any]:
        found = []
        while (event := self.next()) is not None:
            found.append(event)
        return found

    def read(self) -> bytes:
        """All that is left, as it comes."""
        return self._response.read()

    def leave(self) -> None:
        self._response.close()
        self.socket.close()


def events(raw: bytes) -> Iterator[Any]:
    for line in raw.decode().splitlines():
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))


def text_of(found: list[Any], i: int = 0) -> str:
    """What the events of a chat or completion stream add up to, for choice `i`."""
    choices = [c for event in found for c in event["choices"] if c["index"] == i]
    return "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)


@contextmanager
def serving(served: Served, **options: Any) -> Iterator[tuple[Client, Gateway, Server]]:
    """A server of its own thread and port, ended at the end; nothing may be left of it then."""
    server_options = {k: options.pop(k) for k in ("grace_s",) if k in options}
    gateway = Gateway(served, **options)
    sock = bind("127.0.0.1", 0)
    started = threading.Event()
    server = Server(gateway, local=True, on_started=started.set, **server_options)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
    thread.start()
    assert started.wait(60)
    try:
        yield Client(sock.getsockname()[1]), gateway, server
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def wait_until(what: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.005)


def check_quiet(gateway: Gateway) -> None:
    """No sequence, block, ticket or mailbox is left."""
    engine, limits = gateway.served.engine, gateway.limits
    wait_until(lambda: not engine.seqs and not engine.has_work and not gateway.service.n_open and not limits.n_seqs)
    engine.pool.check([])
    assert limits.n_tokens == 0
    assert not gateway._running
    assert not engine.executor._sums  # type: ignore[attr-defined]


class Gate:
    """Holds the steps of an engine until it is opened; may let single steps pass."""

    def __init__(self, served: Served) -> None:
        self._real, self._steps, self._is_open = served.engine.executor.run, threading.Semaphore(0), True
        self.waiting = threading.Event()
        served.engine.executor.run = self._run  # type: ignore[method-assign]

    def _run(self, batch: Any) -> Any:
        while not self._is_open:
            self.waiting.set()
            if self._steps.acquire(timeout=0.01):
                break
        return self._real(batch)

    def close(self) -> None:
        self.waiting.clear()
        self._is_open = False

    def open(self) -> None:
        self._is_open = True

    def step(self, n: int = 1) -> None:
        self._steps.release(n)
