"""`nearfar cloud serve` as people start it: nano in a process of its own, SIGTERM under load, and what it refuses."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("fastapi", reason="fastapi is not installed (extra [cloud])")

from nearfar.cli.main import main
from nearfar.gguf_reader import ValueType
from nearfar_cloud.model.packed import can_pack
from tests.cloud.gateway import Client, nano_process, text_of, tiny_path
from tests.gguf_bytes import kv, string, u32
from tests.paths import needs_nano

SECRET = "the parrot knows the number of the safe"


@pytest.fixture
def process() -> Iterator[subprocess.Popen[str]]:
    with nano_process("--threads", "1", "--grace", "60") as started:
        yield started


@needs_nano
def test_nano_serves_calls_and_text_and_ends_in_order_under_load(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    facts = json.loads(line)
    assert (facts["model"], facts["context"]) == ("nano", 512)
    client = Client(int(facts["url"].split(":")[2].split("/")[0]), model="nano")

    # The call that a home's request becomes, in nano's own form.
    home = [
        {"role": "system", "content": " kitchen: light ceiling light; bedroom: fan fan"},
        {"role": "user", "content": "turn off the kitchen lights"},
    ]
    asked: dict[str, Any] = {"messages": home, "temperature": 0, "response_format": {"type": "json_object"}}
    call = json.loads(client.ok("chat/completions", **asked)["choices"][0]["message"]["content"])
    assert call["intent"].startswith("Hass")

    # A tool: what it is called with fits its parameters, and is text without the spaces of nano's rows.
    parameters = {
        "type": "object",
        "properties": {"to": {"type": "string"}},
        "required": ["to"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "FindBus", "parameters": parameters}}]
    asked = {
        "messages": [{"role": "user", "content": "find me a bus to london"}],
        "tools": tools,
        "tool_choice": "required",
    }
    choice = client.ok("chat/completions", **asked, temperature=0)["choices"][0]
    if choice["finish_reason"] == "tool_calls":
        arguments = json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])
        assert arguments["to"] == arguments["to"].strip()

    said = client.ok("chat/completions", messages=[{"role": "user", "content": "hello"}], temperature=0, max_tokens=20)
    assert not said["choices"][0]["message"]["content"].startswith(" ")

    # Six streams are under way when the signal comes; all of them end as they would have.
    prompts = [f"{SECRET} {i}" for i in range(6)]
    expected = client.ok("completions", prompt=prompts, temperature=0, max_tokens=120)["choices"]
    streams = [client.open_stream("completions", prompt=p, temperature=0, max_tokens=120) for p in prompts]
    firsts = [stream.next() for stream in streams]
    process.send_signal(signal.SIGTERM)
    with ThreadPoolExecutor(6) as threads:
        rest = list(threads.map(lambda stream: stream.rest(), streams))
    texts = [text_of([first, *more]) for first, more in zip(firsts, rest, strict=True)]
    assert texts == [choice["text"] for choice in expected]
    assert process.wait(60) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""  # no warning, no trace, and no prompt


def serve_briefly(learned: Path, threads: int = 1) -> tuple[int, str]:
    """(exit code, what it said aside) of a server that answers once."""
    command = [sys.executable, "-m", "nearfar.cli.main", "cloud", "serve", "nano", "--port", "0", "--json"]
    options = ["--threads", str(threads), "--learned", str(learned)]
    with subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if line := process.stdout.readline():
            port = int(json.loads(line)["url"].split(":")[2].split("/")[0])
            Client(port, model="nano").ok("completions", prompt="once upon", max_tokens=30)
            process.send_signal(signal.SIGTERM)
        return process.wait(60), process.communicate()[1]


@needs_nano
def test_what_steps_cost_is_kept_for_the_next_server(tmp_path: Path) -> None:
    learned = tmp_path / "cost.json"
    assert serve_briefly(learned) == (0, "")
    n_steps = []
    for _ in range(5):
        first = json.loads(learned.read_text())
        assert serve_briefly(learned) == (0, "")
        second = json.loads(learned.read_text())
        assert second["of"] == first["of"]
        n_steps = [sum(r["n"] for r in told["regimes"]) for told in (first, second)]
        if n_steps[1] > n_steps[0]:  # a machine that is suddenly slower makes it begin again
            break
    assert n_steps[1] > n_steps[0] > 0
    code, said = serve_briefly(learned, threads=2)
    assert code == 0
    assert "another model or machine" in said
    learned.write_text("{}")
    code, said = serve_briefly(learned)
    assert code == 3
    assert "not a cost model" in said
    assert learned.read_text() == "{}"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["no-such-model"], 3, "no such file"),
        (["nano", "--host", "0.0.0.0"], 2, "--key-file"),
        (["nano", "--tls-cert", "cert.pem"], 2, "expected both or none"),
        (["nano", "--tls-cert", "cert.pem", "--tls-key", "key.pem"], 3, "no certificate"),
        (["nano", "--key-file", "none.json"], 3, "none.json"),
        (["nano", "--host", "no.such.host.invalid"], 2, "--host"),
        (["nano", "--kv-memory", "0"], 2, "1..1048576"),
        (["nano", "--hidden-share", "3"], 2, "LAYER,PERCENT"),
        (["nano", "--hidden-share", "0,50"], 2, "a layer above 0"),
        (["nano", "--hidden-share", "99,50"], 2, "inside of the model"),
        (["nano", "--hidden-share", "2,50", "--workers", "2"], 2, "--workers"),
        (["nano", "--port", "70000"], 2, "0..65535"),
    ],
)
def test_what_cannot_be_served_ends_with_a_sentence_and_a_code(
    arguments: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cert.pem").write_text("no certificate")
    if "--port" not in arguments:
        arguments = [*arguments, "--port", "0"]
    try:
        found = main(["cloud", "serve", *arguments])
    except SystemExit as ended:  # argparse
        found = int(ended.code or 0)
    assert found == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("weights", ["file", "fp32"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[: len(raw) // 2], r"spoiled.gguf"),
        (lambda raw: raw[:20], r"spoiled.gguf"),
        (lambda raw: raw.replace(string("llama"), string("mamba")), "mamba"),
        (lambda raw: raw.replace(width(128), width(192)), "blk.0.ffn_gate.weight"),
        (lambda raw: raw.replace(string("blk.2.attn_k.weight"), string("blk.2.attn_x.weight")), "blk.2.attn_"),
    ],
    ids=["half", "header", "architecture", "shape", "missing"],
)
def test_damaged_weights_end_the_start_and_are_named(
    damage: Callable[[bytes], bytes], message: str, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if weights == "file" and not can_pack():
        pytest.skip("the extension is not built")
    raw = tiny_path().read_bytes()
    path = tmp_path / "spoiled.gguf"
    path.write_bytes(damage(raw))
    assert path.read_bytes() != raw
    assert main(["cloud", "serve", str(path), "--port", "0", "--weights", weights]) in (3, 4)
    said = capsys.readouterr().err
    assert "spoiled.gguf" in said
    assert message in said
    assert "Traceback" not in said


def width(n: int) -> bytes:
    """The feed-forward width, as the file says it."""
    return kv("llama.feed_forward_length", ValueType.U32, u32(n))


def test_a_port_that_is_taken_is_named_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["cloud", "serve", "no-such-model", "--port", str(taken.getsockname()[1])]) == 2
    assert "in use" in capsys.readouterr().err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["cloud", "serve", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "nearfar cloud serve nano" in text
    assert "--key-file" in text
