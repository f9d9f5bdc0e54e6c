"""What goes wrong in the world goes wrong for one request: documented errors, nothing else disturbed, nothing left."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("fastapi", reason="fastapi is not installed (extra [cloud])")

from nearfar_cloud.gateway import events as server_events
from nearfar_cloud.gateway import grammar
from nearfar_cloud.gateway.events import EventStream
from nearfar_cloud.gateway.grammar import Grammars
from nearfar_cloud.gateway.refusal import Refusal
from nearfar_cloud.gateway.service import MAX_UNREAD, Mailbox
from nearfar_cloud.types import Output
from tests.cloud.gateway import TINY, Client, Gate, check_quiet, serving, text_of, tiny, wait_until

pytestmark = pytest.mark.usefixtures("one_thread")

USER = [{"role": "user", "content": "a question"}]


def greedy(client: Client, prompt: str, n: int = 12) -> str:
    return str(client.ok("completions", prompt=prompt, temperature=0, max_tokens=n)["choices"][0]["text"])


def test_a_client_that_vanishes_frees_its_blocks_and_disturbs_nobody() -> None:
    served = tiny(64)
    gate = Gate(served)
    with serving(served) as (client, gateway, _):
        expected = greedy(client, "stays", 30)
        gate.close()
        leaver = client.open_stream("completions", prompt="leaves", max_tokens=900, n=2)
        stayer = client.open_stream("completions", prompt="stays", max_tokens=30, temperature=0)
        gate.step(3)
        leaver.next()
        assert gateway.limits.n_seqs == 3
        leaver.leave()
        gate.open()
        assert text_of(stayer.rest()) == expected
        check_quiet(gateway)
        counts = served.engine.counts
        assert counts.generated_tokens < 300  # of the 1800 that were asked for
        assert counts.cancelled == 2
        assert counts.steps_after_cancel <= counts.cancelled
        assert client.metric("nearfar_cloud_cancelled_total") == 2


def test_a_client_that_does_not_wait_for_a_whole_reply_stops_it_too() -> None:
    served = tiny(64)
    gate = Gate(served)
    with serving(served) as (client, gateway, _):
        gate.close()
        with socket.create_connection(("127.0.0.1", client.port)) as impatient:
            impatient.sendall(raw_request({"prompt": "x", "max_tokens": 900}))
            assert gate.waiting.wait(60)
        gate.open()
        check_quiet(gateway)
        assert served.engine.counts.generated_tokens < 300
        assert client.metric('nearfar_cloud_requests_total{code="499",route="/v1/completions"}') == 1


def test_a_client_that_leaves_before_its_body_has_come_is_no_fault_of_the_server(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with serving(tiny(64)) as (client, gateway, _):
        with socket.create_connection(("127.0.0.1", client.port)) as hasty:
            hasty.sendall(raw_request({"prompt": "x"})[:-5])
        name = 'nearfar_cloud_requests_total{code="499",route="/v1/completions"}'
        wait_until(lambda: client.metric(name) == 1)
        assert not caplog.records
        check_quiet(gateway)


def test_a_worker_makes_a_hook_however_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In front it was compiled in time; a busy worker may need longer, and keeps what it has made."""
    grammars = Grammars(tiny(64).tokenizer)
    compiled = asyncio.run(grammars.compile({"enum": ["red", "green"]}, "schema"))
    grammars.close()
    monkeypatch.setattr(grammar, "MAX_S", 0.0)
    busy = Grammars(tiny(64).tokenizer)
    for _ in range(2):
        hook = busy.make(compiled.source)
        assert (hook.source, hook.n_followed) == (compiled.source, 0)
    assert list(busy._kept) == [compiled.source]
    with pytest.raises(Refusal, match="not compiled within 0 s"):
        asyncio.run(busy.compile({"enum": ["blue"]}, "schema"))
    busy.close()


def raw_request(body: dict[str, Any]) -> bytes:
    """A completion as bytes, for a connection that stays open."""
    raw = json.dumps({"model": TINY, "seed": 1} | body).encode()
    head = (
        "POST /v1/completions HTTP/1.1",
        "host: 127.0.0.1",
        "content-type: application/json",
        f"content-length: {len(raw)}",
    )
    return "\r\n".join((*head, "", "")).encode() + raw


def test_more_than_the_memory_holds_is_served_in_turn() -> None:
    """Eight answers that need 40 blocks, in 12: some have to give theirs up, and all are what they would be alone."""
    prompts = [f"{'the an ' * 60}{i}" for i in range(8)]
    with serving(tiny(64)) as (client, _, _):
        expected = [greedy(client, prompt, 100) for prompt in prompts]
    with serving(tiny(12)) as (client, gateway, _):
        asked = {"temperature": 0, "max_tokens": 100}
        with ThreadPoolExecutor(8) as threads:
            replies = list(threads.map(lambda prompt: client.ok("completions", prompt=prompt, **asked), prompts))
        assert [reply["choices"][0]["text"] for reply in replies] == expected
        preempted = sum(reply["nearfar"]["preempted"] for reply in replies)
        assert preempted == gateway.served.engine.counts.preempted > 0
        assert gateway.served.n_ctx == 12 * 64  # what can never fit is refused, not queued
        reply = client.post("completions", prompt=[5] * 700, max_tokens=100)
        assert (reply.status, reply.code) == (400, "context_length_exceeded")
        check_quiet(gateway)


