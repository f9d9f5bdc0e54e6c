"""The picture of a few records, and the refusal of what are none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.arrows import ROOT

pytest.importorskip("matplotlib")

KERNEL = {"what": "kernel", "threads": 1, "kind": "q4", "from": "dram"}
RECORDS = [
    {"what": "machine", "cpu": "a CPU", "isa": "avx512"},
    {"what": "read", "threads": 1, "from": "l2", "gb_s": 130.0},
    {"what": "read", "threads": 1, "from": "dram", "gb_s": 16.0},
    {"what": "int8", "threads": 1, "instruction": "VPDPBUSD zmm", "gops": 700.0},
    KERNEL | {"m": 1, "ops_per_byte": 3.6, "gops": 50.0},
    KERNEL | {"m": 8, "ops_per_byte": 28.0, "gops": 300.0},
    {
        "what": "decode",
        "threads": 1,
        "model": "random llama-1b, Q4_0, embedding and tied head Q4_0",
        "m": 1,
        "tokens_s": 22.0,
        "share_of_read": 0.95,
        "ops_per_byte": 3.6,
        "gops": 54.0,
    },
]


def plot(records: Path, picture: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "bench" / "plot_roofline.py", records, picture, *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_picture_shows_roofs_kernels_and_models(tmp_path: Path) -> None:
    records, picture = tmp_path / "r.jsonl", tmp_path / "r.svg"
    records.write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    assert plot(records, picture).returncode == 0
    svg = picture.read_text()
    for words in ("memory 16 GB/s", "VPDPBUSD zmm: 700 GOPS", "llama-1b Q4_0: decode 22 tokens/s", "8 rows", "q4"):
        assert f"<!-- {words}" in svg or words in svg, words
    first = picture.read_bytes()
    assert plot(records, picture).returncode == 0
    assert picture.read_bytes() == first  # the same records, the same picture


@pytest.mark.parametrize(
    ("text", "words"), [('{"a": 1}\n', "expected a record"), ("", "no roofs"), ("x\n", "Expecting")]
)
def test_what_are_no_records_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    done = plot(tmp_path / "r.jsonl", tmp_path / "r.svg")
    assert done.returncode == 2
    assert words in done.stderr


def test_threads_that_were_not_measured_are_refused(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    assert "no records of 7 threads" in plot(tmp_path / "r.jsonl", tmp_path / "r.svg", "--threads", "7").stderr
