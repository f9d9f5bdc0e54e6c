"""Readers: each source in its row form, each kind of bad input in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nearfar import corpora, forms
from nearfar.errors import DataError
from nearfar_cloud.training import rows
from tests.cloud import mini_data
from tests.cloud.mini_data import write_lines
from tests.paths import SHARED, needs_shared


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mini_data.write(tmp_path_factory.mktemp("data"))


def read(data: Path, source: str, split: rows.Split = "train", max_chars: int = rows.MAX_ROW_CHARS) -> list[str]:
    return [forms.show(row.parts) for row in rows.FILE_SOURCES[source](data, split, max_chars)]


def test_an_intent_row_names_its_label_space_and_joins_scenario_and_intent(data: Path) -> None:
    call = '{"intent":"alarm_set","slots":{"time":" 1","house_place":" hall"}}'
    assert f"<|s|>hwu64<|u|> Wake me at 1 in the hall<|c|>{call}<|e|>" in read(data, "intents")


def test_a_repeated_slot_type_becomes_a_list() -> None:
    slots = [("person", "ann"), ("time", "six"), ("person", "bob"), ("person", "cy")]
    assert forms.group_slots(slots) == {"person": ["ann", "bob", "cy"], "time": "six"}


def test_an_sgd_dialogue_shows_its_calls_results_and_the_day(data: Path) -> None:
    shown = read(data, "sgd")
    call = '{"call":"FindFood","args":{"cuisine":" greek","city":" San Jose"}}'
    row = next(r for r in shown if "number 1." in r)
    assert row.endswith(
        f"<|u|> I want greek food in San Jose, number 1.<|c|>{call}"
        '<|r|>{"cuisine":" greek","city":" San Jose","name":" greek house"}<|a|> How about greek house?'
        "<|u|> Thanks, that is all.<|a|> Have a nice day.<|e|>"
    )
    assert row.startswith("<|s|>2019-03-01; Food_1: FindFood(cuisine, city)")


def test_ids_and_menus_are_trimmed_from_coffee_orders(data: Path) -> None:
    row = read(data, "coffee")[0]
    assert '{"call":"add_order_item","args":{"item":" mocha"}}' in row
    assert "order_id" not in row


def test_the_second_speaker_of_a_persona_chat_is_the_assistant(data: Path) -> None:
    assert "<|s|>I like thai.<|u|> Hi!<|a|> Hello thai!<|e|>" in read(data, "persona")


def test_worked_answers_lose_their_calculator_marks(data: Path) -> None:
    assert "<|u|> What is 3 plus 1?<|a|> 4<|e|>" in read(data, "gsm8k")


def test_documents_are_cut_between_paragraphs_and_end_once(data: Path) -> None:
    pieces = read(data, "books", max_chars=300)
    assert max(map(len, pieces)) <= 300 + len("<|e|>\n")
    assert sum(piece.endswith("<|e|>") for piece in pieces) <= 1
    assert all(piece.startswith("The ") for piece in pieces)


def test_every_call_that_is_learned_has_the_turns_before_it_in_its_row(tmp_path: Path) -> None:
    """The beginning of a dialogue, then a row a call: as evaluation asks."""
    data = mini_data.write(tmp_path)
    long = mini_data.dialogue(0)
    long["turns"] = [turn for i in range(12) for turn in mini_data.dialogue(i)["turns"]]
    write_lines(data / "dialogue" / "sgd_train.jsonl.xz", [{**long, "id": f"1_{i}"} for i in range(4)])
    windows = [row.parts for row in rows.sgd(data, "train", 600)]
    assert len(windows) > 4
    assert all(sum(len(p.text) for p in w if not p.control) < 900 for w in windows)
    assert all(next(p.text for p in w if p.text in (forms.USER, forms.ASSISTANT)) == forms.USER for w in windows)
    later = [w for w in windows if w[-1].text == forms.RESULT]
    assert later
    for w in later:
        written = [p.text for p in w if p.answer]
        assert (written[0], written[-1], len(written)) == (forms.CALL, forms.RESULT, 3)
        wanted = json.loads(written[1])["args"]["cuisine"]
        assert wanted in forms.show(p for p in w if not p.answer)
    calls = [p.text for w in windows for p in w if p.answer and p.text.startswith('{"call"')]
    assert len(calls) == sum(len(t.get("calls", [])) for t in long["turns"]) * len(windows_of(data))


def windows_of(data: Path) -> list[str]:
    """The dialogues of the small corpus that train."""
    return read(data, "sgd", max_chars=10_000)


def test_what_the_model_writes_is_marked_and_nothing_else(data: Path) -> None:
    row = next(rows.sgd(data))
    written = forms.show(p for p in row.parts if p.answer)
    given = forms.show(p for p in row.parts if not p.answer)
    assert '{"call":"FindFood"' in written
    assert "<|a|>" in written
    assert "<|u|>" not in written
    assert "I want" in given
    assert "How about" in given  # what the assistant of these dialogues says is context: its calls are learned
    reply = next(rows.persona(data)).parts
    assert "Hello" in forms.show(p for p in reply if p.answer)


def test_text_that_looks_like_a_control_token_is_neutralised(tmp_path: Path) -> None:
    data = mini_data.write(tmp_path)
    bad = {"text": "play <|e|> now <|c|>", "intent": "PlayMusic", "slots": []}
    write_lines(data / "intents" / "snips_train.jsonl.xz", [{**bad, "text": f"{bad['text']} {n}"} for n in range(40)])
    for row in rows.intents(data):
        assert all("<|" not in part.text for part in row.parts if not part.control)
        assert all(part.text in forms.CONTROLS for part in row.parts if part.control)


@pytest.mark.parametrize(
    ("file", "row", "message"),
    [
        ("dialogue/sgd_train.jsonl.xz", {"id": "1", "services": ["Food_1"]}, "line 1: expected 'turns' as list"),
        ("dialogue/sgd_train.jsonl.xz", {"services": 7, "turns": []}, "expected 'services' as list, found int '7'"),
        ("dialogue/sgd_train.jsonl.xz", {"id": "1", "services": ["Bus_9"], "turns": []}, "found 'Bus_9'"),
        ("intents/snips_train.jsonl.xz", {"text": "a", "intent": "b", "slots": [["c"]]}, "pairs of text"),
        ("intents/hwu64_train.jsonl.xz", {"text": "a", "intent": "b", "slots": []}, "expected 'scenario'"),
        ("math/gsm8k_train.jsonl.xz", {"question": "a"}, "expected 'answer' as str, found nothing"),
    ],
)  # fmt: skip
def test_a_wrong_key_or_type_names_file_and_line(
    tmp_path: Path, file: str, row: dict[str, object], message: str
) -> None:
    data = mini_data.write(tmp_path)
    # The row comes first and twenty times with other words, so that it belongs to every split.
    write_lines(data / file, [{**row, **({"text": f"a {n}"} if "text" in row else {})} for n in range(20)])
    source = next(s for s in rows.FILE_SOURCES if any((data / file).match(p) for p in _files(s)))
    with pytest.raises(DataError) as error:
        list(rows.FILE_SOURCES[source](data, "train", 1400))
    assert Path(file).name in str(error.value)
    assert message in str(error.value)


def _files(source: str) -> tuple[str, ...]:
    from nearfar_cloud.training import mix

    return mix.FILES[source]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not xz at all", "packed with xz"), (b"", "packed with xz")],
    ids=["other bytes", "an empty file"],
)
def test_a_file_that_is_not_xz_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    data = mini_data.write(tmp_path)
    (data / "math" / "gsm8k_train.jsonl.xz").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(rows.gsm8k(data))


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    data = mini_data.write(tmp_path)
    mini_data.write_text(
        data / "math" / "gsm8k_train.jsonl.xz", json.dumps({"question": "a", "answer": "b"}) + "\n{cut"
    )
    with pytest.raises(DataError, match=r"gsm8k_train\.jsonl\.xz line 2: expected a JSON object"):
        list(rows.gsm8k(data))


def test_a_missing_file_names_itself_its_use_and_the_readme(tmp_path: Path) -> None:
    for source, use in (("sgd", "SGD's services"), ("intents", "intents"), ("books", "books")):
        with pytest.raises(DataError) as error:
            list(rows.FILE_SOURCES[source](tmp_path, "train", 1400))
        assert str(tmp_path) in str(error.value)
        assert use in str(error.value)
        assert "README.md" in str(error.value)


@needs_shared
def test_out_of_scope_rows_of_clinc_never_train() -> None:
    content = json.loads(corpora.open_text(SHARED / "intents" / "clinc150_train_val.json.xz", "").read())
    outside = {row[0] for part in ("oos_train", "oos_val") for row in content[part]}
    assert len(outside) == 200
    assert not outside & {text for text, _ in rows.clinc150(SHARED)}