@pytest.mark.parametrize("n", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_flood_is_held_at_the_door(n: int) -> None:
    """`n` requests that all wait: 64 are taken, the others hear 503 and when to come back, and the 64 are answered."""
    served = tiny(64)
    gate = Gate(served)
    with serving(served, max_queued=64) as (client, gateway, _):
        expected = greedy(client, "the flood", 2)
        gate.close()
        replies: list[tuple[int, bytes]] = []
        thread = threading.Thread(target=lambda: replies.extend(asyncio.run(_flood(client.port, n))))
        thread.start()
        wait_until(lambda: gateway.limits.n_seqs == 64, 120)
        wait_until(lambda: gateway.metrics.requests.labels("/v1/completions", "503")._value.get() == n - 64, 300)
        assert client.get("/health").status == 200  # the door still answers
        gate.open()
        thread.join(120)
        texts = [json.loads(raw)["choices"][0]["text"] for status, raw in replies if status == 200]
        assert texts == [expected] * 64
        refused = [raw for status, raw in replies if status == 503]
        assert len(refused) == n - 64
        assert all(json.loads(raw)["error"]["code"] == "overloaded" for raw in refused)
        check_quiet(gateway)
        assert greedy(client, "the flood", 2) == expected


def test_ten_thousand_that_wait_hide_nobody_and_leave_nothing() -> None:
    """Twenty requests of 512 sequences each are let in; one that matters more is answered before most of them."""
    served = tiny(64)
    gate = Gate(served)
    with serving(served, max_queued=11_000) as (client, gateway, _):
        expected = greedy(client, "matters more")
        gate.close()
        flood = [client.open_stream("completions", prompt=["x"] * 64, n=8, max_tokens=400) for _ in range(20)]
        assert gateway.limits.n_seqs == 20 * 512
        assert client.get("/health").status == 200
        gate.open()
        asked = {"prompt": "matters more", "temperature": 0, "max_tokens": 12, "nearfar": {"priority": 9}}
        assert client.ok("completions", **asked)["choices"][0]["text"] == expected
        assert gateway.limits.n_seqs > 5000
        for stream in flood:
            stream.leave()
        check_quiet(gateway)
        assert served.engine.counts.generated_tokens < 100_000  # of four millions


async def _flood(port: int, n: int) -> list[tuple[int, bytes]]:
    """`n` requests over a hundred connections: each of them asks again once it has been refused."""
    raw = raw_request({"prompt": "the flood", "max_tokens": 2, "temperature": 0})
    left, found = n, []

    async def one_connection() -> None:
        nonlocal left
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while left > 0:
            left -= 1
            writer.write(raw)
            headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            size = int(headers.split("content-length: ")[1].split("\r\n")[0])
            status = int(headers.split()[1])
            assert (status == 503) == ("retry-after: " in headers)
            found.append((status, await reader.readexactly(size)))
        writer.close()

    await asyncio.gather(*(one_connection() for _ in range(100)))
    return found


def test_a_schema_bomb_is_refused_while_others_go_on() -> None:
    bomb: dict[str, Any] = {"type": "string"}
    for i in range(10):
        bomb = {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {"type": "integer"}}} for j in range(8)]}, bomb]}
    again = {"type": "array", "items": bomb}
    with serving(tiny(64)) as (client, gateway, _):
        expected = greedy(client, "goes on", 40)
        stream = client.open_stream("completions", prompt="goes on", max_tokens=40, temperature=0)
        for schema in (bomb, again, {"enum": [f"word number {i}" * 10 for i in range(2000)]}):
            format_ = {"type": "json_schema", "json_schema": {"schema": schema}}
            reply = client.post("chat/completions", messages=USER, response_format=format_)
            assert (reply.status, reply.code) == (400, "schema_too_complex")
        assert text_of(stream.rest()) == expected
        assert client.metric('nearfar_cloud_grammar_total{what="refused"}') == 3
        check_quiet(gateway)


def test_a_deadline_that_passes_ends_the_answer() -> None:
    served = tiny(64)
    gate = Gate(served)
    with serving(served) as (client, gateway, _):
        gate.close()
        reply = client.post("completions", prompt="late", max_tokens=50, nearfar={"deadline_ms": 50})
        assert (reply.status, reply.code) == (504, "deadline_exceeded")
        assert reply.json["error"]["param"] == "nearfar.deadline_ms"
        gate.open()
        check_quiet(gateway)
        hurried = client.ok("completions", prompt="late", max_tokens=5, nearfar={"deadline_ms": 60_000, "priority": 5})
        assert hurried["usage"]["completion_tokens"] > 0


