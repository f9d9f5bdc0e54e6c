"""Tasks: what is asked, how answers are scored, and what happens with data that is missing or damaged.

A table plays the model: it maps the text of a prompt to an answer, so that every figure can be worked out by hand.
"""

from __future__ import annotations

import io
import json
import lzma
import re
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nearfar import corpora, forms
from nearfar.errors import ContextError, DataError, FileError, UsageError
from nearfar.eval import calls, home, intents
from nearfar.eval.metrics import parse_answer
from nearfar.eval.tasks import (
    Figure,
    Prediction,
    Row,
    Task,
    in_order,
    load_predictions,
    predict,
    prompts_task,
    save_predictions,
    stop_ids,
)
from nearfar.forms import ROWS_VERSION
from tests.paths import SHARED, needs_shared


class TableTokenizer:
    """Control tokens by number, anything else by length."""

    def encode(self, text: str, *, add_bos: bool | None = None, parse_special: bool = False) -> list[int]:
        if parse_special and text in forms.CONTROLS:
            return [forms.CONTROLS.index(text)]
        return list(range(100, 100 + len(text)))


class TableModel:
    """Answers by the request in the prompt; `rows=False` makes it a chat model."""

    def __init__(self, answers: dict[str, str], *, rows: bool = True) -> None:
        self.answers, self.asked = answers, []  # type: ignore[var-annotated]
        self.metadata = {"nearfar.rows": ROWS_VERSION} if rows else {}
        self.tokenizer = TableTokenizer()

    def generate(self, prompt: Any, **options: Any) -> Any:
        self.asked.append((prompt, options))
        text = self.answers[next(p.text.strip() for p in reversed(prompt) if not p.control)]
        if text == "too long":
            raise ContextError("too long")
        return SimpleNamespace(text=text, ids=list(range(len(text))), finish_reason="eos")

    def chat(self, messages: Any, **options: Any) -> Any:
        self.asked.append((messages, options))
        return SimpleNamespace(text=self.answers[messages[-1]["content"]], ids=[1], finish_reason="eos")


def value(figures: list[Figure], metric: str) -> float:
    return next(f.interval.value for f in figures if f.metric == metric)


def intent_row(n: int, text: str, intent: str, slots: dict[str, Any], kind: str = "") -> Row:
    return Row(f"row {n}", text, {"intent": intent, "slots": slots}, kind)


INTENT_ROWS = [
    intent_row(0, "wake me at six", "alarm_set", {"time": "six"}),
    intent_row(1, "play Blur and Pulp", "play_music", {"artist": ["Blur", "Pulp"]}),
    intent_row(2, "what is up", "chat", {}),
    intent_row(3, "no json here", "chat", {}),
]
INTENT_ANSWERS = {
    "wake me at six": '{"intent":"alarm_set","slots":{"time":"SIX"}}',
    "play Blur and Pulp": '{"intent":"play_music","slots":{"artist":"blur","album":"x"}}',
    "what is up": '{"intent":"alarm_set","slots":{}}',
    "no json here": '{"intent":"chat"',
}


def intent_task(rows: list[Row] | None = None) -> Task:
    return intents._task("hwu64", "hwu64", "a test", INTENT_ROWS if rows is None else rows, INTENT_ROWS)


def test_intents_are_scored_as_worked_out_by_hand() -> None:
    found = list(predict(TableModel(INTENT_ANSWERS), intent_task()))
    figures = intent_task().score(INTENT_ROWS, found)
    assert value(figures, "intent") == 2 / 4
    assert value(figures, "slot F1") == pytest.approx(2 * 2 / (3 + 3))  # time and blur; wanted 3, found 3
    assert value(figures, "exact JSON") == 1 / 4
    assert value(figures, "valid JSON") == 3 / 4
    assert {f.interval.n for f in figures} == {4}


