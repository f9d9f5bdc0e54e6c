"""The OpenAI routes say what the engine decided: whole, as a stream, beside whoever else is served."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("fastapi", reason="fastapi is not installed (extra [cloud])")

from nearfar.sampling import Sampling
from nearfar_cloud.types import Request
from tests.cloud.gateway import Client, check_quiet, events, serving, text_of, tiny, tiny_path
from tests.cloud.serving import drain, engine
from tests.cloud.serving import loaded as other_model

pytestmark = pytest.mark.usefixtures("one_thread")

USER = [{"role": "user", "content": "a question"}]
COLOURS = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "on": {"type": "boolean"}},
    "required": ["colour", "on"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with serving(tiny()) as (client, gateway, _):
        yield client
        check_quiet(gateway)


without_gateway = cache(tiny)


@cache
def alone(prompt: str, seed: int, max_tokens: int) -> str:
    """The text of a completion, from an engine without a gateway."""
    served = without_gateway()
    sampling = Sampling(temperature=1.0, seed=seed)
    ids = tuple(served.tokenizer.encode(prompt))
    served.engine.submit(Request(ids, max_tokens=max_tokens, sampling=sampling, stop_ids=served.tokenizer.eog_ids))
    return served.tokenizer.decode(next(iter(drain(served.engine).values())))


def test_a_completion_is_what_the_engine_decides(client: Client) -> None:
    for seed in range(3):
        found = client.ok("completions", prompt="the answer", seed=seed, max_tokens=24)
        assert found["choices"][0]["text"] == alone("the answer", seed, 24)
        assert found["usage"]["completion_tokens"] <= 24
        assert found["object"] == "text_completion"
        assert set(found["nearfar"]) == {
            "queue_ms", "ttft_ms", "cached_tokens", "cache", "drafted", "accepted", "preempted", "lossy"
        }  # fmt: skip
        assert found["nearfar"]["cache"] == "none"  # it is shorter than a block


def test_answers_at_the_same_time_are_those_of_one_at_a_time(client: Client) -> None:
    prompts = [f"{'the ' * (3 * i)}end" for i in range(8)]
    with ThreadPoolExecutor(8) as threads:
        asked = threads.map(lambda i: client.ok("completions", prompt=prompts[i], seed=i, max_tokens=16), range(8))
        found = [reply["choices"][0]["text"] for reply in asked]
    assert found == [alone(prompt, i, 16) for i, prompt in enumerate(prompts)]


@pytest.mark.parametrize("seed", range(3))
def test_a_stream_adds_up_to_the_whole_text(client: Client, seed: int) -> None:
    """Random bytes: characters are cut by tokens, and some never end."""
    for path, body in (("completions", {"prompt": "some"}), ("chat/completions", {"messages": USER})):
        asked = body | {"seed": seed, "max_tokens": 40, "n": 2, "stop": ["the", "in"]}
        whole = client.ok(path, **asked)["choices"]
        found = client.stream(path, **asked)
        for i, choice in enumerate(whole):
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            assert text_of(found, i) == text
            ends = [c["finish_reason"] for e in found for c in e["choices"] if c["index"] == i and c["finish_reason"]]
            assert ends == [choice["finish_reason"]]
        assert len({e["id"] for e in found}) == 1


def test_the_usage_comes_with_a_stream_that_asks_for_it(client: Client) -> None:
    asked = {"prompt": "some", "seed": 1, "max_tokens": 9}
    found = client.stream("completions", **asked, stream_options={"include_usage": True})
    assert found[-1]["choices"] == []
    assert found[-1]["usage"] == client.ok("completions", **asked)["usage"]
    assert all("usage" not in event for event in found[:-1])


def test_n_choices_are_those_of_n_seeds_in_a_row(client: Client) -> None:
    found = client.ok("completions", prompt="several", n=3, seed=7, max_tokens=12)
    assert [c["text"] for c in found["choices"]] == [alone("several", seed, 12) for seed in (7, 8, 9)]
    assert (
        found["usage"]["prompt_tokens"]
        == client.ok("completions", prompt="several", max_tokens=1)["usage"]["prompt_tokens"]
    )


def test_several_prompts_are_several_choices(client: Client) -> None:
    found = client.ok("completions", prompt=["one", "another one"], seed=3, max_tokens=8)
    assert [c["text"] for c in found["choices"]] == [alone("one", 3, 8), alone("another one", 3, 8)]
    ids = [without_gateway().tokenizer.encode(text) for text in ("one", "another one")]
    assert client.ok("completions", prompt=ids, seed=3, max_tokens=8)["choices"] == found["choices"]


def test_a_stop_string_ends_the_text_before_it_wherever_tokens_are_cut(client: Client) -> None:
    whole = alone("stop here", 5, 60)
    for at in (3, 11, 20):
        stop = whole[at : at + 4]
        found = client.ok("completions", prompt="stop here", seed=5, max_tokens=60, stop=[stop, "never written"])
        assert found["choices"][0]["text"] == whole[: whole.index(stop)]
        assert found["choices"][0]["finish_reason"] == "stop"
        assert found["usage"]["completion_tokens"] < 60


def test_logprobs_are_told_for_every_token(client: Client) -> None:
    asked = {"seed": 2, "max_tokens": 6, "temperature": 0}
    told = client.ok("completions", prompt="log", logprobs=3, **asked)["choices"][0]["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"]) == 6
    for own, top in zip(told["token_logprobs"], told["top_logprobs"], strict=True):
        assert own == max(top.values()) < 0
        assert len(top) <= 3
    whole = client.ok("chat/completions", messages=USER, logprobs=True, top_logprobs=2, **asked)
    content = whole["choices"][0]["logprobs"]["content"]
    assert len(content) == 6
    for token in content:
        assert token["logprob"] == token["top_logprobs"][0]["logprob"]
        assert token["bytes"] == token["top_logprobs"][0]["bytes"]
    streamed = client.stream("chat/completions", messages=USER, logprobs=True, top_logprobs=2, **asked)
    parts = [c["logprobs"]["content"] for e in streamed for c in e["choices"] if c["logprobs"]]
    assert [token for part in parts for token in part] == content


def test_a_prefix_that_was_computed_before_is_not_computed_again(client: Client) -> None:
    prompt = "the " * 100
    first = client.ok("completions", prompt=prompt, max_tokens=4, temperature=0)
    again = client.ok("completions", prompt=prompt, max_tokens=4, temperature=0)
    assert again["choices"] == first["choices"]
    assert again["nearfar"]["cached_tokens"] == again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 64
    assert again["nearfar"]["cache"] == "exact"
    assert client.metric('nearfar_cloud_prefix_blocks_total{what="hit"}') >= 1
    assert first["nearfar"]["lossy"] == again["nearfar"]["lossy"] == []


def test_programs_and_permissions_are_read_and_change_no_answer(client: Client) -> None:
    asked = {"prompt": "a job", "seed": 3, "max_tokens": 8}
    expected = client.ok("completions", **asked)["choices"]
    extension = {"program": "job 7", "program_end": True, "allow": ["semantic", "examples", "kv_share"]}
    found = client.ok("completions", **asked, nearfar=extension)
    assert (found["choices"], found["nearfar"]["lossy"]) == (expected, [])


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_follows_its_schema(client: Client, seed: int) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "light", "schema": COLOURS}}
    asked = {"messages": USER, "seed": seed, "temperature": 2, "response_format": format_}
    whole = client.ok("chat/completions", **asked)["choices"][0]
    value = json.loads(whole["message"]["content"])
    assert value["colour"] in ("red", "green")
    assert value["on"] in (True, False)
    assert set(value) == {"colour", "on"}
    assert whole["finish_reason"] == "stop"
    assert text_of(client.stream("chat/completions", **asked)) == whole["message"]["content"]
    responses = {
        "input": "a question",
        "temperature": 2,
        "text": {"format": {"type": "json_schema", "name": "light", "schema": COLOURS}},
    }
    text = client.ok("responses", seed=seed, **responses)["output"][0]["content"][0]["text"]
    assert set(json.loads(text)) == {"colour", "on"}


TOOLS = [
    {"type": "function", "function": {"name": "paint", "description": "paint it", "parameters": COLOURS}},
    {"type": "function", "function": {"name": "wait", "parameters": {
        "type": "object", "properties": {"minutes": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["minutes"], "additionalProperties": False}}},
]  # fmt: skip


def check_call(call: dict[str, Any]) -> str:
    """The name of a call, whose arguments fit."""
    arguments = json.loads(call["function"]["arguments"])
    if call["function"]["name"] == "paint":
        assert arguments["colour"] in ("red", "green")
    else:
        assert 1 <= arguments["minutes"] <= 9
    return str(call["function"]["name"])


def test_a_call_that_is_asked_for_names_a_function_and_fits_its_parameters(client: Client) -> None:
    called = set()
    for seed in range(4):
        asked = {"messages": USER, "tools": TOOLS, "tool_choice": "required", "seed": seed, "max_tokens": 200}
        choice = client.ok("chat/completions", **asked)["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        called.add(check_call(choice["message"]["tool_calls"][0]))
        found = client.stream("chat/completions", **asked)
        calls = [c["delta"]["tool_calls"][0] for e in found for c in e["choices"] if "tool_calls" in c["delta"]]
        assert [call["function"] for call in calls] == [choice["message"]["tool_calls"][0]["function"]]
        assert text_of(found) == ""
    assert called == {"paint", "wait"}
    named = {"type": "function", "function": {"name": "wait"}}
    choice = client.ok("chat/completions", messages=USER, tools=TOOLS, tool_choice=named)["choices"][0]
    assert check_call(choice["message"]["tool_calls"][0]) == "wait"


def test_a_model_that_may_call_answers_with_text_or_with_a_call(client: Client) -> None:
    for seed in range(4):
        choice = client.ok("chat/completions", messages=USER, tools=TOOLS, seed=seed, max_tokens=30)["choices"][0]
        if "tool_calls" in choice["message"]:
            check_call(choice["message"]["tool_calls"][0])
        else:
            assert not choice["message"]["content"].startswith("{") or choice["finish_reason"] == "length"


def test_calls_and_their_results_are_part_of_a_conversation(client: Client) -> None:
    called = [{"id": "call_1", "type": "function", "function": {"name": "wait", "arguments": '{"minutes": 3}'}}]
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        *USER,
        {"role": "assistant", "content": None, "tool_calls": called},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]
    n = client.ok("chat/completions", messages=messages, tools=TOOLS, max_tokens=3)["usage"]["prompt_tokens"]
    assert n > client.ok("chat/completions", messages=USER, tools=TOOLS, max_tokens=3)["usage"]["prompt_tokens"]


def test_a_response_is_the_chat_answer_in_other_words(client: Client) -> None:
    asked = {"seed": 4, "temperature": 0.9}
    chat = client.ok(
        "chat/completions", messages=[{"role": "system", "content": "short"}, *USER], max_tokens=12, **asked
    )
    found = client.ok("responses", input="a question", instructions="short", max_output_tokens=12, **asked)
    assert found["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert found["usage"]["output_tokens"] == chat["usage"]["completion_tokens"]
    assert found["status"] == ("incomplete" if chat["choices"][0]["finish_reason"] == "length" else "completed")
    items = [
        {"role": "system", "content": "short"},
        {"role": "user", "content": [{"type": "input_text", "text": "a question"}]},
    ]
    assert (
        client.ok("responses", input=items, max_output_tokens=12, **asked)["output"][0]["content"]
        == found["output"][0]["content"]
    )


def test_the_events_of_a_response_are_numbered_and_end_with_the_whole(client: Client) -> None:
    asked = {"input": "a question", "seed": 4, "max_output_tokens": 12}
    found = client.stream("responses", **asked)
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    assert [found[0]["type"], found[1]["type"]] == ["response.created", "response.in_progress"]
    deltas = "".join(event["delta"] for event in found if event["type"] == "response.output_text.delta")
    last = found[-1]["response"]
    assert last["output"][0]["content"][0]["text"] == deltas
    assert deltas == client.ok("responses", **asked)["output"][0]["content"][0]["text"]
    tools = [{"type": "function", "name": "wait", "parameters": TOOLS[1]["function"]["parameters"]}]  # type: ignore[index]
    called = client.stream("responses", input="a question", tools=tools, tool_choice="required", seed=1)
    assert called[-1]["type"] == "response.completed"
    item = called[-1]["response"]["output"][0]
    assert item["type"] == "function_call"
    assert 1 <= json.loads(item["arguments"])["minutes"] <= 9
    assert [e["arguments"] for e in called if e["type"] == "response.function_call_arguments.done"] == [
        item["arguments"]
    ]


def test_an_embedding_is_the_mean_row_and_does_not_depend_on_company(client: Client) -> None:
    texts = ["the " * 80, "another", "the " * 80 + "end"]
    found = client.ok("embeddings", input=texts)
    rows = [np.array(item["embedding"], np.float32) for item in found["data"]]
    for text, row in zip(texts, rows, strict=True):
        assert np.sqrt((row.astype(np.float64) ** 2).sum()) == pytest.approx(1, abs=1e-6)
        apart = client.ok("embeddings", input=text)["data"][0]["embedding"]
        assert np.array_equal(np.array(apart, np.float32), row)
        assert row @ reference(text) == pytest.approx(1, abs=1e-5)
    packed = client.ok("embeddings", input=texts[1], encoding_format="base64")["data"][0]["embedding"]
    assert np.array_equal(np.array(struct.unpack(f"<{len(rows[1])}f", base64.b64decode(packed)), np.float32), rows[1])
    assert found["usage"] == {
        "prompt_tokens": found["usage"]["total_tokens"],
        "total_tokens": found["usage"]["total_tokens"],
    }


def reference(text: str) -> np.ndarray:
    """The same from the readable engine of the device: numpy, all rows at once."""
    from nearfar.lower import open_lower
    from nearfar.weights import Weights

    weights = Weights.open(tiny_path())
    lower = open_lower(weights, "numpy")
    ids = np.array(without_gateway().tokenizer.encode(text), np.int32)
    h = lower.forward(lower.embed(ids), lower.new_kv(1024, "f32"), 0, weights.config.n_layers)
    mean = lower.norm(h).astype(np.float64).mean(axis=0)
    return mean / np.sqrt(mean @ mean)


def test_a_mean_is_the_same_however_its_prompt_is_cut() -> None:
    from nearfar_cloud.scheduling.budget import Arrival, ChunkedPrefill

    ids = tuple(i % 320 for i in range(300))
    found = []
    for rows in (64, 100, 4096):
        e = engine(ChunkedPrefill(rows), Arrival(), model=other_model())
        e.submit(Request(ids[:200], max_tokens=3))
        e.submit(Request(ids, max_tokens=1, pooled=True))
        outputs = []
        while e.seqs or e.has_work:
            outputs += e.step()
        found.append(next(out.pooled for out in outputs if out.pooled is not None))
    assert all(np.array_equal(row, found[0]) for row in found)


def test_the_model_is_listed(client: Client) -> None:
    (found,) = client.get("/v1/models").json["data"]
    assert found["id"] == client.model
    assert found["nearfar"]["context"] == 1024
    assert client.get(f"/v1/models/{client.model}").json["id"] == client.model
    assert client.get("/v1/models/another").code == "model_not_found"


def test_health_readiness_and_metrics_are_told(client: Client) -> None:
    assert client.get("/health").json == {"status": "ok"}
    assert client.get("/ready").json == {"ready": True}
    before = client.metric('nearfar_cloud_tokens_total{kind="generated"}')
    count = client.metric('nearfar_cloud_requests_total{code="200",route="/v1/completions"}')
    client.ok("completions", prompt="count", max_tokens=5, seed=0)
    assert client.metric('nearfar_cloud_tokens_total{kind="generated"}') == before + 5
    assert client.metric('nearfar_cloud_requests_total{code="200",route="/v1/completions"}') == count + 1
    client.get("/v1/no/such/route")
    assert client.metric('nearfar_cloud_requests_total{code="404",route="other"}') == 1
    text = client.get("/metrics").raw.decode()
    for name in ("ttft_s", "tbt_s", "e2e_s", "queue_s", "step_s", "plan_s", "commit_s", "step_rows"):
        assert f"nearfar_cloud_{name}_count" in text
    assert 'nearfar_cloud_prefix_blocks_total{what="miss"}' in text
    assert "nearfar_cloud_cost_error_ratio_count" in text
    assert client.metric("nearfar_cloud_resident_bytes") > 1 << 20
    for state in ("free", "cached", "used"):
        assert f'nearfar_cloud_kv_blocks{{state="{state}"}}' in text
    for name in ("seqs", "kv_blocks", "queue_tokens", "preemptions_total", "poisoned_total"):
        assert f"nearfar_cloud_{name}" in text


def test_a_seed_is_drawn_where_none_is_given(client: Client) -> None:
    texts = {client.ok("completions", prompt="draw", max_tokens=12, seed=None)["choices"][0]["text"] for _ in range(4)}
    assert len(texts) > 1


def test_events_are_framed_as_the_standard_says(client: Client) -> None:
    reply = client.post("completions", prompt="frame", max_tokens=2, seed=0, stream=True)
    assert reply.raw.endswith(b"data: [DONE]\n\n")
    assert next(events(reply.raw))["object"] == "text_completion"
    assert client.post("responses", input="frame", max_output_tokens=2, stream=True).raw.startswith(
        b"event: response.created\n"
    )