def test_a_request_that_fails_takes_nobody_along(monkeypatch: pytest.MonkeyPatch) -> None:
    served = tiny(64)
    real = served.engine.executor.run

    def run_or_fail(batch: list[Any]) -> Any:
        if any(w.ids is not None and 200 in w.ids for w in batch):
            raise MemoryError("no room")
        return real(batch)

    with serving(served) as (client, gateway, _):
        expected = greedy(client, "stays")
        monkeypatch.setattr(served.engine.executor, "run", run_or_fail)
        stream = client.open_stream("completions", prompt=[200], max_tokens=20)
        reply = client.post("completions", prompt=[5, 200, 5], max_tokens=20, n=2)
        assert (reply.status, reply.code) == (500, "request_failed")
        assert stream.rest()[-1]["error"]["code"] == "request_failed"
        assert greedy(client, "stays") == expected
        check_quiet(gateway)


def test_numbers_that_are_not_finite_end_their_own_request(monkeypatch: pytest.MonkeyPatch) -> None:
    served = tiny(64)
    model = served.engine.executor.model  # type: ignore[attr-defined]
    real = model.embed

    def embed(ids: Any) -> Any:
        rows = real(ids)
        rows[ids == 200] = float("nan")
        return rows

    with serving(served) as (client, gateway, _):
        expected = greedy(client, "stays", 40)
        monkeypatch.setattr(model, "embed", embed)
        beside = client.open_stream("completions", prompt="stays", max_tokens=40, temperature=0)
        reply = client.post("completions", prompt=[5, 200, 5], max_tokens=20)
        assert (reply.status, reply.code) == (500, "request_failed")
        assert "not finite" in reply.json["error"]["message"]
        assert text_of(beside.rest()) == expected
        assert client.metric("nearfar_cloud_poisoned_total") == 1
        check_quiet(gateway)


def test_an_engine_that_stops_says_so_to_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of ours: nobody waits for ever, and /health tells whoever may start the server again."""
    served = tiny(64)
    gate = Gate(served)
    with serving(served) as (client, gateway, _):
        gate.close()
        stream = client.open_stream("completions", prompt="x", max_tokens=50)
        assert gate.waiting.wait(60)

        def broken() -> Any:
            raise RuntimeError("a fault")

        monkeypatch.setattr(served.engine, "view", broken)
        gate.open()
        assert stream.rest()[-1]["error"]["code"] == "engine_failed"
        assert gateway.service.failure == "RuntimeError"
        assert client.get("/health").status == 503
        assert client.get("/ready").status == 503
        reply = client.post("completions", prompt="x")
        assert (reply.status, reply.code) == (503, "engine_failed")


def test_a_reader_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    async def mailbox_overflows() -> None:
        box = Mailbox()
        for i in range(MAX_UNREAD):
            box.put(Output(1, (i,)))
        assert (await box.get()).ids == (0,)
        box.put(Output(1, (1,)))
        assert not box.ended
        box.put(Output(1, (2,)))
        with pytest.raises(Refusal, match="unread"):
            await box.get()

    async def socket_is_full() -> list[str]:
        done: list[str] = []

        async def pieces() -> Any:
            while True:
                yield b"x"

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        async def receive() -> Any:
            await asyncio.Event().wait()

        stream = EventStream(pieces(), lambda: done.append("closed"), asyncio.Event())
        await stream({"type": "http"}, receive, send)
        return done

    asyncio.run(mailbox_overflows())
    monkeypatch.setattr(server_events, "SEND_S", 0.05)
    assert asyncio.run(socket_is_full()) == ["closed"]


def test_a_server_that_is_to_stop_finishes_what_is_under_way() -> None:
    served = tiny(64)
    gate = Gate(served)
    with serving(served, grace_s=60) as (client, gateway, server):
        expected = greedy(client, "under way", 40)
        gate.close()
        stream = client.open_stream("completions", prompt="under way", max_tokens=40, temperature=0)
        server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: gateway.draining)
        assert client.get("/ready").status == 503
        assert client.get("/health").status == 200
        reply = client.post("completions", prompt="too late")
        assert (reply.status, reply.code) == (503, "shutting_down")
        assert "retry-after" in reply.headers
        gate.open()
        assert text_of(stream.rest()) == expected
        wait_until(lambda: server.should_exit)
        check_quiet(gateway)


def test_who_asks_twice_does_not_wait_for_the_grace_time() -> None:
    served = tiny(64)
    gate = Gate(served)
    with serving(served, grace_s=3600) as (client, gateway, server):
        gate.close()
        stream = client.open_stream("completions", prompt="too long", max_tokens=900)
        server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: gateway.draining)
        server.handle_exit(signal.SIGTERM, None)
        assert stream.rest()[-1]["error"]["code"] == "shutting_down"
        gate.open()
        check_quiet(gateway)


def test_what_does_not_end_within_the_grace_time_is_told_so() -> None:
    served = tiny(64)
    gate = Gate(served)
    with serving(served, grace_s=0) as (client, gateway, server):
        gate.close()
        stream = client.open_stream("completions", prompt="too long", max_tokens=900)
        server.handle_exit(signal.SIGTERM, None)
        assert stream.rest()[-1]["error"]["code"] == "shutting_down"
        gate.open()
        check_quiet(gateway)