def test_a_model_of_rows_is_asked_in_its_rows_and_stopped_at_control_tokens() -> None:
    model = TableModel(INTENT_ANSWERS)
    list(predict(model, intent_task().first(1), constrained=True))
    prompt, options = model.asked[0]
    assert forms.show(prompt) == "<|s|>hwu64<|u|> wake me at six<|c|>"
    assert options["stop_ids"] == (forms.CONTROLS.index(forms.RESULT), forms.CONTROLS.index(forms.END))
    assert options["exits"] is False
    assert options["schema"]["properties"]["intent"]["enum"] == ["alarm_set", "chat", "play_music"]


def test_under_the_schema_a_value_is_a_run_of_words_of_the_request() -> None:
    schema = intents.intent_schema(["a"], ["artist"], 'play "Blur" & (Pulp) at 6pm?')
    text = next(iter(schema["properties"]["slots"]["patternProperties"].values()))["anyOf"][0]["pattern"]
    for value in ("Blur", " Blur", '"Blur" & (Pulp)', "at 6pm", "play", "?"):
        assert re.fullmatch(text, value), value
    for value in ("blur", "Blu", "Blur Pulp", "Oasis", "", "  Blur"):
        assert not re.fullmatch(text, value), value
    assert "'pattern'" not in str(intents.intent_schema(["a"], ["artist"]))


def test_another_model_is_asked_in_its_chat_with_labels_and_three_examples() -> None:
    model = TableModel(INTENT_ANSWERS, rows=False)
    list(predict(model, intent_task().first(1)))
    messages, options = model.asked[0]
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 3, "user"]
    assert "alarm_set, chat, play_music" in messages[0]["content"]
    assert "schema" not in options
    assert stop_ids(model) == ()


def test_a_prompt_that_does_not_fit_counts_as_wrong() -> None:
    found = list(predict(TableModel({**INTENT_ANSWERS, "wake me at six": "too long"}), intent_task().first(1)))
    assert found[0].finish == "context"
    assert value(intent_task().score(INTENT_ROWS[:1], found), "intent") == 0


def test_some_rows_are_spread_over_all() -> None:
    assert [r.id for r in intent_task().first(2).rows] == ["row 0", "row 2"]
    assert intent_task().first(None).rows == intent_task().first(9).rows == INTENT_ROWS


def test_out_of_scope_rows_count_only_for_confidence() -> None:
    rows = [intent_row(i, f"in {i}", "a", {}) for i in range(10)]
    rows += [intent_row(10 + i, f"out {i}", "oos", {}, intents.OUT) for i in range(10)]
    answer = '{"intent":"a","slots":{}}'
    # in scope 0.5 .. 0.95, out of scope 0.0 .. 0.45, but the last one at 0.99
    sure = [0.5 + i / 20 for i in range(10)] + [i / 20 for i in range(9)] + [0.99]
    found = [Prediction(r.id, answer, scores={"exit.2": s}) for r, s in zip(rows, sure, strict=True)]
    figures = intents.score(rows, found)
    assert value(figures, "intent") == 1.0
    assert value(figures, "out-of-scope AUROC by exit.2") == pytest.approx(0.9)
    assert value(figures, "intent at 90 % out-of-scope recall by exit.2") == 0.0  # the threshold is 0.99
    found[-1] = Prediction(rows[-1].id, answer, scores={"exit.2": 0.1})
    assert value(intents.score(rows, found), "intent at 90 % out-of-scope recall by exit.2") == 1.0


SERVICES = {"Rides_1": {"Find": calls.Method(("to",), ("cheap",)), "Book": calls.Method(("to", "at"), ())}}


def call_row(n: int, call: str, args: dict[str, str], kind: str, group: str) -> Row:
    turns = (forms.Turn("u", f"take me somewhere {n}"),)
    return Row(
        f"d{n}", turns[0].text, {"call": call, "args": args}, kind, group, calls.Before(("Rides_1",), turns, "Rides_1")
    )


