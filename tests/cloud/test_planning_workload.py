"""Workloads: published traces are read or refused line by line; what is generated or scaled has the shape it should."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import numpy as np
import pytest

from nearfar.errors import DataError, FileError, UsageError
from nearfar_cloud.planning.generate import Zipf, generate, injection
from nearfar_cloud.planning.traces import LONGEST_LINE, load_trace
from nearfar_cloud.planning.workload import Workload
from tests.paths import SHARED, needs_shared

AZURE = """\
TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.2299600,110,27
2023-11-16 18:17:04.1049600,3180,8
"""
BURSTGPT = """\
Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type
5,a,1.5,ChatGPT,472,18,490,Conversation log
45,b,0,ChatGPT,1087,0,1087,Conversation log
118.5,a,2.5,GPT-4,417,276,693,API log
"""
MOONCAKE = """\
{"timestamp": 0, "input_length": 1025, "output_length": 500, "hash_ids": [0, 1, 2]}
{"timestamp": 3000, "input_length": 600, "output_length": 3, "hash_ids": [0, 7]}
"""


def write(folder: Path, text: str, name: str = "trace.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_the_three_published_forms_are_read(tmp_path: Path) -> None:
    azure = load_trace(write(tmp_path, AZURE))
    assert azure.arrival_s == pytest.approx([0, 0.125, 0.25], abs=1e-5)
    assert azure.n_prompt.tolist() == [4808, 3180, 110]  # sorted by arrival
    assert azure.n_output.tolist() == [10, 8, 27]
    burst = load_trace(write(tmp_path, BURSTGPT))
    assert burst.arrival_s.tolist() == [0, 113.5]  # the failure in the middle is left out
    assert burst.n_prompt.tolist() == [472, 417]
    assert burst.n_output.tolist() == [18, 276]
    mooncake = load_trace(write(tmp_path, MOONCAKE, "conversation.jsonl"))
    assert mooncake.name == "conversation"
    assert mooncake.arrival_s.tolist() == [0, 3]
    assert mooncake.hashes == ((0, 1, 2), (0, 7))
    assert mooncake.hash_block == 512
    assert len(load_trace(write(tmp_path, AZURE), most=2)) == 2


@pytest.mark.parametrize(("name", "pack"), [("t.csv.xz", lzma.compress), ("t.csv.gz", gzip.compress)])
def test_a_packed_trace_is_the_same_and_a_damaged_one_is_refused(tmp_path: Path, name: str, pack: object) -> None:
    raw = pack(AZURE.encode())  # type: ignore[operator]
    path = tmp_path / name
    path.write_bytes(raw)
    assert load_trace(path).n_prompt.tolist() == [4808, 3180, 110]
    path.write_bytes(raw[:-12])
    with pytest.raises(FileError, match="damaged or cut short"):
        load_trace(path)


WRONG = {
    "prompt,answer\n1,2": r":1: found 'prompt,answer', expected the columns TIMESTAMP",
    AZURE + "2023-11-16 18:17:05,1": r":5: 2 fields, expected 3",
    AZURE + "yesterday,1,2": r":5: TIMESTAMP 'yesterday', expected a date and time",
    AZURE + "2023-11-16 18:17:05,-4,2": r":5: ContextTokens '-4', expected a whole number 1\.\.",
    AZURE + "2023-11-16 18:17:05,4,0": r":5: GeneratedTokens '0', expected a whole number 1\.\.",
    AZURE + "2023-11-16 18:17:05,4,99999999999": r":5: GeneratedTokens '99999999999'",
    AZURE[:40]: r"1 lines and no request",
    BURSTGPT + "nan,a,0,m,1,1,2,l": r":5: timestamp 'nan', expected a number from 0 on",
    BURSTGPT + "-1,a,0,m,1,1,2,l": r":5: timestamp '-1'",
    BURSTGPT + "9,a,0,m,x,1,2,l": r":5: Request tokens 'x', expected a whole number 0\.\.",
    BURSTGPT + "9,a,0": r":5: 3 fields, expected 8",
    MOONCAKE + "{": r":3: not JSON",
    MOONCAKE + "[1]": r":3: list, expected an object",
    MOONCAKE + '{"timestamp": "0", "input_length": 1, "output_length": 1, "hash_ids": [1]}': r":3: timestamp '0'",
    MOONCAKE + '{"timestamp": 0, "input_length": 1.5, "output_length": 1, "hash_ids": [1]}': r":3: input_length '1.5'",
    MOONCAKE
    + '{"timestamp": 0, "input_length": true, "output_length": 1, "hash_ids": [1]}': r":3: input_length 'True'",
    MOONCAKE + '{"timestamp": 0, "input_length": 513, "output_length": 1, "hash_ids": [1]}': r":3: 1 hash_ids for 513",
    MOONCAKE + '{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": [-1]}': r":3: hash_ids: expected a",
    MOONCAKE + '{"timestamp": 0, "input_length": 1, "output_length": 1}': r":3: hash_ids: expected a list",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_line_is_named_with_what_was_expected(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=WRONG[text]) as caught:
        load_trace(write(tmp_path, text))
    assert str(tmp_path / "trace.csv") in str(caught.value)


def test_bytes_that_are_no_text_lines_without_end_and_missing_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(AZURE.encode() + b"\xff\xfe,1,2\n")
    with pytest.raises(DataError, match=":5: not UTF-8"):
        load_trace(path)
    path.write_bytes(AZURE.encode() + b"9" * (LONGEST_LINE + 1))
    with pytest.raises(DataError, match=f":5: a line of {LONGEST_LINE} bytes or more"):
        load_trace(path)
    with pytest.raises(FileError, match="No such file"):
        load_trace(tmp_path / "none.csv")


@needs_shared
@pytest.mark.parametrize(
    ("name", "n", "rate", "cv", "n_prompt", "n_output"),
    [
        ("azure_llm_2023_code_first70.csv.xz", 6_173, 3.1, 12.9, 2043, 27),
        ("azure_llm_2023_conv_first70.csv.xz", 13_556, 5.9, 1.08, 1208, 201),
        ("mooncake_conversation_first70.jsonl.xz", 8_421, 3.3, 3.0, 12_292, 346),
    ],
)
def test_the_published_traces_have_their_known_figures(
    name: str, n: int, rate: float, cv: float, n_prompt: int, n_output: int
) -> None:
    w = load_trace(SHARED / "traces" / name)
    assert len(w) == n
    assert (w.rate, w.cv) == pytest.approx((rate, cv), rel=0.03)
    assert (w.n_prompt.mean(), w.n_output.mean()) == pytest.approx((n_prompt, n_output), rel=0.02)
    if w.hashes:
        seen: set[int] = set()
        hits = 0
        for hashes in w.hashes:
            hits += next((i for i, h in enumerate(hashes) if h not in seen), len(hashes))
            seen.update(hashes)
        assert hits / sum(map(len, w.hashes)) == pytest.approx(0.35, abs=0.04)


# ------------------------------------------------------------ what is generated


@pytest.mark.parametrize("cv", [0.5, 1.0, 4.0])
def test_generated_intervals_have_the_rate_and_the_variation_asked_for(cv: float) -> None:
    w = generate(100_000, rate=20, cv=cv, prompt=Zipf(1, 64), output=Zipf(1, 64), seed=3)
    assert w.rate == pytest.approx(20, rel=0.05)
    assert w.cv == pytest.approx(cv, rel=0.05)
    gaps = np.diff(w.arrival_s)
    if cv == 1:  # a Gamma of shape 1 is the exponential distribution
        assert (gaps < np.log(2) / 20).mean() == pytest.approx(0.5, abs=0.01)


def test_a_metronome_and_a_seed() -> None:
    sizes = {"prompt": Zipf(1, 9), "output": Zipf(1, 9)}
    assert generate(5, rate=2, cv=0, **sizes).arrival_s.tolist() == [0, 0.5, 1, 1.5, 2]
    one, same, other = (generate(50, rate=2, cv=2, seed=s, **sizes) for s in (1, 1, 2))
    assert np.array_equal(one.arrival_s, same.arrival_s)
    assert np.array_equal(one.n_prompt, same.n_prompt)
    assert not np.array_equal(one.arrival_s, other.arrival_s)


def test_lengths_follow_zipf() -> None:
    z = Zipf(16, 512, 1.1)
    p = z.probabilities()
    assert p.sum() == pytest.approx(1)
    assert p[0] / p[16] == pytest.approx(2**1.1)  # 16 and 32
    drawn = z.draw(100_000, np.random.default_rng(0))
    assert drawn.min() == 16
    assert drawn.max() <= 512
    assert drawn.mean() == pytest.approx(z.mean, rel=0.02)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Zipf(0, 4),
        lambda: Zipf(5, 4),
        lambda: Zipf(1, 4, -1),
        lambda: generate(0, rate=1, cv=1, prompt=Zipf(1, 2), output=Zipf(1, 2)),
        lambda: generate(5, rate=float("nan"), cv=1, prompt=Zipf(1, 2), output=Zipf(1, 2)),
        lambda: generate(5, rate=1, cv=-1, prompt=Zipf(1, 2), output=Zipf(1, 2)),
    ],
)
def test_what_nothing_can_be_drawn_from_is_refused(bad: object) -> None:
    with pytest.raises(UsageError, match="expected"):
        bad()  # type: ignore[operator]


def test_an_injection_is_one_long_prompt_among_running_answers() -> None:
    w = injection(0.5, n_running=3, long=2048)
    assert w.arrival_s.tolist() == [0, 0, 0, 0.5]
    assert w.n_prompt.tolist() == [64, 64, 64, 2048]


# ------------------------------------------------------------ what is scaled


def made(**changes: object) -> Workload:
    arrays = {
        "arrival_s": np.array([0.0, 1.0, 1.0, 4.0]),
        "n_prompt": np.array([1025, 512, 600, 7]),
        "n_output": np.array([80, 4, 8, 16]),
        "hashes": ((0, 1, 2), (0,), (0, 5), (9,)),
        "hash_block": 512,
    }
    return Workload("made", **(arrays | changes))  # type: ignore[arg-type]


def test_scaling_keeps_the_shape() -> None:
    w = made()
    assert w.rate == 0.75
    scaled = w.divided(8).at_rate(30)
    assert scaled.rate == pytest.approx(30)
    assert scaled.cv == pytest.approx(w.cv)
    assert scaled.arrival_s * 40 == pytest.approx(w.arrival_s)
    assert scaled.n_prompt.tolist() == [128, 64, 75, 1]  # never less than a token
    assert scaled.n_output.tolist() == [10, 1, 1, 2]
    assert scaled.hash_block == 64
    assert w.at_once().arrival_s.tolist() == [0, 0, 0, 0]


def test_pieces_of_a_workload_begin_at_zero_and_keep_what_belongs_together() -> None:
    w = made()
    assert w.first(2).n_prompt.tolist() == [1025, 512]
    late = w.window(1, 10)
    assert late.arrival_s.tolist() == [0, 0, 3]
    assert late.hashes == ((0,), (0, 5), (9,))
    assert w.window(1, 2).n_prompt.tolist() == [512, 600]
    small = w.fitting(700)
    assert small.arrival_s.tolist() == [0, 0, 3]
    assert small.n_output.tolist() == [4, 8, 16]


def test_equal_hashes_are_equal_tokens_and_others_are_not() -> None:
    w = made().divided(8)
    a, b, c, d = (w.prompt(i, 320, seed=5) for i in range(4))
    assert [len(x) for x in (a, b, c, d)] == [128, 64, 75, 1]
    assert a[:64] == b == c[:64]
    assert a[64:75] != c[64:]
    assert w.prompt(0, 320, seed=5) == a != w.prompt(0, 320, seed=6)
    plain = made(hashes=(), hash_block=0)
    assert plain.prompt(1, 320)[:64] != plain.prompt(0, 320)[:64]
    assert max(plain.prompt(0, 7)) == 6


@pytest.mark.parametrize(
    "bad",
    [
        lambda: made().divided(0),
        lambda: made().divided(7),
        lambda: made().at_rate(0),
        lambda: made().at_once().at_rate(2),
        lambda: made().window(5, 1),
        lambda: made().fitting(3),
    ],
)
def test_what_cannot_be_scaled_says_why(bad: object) -> None:
    with pytest.raises(UsageError):
        bad()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arrival_s": np.array([])}, "no requests"),
        ({"arrival_s": np.array([0.0, 2.0, 1.0, 4.0])}, "rise from 0"),
        ({"arrival_s": np.array([0.0, 1.0, np.nan, 4.0])}, "rise from 0"),
        ({"n_prompt": np.array([1, 2, 3])}, "4 arrivals, 3 prompts"),
        ({"n_output": np.array([1, 2, 0, 3])}, "answers of 0..3 tokens"),
        ({"hashes": ((0,), (0,), (0, 5), (9,))}, "do not cover"),
    ],
)
def test_arrays_that_form_no_workload_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        made(**changes)
