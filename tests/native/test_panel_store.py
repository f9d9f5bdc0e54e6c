"""The store of packed matrices: a hit computes what packing computes, and nothing in it is trusted."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nearfar import panel_store, weights
from nearfar.errors import UsageError, WeightsError
from nearfar.llm import LLM
from nearfar.options import EngineOptions
from nearfar.panel_file import PanelFile
from nearfar.panel_store import CacheState, stored, vouches_for
from nearfar.weights import Weights
from tests.tiny import WEIGHT_TYPES, write_tiny

_core = pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
lower_native = pytest.importorskip("nearfar.lower_native", reason="the compiled engine is not built")

VERSION = _core.PANEL_VERSION
IDS = (np.arange(9) * 7 % 320).astype(np.int32)


def run(path: Path, cache: str | Path | None, **layers: int) -> tuple[np.ndarray, CacheState]:
    """What the model computes, and what the store did."""
    lower = lower_native.NativeLower(Weights.open(path), EngineOptions(threads=2, cache=cache), **layers)
    h = lower.embed(IDS)
    h = lower.forward(h, lower.new_kv(16), lower.first, lower.last)
    return lower.logits(h), lower.cache


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "m.gguf", "bitnet", "TQ2_0", n_layers=2, exits=(1,), embedding_type="Q8_0")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []


@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_a_hit_and_a_build_compute_the_bits_of_fresh_packing(weight_type: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "llama", weight_type, n_layers=2, tied=False, embedding_type="Q8_0")
    fresh, state = run(path, "off")
    assert (state.state, state.path) == ("off", None)
    for expected in ("built", "hit", "hit"):
        z, state = run(path, tmp_path / "store")
        assert state.state == expected
        assert state.path is not None
        assert state.n_bytes == state.path.stat().st_size
        assert np.array_equal(z, fresh)
    assert len(files(tmp_path / "store")) == 1


def test_scales_beside_their_matrices_travel_with_the_panels(tmp_path: Path, store: Path) -> None:
    from nearfar.gguf_reader import GGUFFile
    from nearfar.gguf_writer import GGUFWriter

    plain = write_tiny(tmp_path / "m.gguf", "bitnet", "TQ1_0", n_layers=1)
    w = GGUFWriter(tmp_path / "scaled.gguf")
    with GGUFFile.open(plain) as file:
        for key in file.metadata:
            w.add_encoded(key, file.encoded(key))
        for name, t in file.tensors.items():
            w.add_tensor(name, file.raw(name).copy(), t.type, t.shape)
    w.add_tensor("blk.0.ffn_up.scale", np.array([0.75], np.float32))
    path = w.write()
    fresh = run(path, "off")[0]
    for _ in range(2):
        assert np.array_equal(run(path, store)[0], fresh)
    assert not np.array_equal(run(plain, "off")[0], fresh)


def test_a_model_that_changed_is_packed_again(model: Path, store: Path) -> None:
    before = run(model, store)[0]
    with open(model, "r+b") as f:
        f.seek(-1000, os.SEEK_END)
        f.write(bytes(range(100)))  # the same size; codes, so that every number stays finite
    fresh = run(model, "off")[0]
    assert not np.array_equal(fresh, before)
    z, state = run(model, store)
    assert state.state == "built"
    assert "the model changed" in state.why
    assert np.array_equal(z, fresh)
    assert run(model, store)[1].state == "hit"
    assert len(files(store)) == 1


def test_another_model_of_the_same_size_and_time_is_noticed(tmp_path: Path, store: Path) -> None:
    first = write_tiny(tmp_path / "m.gguf", "bitnet", "TQ2_0", seed=1)
    run(first, store)
    size, when = first.stat().st_size, first.stat().st_mtime_ns
    second = write_tiny(tmp_path / "m.gguf", "bitnet", "TQ2_0", seed=2)
    os.utime(second, ns=(when, when))
    assert (second.stat().st_size, second.stat().st_mtime_ns) == (size, when)
    z, state = run(second, store)
    assert state.state == "built"
    assert np.array_equal(z, run(second, "off")[0])


def damage_at(offset: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


HEADER = {"magic": 0, "version": 8, "count": 12, "size": 16, "source": 24, "layout": 56, "first": 88, "last": 92}
ENTRY = {"name": 0, "kind": 64, "rows": 80, "cols": 88, "scale": 96, "offset": 104, "n_bytes": 112, "sum": 120}
DAMAGE = {name: damage_at(at) for name, at in HEADER.items()}
DAMAGE |= {f"entry {name}": damage_at(112 + 152 + at) for name, at in ENTRY.items()}
DAMAGE |= {
    "digest": damage_at(96),
    "first byte of the panels": damage_at(-1),  # patched below: offsets count from the first matrix
    "last byte": lambda data: damage_at(len(data) - 1)(data),
    "cut by one byte": lambda data: data[:-1],
    "cut in the middle": lambda data: data[: len(data) // 2],
    "cut in the table": lambda data: data[:200],
    "cut in the header": lambda data: data[:100],
    "empty": lambda data: b"",
    "longer": lambda data: data + bytes(64),
    "zeros": lambda data: bytes(len(data)),
    "a page of zeros": lambda data: data[:8192] + bytes(4096) + data[12288:],
    "another version": lambda data: data[:8] + b"\2" + data[9:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_any_damage_is_noticed_said_and_repaired(
    damage: str, model: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fresh, state = run(model, store)
    assert state.path is not None
    whole = state.path.read_bytes()
    change = DAMAGE[damage]
    if damage == "first byte of the panels":
        first = next(iter(PanelFile.open(state.path).matrices.values())).data
        change = damage_at(whole.index(first.tobytes()))
    state.path.write_bytes(change(whole))
    with caplog.at_level(logging.WARNING, "nearfar"):
        z, state = run(model, store)
    assert state.state == "built"
    assert np.array_equal(z, fresh)
    assert len(caplog.messages) == 1
    assert "packed again" in caplog.messages[0]
    assert "\n" not in caplog.messages[0]
    assert state.path is not None
    assert state.path.read_bytes() == whole


def test_a_byte_of_any_matrix_and_its_scales_counts(model: Path, store: Path) -> None:
    _, state = run(model, store)
    assert state.path is not None
    whole = state.path.read_bytes()
    matrices = PanelFile.open(state.path).matrices
    for panels in matrices.values():
        for part in (panels.data, panels.row_scales):
            if part.size:
                at = whole.index(part.tobytes()) + part.size // 2
                state.path.write_bytes(damage_at(at)(whole))
                assert run(model, store)[1].state == "built"
    assert sum(p.row_scales.size > 0 for p in matrices.values()) == 14  # the ternary ones have some


def test_kernels_of_one_layout_share_their_panels(model: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(model, store)
    monkeypatch.setenv("NEARFAR_ISA", "ref")
    assert run(model, store)[1].state == "hit"


def test_kernels_of_another_layout_have_panels_of_their_own(
    model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = run(model, store)[0]
    monkeypatch.setattr(_core, "ternary_kind", lambda isa, lut, n_weights: "t5")
    for expected in ("built", "hit"):
        z, state = run(model, store)
        assert state.state == expected
        assert np.array_equal(z, fresh)
    monkeypatch.undo()
    assert run(model, store)[1].state == "hit"
    assert [name.split(".")[-3] for name in files(store)] == [f"{VERSION}-i2", f"{VERSION}-t5"]


def test_products_by_lookup_have_panels_of_their_own(model: Path, store: Path) -> None:
    if not lower_native.has_lookups():
        pytest.skip("these kernels have no lookups")
    run(model, store)
    results = []
    for cache, expected in (("off", "off"), (store, "built"), (store, "hit")):
        options = EngineOptions(threads=1, cache=cache, lut="fast")
        lower = lower_native.NativeLower(Weights.open(model), options)
        assert lower.cache.state == expected
        results.append(lower.logits(lower.forward(lower.embed(IDS), lower.new_kv(16), 0, 2)))
    assert np.array_equal(results[0], results[1])
    assert np.array_equal(results[0], results[2])
    assert run(model, store)[1].state == "hit"


@pytest.mark.parametrize("head", ["q4", "screened"])
def test_other_heads_compute_the_bits_of_fresh_packing(head: str, model: Path, store: Path) -> None:
    run(model, store)
    results = []
    for cache, expected in (("off", ("off",)), (store, ("built", "hit")), (store, ("hit",))):
        lower = lower_native.NativeLower(Weights.open(model), EngineOptions(threads=2, cache=cache, head=head))
        assert lower.cache.state in expected
        h = lower.forward(lower.embed(IDS), lower.new_kv(16), 0, 2)
        results.append((lower.logits(h), lower.greedy(h)[0], sum(p.n_bytes for p in lower.panels())))
    for logits, ids, n_bytes in results[1:]:
        assert np.array_equal(logits, results[0][0])
        assert np.array_equal(ids, results[0][1])
        assert n_bytes == results[0][2]
    assert run(model, store)[1].state == "hit"
    assert len(files(store)) == (2 if head == "q4" else 1)  # a screen is made from the file each time


def test_layer_ranges_have_panels_of_their_own(model: Path, store: Path) -> None:
    for expected in ("built", "hit"):
        low, state = run(model, store, first=0, last=1)
        assert state.state == expected
        assert np.array_equal(low, run(model, "off", first=0, last=1)[0])
        assert run(model, store, first=1, last=2)[1].state == expected
    assert len(files(store)) == 2
    with pytest.raises(UsageError, match=r"layers \[0, 9\)"):
        run(model, store, last=9)


def test_a_panel_file_under_another_name_is_not_taken(model: Path, store: Path) -> None:
    run(model, store, first=0, last=1)
    run(model, store)
    part, whole = sorted(store.iterdir())
    whole.write_bytes(part.read_bytes())
    z, state = run(model, store)
    assert state.state == "built"
    assert np.array_equal(z, run(model, "off")[0])


def test_small_models_are_packed_at_once_and_nothing_is_left_beside_them(model: Path) -> None:
    for cache in ("auto", None, "off"):
        assert run(model, cache)[1].state == "off"
    assert files(model.parent) == ["m.gguf"]


def test_large_models_keep_their_panels_beside_them(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(panel_store, "SMALLEST", 0)
    assert run(model, "auto")[1].state == "built"
    assert run(model, None)[1].state == "hit"
    assert files(model.parent) == ["m.gguf", f"m.gguf.{VERSION}-i2.0-2.panels"]


def test_where_beside_the_model_cannot_be_written_the_users_cache_folder_serves(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs a folder that nobody can write to, not even root")
    monkeypatch.setattr(panel_store, "SMALLEST", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with open(model, "rb") as f:
        path = Path(f"/proc/self/fd/{f.fileno()}")
        for expected in ("built", "hit"):
            z, state = run(path, "auto")
            assert state.state == expected
            assert state.path is not None
            assert state.path.parent == tmp_path / "home" / "nearfar" / "panels"
            assert np.array_equal(z, run(model, "off")[0])


@pytest.mark.parametrize("folder", ["/proc/nearfar", "{tmp_path}/m.gguf"])
def test_a_folder_that_takes_nothing_costs_nothing_but_time(folder: str, model: Path, tmp_path: Path) -> None:
    z, state = run(model, folder.format(tmp_path=tmp_path))
    assert state.state == "off"
    assert "cannot keep panels" in state.why
    assert np.array_equal(z, run(model, "off")[0])


def test_a_full_disk_leaves_nothing_and_loses_nothing(model: Path, store: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))"
    assert builder(model, store, limit).stdout.split()[0] == "off"
    assert files(store) == []


def builder(model: Path, store: Path, before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(_builder(model, store, before), capture_output=True, text=True, check=True, timeout=60)


def _builder(model: Path, store: Path, before: str = "") -> list[str]:
    code = f"""