def test_calls_are_scored_as_worked_out_by_hand() -> None:
    rows = [
        call_row(0, "Find", {"to": "Rome"}, calls.SEEN, "a"),
        call_row(1, "Book", {"to": "Rome", "at": "12:00"}, calls.UNSEEN, "a"),
        call_row(2, "Book", {"to": "Oslo", "at": "13:00"}, calls.UNSEEN, "b"),
    ]
    texts = [
        forms.call_json("Find", {"to": "rome"}),
        forms.call_json("Find", {"to": "Rome"}),
        forms.call_json("Book", {"to": "Oslo", "at": "14:00"}),
    ]
    figures = calls.score(rows, [Prediction(r.id, t) for r, t in zip(rows, texts, strict=True)])
    assert value(figures, "method") == 2 / 3
    assert value(figures, "method, seen services") == 1.0
    assert value(figures, "method, unseen services") == 0.5
    assert value(figures, "argument F1") == pytest.approx(2 * 3 / (4 + 5))
    assert value(figures, "whole call") == 1 / 3
    assert next(f for f in figures if f.metric == "argument F1").interval.n == 2  # dialogues are drawn


def test_a_call_is_asked_with_the_day_the_services_and_the_turns() -> None:
    prompt = forms.show(calls.call_prompt(call_row(0, "Find", {}, "", ""), SERVICES))
    expected = "<|s|>2019-03-01; Rides_1: Find(to, cheap) Book(to, at)<|u|> take me somewhere 0<|c|>"
    assert prompt == expected
    schema = calls.call_schema(("Rides_1",), SERVICES)
    assert [one["properties"]["call"]["const"] for one in schema["anyOf"]] == ["Find", "Book"]
    assert list(schema["anyOf"][1]["properties"]["args"]["properties"]) == ["at", "to"]  # the order of the corpus


def test_a_long_dialogue_keeps_its_last_turns() -> None:
    turns = tuple(forms.Turn("ua"[i % 2], f"turn {i} " + "x" * 90) for i in range(41))
    row = Row("d", "", {}, context=calls.Before(("Rides_1",), turns, "Rides_1"))
    prompt = forms.show(calls.call_prompt(row, SERVICES))
    assert len(prompt) < calls.MAX_CHARS + 200
    assert "turn 40" in prompt
    assert "turn 3 " not in prompt


def test_a_slot_of_the_home_may_have_several_right_values_or_none() -> None:
    gold = {"name": ["pizza", "pizza "], "area": "Office", "minutes": 10}
    meet = home.compare({"name": "Pizza", "minutes": "10"}, gold, frozenset({"area"}))
    assert (meet.shared, meet.found, meet.wanted, meet.exact) == (2, 2, 2, True)
    meet = home.compare({"name": "Pizza", "area": "office", "minutes": 10}, gold, frozenset({"area"}))
    assert meet.exact
    assert not home.compare({"name": "Pizza", "area": "kitchen", "minutes": 10}, gold, frozenset({"area"})).exact
    assert not home.compare({"name": "Pizza", "minutes": 10, "hours": 1}, gold, frozenset({"area"})).exact
    assert not home.compare("nothing", gold, frozenset()).exact


def test_home_requests_are_read_from_both_forms_of_test_file() -> None:
    pytest.importorskip("yaml", reason="pyyaml is not installed")
    files = {
        "tests/en/_fixtures.yaml": "areas: [{name: Hall, id: hall_id}]\n"
        'entities: [{name: "Joe[\']s Lamp", id: light.joe, area: hall_id}, {name: TV, id: media_player.tv}]',
        "tests/en/light.yaml": "tests: [{sentences: [lamp on, lamps on], "
        "intent: {name: HassTurnOn, context: {area: Hall}, slots: {area: Hall, domain: light}}}]",
        "tests/en/HassTurnOff/name_only.yaml": "entities: [{name: Door, domain: cover}]\n"
        "tests: [{sentences: close Door, slots: {name: Door}}]",
        "sentences/en/other.yaml": "not: read",
    }
    rows = sorted(home.read_tests(files), key=lambda r: r.id)
    assert [(r.text, r.gold["intent"]) for r in rows] == [
        ("close Door", "HassTurnOff"),
        ("lamp on", "HassTurnOn"),
        ("lamps on", "HassTurnOn"),
    ]
    assert rows[0].context.listed is True
    assert rows[1].context.optional == {"area"}  # the satellite's own area is not asked of the model
    assert rows[1].context.home.setting() == "hall: light joes lamp; media_player tv"
    assert rows[1].context.listed is None
    files["tests/en/light.yaml"] = "tests: [{sentences: [on], intent: {name: HassTurnOn}}]"
    with pytest.raises(
        DataError, match=r"light.yaml test 0: expected 'sentences' as text"
    ):  # YAML's on is a truth value
        list(home.read_tests(files))


