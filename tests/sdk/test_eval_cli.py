"""`nearfar eval` and `nearfar calibrate` from end to end, on a tiny model and a tiny data folder."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfar.cli.main import main
from nearfar.eval.cli import TASKS, held_out
from nearfar.eval.exits import answers_at_full_depth, engine_of
from nearfar.eval.intervals import Interval
from nearfar.eval.pair import open_pair
from nearfar.eval.report import Section, as_json, as_text, shown
from nearfar.eval.tasks import Figure, answer
from nearfar.forms import ROWS_VERSION, encode
from nearfar.halves import Halves, check_pair, split
from nearfar.llm import LLM
from nearfar.lower import open_lower
from nearfar.splits import split_residue
from nearfar.weights import Weights
from nearfar.wire.codec import Codec
from nearfar.wire.messages import CodecId, CodecSpec
from tests.master_file import write_master_file
from tests.tiny import write_tiny

SMALL = {"n_layers": 2, "exits": (1,), "d_model": 32, "n_heads": 2, "n_kv_heads": 1, "d_ff": 32}
INTENTS = ("alarm_set", "music_play", "weather_query")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "tiny.gguf"
    return write_tiny(path, tau=0.2, seed=4, n_ctx=160, extra={"nearfar.rows": ROWS_VERSION}, **SMALL)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of HWU64, SNIPS, CLINC150 and SGD in small; enough dev rows to calibrate on."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "intents").mkdir()
    (folder / "dialogue").mkdir()

    def rows(word: str, n: int) -> list[dict[str, Any]]:
        texts = (f"{word} {i}" for i in range(n * 40))
        dev = [t for t in texts if split_residue(t) == 0][:n]
        texts = [*dev, *(f"{word} x{i}" for i in range(60))]
        return [{"text": t, "intent": INTENTS[i % 3], "slots": [["at", str(i)]]} for i, t in enumerate(texts)]

    def put(name: str, found: list[dict[str, Any]]) -> None:
        (folder / "intents" / name).write_bytes(lzma.compress("\n".join(map(json.dumps, found)).encode()))

    put("hwu64_train.jsonl.xz", rows("hwu", 20))
    put("hwu64_test.jsonl.xz", rows("test", 1)[:12])
    put("snips_train.jsonl.xz", rows("snips", 20))
    clinc = {p: [[r["text"], r["intent"]] for r in rows(p, 20)[:n]] for p, n in (("train", 80), ("val", 9))}
    clinc |= {p: [[f"{p} {i}", "oos"] for i in range(4)] for p in ("oos_train", "oos_val")}
    (folder / "intents" / "clinc150_train_val.json.xz").write_bytes(lzma.compress(json.dumps(clinc).encode()))
    method = {"name": "Find", "required_slots": ["to"], "optional_slots": {}}
    schema = json.dumps([{"service_name": "Rides_1", "intents": [method]}])
    call = {"service": "Rides_1", "method": "Find", "args": {"to": "Rome"}}
    turns = [{"s": "u", "t": "to Rome"}, {"s": "a", "t": "done", "calls": [call]}]
    dialogue = json.dumps({"id": "1", "services": ["Rides_1"], "turns": turns})
    for side in ("train", "dev"):
        (folder / "dialogue" / f"sgd_{side}_schema.json").write_text(schema)
        (folder / "dialogue" / f"sgd_{side}.jsonl.xz").write_bytes(lzma.compress(dialogue.encode()))
    return folder


def run(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_eval_prints_every_task_with_baselines_and_intervals(
    capsys: pytest.CaptureFixture[str], model: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    options = ("--data", data, "--tasks", "hwu64,clinc150,sgd,exits", "--no-grammar", "--limit", "3")
    stored = tmp_path / "answers.jsonl"
    code, out, err = run(capsys, "eval", model, *options, "--json", "--save", stored, "--backend", "numpy")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["backend"] == "numpy"
    by_name = {t["task"]: t for t in facts["tasks"]}
    assert set(by_name) == {"hwu64", "clinc150", "sgd", "exits"}
    assert by_name["hwu64"]["rows"] == 3
    intent = by_name["hwu64"]["figures"][0]
    assert intent["metric"] == "intent"
    assert intent["free"]["n"] == intent["baseline"]["n"] == 3
    assert intent["free"]["low"] <= intent["free"]["value"] <= intent["free"]["high"]
    scope = [f for f in by_name["clinc150"]["figures"] if f["metric"].startswith("out-of-scope AUROC")]
    assert [f["metric"] for f in scope] == ["out-of-scope AUROC by exit.1", "out-of-scope AUROC by full"]
    assert all("baseline" in f for f in scope)
    assert {"free", "exits"} < set(intent)  # tau is 0.2: some tokens leave, so what ships is measured too
    assert "hwu64 free 3/3" in err

    code, again, _ = run(capsys, "eval", *options, "--json", "--table", stored)
    assert code == 0
    without_exits = [t for t in facts["tasks"] if t["task"] != "exits"]
    assert json.loads(again)["tasks"] == without_exits  # the table is made again from the stored answers


def test_eval_under_a_grammar_keeps_to_the_methods_of_the_dialogue(
    capsys: pytest.CaptureFixture[str], model: Path, data: Path, tmp_path: Path
) -> None:
    pytest.importorskip("llguidance", reason="llguidance is not installed")
    stored = tmp_path / "answers.jsonl"
    args = ("--data", data, "--tasks", "sgd", "--no-baselines", "--backend", "numpy", "--save", stored)
    code, out, err = run(capsys, "eval", model, *args)
    assert code == 0, err
    assert all(mode in out for mode in ("free, full depth", "free, with exits", "grammar, full depth"))
    assert "most frequent method, last values (stored)" in out
    answers = {p["mode"]: p["text"] for p in map(json.loads, stored.read_text().splitlines())}
    assert answers["schema"].startswith('{"call":"Find","args":{"to":"')  # random weights, yet the one call there is
    assert not answers["free"].startswith("{")


def test_any_gguf_gets_the_whole_table_and_what_has_no_data_says_so(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    """A llama of random weights without exits, rows or chat template; the folder has five of the files."""
    other = write_tiny(tmp_path / "other.gguf", n_layers=1, d_model=32, n_heads=2, n_kv_heads=1, d_ff=32, n_ctx=2048)
    (data / "eval").mkdir(exist_ok=True)
    choice = {"query": "Question: What is wet?", "choices": ["Rain.", "Sand."], "gold": 0}
    (data / "eval" / "piqa.jsonl.xz").write_bytes(lzma.compress(json.dumps(choice).encode()))
    args = ("--data", data, "--limit", "1", "--no-grammar", "--no-baselines", "--backend", "numpy", "--json")
    code, out, err = run(capsys, "eval", other, *args)
    assert code == 0, err
    by_name = {t["task"]: t for t in json.loads(out)["tasks"]}
    assert set(by_name) == set(TASKS)
    ran = {name for name, t in by_name.items() if t["figures"]}
    assert ran == {"hwu64", "hwu64_typed", "snips", "clinc150", "sgd", "journal", "piqa"}
    assert by_name["piqa"]["figures"][0]["free"]["n"] == 1
    assert by_name["blimp"]["notes"] == ["n/a: blimp_200.jsonl.xz missing"]
    code, _, err = run(capsys, "eval", other, *args, "--tasks", "piqa,blimp")
    assert code == 8  # what was asked for has to be there
    assert "blimp_200.jsonl.xz: missing, needed for pairs of sentences" in err


def test_the_catalog_has_the_names_that_the_parser_knows() -> None:
    from nearfar.eval.catalog import LOADERS

    assert tuple(LOADERS) == TASKS


def test_what_exits_save_is_drawn(capsys: pytest.CaptureFixture[str], model: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    picture = tmp_path / "exits.png"
    args = ("--data", data, "--tasks", "hwu64,exits", "--limit", "2", "--no-baselines", "--no-grammar", "--json")
    code, out, err = run(capsys, "eval", model, *args, "--plot", picture, "--backend", "numpy")
    assert code == 0, err
    assert picture.read_bytes().startswith(b"\x89PNG")
    facts = json.loads(out)
    points = facts["exit_curves"]["exit.1 alone"]
    left = [p["left"] for p in points]
    assert left == sorted(left, reverse=True)  # the stricter, the fewer leave
    assert all(0 <= p["agreement"] <= 1 for p in points)
    metrics = [f["metric"] for f in facts["tasks"][-1]["figures"]]
    assert {f"exit.1 calibration error, {kind}" for kind in ("raw", "as calibrated")} < set(metrics)
    code, _, err = run(capsys, "eval", model, *args, "--plot", picture, "--tasks", "journal", "--backend", "numpy")
    assert code == 2  # the last --tasks counts: no exits, no picture
    assert "--plot draws what the task exits finds" in err


def test_calibrate_writes_a_copy_whose_exits_fire_or_do_not(
    capsys: pytest.CaptureFixture[str], model: Path, data: Path, tmp_path: Path
) -> None:
    out_file, more = tmp_path / "out.gguf", tmp_path / "requests.jsonl"
    more.write_text("".join(json.dumps({"prompt": [[f"request {i}", False]]}) + "\n" for i in range(3)))
    text = tmp_path / "story.txt"
    text.write_text("The cat sat down on the mat. It was late and the rain fell. Nobody knew where the dog had gone.")
    args = ("--data", data, "--limit", "14", "--delta", "0.5", "--rows", more, "--backend", "numpy", "--json")
    args += ("--text", text)
    code, out, err = run(capsys, "calibrate", model, *args, "-o", out_file)
    assert code == 0, err
    facts = json.loads(out)
    assert facts["mix"]["requests"] == 3
    assert facts["mix"]["story"] == 14
    assert sum(facts["mix"].values()) == sum(facts["answers"].values())
    exit_ = Weights.open(out_file).config.exits[0]
    assert facts["exits"]["exit.1"]["tau"] == pytest.approx(exit_.tau, abs=1e-6)
    assert exit_.isotonic_x
    assert facts["tested"][0]["tau"] == [pytest.approx(0.999)]


@pytest.fixture(scope="module")
def halves(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Halves:
    with Weights.open(model) as whole:
        return split(whole, 1, tmp_path_factory.mktemp("halves"), outliers=(3,))


@pytest.mark.parametrize("codec", ["fp16", "int8", "int4", "ids"])
def test_a_device_half_is_calibrated_against_what_decides_above_it(
    codec: str, capsys: pytest.CaptureFixture[str], model: Path, halves: Halves, data: Path, tmp_path: Path
) -> None:
    """Its exit must come to agree with the pair, codec included, or with the whole model where ids travel."""
    out_file = tmp_path / "out.gguf"
    args = ("--data", data, "--limit", "14", "--delta", "0.5", "--backend", "numpy", "--json")
    above = ("--upper", model if codec == "ids" else halves.upper, "--codec", codec)
    code, out, err = run(capsys, "calibrate", halves.device, *above, *args, "-o", out_file)
    assert code == 0, err
    with Weights.open(out_file) as weights:
        assert weights.config.role == "device"
        assert weights.config.exits[0].isotonic_x
        assert weights.file.metadata["nearfar.calibration.oracle"] == codec
        assert json.loads(out)["exits"]["exit.1"]["tau"] == pytest.approx(weights.config.exits[0].tau, abs=1e-6)
        with Weights.open(halves.upper) as upper:
            check_pair(weights, upper)  # a calibrated device half still belongs to its upper half


def test_ids_are_calibrated_against_the_whole_model_and_its_own_lower_layers(model: Path, data: Path) -> None:
    """The device half is another model here: its rows must not decide."""
    other = write_tiny(data / "other.gguf", tau=0.2, seed=9, n_ctx=160, extra={"nearfar.rows": ROWS_VERSION}, **SMALL)
    with Weights.open(other) as whole:
        two = split(whole, 1, data / "other")
    task = held_out(data, None)[0]
    with LLM.open(two.device, backend="numpy") as llm, LLM.open(model, backend="numpy") as oracle:
        pair = open_pair(llm, two.device, model, CodecId.IDS, backend="numpy")
        found = [t for _, t in answers_at_full_depth(pair.oracle, [task], 5, pair.heads)]
        for row, t in zip(task.first(5).rows, found, strict=True):
            assert t.tokens.tolist() == answer(oracle, task, row, constrained=False).ids
            lower, prompt = engine_of(llm).lower, encode(task.prompt(row), llm.tokenizer)
            h = lower.forward(lower.embed(np.array([*prompt, *t.tokens[:-1]], np.int32)), lower.new_kv(160), 0, 1)
            np.testing.assert_array_equal(t.rows[1], h[len(prompt) - 1 :])


def test_rows_are_calibrated_against_the_pair_and_what_the_codec_leaves(halves: Halves, data: Path) -> None:
    task = held_out(data, None)[0]
    with LLM.open(halves.device, backend="numpy") as llm:
        pair = open_pair(llm, halves.device, halves.upper, CodecId.INT4_OS, backend="numpy")
        found = [t for _, t in answers_at_full_depth(pair.oracle, [task], 5, pair.heads)]
        below = engine_of(llm).lower
    above = open_lower(Weights.open(halves.upper), "numpy")
    codec = Codec.of(CodecSpec(CodecId.INT4_OS, outliers=(3,)), 32)
    for row, t in zip(task.first(5).rows, found, strict=True):
        ids = np.array([*encode(task.prompt(row), llm.tokenizer), *t.tokens[:-1]], np.int32)
        h = codec.round_trip(below.forward(below.embed(ids), below.new_kv(160), 0, 1))
        rows = above.forward(h, above.new_kv(160), 1, 2)[t.n_prompt - 1 :]
        assert t.tokens.tolist() == above.logits(rows).argmax(1).tolist()


@pytest.mark.parametrize(
    ("device", "above", "code", "said"),
    [
        ("device", [], 2, "is a device half, whose upper layers decide: expected --upper"),
        ("whole", ["--upper", "upper"], 2, "is a whole model: no --upper"),
        ("device", ["--upper", "device"], 2, "expected a device half, and its upper half"),
        ("device", ["--upper", "upper", "--codec", "ids"], 2, "which takes no ids"),
        ("device", ["--upper", "other"], 11, "they differ in device (theirs"),
    ],
)
def test_halves_that_do_not_fit_are_not_calibrated(
    device: str,
    above: list[str],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    model: Path,
    halves: Halves,
    data: Path,
    tmp_path: Path,
) -> None:
    other = write_tiny(tmp_path / "other.gguf", seed=9, n_ctx=160, extra={"nearfar.rows": ROWS_VERSION}, **SMALL)
    files = {"device": halves.device, "upper": halves.upper, "whole": model, "other": other}
    args = [str(files.get(a, a)) for a in above]
    found, _, err = run(capsys, "calibrate", files[device], *args, "--data", data, "-o", tmp_path / "o.gguf")
    assert (found, said in err) == (code, True), err


def test_pack_with_data_calibrates_the_packed_file_within_the_budget(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    master, out_file = write_master_file(tmp_path / "master.gguf"), tmp_path / "out.gguf"
    args = ("--data", data, "--limit", "8", "--delta", "0.5", "--json", "-o", out_file)
    code, out, err = run(capsys, "pack", master, "--budget", "840kB", *args)
    assert code == 0, err
    facts = json.loads(out)
    assert facts["bytes"] == out_file.stat().st_size <= 840_000
    exit_ = Weights.open(out_file).config.exits[0]
    assert facts["calibration"]["exits"]["exit.2"]["tau"] == pytest.approx(exit_.tau, abs=1e-6)
    assert exit_.isotonic_x
    assert not list(tmp_path.glob(".*")), "the uncalibrated file is gone"


def test_calibrate_never_writes_over_the_model(capsys: pytest.CaptureFixture[str], model: Path, data: Path) -> None:
    before = model.read_bytes()
    code, _, err = run(capsys, "calibrate", model, "--data", data, "-o", model)
    assert code == 2
    assert "into a copy" in err
    assert model.read_bytes() == before


def test_a_model_of_other_rows_cannot_be_calibrated(
    capsys: pytest.CaptureFixture[str], data: Path, tmp_path: Path
) -> None:
    other = write_tiny(tmp_path / "m.gguf", n_layers=2, exits=(1,))
    code, _, err = run(capsys, "calibrate", other, "--data", data, "-o", tmp_path / "o.gguf", "--backend", "numpy")
    assert code == 2
    assert "not trained on nearfar's rows" in err


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["eval", "nano", "--data", "nowhere"], 8, "nowhere: expected the folder of the corpora"),
        (["eval", "missing.gguf", "--data", ".", "--tasks", "hwu64"], 8, "missing, needed for intents"),
        (["eval"], 2, "expected a model, or --table"),
        (["calibrate", "missing.gguf", "-o", "x.gguf"], 3, "missing.gguf"),
    ],
)
def test_what_is_missing_is_said_in_one_sentence(
    capsys: pytest.CaptureFixture[str], args: list[str], code: int, words: str
) -> None:
    found, _, err = run(capsys, *args)
    assert (found, err.count("\n")) == (code, 1)
    assert words in err


def test_unknown_tasks_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", "nano", "--tasks", "maths"])
    assert stop.value.code == 2
    assert f"expected some of {','.join(TASKS)},exits" in capsys.readouterr().err


def test_the_table_for_people_says_what_is_missing() -> None:
    nothing = Figure("slot F1", Interval(float("nan"), float("nan"), float("nan"), 0))
    section = Section(
        "t", "A test", 3, {"free": [Figure("intent", Interval(0.5, 0.25, 0.75, 3)), nothing]}, notes=["x"]
    )
    assert as_text([section]).splitlines() == [
        "A test (3 rows)  free, full depth",
        "  intent         50.0 % [25.0, 75.0] n 3",
        "  slot F1        n/a",
        "  note: x",
    ]
    assert shown(Interval(0.9468, 0.9, 0.97, 7), unit="") == "0.947 [0.900, 0.970] n 7"


def test_a_figure_that_one_mode_lacks_is_a_dash() -> None:
    share, area = Figure("intent", Interval(0.5, 0.25, 0.75, 3)), Figure("area", Interval(0.9, 0.8, 1.0, 3), unit="")
    section = Section("t", "A test", 3, {"free": [share, area], "schema": [share]})
    assert as_text([section]).splitlines()[-1] == "  area           0.900 [0.800, 1.000] n 3  -"
    lines = as_json([section])["tasks"][0]["figures"]
    assert [sorted(line) for line in lines] == [["free", "metric", "schema", "unit"], ["free", "metric", "unit"]]
