"""A whole run on a data folder of a few rows: log, checkpoints, Ctrl-C, resume, and the model's file at the end."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")
for package in ("tokenizers", "hassil", "safetensors", "matplotlib"):
    pytest.importorskip(package, reason=f"{package} is not installed (extra [train])")

from nearfar.errors import DataError, MissingExtraError, NearfarError, UsageError  # noqa: E402
from nearfar.gguf_reader import GGUFFile, TensorType  # noqa: E402
from nearfar.lower import open_lower  # noqa: E402
from nearfar.weights import Weights  # noqa: E402
from nearfar_cloud.training import cli  # noqa: E402
from nearfar_cloud.training import tokenizer as tokenizers  # noqa: E402
from nearfar_cloud.training.checkpoint import Checkpoints  # noqa: E402
from nearfar_cloud.training.mix import Batch, Mix, Phase  # noqa: E402
from nearfar_cloud.training.recipe import DEVICE_FIRST, RECIPES, Recipe, Shape  # noqa: E402
from nearfar_cloud.training.run import Options, train  # noqa: E402
from nearfar_cloud.training.schedule import Budget  # noqa: E402
from tests.cloud import mini_data  # noqa: E402
from tests.paths import ROOT  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mini_data.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer(data: Path) -> tokenizers.RowTokenizer:
    return tokenizers.train(tokenizers.training_texts(data), 512)


def recipe_for(tokenizer: tokenizers.RowTokenizer) -> Recipe:
    shape = Shape(tokenizer.n_vocab, 256, 2, 4, 2, 256, 128, exits=(1,))
    return Recipe(
        "micro", shape, seq_len=128, micro_rows=2, batch_tokens=(256, 512), precision="fp32", shares=DEVICE_FIRST
    )


def options(data: Path, out: Path, tokens: int, **more: Any) -> Options:
    settings = {"budget": Budget(tokens=tokens), "compiled": False, "checkpoint_s": 0.0, "progress_s": 0.0}
    return Options(data=data, out=out, **{**settings, **more})


def losses(out: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in records if r["kind"] == "step"]


def test_a_run_ends_with_a_model_a_card_curves_and_a_report(
    data: Path, tokenizer: tokenizers.RowTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    path = train(recipe_for(tokenizer), options(data, tmp_path, 2048))
    assert path == tmp_path / "micro.gguf"
    weights = Weights.open(path)
    assert [e.layer for e in weights.config.exits] == [1]
    assert open_lower(weights, "numpy").config.n_vocab == tokenizer.n_vocab
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["card"]["train"]["tokens"] >= 2048
    assert report["card"]["held_out"]["intents"]["rows"] > 0
    assert sum(sum(s["tokens_seen"].values()) for s in report["card"]["sources"]) > 1500
    page = (tmp_path / "micro.md").read_text()
    for text in ("CC BY-SA 4.0", "--without sgd", "exit.1", "Not for", report["card"]["train"]["data_sha256"]):
        assert text in page
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert {p.stem for p in (tmp_path / "checkpoints").iterdir()} >= {"best", "stable-end"}
    out = capsys.readouterr().out
    for text in ("stable", "decay", "tokens", "exit.1", "dev", "left 0m"):
        assert text in out


def test_json_progress_is_one_record_a_line(
    data: Path, tokenizer: tokenizers.RowTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    train(recipe_for(tokenizer), options(data, tmp_path, 1024, as_json=True))
    kinds = {json.loads(line)["kind"] for line in capsys.readouterr().out.splitlines()}
    assert kinds == {"note", "progress", "dev", "done"}


CHILD = """
import sys, torch
from pathlib import Path
from nearfar.errors import NearfarError
from nearfar_cloud.training.run import train
from nearfar_cloud.training.tokenizer import RowTokenizer
from tests.cloud.test_run import options, recipe_for

torch.set_num_threads(1)
data, out = Path(sys.argv[1]), Path(sys.argv[2])
try:
    train(recipe_for(RowTokenizer.load(out / "tokenizer.json")), options(data, out, 3072, resume=True))