import sys, pathlib, zlib
from tests.native.test_panel_store import run
{before}
z, state = run(pathlib.Path({str(model)!r}), pathlib.Path({str(store)!r}))
print(state.state, zlib.crc32(z.tobytes()), state)
"""
    return [sys.executable, "-c", code]


def test_builders_at_the_same_time_do_not_disturb_each_other(model: Path, store: Path) -> None:
    at_once = [
        subprocess.Popen(_builder(model, store), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [process.communicate(timeout=60) for process in at_once]
    assert all(process.returncode == 0 for process in at_once), said
    words = [out.split() for out, _ in said]
    assert {w[0] for w in words} <= {"built", "hit"}
    assert len({w[1] for w in words}) == 1
    assert len(files(store)) == 1
    assert run(model, store)[1].state == "hit"


def test_an_open_model_outlives_the_removal_of_its_panels(model: Path, store: Path) -> None:
    run(model, store)
    lower = lower_native.NativeLower(Weights.open(model), EngineOptions(threads=1, cache=store))
    assert lower.cache.state == "hit"
    lower.cache.path.unlink()
    z = lower.logits(lower.forward(lower.embed(IDS), lower.new_kv(16), 0, 2))
    assert np.array_equal(z, run(model, "off")[0])


def test_what_a_killed_builder_left_is_cleared_away(model: Path, store: Path) -> None:
    store.mkdir()
    target = panel_store.panel_path(store, model, f"{VERSION}-i2", 0, 2).name
    old, new, other = (store / name for name in (f".{target}.1-1.tmp", f".{target}.2-2.tmp", ".other.1-1.tmp"))
    for path in (old, new, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (time.time() - 7200,) * 2)
    assert run(model, store)[1].state == "built"
    assert not old.exists()
    assert new.exists()
    assert other.exists()


def test_a_packed_model_is_not_looked_through_again(model: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[tuple[int, ...]] = []

    def all_finite(raw: np.ndarray, kind: object, shape: tuple[int, ...]) -> bool:
        looked.append(shape)
        return True

    monkeypatch.setattr(weights, "all_finite", all_finite)
    LLM.open(model, cache=store, backend="native").close()
    assert any(len(shape) == 2 for shape in looked)
    looked.clear()
    LLM.open(model, cache=store, backend="native").close()
    assert looked
    assert all(len(shape) == 1 for shape in looked)  # vectors are looked at each time
    looked.clear()
    os.utime(model)
    LLM.open(model, cache=store, backend="native").close()
    assert any(len(shape) == 2 for shape in looked)


def test_nobody_vouches_for_a_model_that_was_never_packed_or_is_not_finite(tmp_path: Path, store: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "llama", "Q8_0", n_layers=1)
    with Weights.open(path) as w:
        assert not vouches_for(w.file, store)
        run(path, store)
        assert vouches_for(w.file, store)
        assert not vouches_for(w.file, "off")
        at = w.file.tensors["blk.0.ffn_down.weight"].offset
    with open(path, "r+b") as f:
        f.seek(at)
        f.write(b"\0\x7c")  # the scale of the first block becomes infinite
    with pytest.raises(WeightsError, match="not finite"):
        LLM.open(path, cache=store)


def test_the_environment_names_the_folder_where_the_caller_does_not(
    model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEARFAR_CACHE", str(store))
    with LLM.open(model, backend="native") as llm:
        assert llm.stepper.lower.cache.state == "built"
    with LLM.open(model, backend="native", cache="off") as llm:
        assert llm.stepper.lower.cache.state == "off"


def test_the_list_of_what_is_stored_tells_sound_from_damaged(model: Path, store: Path) -> None:
    run(model, store)
    run(model, store, first=0, last=1)
    whole, part = sorted(store.iterdir())[::-1]
    part.write_bytes(part.read_bytes()[:-1])
    found = {s.path: s for s in stored([store])}
    assert set(found) == {whole, part}
    assert found[part].key is None
    key = found[whole].key
    assert key is not None
    assert (key.layout, key.first, key.last) == (f"{VERSION}-i2", 0, 2)
    assert found[whole].n_bytes == whole.stat().st_size


def test_an_empty_name_of_a_cache_is_refused(model: Path) -> None:
    with pytest.raises(UsageError, match="expected auto, off or a folder"):
        LLM.open(model, cache="")
