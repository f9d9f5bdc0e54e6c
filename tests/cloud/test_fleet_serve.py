"""`nearfar cloud serve --workers`: a gateway over several processes answers as over one engine, and outlives them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("fastapi", reason="fastapi is not installed (extra [cloud])")
pytest.importorskip("msgspec", reason="msgspec is not installed (extra [cloud])")

from nearfar.cli.main import main
from nearfar.errors import NearfarError
from nearfar.sampling import Sampling
from nearfar_cloud.gateway.grammar import Grammars
from nearfar_cloud.gateway.served import describe, open_served
from nearfar_cloud.gateway.workers import open_fleet
from nearfar_cloud.types import Request
from tests.cloud.fleet import Answer, collect
from tests.cloud.gateway import Client, nano_process, serving, text_of, tiny_path, wait_until
from tests.paths import needs_nano
from tests.processes import parents

pytestmark = pytest.mark.usefixtures("one_thread")
SECRET = "the parrot knows the number of the safe"


def workers_of(pid: int) -> list[int]:
    """Its children, oldest first."""
    return sorted(child for child, parent in parents(zombies=False).items() if parent == pid)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    with nano_process("--threads", "2", "--workers", "2") as started:
        yield started


@needs_nano
def test_a_server_loses_workers_and_no_answer(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    client = Client(int(json.loads(line)["url"].split(":")[2].split("/")[0]), model="nano")
    pids = workers_of(process.pid)
    assert len(pids) == 2
    prompts = [f"{SECRET} {i}" for i in range(6)]
    asked: dict[str, Any] = {"temperature": 0.7, "seed": 3, "max_tokens": 300, "logprobs": 2}
    expected = [client.ok("completions", prompt=p, **asked)["choices"][0] for p in prompts]
    assert client.metric('nearfar_cloud_freeness{worker="0"}') > 0
    assert client.metric('nearfar_cloud_freeness{worker="1"}') > 0
    n_expected = client.metric('nearfar_cloud_tokens_total{kind="generated"}')

    streams = [client.open_stream("completions", prompt=p, **asked) for p in prompts]
    firsts = [stream.next() for stream in streams]
    os.kill(pids[0], signal.SIGKILL)
    with ThreadPoolExecutor(6) as threads:
        rest = list(threads.map(lambda stream: stream.rest(), streams))
    for first, more, choice in zip(firsts, rest, expected, strict=True):
        assert text_of([first, *more]) == choice["text"]
    wait_until(lambda: client.metric("nearfar_cloud_worker_restarts_total") == 1)
    # Either one may have been the older process.
    wait_until(lambda: all(client.metric(f'nearfar_cloud_freeness{{worker="{i}"}}') > 0 for i in (0, 1)))
    assert client.get("/ready").status == 200
    assert len(workers_of(process.pid)) == 2
    assert sum(event.get("nearfar", {}).get("preempted", 0) for events in rest for event in events) > 0
    assert client.metric('nearfar_cloud_tokens_total{kind="generated"}') >= 2 * n_expected

    # Its end under load: what is under way is finished by workers that hear the signal, too.
    streams = [client.open_stream("completions", prompt=p, **asked) for p in prompts]
    firsts = [stream.next() for stream in streams]
    pids = workers_of(process.pid)
    for pid in (process.pid, *pids):
        os.kill(pid, signal.SIGTERM)
    with ThreadPoolExecutor(6) as threads:
        rest = list(threads.map(lambda stream: stream.rest(), streams))
    assert [text_of([a, *b]) for a, b in zip(firsts, rest, strict=True)] == [c["text"] for c in expected]
    assert process.wait(60) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert process.stderr is not None
    said = process.stderr.read()
    assert re.fullmatch(r"worker [01] is lost: .*\n", said), said


@needs_nano
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_an_answer_that_follows_a_schema_goes_on_after_a_kill(temperature: float) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra [schema])")
    schema = {"type": "array", "items": {"type": "integer", "maximum": 99}, "minItems": 60, "maxItems": 70}
    here = open_served("nano")
    prompt = tuple(here.tokenizer.encode("numbers: "))
    req = Request(
        ids=prompt,
        max_tokens=400,
        sampling=Sampling(temperature, repetition_penalty=1.1, seed=4),
        stop_ids=here.tokenizer.eog_ids,
    )
    grammars = Grammars(here.tokenizer)
    compiled = asyncio.run(grammars.compile(schema, "schema"))
    here.engine.submit_branches(req, 1, [grammars.hook(compiled)])
    expected = Answer()
    while expected.finish is None:
        for out in here.engine.step():
            expected = expected.and_then(out)
    assert expected.finish == "stop"
    text = b"".join(here.tokenizer.token_bytes(i) for i in expected.ids)
    assert 60 <= len(json.loads(text)) <= 70

    killed = False
    with open_fleet("nano", 1, threads=1) as fleet:

        def kill(answers: dict[int, Answer]) -> None:
            nonlocal killed
            if not killed and any(len(a.ids) > 10 for a in answers.values()):
                killed = True
                os.kill(fleet.members[0].pid, signal.SIGKILL)

        (seq,) = fleet.submit_branches(req, 1, [grammars.hook(compiled)])
        assert collect(fleet, [seq], kill)[seq] == expected
        assert fleet.n_restarts == 1

        # From the middle, as a stream that was broken goes on; and with another worker lost on the way.
        half, killed = len(expected.ids) // 2, False
        hook = grammars.hook(compiled)
        for token in expected.ids[:half]:
            hook.accept(token)
        rest = replace(req, ids=req.ids + expected.ids[:half], max_tokens=req.max_tokens - half)
        (seq,) = fleet.submit_branches(rest, 1, [hook])
        assert collect(fleet, [seq], kill)[seq] == expected._replace(ids=expected.ids[half:])
        assert fleet.n_restarts == 2
    grammars.close()


def test_every_kind_of_request_is_served_by_workers_as_by_one_engine() -> None:
    """Branches, log-probabilities, embeddings, stop strings, an answer that is left; and nothing stays behind."""
    with serving(open_served(str(tiny_path()), form="fp32")) as (client, _, _):
        expected = [ask(client) for ask in ASKED]
    with (
        open_fleet(str(tiny_path()), 2, form="fp32", threads=2) as fleet,
        serving(describe(str(tiny_path())).served_by(fleet)) as (client, gateway, _),
    ):
        assert [ask(client) for ask in ASKED] == expected
        leaver = client.open_stream("completions", prompt="leaves", max_tokens=900, n=2)
        leaver.next()
        leaver.leave()
        wait_until(lambda: not gateway.limits.n_seqs and not gateway.service.n_open)
        wait_until(lambda: not fleet._open and all(load.n_seqs == 0 for load in fleet.loads.values()))
        assert all(load.n_used == 0 for load in fleet.loads.values())
        assert client.metric("nearfar_cloud_cancelled_total") == 2
        assert client.metric("nearfar_cloud_step_s_count") > 10
        reply = client.post("completions", prompt=[5] * 2000)
        assert (reply.status, reply.code) == (400, "context_length_exceeded")


def choices(client: Client, **body: Any) -> Any:
    return client.ok("completions", **body)["choices"]


ASKED = [
    lambda client: choices(client, prompt="a text", max_tokens=20, temperature=0),
    lambda client: choices(client, prompt=["one", [5, 6, 7]], max_tokens=9, seed=1, n=3, logprobs=2),
    lambda client: choices(client, prompt="the " * 300, max_tokens=30, temperature=0.5, seed=2, stop=["a", "e"]),
    lambda client: client.ok("embeddings", input=["the house", "a tree"])["data"],
    lambda client: client.ok("chat/completions", messages=[{"role": "user", "content": "x"}], seed=7)["choices"],
]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no-such-model", "--workers", "2"], 3, "no such file"),
        (["nano", "--workers", "2", "--weights", "q8_0"], 2, "q8_0 is made of folders"),
        (["nano", "--workers", "0"], 2, "1..256"),
        (["nano", "--ray"], 2, "--workers says how many"),
        (["nano", "--workers", "2", "--learned", "cost.json"], 2, "--learned"),
    ],
)
def test_what_workers_cannot_serve_ends_with_a_sentence(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        found = main(["cloud", "serve", *arguments, "--port", "0"])
    except SystemExit as ended:  # argparse
        found = int(ended.code or 0)
    assert found == code
    assert message in capsys.readouterr().err


def test_a_model_that_workers_cannot_load_is_told() -> None:
    with (
        pytest.raises(NearfarError, match=r"a worker did not start: gone\.gguf: no such file"),
        open_fleet("gone.gguf", 2),
    ):
        pass
