"""A stream that was cut is read on from its cursor: the same tokens, by the same tenant, for a bounded time."""

from __future__ import annotations

import gc
import json
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("fastapi", reason="fastapi is not installed (extra [cloud])")

from nearfar_cloud.gateway import service, streams
from nearfar_cloud.gateway.answers import Answer
from nearfar_cloud.gateway.grammar import GrammarHook
from nearfar_cloud.gateway.limits import Keys
from nearfar_cloud.gateway.openai import Query
from tests.cloud.gateway import Client, Gate, Reply, check_quiet, events, serving, text_of, tiny, wait_until
from tests.cloud.test_gateway_limits import digest, key_file

pytestmark = pytest.mark.usefixtures("one_thread")

USER = [{"role": "user", "content": "a question"}]
COLOURS = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]}
PARAMETERS = COLOURS | {"additionalProperties": False}
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("completions", {"prompt": "some", "seed": 2, "max_tokens": 12, "n": 2, "logprobs": 2, "stop": ["the"]}),
    ("chat/completions", {"messages": USER, "max_tokens": 12, "stream_options": {"include_usage": True}}),
    ("chat/completions", {"messages": USER, "tool_choice": "required", "seed": 1, "tools": [
        {"type": "function", "function": {"name": "paint", "parameters": PARAMETERS}}]}),
    ("responses", {"input": "a question", "seed": 4, "max_output_tokens": 12}),
]  # fmt: skip


def frames(raw: bytes) -> list[bytes]:
    return [frame + b"\n\n" for frame in raw.split(b"\n\n")[:-1]]


def cursor_of(frame: bytes) -> str:
    return next(line for line in frame.decode().splitlines() if line.startswith("id: ")).removeprefix("id: ")


def whole(client: Client, path: str, body: dict[str, Any]) -> list[bytes]:
    """The frames of a stream that is read to its end."""
    reply = client.post(path, **body, stream=True)
    assert reply.status == 200, reply.raw
    return frames(reply.raw)


def again(client: Client, path: str, body: dict[str, Any], cursor: str) -> Reply:
    """The same body once more, with a cursor."""
    raw = client.asked(path, body) | {"stream": True}
    return client.send("POST", f"/v1/{path}", raw, **{"last-event-id": cursor})


def timeless(frame: bytes) -> Any:
    """What an event says of the answer, without when and how fast it was made."""
    said = [line for line in frame.decode().splitlines() if line.startswith("data: {")]
    found = json.loads(said[0].removeprefix("data: ")) if said else {}
    for part in (found, found.get("response", {})):
        for name in ("created", "created_at", "nearfar"):
            part.pop(name, None)
    return cursor_of(frame), found


@pytest.mark.parametrize(("path", "body"), ASKED, ids=["choices", "chat", "call", "response"])
def test_what_is_kept_is_told_again_from_any_event_on(path: str, body: dict[str, Any]) -> None:
    with serving(tiny(64)) as (client, gateway, _):
        told = whole(client, path, body)
        n_steps = gateway.served.engine.counts.steps
        for k, frame in enumerate(told):
            assert b"".join(told[k + 1 :]) == client.read_on(path, cursor_of(frame)).raw
            assert b"".join(told[k + 1 :]) == again(client, path, body, cursor_of(frame)).raw
        assert client.get(f"/v1/{path}/{cursor_of(told[0]).partition('.')[0]}").raw == b"".join(told)
        assert gateway.served.engine.counts.steps == n_steps  # nothing is computed for it
        assert client.metric('nearfar_cloud_resumed_total{how="kept"}') == 2 * len(told) + 1
        check_quiet(gateway)


