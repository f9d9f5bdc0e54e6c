"""The door between Python and C++: the committed stub, ownership of arrays, refusals, threads."""

from __future__ import annotations

import difflib
import gc
import importlib.util
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from nearfar.cancel import Cancel
from nearfar.errors import Cancelled, ConfigError, EngineBusy, NearfarError, UsageError
from nearfar.options import EngineOptions
from nearfar.weights import Weights
from tests.paths import ROOT
from tests.tiny import write_tiny

_core = pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
lower_native = pytest.importorskip("nearfar.lower_native", reason="the compiled engine is not built")

F32, TQ2_0 = 0, 35


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("binding") / "m.gguf", "bitnet", "TQ2_0", exits=(2,))


@pytest.fixture(scope="module")
def weights(path: Path) -> Weights:
    return Weights.open(path)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> lower_native.NativeLower:
    """Slow enough (many rows, no batching of floats) that another thread meets it at work."""
    path = write_tiny(tmp_path_factory.mktemp("big") / "m.gguf", "llama", "F32", d_ff=2048, n_layers=8, n_ctx=8192)
    return lower_native.NativeLower(Weights.open(path), EngineOptions(threads=1))


def ids(n: int) -> np.ndarray:
    return (np.arange(n) * 7 % 320).astype(np.int32)


@pytest.mark.skipif(importlib.util.find_spec("nanobind") is None, reason="nanobind, which makes the stub, is missing")
def test_the_committed_stub_is_that_of_the_module(tmp_path: Path) -> None:
    made = tmp_path / "_core.pyi"
    subprocess.run(
        [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "nearfar_native._core", "-o", str(made)], check=True
    )
    committed = (ROOT / "native" / "nearfar_native" / "_core.pyi").read_text()
    difference = difflib.unified_diff(committed.splitlines(), made.read_text().splitlines(), lineterm="")
    assert not list(difference), "build the CMake target `stubs` and commit _core.pyi"


def test_results_outlive_the_engine_and_the_engine_outlives_its_tensors(path: Path) -> None:
    weights = Weights.open(path)
    lower = lower_native.NativeLower(weights, EngineOptions(threads=2))
    kv = lower.new_kv(16)
    first = lower.forward(lower.embed(ids(4)), kv, 0, 4)
    copy = first.copy()
    del weights
    gc.collect()
    again = lower.forward(lower.embed(ids(4)), lower.new_kv(16), 0, 4)
    del lower, kv
    gc.collect()
    assert np.array_equal(first, copy)
    assert np.array_equal(again, copy)
    first += 1  # results are ordinary, writable arrays of their own
    assert np.array_equal(again, copy)


def test_arrays_of_another_type_or_rank_are_refused_not_converted(weights: Weights) -> None:
    model = lower_native.NativeLower(weights, EngineOptions(threads=1))._model
    kv = model.new_kv(8, "f16")
    for wrong in (np.zeros((1, 256)), np.zeros(256, np.float32), np.zeros((256, 2), np.float32).T):
        with pytest.raises(TypeError):
            model.forward(wrong, kv, 0, 1)
    with pytest.raises(TypeError):
        model.embed(np.zeros(1, np.int64))


def test_rows_of_another_layout_give_the_same_result(weights: Weights) -> None:
    lower = lower_native.NativeLower(weights, EngineOptions(threads=1))
    h = lower.embed(ids(6))
    spread = np.repeat(h, 2, axis=0)[::2]
    assert not spread.flags.c_contiguous
    assert np.array_equal(lower.norm(spread), lower.norm(h))
    with pytest.raises(UsageError, match="expected"):
        lower.norm(h[0])
    with pytest.raises(UsageError, match="256"):
        lower.norm(h[:, :128])


def test_heads_that_the_model_lacks_are_named(weights: Weights) -> None:
    lower = lower_native.NativeLower(weights, EngineOptions(threads=1))
    with pytest.raises(UsageError, match=r"exit\.3.*exit\.2, final"):
        lower.logits(lower.embed(ids(1)), "exit.3")


def test_rows_that_are_not_finite_are_refused_and_leave_no_trace(weights: Weights) -> None:
    lower = lower_native.NativeLower(weights, EngineOptions(threads=1))
    kv = lower.new_kv(8)
    h = lower.embed(ids(2))
    h[1, 7] = np.nan
    with pytest.raises(NearfarError, match="not finite"):
        lower.forward(h, kv, 0, 4)
    assert [kv.length(i) for i in range(4)] == [0, 0, 0, 0]


def test_a_part_of_the_layers_is_a_model_of_its_own(weights: Weights) -> None:
    whole = lower_native.NativeLower(weights, EngineOptions(threads=1))
    low = lower_native.NativeLower(weights, EngineOptions(threads=1), first=0, last=2)
    high = lower_native.NativeLower(weights, EngineOptions(threads=1), first=2)
    h = whole.embed(ids(5))
    expected = whole.forward(h, whole.new_kv(8), 0, 4)
    kv = high.new_kv(8)
    assert np.array_equal(high.forward(low.forward(h, low.new_kv(8), 0, 2), kv, 2, 4), expected)
    assert kv.length() == kv.length(3) == 5
    with pytest.raises(UsageError, match="layer 0"):
        kv.length(0)
    with pytest.raises(UsageError, match=r"\[0, 4\).*\[2, 4\)"):
        high.forward(h, kv, 0, 4)


