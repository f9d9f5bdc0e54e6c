"""`nearfar chaos suite`, for real and small: a server, devices, faults, and what it says where a token is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("fastapi", reason="fastapi is not installed (extra [cloud])")
pytest.importorskip("grpc", reason="grpcio is not installed (extra [collab])")
pytest.importorskip("nearfar_native", reason="the compiled extension is not built")

from nearfar.bench.collab.systems import Files
from nearfar.chaos import plan, suite
from nearfar.chaos.plan import Kind, Plan, Task
from nearfar.chaos.schedule import Schedule
from nearfar.chaos.suite import Leg, Setting
from nearfar.cli.main import main
from nearfar.errors import UsageError
from nearfar.llm import LLM
from nearfar.wire.messages import CodecSpec
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    return write_tiny(folder / "m.gguf", "llama", "F32", exits=(1, 2), tau=0.02, n_ctx=160)


def words(model: Path, *more: str) -> list[str]:
    return ["chaos", "suite", str(model), "--at", "2", "--seed", "7", "--devices", "2", "--answer-tokens", "48", *more]


@pytest.mark.parametrize("rows_at", ["2", "1"])
def test_hundreds_of_tokens_under_faults_are_the_oracles(
    model: Path, capsys: pytest.CaptureFixture[str], rows_at: str
) -> None:
    some = ("--codecs", "int8", "--tokens", "300", "--fault-every", "12", "--faults", "reset,cut,stall,stop,evict")
    assert main(words(model, *some, "--rows-at", rows_at, "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["cut"], result["rows_at"]) == (2, int(rows_at))
    assert result["tokens"] >= 300
    assert sum(result["faults"].values()) >= result["tokens"] // 16
    assert [leg["failures"] for leg in result["codecs"]] == [[]]
    assert [leg["not_given_back"] for leg in result["codecs"]] == [{}]
    assert all(leg["reopened"] > 0 and leg["retracted"] > 0 for leg in result["codecs"])


def test_a_killed_device_and_a_killed_server_go_on_with_the_next_index(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The seed draws one of each within the one answer."""
    some = ("--codecs", "ids", "--tokens", "40", "--fault-every", "20", "--faults", "device,kill", "--devices", "1")
    assert main(words(model, *some, "--seed", "36", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["answers"], result["faults"]) == (1, {"device": 1, "kill": 1})
    assert [leg["failures"] for leg in result["codecs"]] == [[]]


@pytest.mark.parametrize("codec", ["int8", pytest.param("ids", marks=pytest.mark.slow)])
def test_other_weights_are_refused_and_the_answer_goes_on_when_the_right_ones_are_back(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    """The seed draws a swap early in the one answer; the device has to meet the other server before it goes."""
    monkeypatch.setitem(plan.FAULTS, "swap", Kind(0.1, (5.0, 6.0)))
    some = ("--codecs", codec, "--tokens", "40", "--answer-tokens", "40", "--fault-every", "40")
    assert main(words(model, *some, "--faults", "swap", "--devices", "1", "--seed", "202", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["tokens"], result["answers"], result["faults"]) == (40, 1, {"swap": 1})
    (leg,) = result["codecs"]
    assert (leg["refused"], leg["failures"], leg["strangers_got"], leg["not_given_back"]) == (1, [], {}, {})


def test_a_wrong_token_is_told_with_the_seed_and_the_fewest_faults(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The oracle is made to want another last token wherever the answer is greedy."""
    real = suite.oracle_of

    @contextmanager
    def wants_another(files: Files, codec: CodecSpec) -> Iterator[tuple[LLM, Callable[[Task], list[int]]]]:
        with real(files, codec) as (llm, right):
            yield llm, lambda task: [*right(task)[:-1], -1] if task.temperature == 0 else right(task)

    monkeypatch.setattr(suite, "oracle_of", wants_another)
    saved = tmp_path / "failing.json"
    some = ("--codecs", "ids", "--tokens", "96", "--fault-every", "12", "--faults", "reset", "--devices", "1")
    assert main(words(model, *some, "--save", str(saved))) == 1
    out = capsys.readouterr().out
    assert "token 47 is not the oracle's" in out
    assert "seed 7, it takes" in out
    smallest = Schedule.from_json(saved.read_text())
    assert (smallest.seed, smallest.unit, len(smallest)) == (7, "token", 0)  # no fault is to blame


def test_what_is_not_given_back_fails_the_run(model: Path) -> None:
    leg = Leg("int8")
    assert leg.is_good
    leg.kept["device_sessions.away"] = (1.0, 0.0)
    assert not leg.is_good


def test_a_server_with_other_weights_that_was_trusted_fails_the_run() -> None:
    assert not Leg("ids", strangers_got={"device_positions": 3.0}).is_good


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--codecs", "int2"), "'int2'"),
        (("--faults", "flood"), "'flood'"),
        (("--mode", "cloud-only"), "expected --codecs ids"),
        (("--mode", "lossy", "--tau", "0.5"), "expected --tau 1"),
    ],
)
def test_what_cannot_be_run_is_refused(
    model: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], text: str
) -> None:
    assert main(words(model, *more)) == 2
    assert text in capsys.readouterr().err


def drawn(**options: Any) -> Task:
    return Plan(7, every=10, max_tokens=100, **options).task(3, [[1, 2, 3]], 512, "int8")


def test_faults_are_drawn_from_the_seed_one_in_every_stretch_of_tokens() -> None:
    task = drawn()
    assert task == drawn()
    assert [int(f.at) // 10 for f in task.faults.faults] == list(range(10))
    assert task.faults.seed == 7
    assert {f.kind for f in drawn(kinds=("cut",)).faults.faults} == {"cut"}
    assert Plan(8, every=10, max_tokens=100).task(3, [[1, 2, 3]], 512, "int8").faults != task.faults


def test_an_answer_ends_with_the_context_and_a_plan_wants_known_faults() -> None:
    assert Plan(7).task(0, [[1] * 60], 100, "ids").max_tokens == 40
    with pytest.raises(UsageError, match="'flood'"):
        Plan(7, kinds=("flood",))


def test_a_setting_has_all_codecs_unless_told_otherwise(model: Path) -> None:
    assert Setting(model, 2, Plan(7)).codecs == ("fp16", "int8", "int4", "ids")
