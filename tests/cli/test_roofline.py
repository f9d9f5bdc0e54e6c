"""`bench roofline` measures the machine first, then everything as a share of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nearfar.bench.roofline import LEVELS, Caches, Roofs, Work, caches
from tests.cli.conftest import Nearfar

pytest.importorskip("nearfar_native", reason="the compiled engine is not built")

QUICK = ["--quick", "--threads", "1", "--json"]


def lines(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_the_machine_comes_first_then_kernels_then_models(nearfar: Nearfar, tmp_path: Path) -> None:
    words = ["--kinds", "l3,q4", "--rows", "1,8", "--random", "tiny:TQ2_0", "--folder", tmp_path]
    done = nearfar("bench", "roofline", *QUICK, *words)
    assert done.code == 0
    found = lines(done.out)
    assert [r["what"] for r in found] == ["machine", *["read"] * 3, "int8", *["kernel"] * 12, "decode", "prefill"]
    assert all(r["gb_s"] > 0 for r in found if r["what"] == "read")  # type: ignore[operator]
    for r in found[5:]:
        assert r["share"] == pytest.approx(r["gops"] / r["limit_gops"])  # type: ignore[operator]
    decode = found[-2]
    assert decode["gb_s"] == pytest.approx(decode["tokens_s"] * decode["bytes_a_token"] / 1e9)  # type: ignore[operator]
    assert "embedding and tied head Q4_0" in str(decode["model"])
    assert "l3" in nearfar("bench", "roofline", *QUICK[:3], *words[:2], "--parts", "kernels").out


def test_a_file_is_measured_and_left_where_it_is(nearfar: Nearfar, model: Path) -> None:
    done = nearfar("bench", "roofline", model, *QUICK, "--parts", "models", "--cpu-time", "--delete")
    assert done.code == 0
    assert {r["what"] for r in lines(done.out)} >= {"machine", "read", "decode", "prefill"}
    assert model.is_file()


def test_random_models_are_deleted_when_asked(nearfar: Nearfar, tmp_path: Path) -> None:
    words = ["--parts", "models", "--folder", tmp_path, "--random", "tiny:Q4_0"]
    assert nearfar("bench", "roofline", *QUICK, *words).code == 0
    assert len(list(tmp_path.iterdir())) == 1
    assert nearfar("bench", "roofline", *QUICK, *words, "--delete").code == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--kinds", "q9"], 2, "expected some of"),
        (["--parts", "moon"], 2, "expected some of machine"),
        (["--rows", "0"], 2, "expected a whole number"),
        (["--set", "speed=11"], 2, "expected lut="),
        (["--set", "lut=slow"], 2, "expected one of off"),
        (["--set", "kv_dtype=f8"], 2, "KV dtype"),
        (["--random", "bitnet-9b:Q4_0"], 2, "bitnet-2b"),
        (["nowhere.gguf"], 3, "no such file"),
    ],
)
def test_what_cannot_be_measured_is_refused(nearfar: Nearfar, words: list[str], code: int, text: str) -> None:
    done = nearfar("bench", "roofline", "--quick", "--threads", "1", *words)
    assert done.code == code
    assert text in done.err


def test_bench_itself_still_takes_a_model(nearfar: Nearfar, model: Path) -> None:
    done = nearfar("bench", model, "--engines", "native", "--rounds", "1", "--prompt", "8", "--tokens", "4", "--json")
    assert done.code == 0
    assert json.loads(done.out)["engines"]["native"]["decode"] > 0


def test_a_limit_is_the_lower_of_two_roofs() -> None:
    roofs = Roofs(1, {"dram": 16.0}, 700.0)
    assert roofs.limit("dram", 10.0) == 160.0
    assert roofs.limit("dram", 1000.0) == 700.0


def test_buffers_lie_in_the_cache_that_they_are_named_after() -> None:
    c = Caches(l2=2 << 20, last=260 << 20, free=20 << 30)
    l2, l3, dram = (c.n_bytes(level) for level in LEVELS)
    assert l2 < c.l2 < l3 < c.last
    assert dram == 4 * c.last
    assert Caches(c.l2, c.last, free=1 << 30).n_bytes("dram") == 1 << 28
    assert 0 < caches().l2 <= caches().last


def test_a_prompt_goes_through_the_layers_once_a_token_and_through_the_head_once() -> None:
    assert Work(n_bytes=1, layer_weights=100, head_weights=7).prefill_ops(3) == 2 * (300 + 7)