def test_an_isa_that_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch, weights: Weights) -> None:
    for isa in lower_native.isas_available():
        monkeypatch.setenv("NEARFAR_ISA", isa)
        assert lower_native.NativeLower(weights, EngineOptions(threads=1)).isa == isa
    monkeypatch.setenv("NEARFAR_ISA", "avx9")
    with pytest.raises(ConfigError, match="avx9"):
        lower_native.NativeLower(weights, EngineOptions(threads=1))
    with pytest.raises(ValueError, match="no kernels"):
        _core.isa("neon" if "ref" in lower_native.isas_available() else "ref")


def test_every_isa_and_thread_count_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch, weights: Weights) -> None:
    results = []
    for isa in lower_native.isas_available():
        monkeypatch.setenv("NEARFAR_ISA", isa)
        for threads in (1, 2):
            lower = lower_native.NativeLower(weights, EngineOptions(threads=threads))
            results.append(lower.logits(lower.forward(lower.embed(ids(9)), lower.new_kv(16), 0, 4)))
    assert all(np.array_equal(result, results[0]) for result in results)


def test_a_bad_number_of_threads_is_refused(weights: Weights) -> None:
    with pytest.raises(UsageError, match="257"):
        lower_native.NativeLower(weights, EngineOptions(threads=257))
    assert lower_native.NativeLower(weights).n_threads == lower_native.default_threads()


def test_a_second_thread_is_turned_away_while_the_engine_works(big: lower_native.NativeLower) -> None:
    h = big.embed(ids(700))
    done = threading.Event()

    def work() -> None:
        big.forward(h, big.new_kv(1000), 0, 8)
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        refused = 0
        while not done.is_set():  # the GIL is free meanwhile, or this loop would not turn
            try:
                big.logits(h[:1])
            except EngineBusy:
                refused += 1
            time.sleep(0.001)
    finally:
        worker.join()
    assert refused > 0
    assert big.logits(h[:1]).shape == (1, 320)


def test_cancel_from_another_thread_ends_a_long_call(big: lower_native.NativeLower) -> None:
    kv, cancel = big.new_kv(8000), Cancel()
    big.forward(big.embed(ids(3)), kv, 0, 8)
    timer = threading.Timer(0.05, cancel.set)
    timer.start()
    with pytest.raises(Cancelled):
        big.forward(big.embed(ids(6000)), kv, 0, 8, cancel)
    timer.join()
    assert {kv.length(i) for i in range(8)} == {3}
    assert big.forward(big.embed(ids(2)), kv, 0, 8).shape == (2, 256)


def test_a_child_of_fork_is_told_to_open_the_model_again(weights: Weights, path: Path) -> None:
    code = f"""
import os, signal
import numpy as np
from nearfar.errors import NearfarError
from nearfar.lower_native import NativeLower
from nearfar.options import EngineOptions
from nearfar.weights import Weights
weights = Weights.open({str(path)!r})
lower = NativeLower(weights, EngineOptions(threads=2))
h = lower.embed(np.arange(200, dtype=np.int32))
lower.forward(h, lower.new_kv(300), 0, 4)
child = os.fork()
if child == 0:
    signal.alarm(30)
    try:
        lower.forward(h, lower.new_kv(300), 0, 4)
    except NearfarError as error:
        again = NativeLower(weights, EngineOptions(threads=2))
        again.forward(h, again.new_kv(300), 0, 4)
        del lower
        os._exit(42 if "fork" in str(error) else 2)
    os._exit(1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "42", done.stderr


def test_forks_share_their_blocks(weights: Weights) -> None:
    lower = lower_native.NativeLower(weights, EngineOptions(threads=1))
    kv = lower.new_kv(200)
    lower.forward(lower.embed(ids(130)), kv, 0, 4)
    block = 2 * 64 * 2 * 64 * 2  # bytes: K and V, 64 positions, 2 heads of 64 numbers in f16
    assert kv.n_bytes == 4 * 3 * block
    forks = [kv.fork(128) for _ in range(50)]
    assert {fork.length(3) for fork in forks} == {128}
    assert kv.fork().length() == 130
    kv.truncate(64)
    assert kv.n_bytes == 4 * block
    assert forks[0].n_bytes == 4 * 2 * block


def test_panels_name_what_a_token_reads(weights: Weights) -> None:
    panels = lower_native.NativeLower(weights, EngineOptions(threads=1)).panels()
    assert len(panels) == 4 * 7 + 1
    gate = next(p for p in panels if p.name == "blk.0.ffn_gate")
    assert (gate.kind, gate.rows, gate.cols) == ("i2", 512, 256)
    assert 512 * 256 // 4 <= gate.n_bytes < 512 * 256 // 3  # 2 bits a weight and a scale a row
    assert panels[-1].name == "token_embd"
