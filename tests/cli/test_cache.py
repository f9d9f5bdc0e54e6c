"""`cache` lists what models have left for the next time, and removes it; `doctor` says what the store did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Nearfar

_core = pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")


def test_a_run_leaves_panels_that_cache_lists_and_removes(nearfar: Nearfar, story_model: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    ask = ("run", "--raw", "--model", story_model, "--max-tokens", "3", "--cache", store, "the")
    first = nearfar(*ask)
    assert first.code == 0
    (panels,) = store.iterdir()
    assert str(panels) in nearfar("cache", store).out
    assert nearfar(*ask, NEARFAR_DEBUG="1").err.count("packed matrices: hit") == 1
    listed = json.loads(nearfar("cache", store, "--json").out)
    assert listed == {
        "files": [
            {
                "path": str(panels),
                "bytes": panels.stat().st_size,
                "sound": True,
                "layout": f"{_core.PANEL_VERSION}-i2",
                "layers": [0, 4],
            }
        ],
        "bytes": panels.stat().st_size,
        "removed": False,
    }
    assert panels.exists()
    assert "removed" in nearfar("cache", store, "--remove").out
    assert list(store.iterdir()) == []
    assert "no packed matrices" in nearfar("cache", store).out


def test_cache_finds_what_lies_beside_a_model_and_leaves_the_model_alone(
    nearfar: Nearfar, story_model: Path, tmp_path: Path
) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(story_model.read_bytes())
    beside = tmp_path / "m.gguf.1-i2.0-4.panels"
    beside.write_bytes(b"damaged")
    (tmp_path / "other.gguf.1-i2.0-4.panels").write_bytes(b"another model's")
    (file,) = json.loads(nearfar("cache", model, "--json").out)["files"]
    assert file == {"path": str(beside), "bytes": 7, "sound": False}
    nearfar("cache", model, "--remove")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "other.gguf.1-i2.0-4.panels"]


def test_remove_leaves_files_of_other_programs_that_end_alike(nearfar: Nearfar, tmp_path: Path) -> None:
    foreign = tmp_path / "house.panels"
    foreign.write_bytes(b"somebody else's")
    abandoned = tmp_path / ".m.gguf.1-i2.0-4.panels.12-34.tmp"
    abandoned.write_bytes(b"")
    assert "removed" in nearfar("cache", tmp_path, "--remove").out
    assert list(tmp_path.iterdir()) == [foreign]


def test_a_place_that_is_not_there_is_an_error(nearfar: Nearfar, tmp_path: Path) -> None:
    done = nearfar("cache", tmp_path / "nowhere")
    assert done.code == 3
    assert "no such file" in done.err


def test_doctor_says_what_the_store_did_for_a_model(nearfar: Nearfar, story_model: Path, tmp_path: Path) -> None:
    assert json.loads(nearfar("doctor", "--json").out)["engine"]["cache"]["state"] == "off"  # nano is small
    store = str(tmp_path / "store")
    for expected in ("built", "hit"):
        cache = json.loads(nearfar("doctor", story_model, "--json", NEARFAR_CACHE=store).out)["engine"]["cache"]
        assert cache["state"] == expected
        assert Path(cache["path"]).stat().st_size == cache["bytes"]
    assert f"hit: mapped as packed before, {cache['bytes'] / 1e6:.1f} MB" in nearfar("doctor", story_model).out