@pytest.mark.parametrize(("path", "body"), ASKED[1:], ids=["chat", "call", "response"])
def test_what_is_not_kept_is_computed_again(path: str, body: dict[str, Any]) -> None:
    """By another server of the same model, from any event on; a seed that was drawn is in the cursor."""
    with serving(tiny(64)) as (client, _, _):
        told = whole(client, path, body)
    with serving(tiny(64), kept_s=0) as (client, gateway, _):
        for k, frame in enumerate(told):
            found = frames(again(client, path, body, cursor_of(frame)).raw)
            assert [timeless(f) for f in found] == [timeless(f) for f in told[k + 1 :]]
        assert gateway.tapes.n_parked == 0
        assert client.metric('nearfar_cloud_resumed_total{how="again"}') == len(told)
        check_quiet(gateway)


SAMPLED = {"seed": 5, "max_tokens": 40, "repetition_penalty": 1.3, "n": 2}
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"type": "array", "items": COLOURS, "minItems": 6}}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": "a prompt", "stop": ["no such text"]} | SAMPLED),
        ("completions", {"prompt": ["one", "one one one one"], "temperature": 0, "max_tokens": 40}),
        ("chat/completions", {"messages": USER, "response_format": SCHEMA, "seed": 3, "max_tokens": 60}),
    ],
    ids=["sampled", "drafted", "schema"],
)
def test_an_unfinished_answer_goes_on_with_the_tokens_it_would_have_had(path: str, body: dict[str, Any]) -> None:
    """Its reader leaves every few steps, and nothing runs until it comes back."""
    served = tiny(64)
    gate = Gate(served)
    with serving(served) as (client, gateway, _):
        expected = client.stream(path, **body)
        client.send("DELETE", f"/v1/{path}/{expected[0]['id']}")
        indices = {c["index"] for event in expected for c in event["choices"]}
        gate.close()
        found: list[Any] = []
        cursor, n_read, n_rounds = None, 0, 0
        is_complete = False
        while not is_complete:
            n_rounds += 1
            stream = client.open_stream(path, cursor, **body)
            gate.step(3)
            wait_until(lambda: len(gateway.tapes._tapes) == 1)
            (tape,) = gateway.tapes._tapes.values()
            wait_until(lambda tape=tape, n=n_read: tape.n > n)
            while n_read < tape.n:
                found.append(stream.next())
                n_read += 1
            cursor = stream.cursor
            is_complete = tape.answer is None and n_read == tape.n
            stream.leave()
            wait_until(lambda: gateway.tapes.n_parked == 1 and not gateway.limits.n_seqs)
            gate.open()
            wait_until(lambda: not served.engine.seqs)
            gate.close()
        assert n_rounds > 5
        assert found.pop() is None  # the mark of the end
        for k in indices:
            assert text_of(found, k) == text_of(expected, k)
            ends = [
                [c["finish_reason"] for e in told for c in e["choices"] if c["index"] == k]
                for told in (found, expected)
            ]
            assert ends[0] == ends[1]
        check_quiet(gateway)