def test_the_home_schema_lists_every_intent_and_none() -> None:
    options = home.home_schema()["anyOf"]
    names = [one["properties"]["intent"]["const"] for one in options]
    assert names[-1] == "none"
    assert "HassStartTimer" in names
    assert "slots" not in options[-1]["properties"]


def test_schemas_allow_right_answers_and_refuse_wrong_ones() -> None:
    llguidance = pytest.importorskip("llguidance", reason="llguidance is not installed")

    class Bytes:
        eos_token_id, bos_token_id, special_token_ids = 0, None, (0,)
        tokens = (b"\xff[0]", *(bytes([i]) for i in range(256)))

        def __call__(self, text: str) -> list[int]:
            return [b + 1 for b in text.encode()]

    vocabulary = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))

    def accepts(schema: Any, text: str) -> bool:
        compact = {"whitespace_flexible": False, "item_separator": ",", "key_separator": ":"}
        grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=compact)
        assert not llguidance.LLMatcher.validate_grammar(grammar, vocabulary)
        matcher = llguidance.LLMatcher(vocabulary, grammar)
        return matcher.try_consume_tokens([b + 1 for b in text.encode()]) == len(text.encode()) and (
            matcher.is_accepting()
        )

    schema = intent_task().schema(INTENT_ROWS[0])
    assert accepts(schema, '{"intent":"chat","slots":{"time":"six","artist":["wake me"," at"]}}')
    assert accepts(schema, '{"intent":"chat","slots":{"artist":"wake","time":" at six"}}')  # in any order
    assert not accepts(schema, '{"intent":"chat","slots":{"other":"six"}}')
    assert not accepts(schema, '{"intent":"chat","slots":{"time":"seven"}}')
    assert not accepts(schema, '{"intent":"unknown","slots":{}}')
    assert accepts(home.home_schema(), '{"intent":"none"}')
    assert accepts(home.home_schema(), '{"intent":"HassTurnOff","slots":{"area":"kitchen","domain":"light"}}')
    assert not accepts(home.home_schema(), '{"intent":"HassTurnOff","slots":{"brightness":3}}')
    assert accepts(calls.call_schema(("Rides_1",), SERVICES), '{"call":"Find","args":{"to":"Rome"}}')
    assert not accepts(calls.call_schema(("Rides_1",), SERVICES), '{"call":"Book","args":{"to":"Rome"}}')


# ---------------------------------------------------------------- stored answers


def test_stored_answers_come_back_as_they_were(tmp_path: Path) -> None:
    stored = {
        ("hwu64", "free"): [Prediction("a", '{"é":1}', "eos", 3, 0.5, {"full": 0.25}), Prediction("b", "")],
        ("home", "schema"): [Prediction("a", "x")],
    }
    save_predictions(tmp_path / "p.jsonl", stored)
    assert load_predictions(tmp_path / "p.jsonl") == stored


def test_answers_are_matched_to_rows_by_name() -> None:
    rows, found = in_order(INTENT_ROWS, [Prediction("row 2", "c"), Prediction("row 0", "a"), Prediction("gone", "z")])
    assert [r.id for r in rows] == ["row 0", "row 2"]
    assert [p.text for p in found] == ["a", "c"]