except NearfarError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def test_ctrl_c_saves_and_the_resumed_run_has_the_losses_of_an_unbroken_one(
    data: Path, tokenizer: tokenizers.RowTokenizer, tmp_path: Path
) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    for out in (unbroken, broken):
        tokenizer.save(out / "tokenizer.json")
    train(recipe_for(tokenizer), options(data, unbroken, 3072))

    paths = os.pathsep.join(str(ROOT / p) for p in ("sdk", "cloud", "."))
    command = [sys.executable, "-u", "-c", CHILD, str(data), str(broken)]
    child = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if " step      3" in line:
            child.send_signal(signal.SIGINT)
            break
    rest = child.stdout.read()
    assert child.wait() == 130
    assert "--resume goes on from there" in rest
    stopped = losses(broken)
    assert 3 <= stopped[-1][0] < losses(unbroken)[-1][0]
    with pytest.raises(UsageError, match="holds a run at step"):
        train(recipe_for(tokenizer), options(data, broken, 3072))
    train(recipe_for(tokenizer), options(data, broken, 3072, resume=True))
    assert losses(broken) == losses(unbroken)


def test_a_loss_that_is_not_finite_stops_the_run_and_the_last_good_checkpoint_goes_on(
    data: Path, tokenizer: tokenizers.RowTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    recipe, draw = recipe_for(tokenizer), Mix.next_batch

    def poisoned(self: Mix, n: int, phase: Phase, width: int | None = None) -> Batch:
        batch = draw(self, n, phase, width)
        if sum(sum(count.values()) for count in self.state()["tokens"].values()) > 3000:
            batch.weights[:] = float("inf")
        return batch

    monkeypatch.setattr(Mix, "next_batch", poisoned)
    with pytest.raises(NearfarError, match=r"step \d+: loss .* the third step in a row that is not finite"):
        train(recipe, options(data, tmp_path, 6000))
    good = Checkpoints(tmp_path / "checkpoints").newest()
    assert good is not None
    assert all(t.isfinite().all() for name, t in good[0].tensors.items() if name.startswith("model."))
    monkeypatch.setattr(Mix, "next_batch", draw)
    assert train(recipe, options(data, tmp_path, 6000, resume=True)).is_file()


def test_a_disk_that_is_full_in_the_middle_of_a_run_costs_a_checkpoint_and_nothing_else(
    data: Path,
    tokenizer: tokenizers.RowTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    usage, asked = shutil.disk_usage, []

    def sometimes_full(path: Any) -> Any:
        asked.append(path)
        found = usage(path)
        return found._replace(free=0) if 2 <= len(asked) < 5 else found

    monkeypatch.setattr(shutil, "disk_usage", sometimes_full)
    assert train(recipe_for(tokenizer), options(data, tmp_path, 4096)).is_file()
    assert "the checkpoint before it stays; will try again at the next checkpoint" in capsys.readouterr().out
    assert Checkpoints(tmp_path / "checkpoints").newest() is not None


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before_it(
    data: Path, tokenizer: tokenizers.RowTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    recipe = recipe_for(tokenizer)
    train(recipe, options(data, tmp_path, 3072))
    newest = Checkpoints(tmp_path / "checkpoints").last()[0]
    newest.write_bytes(newest.read_bytes()[:-100])
    train(recipe, options(data, tmp_path, 3072, resume=True))
    out = capsys.readouterr().out
    assert f"{newest.name}: damaged checkpoint" in out
    assert "going on from the one before it" in out


def test_a_recipe_of_another_size_than_the_tokenizer_is_refused(
    data: Path, tokenizer: tokenizers.RowTokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    recipe = recipe_for(tokenizer)
    other = replace(recipe, shape=replace(recipe.shape, n_vocab=4096))
    with pytest.raises(UsageError, match="micro is made for 4096"):
        train(other, options(data, tmp_path, 1024))


def verb(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_verb(parser.add_subparsers())
    return parser.parse_args(["train", *argv])


def test_the_verb_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEARFAR_DATA", raising=False)
    with pytest.raises(UsageError, match="--data DIR, or NEARFAR_DATA"):
        cli.run(verb("nano", "--budget", "1m"))
    with pytest.raises(UsageError, match="no such folder"):
        cli.run(verb("nano", "--budget", "1m", "--data", str(tmp_path / "none")))
    with pytest.raises(UsageError, match="expected a time"):
        cli.run(verb("nano", "--budget", "soon", "--data", str(tmp_path)))
    with pytest.raises(DataError, match=r"missing, needed for"):
        cli.run(verb("nano", "--budget", "1m", "--data", str(tmp_path), "--out", str(tmp_path / "out")))
    monkeypatch.setattr(cli, "find_spec", lambda package: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'nearfar\[train\]'"):
        cli.run(verb("nano", "--budget", "1m"))


def test_a_device_that_is_not_there_is_refused_before_anything_is_read(data: Path, tmp_path: Path) -> None:
    command = ("nano", "--tokens", "1000", "--data", str(data), "--out", str(tmp_path / "run"))
    with pytest.raises(UsageError, match="--device tpu: expected cpu or cuda"):
        cli.run(verb(*command, "--device", "tpu"))
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="finds no GPU; train on cpu"):
            cli.run(verb(*command, "--device", "cuda"))
    assert not (tmp_path / "run").exists()


def test_the_verb_knows_exactly_the_recipes() -> None:
    assert set(cli.RECIPE_NAMES) == set(RECIPES)


def test_the_verb_trains_from_the_command_line(
    data: Path, tokenizer: tokenizers.RowTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "pico", recipe_for(tokenizer))
    tokenizer.save(tmp_path / "tokenizer.json")
    command = ("pico", "--tokens", "512", "--data", str(data), "--out", str(tmp_path), "--no-compile", "--threads", "1")
    assert cli.run(verb(*command)) == 0
    assert (tmp_path / "micro.gguf").is_file()


def test_widths_that_ternary_blocks_do_not_fit_are_written_out(
    data: Path, tokenizer: tokenizers.RowTokenizer, tmp_path: Path
) -> None:
    recipe = recipe_for(tokenizer)
    recipe = replace(recipe, shape=replace(recipe.shape, d_model=128, d_ff=128))
    tokenizer.save(tmp_path / "tokenizer.json")
    path = train(recipe, options(data, tmp_path, 512))
    with GGUFFile.open(path) as file:
        assert file.tensors["blk.0.ffn_up.weight"].type == TensorType.F16


def test_a_model_without_exits_teaches_one_with_its_tokenizer_and_no_other(
    data: Path, tokenizer: tokenizers.RowTokenizer, tmp_path: Path
) -> None:
    of_student = recipe_for(tokenizer)
    of_teacher = replace(of_student, name="big", shape=replace(of_student.shape, exits=(), weights="float"))
    run, student, other = (tmp_path / name for name in ("teacher", "student", "other"))
    tokenizer.save(run / "tokenizer.json")
    with Weights.open(train(of_teacher, options(data, run, 512))) as weights:
        assert list(weights.config.exits) == []
    path = train(of_student, options(data, student, 512, teacher=run), {"big": of_teacher})
    assert tokenizers.RowTokenizer.load(student / "tokenizer.json").sha256 == tokenizer.sha256
    with GGUFFile.open(path) as file:
        assert len(file.metadata["nearfar.train.teacher_sha256"]) == 64
    words = tokenizers.training_texts(data, without=("books", "stories"))
    tokenizers.train(words, tokenizer.n_vocab).save(other / "tokenizer.json")
    with pytest.raises(DataError, match=f"the teacher has the tokenizer {tokenizer.sha256[:16]}, the student"):
        train(of_student, options(data, other, 512, teacher=run), {"big": of_teacher})
