"""`nearfar cloud`: figures for people and for programs, and words about what cannot be done."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nearfar.cli.verbs import VerbParser
from nearfar.errors import DataError, FileError, UsageError
from nearfar_cloud import cli
from tests.tiny import write_tiny


def nearfar(*words: str) -> int:
    """The verb as the command line calls it."""
    parser = argparse.ArgumentParser()
    cli.add_verb(parser.add_subparsers(parser_class=VerbParser))
    args = parser.parse_args(["cloud", *words])
    code: int = args.run(args)
    return code


SMALL = ("--requests", "12", "--prompt", "8:64", "--output", "2:8")


def test_simulate_compares_policies_on_one_workload(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert nearfar("simulate", *SMALL, "--cv", "4", "--load", "0.5", "--json") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert list(found["runs"]) == ["chunked", "prefill-first"]
    assert all(r["finished"] == 12 for r in found["runs"].values())
    assert found["workload"]["rate"] == pytest.approx(found["capacity"] / 2)
    assert "capacity" in captured.err
    assert nearfar("simulate", *SMALL, "--rate", "3", "--policies", "chunked") == 0
    text = capsys.readouterr().out
    assert "3.00 a second" in text
    assert text.splitlines()[-1].startswith("chunked")


def test_simulate_takes_a_trace_and_a_file_of_sizes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "azure.csv"
    rows = "\n".join(f"2023-11-16 18:17:{s:02}.5,{80 * s + 8},16" for s in range(20))
    trace.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n{rows}\n")
    model = write_tiny(tmp_path / "tiny.gguf", n_ctx=512)
    words = ("--trace", str(trace), "--requests", "10", "--start", "5", "--rate", "2", "--json")
    assert nearfar("simulate", str(model), *words) == 0
    w = json.loads(capsys.readouterr().out)["workload"]
    assert (w["name"], w["requests"], w["output"]["mean"]) == ("azure", 10, 2)
    assert w["prompt"]["p50"] == pytest.approx((5 * 10 + 1 + 14 * 10 + 1) / 2)  # lengths by 8
    trace.write_text("nonsense")
    with pytest.raises(DataError, match=r"azure.csv:1: found 'nonsense'"):
        nearfar("simulate", "--trace", str(trace))


@pytest.mark.usefixtures("one_thread")
def test_profile_writes_what_simulate_reads_and_replay_serves(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("torch", reason="torch is not installed (extra [train])")
    model = str(write_tiny(tmp_path / "tiny.gguf", n_layers=2, d_model=64, d_ff=64, n_ctx=512))
    fit = str(tmp_path / "fit.json")
    real = ("--dtype", "fp32", "--threads", "1", "--blocks", "32")
    assert nearfar("profile", model, "--out", fit, "--quick", "--cpu-time", *real) == 0
    assert "held out, mean error" in capsys.readouterr().out
    assert nearfar("simulate", model, "--fit", fit, *SMALL, "--rate", "50", "--json") == 0
    assert "1 threads, fp32" in json.loads(capsys.readouterr().out)["title"]
    assert nearfar("replay", model, "--fit", fit, *real, *SMALL, "--rate", "50", "--policies", "chunked", "--json") == 0
    assert json.loads(capsys.readouterr().out)["runs"]["chunked"]["finished"] == 12
    with pytest.raises(UsageError, match="measured on 2 layers, llama-100m has 12"):
        nearfar("simulate", "--fit", fit)
    with pytest.raises(UsageError, match="--cpu-time counts the time of all threads"):
        nearfar("profile", model, "--out", fit, "--cpu-time", "--threads", "2", "--dtype", "fp32")


def test_roofline_prints_a_table_or_json_and_keeps_its_row(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    row = str(tmp_path / "row.json")
    assert nearfar("roofline", "llama-8b", "--hardware", "h100-sxm", "--batch", "4", "--save", row) == 0
    assert "h100-sxm (data sheet, dense bf16): 3350 GB/s" in capsys.readouterr().out
    assert nearfar("roofline", "llama-8b", "--hardware", row, "--stage", "prefill", "--context", "512", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [o["name"] for o in found["operators"]] == ["qkv", "attention", "o", "gate, up", "down", "head"]
    assert found["hardware"]["name"] == "h100-sxm"
    assert found["step"]["tokens_s"] > 0


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (("simulate", "--policies", "chunked,best"), UsageError, "'best': expected some of chunked,prefill-first"),
        (("simulate", "--hardware", "abacus"), UsageError, "abacus: expected zen5-core"),
        (("simulate", "nobody.gguf"), FileError, "nobody.gguf: no such model"),
        (("simulate", "--fit", "none.json"), FileError, "none.json: No such file"),
        (("simulate", "--trace", "none.csv"), FileError, "none.csv: No such file"),
        (("roofline", "nobody"), FileError, "no such model"),
    ],
)
def test_what_cannot_be_done_is_said(words: tuple[str, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        nearfar(*words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("simulate", "--requests", "1"), "'1': expected a whole number 2..999999999"),
        (("simulate", "--cv", "-1"), "'-1': expected a number 0..100"),
        (("simulate", "--load", "nan"), "'nan': expected a number"),
        (("simulate", "--prompt", "9:3"), "expected two rising numbers"),
        (("simulate", "--rate", "1", "--load", "1"), "not allowed with"),
        (("simulate", "--fit", "a", "--hardware", "b"), "not allowed with"),
        (("roofline", "--stage", "idle"), "invalid choice"),
        ((), "the following arguments are required: VERB"),
    ],
)
def test_words_that_make_no_sense_end_with_2(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        nearfar(*words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["simulate", "replay", "profile", "roofline"])
def test_every_verb_shows_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        nearfar(verb, "--help")
    assert stopped.value.code == 0
    assert f"nearfar cloud {verb}" in capsys.readouterr().out.split("examples:")[1]


def test_a_simulation_needs_no_torch() -> None:
    code = (
        "import argparse, sys\n"
        "from nearfar_cloud import cli\n"
        "parser = argparse.ArgumentParser()\n"
        "cli.add_verb(parser.add_subparsers())\n"
        "args = parser.parse_args(['cloud', 'simulate', '--requests', '3', '--rate', '9', '--policies', 'chunked'])\n"
        "assert args.run(args) == 0\n"
        "assert not {'torch', 'matplotlib', 'ray'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