@pytest.mark.parametrize("line", ["{", "[]", '{"task":"a"}', '{"task":"a","mode":"free","unknown":1}'])
def test_a_damaged_line_of_answers_is_named(tmp_path: Path, line: str) -> None:
    good = json.dumps({"task": "a", "mode": "free", "id": "1", "text": ""})
    (tmp_path / "p.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=r"p\.jsonl line 2: expected a stored prediction"):
        load_predictions(tmp_path / "p.jsonl")
    with pytest.raises(FileError):
        load_predictions(tmp_path / "missing.jsonl")


def test_more_prompts_are_read_as_parts(tmp_path: Path) -> None:
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": [["<|s|>", true], ["kitchen", false]]}\n')
    task = prompts_task(path)
    assert (task.name, task.prompt(task.rows[0])) == (
        "requests",
        (forms.Part("<|s|>", control=True), forms.Part("kitchen")),
    )
    path.write_text('{"prompt": "kitchen"}\n')
    with pytest.raises(DataError, match="line 1: expected 'prompt' as a list"):
        prompts_task(path)


# ---------------------------------------------------------------- data that is missing or damaged


def test_a_missing_file_is_named_with_its_use(tmp_path: Path) -> None:
    for load in (intents.load, calls.load, home.load):
        with pytest.raises(DataError, match=rf"{tmp_path}.*missing, needed for .*README"):
            load(tmp_path)


def test_without_a_data_folder_there_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEARFAR_DATA", raising=False)
    with pytest.raises(DataError, match="--data DIR or the environment variable NEARFAR_DATA"):
        corpora.data_folder(None)
    with pytest.raises(DataError, match="no such folder"):
        corpora.data_folder(tmp_path / "nothing")
    monkeypatch.setenv("NEARFAR_DATA", str(tmp_path))
    assert corpora.data_folder(None) == tmp_path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text":"a","intent":"b","slots":[]}\n{"text":1', "line 2: expected a JSON object"),
        (b'{"text":"a","intent":"b","slots":[]}\n3', "line 2: expected a JSON object, found int"),
        (b'{"intent":"b","slots":[]}', "line 1: expected 'text' as str, found nothing"),
        (b'{"text":"a","intent":"b","slots":[["t"]]}', "line 1: expected 'slots' as a list of"),
        (b"\xff\xfe", "expected a JSON object"),
    ],
)
def test_a_damaged_row_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl.xz"
    path.write_bytes(lzma.compress(content))
    with pytest.raises(DataError, match=message):
        list(intents._lines(path))


def test_a_file_that_is_no_xz_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.xz"
    path.write_bytes(b"plain text")
    with pytest.raises(DataError, match=r"rows\.jsonl\.xz"):
        list(corpora.json_lines(path, "tests"))
    tar = tmp_path / "a.tar.xz"
    tar.write_bytes(b"plain text")
    with pytest.raises(DataError, match=r"a\.tar\.xz: expected a \.tar\.xz"):
        corpora.tar_texts(tar, "tests", ".yaml")


def test_the_members_of_an_archive_come_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.xz"
    with tarfile.open(path, "w:xz") as tar:
        for name in ("./b.yaml", "a.yaml", "c.txt"):
            member = tarfile.TarInfo(name)
            member.size = 2
            tar.addfile(member, io.BytesIO(b"ok"))
    assert corpora.tar_texts(path, "tests", ".yaml") == {"a.yaml": "ok", "b.yaml": "ok"}


def test_services_of_a_dialogue_must_be_in_the_schema(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"id": "1", "services": ["Cars_9"], "turns": []}))
    with pytest.raises(DataError, match=r"line 1: expected services of the schema, found 'Cars_9'"):
        list(calls.read_calls(path, SERVICES, set()))


# ---------------------------------------------------------------- the real files


@needs_shared
def test_the_splits_have_the_rows_that_the_table_names() -> None:
    sizes = {t.name: len(t.rows) for t in intents.load(SHARED)}
    assert sizes == {"hwu64": 1076, "hwu64_typed": 1076, "snips": 707, "clinc150": 3200, "slurp": 1194}
    assert {t.name: len(t.rows) for t in intents.dev_rows(SHARED)} == {"hwu64": 547, "snips": 698, "clinc150": 751}
    sgd = calls.load(SHARED)[0]
    kinds = [r.kind for r in sgd.rows]
    assert (kinds.count(calls.SEEN), kinds.count(calls.UNSEEN)) == (3408, 2619)