def test_a_reader_that_is_too_slow_is_cut_and_reads_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small buffers between server and reader: they are full, then 20 tokens wait, then the answer is stopped."""
    monkeypatch.setattr(service, "MAX_UNREAD", 20)
    served = tiny(64)
    body = {"prompt": "slow", "seed": 1, "max_tokens": 900, "logprobs": 20}
    with serving(served) as (client, gateway, server):
        expected = text_of(client.stream("completions", **body))
        before = served.engine.counts.generated_tokens
        for asyncio_server in server.servers:
            for listening in asyncio_server.sockets:
                listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        stream = client.open_stream("completions", receive_buffer=4096, **body)
        wait_until(lambda: served.engine.counts.cancelled == 1)
        wait_until(lambda: not served.engine.seqs)
        assert served.engine.counts.generated_tokens - before < 900
        found = stream.rest()
        assert found.pop()["error"]["code"] == "slow_reader"
        n_cuts, cursor = 1, stream.cursor
        while (rest := client.read_on("completions", cursor)).raw:
            told = frames(rest.raw)
            found += events(rest.raw)
            cursor = cursor_of(told[-1])
            if "error" in found[-1]:  # it was too slow once more
                found.pop()
                n_cuts += 1
        assert text_of(found) == expected
        assert client.metric('nearfar_cloud_refusals_total{reason="slow_reader"}') == n_cuts
        check_quiet(gateway)


def test_a_second_reader_takes_the_stream_from_the_first() -> None:
    """The client comes back before the server has noticed that it had gone."""
    served = tiny(64)
    gate = Gate(served)
    with serving(served) as (client, gateway, _):
        body = {"messages": USER, "seed": 1, "max_tokens": 30}
        expected = text_of(client.stream("chat/completions", **body))
        gate.close()
        first = client.open_stream("chat/completions", **body)
        begun = first.next()
        second = client.open_stream("chat/completions", first.cursor, **body)
        assert first.rest() == []
        gate.open()
        assert text_of([begun, *second.rest()]) == expected
        check_quiet(gateway)


def test_streams_are_the_tenants_own(tmp_path: Path) -> None:
    path = key_file(
        tmp_path,
        {"tenant": "alice", "sha256": digest("alice's"), "metrics": True},
        {"tenant": "bob", "sha256": digest("bob's")},
    )
    with serving(tiny(64), keys=Keys.read(path)) as (nobody, gateway, _):
        alice, bob = Client(nobody.port, "alice's"), Client(nobody.port, "bob's")
        body = {"prompt": "hers", "max_tokens": 5}
        told = whole(alice, "completions", body)
        cursor = cursor_of(told[1])
        place = f"/v1/completions/{cursor.partition('.')[0]}"
        assert nobody.read_on("completions", cursor).status == 401
        assert bob.read_on("completions", cursor).code == "not_found"
        assert bob.get(place).code == "not_found"
        assert bob.send("DELETE", place).code == "not_found"
        # Whoever knows her body and her cursor computes for himself.
        assert again(bob, "completions", body, cursor).status == 200
        assert alice.metric('nearfar_cloud_resumed_total{how="again"}') == 1
        assert alice.read_on("completions", cursor).raw == b"".join(told[2:])
        assert alice.send("DELETE", place).json["deleted"]
        assert alice.read_on("completions", cursor).code == "not_found"
        assert bob.read_on("completions", cursor).status == 200
        check_quiet(gateway)


def test_what_is_kept_is_bounded_in_time() -> None:
    with serving(tiny(64), kept_s=0.05) as (client, gateway, _):
        told = whole(client, "completions", {"prompt": "brief", "max_tokens": 3, "n": 2})
        # The reader may be faster than the server, which keeps the stream only then.

        def is_gone() -> bool:
            time.sleep(0.2)  # each look at it keeps it again
            return client.read_on("completions", cursor_of(told[0])).status == 404

        wait_until(is_gone)
        assert client.read_on("completions", cursor_of(told[0])).code == "not_found"
        several = again(client, "completions", {"prompt": "brief", "max_tokens": 3, "n": 2}, cursor_of(told[0]))
        assert (several.status, several.code) == (410, "cursor_expired")  # the order of two choices is not repeated
        assert (gateway.tapes.n_bytes, client.metric("nearfar_cloud_kept_bytes")) == (0, 0)


def test_what_is_kept_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tiny(64)) as (client, gateway, _):
        body = {"prompt": "long", "seed": 1, "max_tokens": 40}
        monkeypatch.setattr(streams, "TAPE_BYTES", 4000)
        told = whole(client, "completions", body)
        late = again(client, "completions", body, cursor_of(told[-2]))  # the last events are there
        assert late.raw == told[-1]
        assert client.read_on("completions", cursor_of(told[0])).code == "cursor_expired"
        assert timeless(frames(again(client, "completions", body, cursor_of(told[0])).raw)[0]) == timeless(told[1])
        monkeypatch.setattr(streams, "TENANT_BYTES", 25_000)
        first = [whole(client, "completions", body)[0] for _ in range(20)]
        wait_until(lambda: gateway.tapes.n_parked == len(gateway.tapes._tapes))  # the last reader has left
        assert 2 <= gateway.tapes.n_parked <= 6
        assert gateway.tapes.n_bytes == client.metric("nearfar_cloud_kept_bytes") <= 25_000
        statuses = [client.get(f"/v1/completions/{cursor_of(f).partition('.')[0]}").status for f in first]
        assert statuses == sorted(statuses)  # the oldest went first: 404 404 ... 410
        check_quiet(gateway)


def test_what_an_unfinished_stream_holds_is_counted() -> None:
    """Its question, and log-probabilities that are many times its text."""
    served = tiny(64)
    gate = Gate(served)
    with serving(served) as (client, gateway, _):
        gate.close()
        question = "a question " * 40
        asked: list[tuple[str, dict[str, Any]]] = [
            ("completions", {"prompt": question, "max_tokens": 200, "logprobs": 20, "seed": 1}),
            ("responses", {"input": question, "max_output_tokens": 200, "seed": 1}),
            ("chat/completions", {"messages": [{"role": "user", "content": question}], "seed": 1}),
        ]
        held = []
        for i, (path, body) in enumerate(asked):
            stream = client.open_stream(path, **body)
            gate.step(30)
            for _ in range(10):
                stream.next()
            stream.leave()
            wait_until(lambda n=i: gateway.tapes.n_parked == n + 1)
            gate.open()
            wait_until(lambda: not served.engine.seqs)
            gate.close()
            tape = next(t for t in gateway.tapes._parked if t.start.answer == stream.cursor.partition(".")[0])
            assert tape.answer is not None
            held.append(gateway.tapes._parked[tape][1] - tape._n_bytes - streams.A_TAPE)
            assert held[-1] >= len(question) + streams.AN_ID * tape.answer.left.n_known
        assert held[0] > 5 * 20 * 88  # a pair and a float for each alternative
        gate.open()
        check_quiet(gateway)


def test_of_a_finished_stream_its_events_are_kept_and_nothing_else() -> None:
    with serving(tiny(64), kept_s=3600) as (client, gateway, _):

        def held() -> set[int]:
            gc.collect()
            return {id(found) for found in gc.get_objects() if type(found) in (Answer, Query)}

        before = held()
        for path, body in ASKED:
            whole(client, path, body)
        wait_until(lambda: gateway.tapes.n_parked == len(ASKED))
        check_quiet(gateway)
        wait_until(lambda: held() <= before)


def test_a_grammar_follows_what_was_told_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    served = tiny(64)
    gate = Gate(served)
    accepted: list[int] = []
    accept = GrammarHook.accept

    def seen(hook: GrammarHook, token: int) -> None:
        accepted.append(threading.get_ident())
        accept(hook, token)

    with serving(served) as (client, gateway, _):
        gate.close()
        body = {"messages": USER, "response_format": SCHEMA, "seed": 3, "max_tokens": 60}
        stream = client.open_stream("chat/completions", **body)
        gate.step(20)
        for _ in range(10):
            stream.next()
        stream.leave()
        wait_until(lambda: gateway.tapes.n_parked == 1)
        (tape,) = gateway.tapes._parked
        assert tape.answer is not None
        n_told = tape.answer.n_generated
        gate.open()
        wait_until(lambda: not served.engine.seqs)
        gate.close()
        monkeypatch.setattr(GrammarHook, "accept", seen)
        more = client.open_stream("chat/completions", stream.cursor, **body)
        loop, engine = gateway.service._loop, gateway.service._thread
        assert loop is not None
        assert engine is not None
        beside = [thread for thread in accepted if thread != engine.ident]
        assert len(beside) == n_told > 5
        ran: list[int] = []
        loop.call_soon_threadsafe(lambda: ran.append(threading.get_ident()))
        wait_until(lambda: bool(ran))
        assert ran[0] not in beside
        gate.open()
        assert text_of(more.rest())
        check_quiet(gateway)


def test_the_pause_of_a_reader_is_no_time_between_tokens() -> None:
    served = tiny(64)
    gate = Gate(served)
    with serving(served) as (client, gateway, _):
        gate.close()
        stream = client.open_stream("completions", prompt="pauses", max_tokens=40, seed=1)
        gate.step(10)
        stream.next()
        stream.leave()
        wait_until(lambda: gateway.tapes.n_parked == 1)
        (tape,) = gateway.tapes._parked
        assert tape.answer is not None
        tape.answer._last = [then - 1e6 for then in tape.answer._last]  # as if it had been long ago
        gate.open()
        assert client.read_on("completions", stream.cursor).status == 200
        assert 0 < client.metric("nearfar_cloud_tbt_s_sum") < 1e6
        check_quiet(gateway)


def test_a_stream_that_a_stopping_server_cut_is_read_on_elsewhere() -> None:
    served = tiny(64)
    gate = Gate(served)
    body = {"prompt": "cut by a signal", "max_tokens": 60, "seed": 7}
    with serving(served, grace_s=0) as (client, gateway, server):
        gate.close()
        stream = client.open_stream("completions", **body)
        gate.step(10)
        found = [stream.next()]
        server.handle_exit(signal.SIGTERM, None)
        found += stream.rest()
        assert found.pop()["error"]["code"] == "shutting_down"
        gate.open()
        check_quiet(gateway)
    with serving(tiny(64)) as (client, gateway, _):
        expected = text_of(client.stream("completions", **body))
        found += client.open_stream("completions", stream.cursor, **body).rest()
        assert text_of(found) == expected
        check_quiet(gateway)


def test_an_answer_that_failed_is_not_kept() -> None:
    served = tiny(64)
    gate = Gate(served)
    with serving(served) as (client, gateway, _):
        gate.close()
        cancelled = client.open_stream("chat/completions", messages=USER)
        late = client.open_stream("chat/completions", messages=USER, nearfar={"deadline_ms": 50})
        place = f"/v1/chat/completions/{cancelled.next()['id']}"
        assert client.send("DELETE", place).status == 200
        assert cancelled.rest()[-1]["error"]["code"] == "cancelled"
        assert late.rest()[-1]["error"]["code"] == "deadline_exceeded"
        assert gateway.tapes.n_parked == 0
        assert client.get(place).status == client.send("DELETE", place).status == 404
        gate.open()
        check_quiet(gateway)


def test_a_cursor_that_is_none_is_refused() -> None:
    with serving(tiny(64)) as (client, gateway, _):
        body = {"prompt": "x", "max_tokens": 3, "seed": 1}
        cursor = cursor_of(whole(client, "completions", body)[0])
        other = cursor_of(whole(client, "completions", body)[0])
        answer, n, seed, found = cursor.split(".")
        wrong = ["", "x", cursor[1:], f"{answer}.-1.{seed}.{found}", f"{answer}.{n}.{seed}.{'0' * 16}", "x" * 10_000]
        for text in [*wrong, f"chatcmpl-{answer[5:]}.{n}.{seed}.{found}"]:
            reply = again(client, "completions", body, text)
            assert (reply.status, reply.code, reply.json["error"]["param"]) == (400, "invalid_value", "Last-Event-ID")
        assert again(client, "completions", body | {"seed": 2}, cursor).code == "invalid_value"
        mixed = client.send("GET", f"/v1/completions/{answer}", **{"last-event-id": other})
        assert mixed.code == "invalid_value"
        assert client.read_on("completions", f"{answer}.999.{seed}.{found}").code == "cursor_expired"
        assert client.send("GET", "/v1/completions/cmpl-0").code == "not_found"
        check_quiet(gateway)
