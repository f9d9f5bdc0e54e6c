"""The face: streams, stops, cancels, schemas, and answers that repeat themselves exactly."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from nearfar import LLM, Cancel, Sampling
from nearfar.errors import ContextError, FileError, SchemaError, TokenizerError, UnsupportedError, UsageError
from nearfar.forms import Part
from tests.tiny import write_tiny

WARM = Sampling(temperature=1.5, seed=5)


@pytest.fixture(scope="module", params=["numpy", "native", "llama"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    if request.param == "native":
        pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
    if request.param == "llama":
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra [llama])")
    path = write_tiny(tmp_path_factory.mktemp("llm") / "m.gguf", "bitnet", "F32", exits=(2,), tau=0.05, n_ctx=256)
    return LLM.open(path, backend=request.param)


def test_the_backend_says_what_it_is(llm: LLM) -> None:
    assert llm.backend.split()[0] in ("numpy", "native", "llama")


def test_stream_and_generate_give_the_same_answer(llm: LLM) -> None:
    whole = llm.generate("the inn and", max_tokens=40, sampling=WARM)
    stream = llm.stream("the inn and", max_tokens=40, sampling=WARM)
    events = list(stream)
    assert [e.id for e in events] == whole.ids
    assert "".join(e.text for e in events) == whole.text == stream.completion.text
    assert [e.index for e in events] == list(range(len(events)))
    assert sum(whole.stats.by_source.values()) == whole.stats.n_generated == len(whole.ids)
    assert whole.stats.first_token_ms > 0


def test_a_second_call_finds_its_cache_and_gives_the_same_answer(llm: LLM) -> None:
    prompt = "on the inn, and there"
    first = llm.generate(prompt, max_tokens=12, sampling=WARM, exits=False)
    again = llm.generate(prompt, max_tokens=12, sampling=WARM, exits=False)
    assert again.stats.n_cached == again.stats.n_prompt - 1
    assert again.ids == first.ids


def test_text_is_whole_characters_whatever_the_tokens_are(llm: LLM) -> None:
    completion = llm.generate("é", max_tokens=60, sampling=Sampling(temperature=3.0, seed=1))
    assert completion.text.encode()  # no lone surrogate: it can be written anywhere
    ids = [i for i in completion.ids if i not in llm.tokenizer.eog_ids]
    spaced = llm.tokenizer.decode(ids)
    assert completion.text == spaced


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(llm: LLM) -> None:
    text = llm.generate("the", max_tokens=60, sampling=WARM).text
    stop = text[10:13]
    cut = llm.generate("the", max_tokens=60, sampling=WARM, stop=[stop])
    assert cut.text == text[: text.find(stop)]
    assert cut.finish_reason == "stop"


def test_a_stop_id_ends_the_answer(llm: LLM) -> None:
    whole = llm.generate("the", max_tokens=30, sampling=WARM)
    cut = llm.generate("the", max_tokens=30, sampling=WARM, stop_ids=[whole.ids[7]])
    assert cut.ids == whole.ids[: whole.ids.index(whole.ids[7]) + 1]
    assert cut.finish_reason == "eos"


def test_the_length_limit_and_the_context_end_the_answer(llm: LLM) -> None:
    assert llm.generate("the", max_tokens=3, sampling=WARM).finish_reason == "length"
    full = llm.generate([5] * 250, max_tokens=100, sampling=WARM)
    assert full.finish_reason in ("length", "eos")
    assert len(full.ids) <= 7


def test_a_prompt_longer_than_the_context_is_refused(llm: LLM) -> None:
    with pytest.raises(ContextError, match="256"):
        llm.generate([5] * 256)


@pytest.mark.parametrize("prompt", ["", [], ()])
def test_an_empty_prompt_is_refused(llm: LLM, prompt: object) -> None:
    with pytest.raises(UsageError, match="empty"):
        llm.generate(prompt)  # type: ignore[arg-type]


def test_control_tokens_in_text_stay_text_and_parts_make_them(llm: LLM) -> None:
    as_text = llm.generate("<|u|>", max_tokens=1).stats.n_prompt
    as_part = llm.generate((Part("<|u|>", control=True), Part("a")), max_tokens=1).stats.n_prompt
    assert as_text > 1
    assert as_part == 2


def test_cancel_ends_the_stream_and_the_model_answers_again(llm: LLM) -> None:
    expected = llm.generate("the inn", max_tokens=20, sampling=WARM)
    cancel = Cancel()
    stream = llm.stream("the inn", max_tokens=20, sampling=WARM, cancel=cancel)
    for event in stream:
        if event.index == 4:
            cancel.set()
    assert stream.completion.finish_reason == "cancelled"
    assert stream.completion.ids == expected.ids[:5]
    assert llm.generate("the inn", max_tokens=20, sampling=WARM).ids == expected.ids


def test_cancel_works_from_another_thread(llm: LLM) -> None:
    cancel = Cancel()
    timer = threading.Timer(0.05, cancel.set)
    timer.start()
    total = 0
    for _ in range(10_000):  # until the button is pressed
        completion = llm.generate("the", max_tokens=200, sampling=WARM, cancel=cancel)
        total += len(completion.ids)
        if completion.finish_reason == "cancelled":
            break
    timer.join()
    assert completion.finish_reason == "cancelled"


def test_two_open_streams_do_not_mix(llm: LLM) -> None:
    a = llm.generate("the inn", max_tokens=10, sampling=WARM)
    b = llm.generate("on and on", max_tokens=10, sampling=WARM)
    one = llm.stream("the inn", max_tokens=10, sampling=WARM)
    two = llm.stream("on and on", max_tokens=10, sampling=WARM)
    ids: tuple[list[int], list[int]] = ([], [])
    for x, y in zip(one, two, strict=False):
        ids[0].append(x.id)
        ids[1].append(y.id)
    assert ids[0] == a.ids[: len(ids[0])]
    assert ids[1] == b.ids[: len(ids[1])]


SCHEMA = {
    "type": "object",
    "properties": {"room": {"enum": ["kitchen", "hall"]}, "on": {"type": "boolean"}},
    "required": ["room", "on"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
def test_a_schema_is_satisfied_by_a_model_that_knows_nothing(llm: LLM, seed: int) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra [schema])")
    completion = llm.generate("the", sampling=Sampling(temperature=2.0, seed=seed), schema=SCHEMA)
    answer = json.loads(completion.text)
    assert answer["room"] in ("kitchen", "hall")
    assert isinstance(answer["on"], bool)
    assert completion.finish_reason in ("stop", "eos")
    assert completion.text == json.dumps(answer, separators=(",", ":"))


@pytest.mark.parametrize(
    "schema",
    [{"type": "integer", "minimum": 5, "maximum": 3}, {"type": "nonsense"}, {"enum": []}, False],
)
def test_a_schema_that_cannot_be_satisfied_is_refused(llm: LLM, schema: object) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra [schema])")
    with pytest.raises(SchemaError):
        llm.generate("the", max_tokens=20, schema=schema)  # type: ignore[arg-type]


@pytest.mark.parametrize("schema", [{"type": "string", "pattern": "(("}, {"$ref": "#"}, {"enum": []}])
def test_a_schema_is_refused_in_one_line(llm: LLM, schema: dict[str, object]) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed (extra [schema])")
    with pytest.raises(
        SchemaError, match=r"^this schema cannot be .*(unclosed group|no text fits it \(NoExtensionBias\)|empty)$"
    ):
        llm.generate("the", max_tokens=20, schema=schema)


@pytest.mark.parametrize("prompt", [["the"], [1.5], [1, "the"], [Part("the"), 1], [-1], [320], [2**40]])
def test_a_prompt_of_something_else_is_refused(llm: LLM, prompt: list[object]) -> None:
    with pytest.raises(UsageError, match="the prompt holds"):
        llm.generate(prompt, max_tokens=1)  # type: ignore[arg-type]
    assert llm.generate([1, 2], max_tokens=1).ids


def test_a_keyboard_interrupt_ends_a_call_that_nobody_can_cancel(llm: LLM) -> None:
    """Python code that llama.cpp calls back would swallow it."""

    def work() -> None:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            llm.generate("the", max_tokens=20)

    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        work()


def test_a_closed_model_says_so(tmp_path: Path) -> None:
    with LLM.open(write_tiny(tmp_path / "m.gguf"), backend="numpy") as llm:
        llm.generate("a", max_tokens=1)
    with pytest.raises(UsageError, match="closed"):
        llm.generate("a", max_tokens=1)


def test_a_missing_file_and_an_unknown_name_are_named(tmp_path: Path) -> None:
    import nearfar

    with pytest.raises(FileError, match=r"no\.gguf"):
        LLM.open(tmp_path / "no.gguf")
    with pytest.raises(UsageError, match="unknown-model"):
        nearfar.load("unknown-model")


def test_an_unknown_architecture_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "llama", extra={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(UnsupportedError, match=r"nearfar\[llama\]"):
        LLM.open(path, backend="numpy")


def test_what_ours_does_not_run_goes_to_llama_cpp_and_says_why(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra [llama])")
    extra = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 2.0}
    llm = LLM.open(write_tiny(tmp_path / "m.gguf", "llama", extra=extra))
    assert "yarn" in llm.backend
    assert len(llm.generate("the", max_tokens=5).ids) == 5
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(FileError):
        LLM.open(damaged, backend="llama")


def test_a_tokenizer_that_ours_does_not_know_is_read_by_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra [llama])")
    path = write_tiny(tmp_path / "m.gguf", "llama", pre="exaone-moe")
    with pytest.raises(TokenizerError, match=r"m\.gguf: .*exaone-moe"):
        LLM.open(path, backend="numpy")
    llm = LLM.open(path)
    assert "exaone-moe" in llm.backend
    ids = llm.tokenizer.encode("the inn, naïve é")
    assert llm.tokenizer.decode(ids) == "the inn, naïve é"
    assert len(ids) < len("the inn, naïve é".encode())  # merges were applied
    assert llm.generate("the", max_tokens=20, sampling=WARM).text