@needs_shared
def test_the_home_has_1089_sentences_in_both_forms() -> None:
    pytest.importorskip("yaml", reason="pyyaml is not installed")
    task = home.load(SHARED)[0]
    assert len(task.rows) == 1089
    assert len({r.id for r in task.rows}) == 1089
    assert all(len(r.context.home.entities) <= 8 for r in task.rows)


@needs_shared
def test_right_answers_score_one_hundred_per_cent() -> None:
    """Each task's own gold, written as a model would write it, is fully right."""
    tasks = [*intents.load(SHARED), *calls.load(SHARED)]
    for task in tasks:
        rows = task.first(300).rows
        figures = task.score(rows, [Prediction(r.id, forms.compact(r.gold)) for r in rows])
        assert {f.interval.value for f in figures} == {1.0}, task.name


@needs_shared
def test_dev_rows_are_not_test_rows() -> None:
    dev = {r.text for t in intents.dev_rows(SHARED) for r in t.rows}
    test = {r.text for t in intents.load(SHARED) if t.name == "snips" for r in t.rows}
    assert not dev & test


def test_a_baseline_answers_in_the_same_json() -> None:
    baselines = pytest.importorskip("nearfar.eval.baselines")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    train = [intent_row(i, f"wake me at {i}", "alarm_set", {}) for i in range(6)]
    train += [intent_row(i, f"play song {i}", "play_music", {}) for i in range(6)]
    found = baselines.LinearIntents(train).answers([train[0], train[-1]])
    assert [(parse_answer(p.text) or {})["intent"] for p in found] == ["alarm_set", "play_music"]
    assert all(p.scores["margin"] > 0 for p in found)


def test_last_values_copy_the_latest_mention(tmp_path: Path) -> None:
    from nearfar.eval.baselines import LastValues

    schema = {
        "service_name": "Rides_1",
        "intents": [
            {"name": "Find", "required_slots": ["to"], "optional_slots": {"cheap": "False"}},
            {"name": "Book", "required_slots": ["to", "at"], "optional_slots": {}},
        ],
    }
    (tmp_path / "dialogue").mkdir()
    (tmp_path / "dialogue" / "sgd_dev_schema.json").write_text(json.dumps([schema]))
    train = [call_row(i, "Book", {"to": to, "at": "12:00"}, "", "") for i, to in enumerate(("Rome", "Oslo", "Rome"))]
    turns = (
        forms.Turn("u", "not Rome but oslo", ()),
        forms.Turn("a", "", (('{"call":"Find","args":{"to":"Paris"}}', '{"at":"09:00"}'),)),
    )
    row = Row("d", "", {}, context=calls.Before(("Rides_1",), turns, "Rides_1"))
    found = LastValues(train, tmp_path).answers([row])[0]
    assert forms.tight(parse_answer(found.text)) == {"call": "Book", "args": {"to": "Oslo", "at": "09:00"}}


def test_stored_baselines_are_there_for_every_task() -> None:
    from nearfar.eval.baselines import stored_baseline
    from nearfar.eval.cli import TASKS

    for name in TASKS:
        found = stored_baseline(name)
        assert found is not None
        assert found.stored
        assert found.figures
    assert stored_baseline("unknown") is None


@needs_shared
def test_the_stored_baseline_is_the_fitted_one() -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    from nearfar.eval.baselines import baseline, stored_baseline

    task = intents.snips(SHARED)
    fitted, stored = baseline(task, SHARED), stored_baseline("snips")
    assert stored is not None
    for a, b in zip(fitted.figures, stored.figures, strict=True):
        assert (a.metric, a.interval.n) == (b.metric, b.interval.n)
        assert a.interval.value == pytest.approx(b.interval.value, abs=0.005)  # other versions round other ties


def test_usage_needs_a_model_or_stored_answers() -> None:
    from nearfar.cli.main import build_parser

    args = build_parser().parse_args(["eval"])
    with pytest.raises(UsageError, match="expected a model, or --table"):
        args.run(args)
