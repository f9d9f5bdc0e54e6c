"""Checkpoints: whole or not at all, verified when read, survived by the run whatever happens."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")

from nearfar.errors import FileError  # noqa: E402
from nearfar_cloud.training import checkpoint  # noqa: E402
from nearfar_cloud.training.checkpoint import Checkpoint, Checkpoints, read, write  # noqa: E402
from nearfar_cloud.training.schedule import Budget  # noqa: E402
from nearfar_cloud.training.trainer import Trainer  # noqa: E402
from tests.cloud.toy_batches import ToyBatches, tiny_recipe  # noqa: E402
from tests.paths import ROOT  # noqa: E402


def sample(n: int = 0) -> Checkpoint:
    torch.manual_seed(n)
    tensors = {"a": torch.randn(5, 7), "b": torch.tensor(3.5), "rng": torch.get_rng_state(), "none": torch.zeros(0)}
    return Checkpoint(tensors, {"step": n, "mix": {"drawn": {"x": 3}}, "seconds": 1.5})


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors", sample())
    back = read(tmp_path / "a.safetensors")
    assert back.state == sample().state
    assert set(back.tensors) == set(sample().tensors)
    for name, tensor in sample().tensors.items():
        assert torch.equal(back.tensors[name], tensor)
        assert back.tensors[name].shape == tensor.shape


def test_only_the_last_two_and_the_named_ones_stay(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path)
    for n in range(1, 6):
        path = folder.save(n, sample(n))
        if n == 2:
            folder.keep(path, "stable-end")
        if n in (1, 3):
            folder.keep(path, "best")
    assert [p.stem for p in folder.last()] == ["step-00000005", "step-00000004"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.safetensors",
        "stable-end.safetensors",
        "step-00000004.safetensors",
        "step-00000005.safetensors",
    ]
    assert read(folder.path("best")).state["step"] == 3
    assert read(folder.path("stable-end")).state["step"] == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "tensor bit", "header bit", "text"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(tmp_path: Path, damage: str) -> None:
    folder = Checkpoints(tmp_path)
    folder.save(1, sample(1))
    path = folder.save(2, sample(2))
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "empty":
        data = bytearray()
    elif damage == "tensor bit":
        data[-9] ^= 1
    elif damage == "header bit":
        data[data.index(b"seconds") + 12] ^= 1
    else:
        data = bytearray(b"this is no checkpoint at all")
    path.write_bytes(data)
    found = folder.newest()
    assert found is not None
    saved, sentences = found
    assert saved.state["step"] == 1
    assert len(sentences) == 1
    assert "step-00000002.safetensors: damaged checkpoint" in sentences[0]


def test_without_a_sound_checkpoint_all_damaged_ones_are_named(tmp_path: Path) -> None:
    folder = Checkpoints(tmp_path)
    assert folder.newest() is None
    for n in (1, 2):
        folder.save(n, sample(n)).write_bytes(b"")
    with pytest.raises(FileError, match=r"no sound checkpoint is left.*step-00000002.*step-00000001"):
        folder.newest()


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Checkpoints(tmp_path)
    folder.save(1, sample(1))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage(100, 100, 1 << 20))
    with pytest.raises(FileError, match="1 MB free; the checkpoint before it stays"):
        folder.save(2, sample(2))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.safetensors"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write(path, sample(1))

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "fsync", fail)
    with pytest.raises(FileError, match="not written, No space left on device"):
        write(path, sample(2))
    assert read(path).state["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


CHILD = """
import sys, torch
from pathlib import Path
from nearfar_cloud.training.checkpoint import Checkpoints
from nearfar_cloud.training.schedule import Budget
from nearfar_cloud.training.trainer import Trainer
from tests.cloud.toy_batches import ToyBatches, tiny_recipe
torch.set_num_threads(1)
recipe = tiny_recipe()
t = Trainer(recipe, ToyBatches(recipe), Budget(tokens=40 * 128))
folder = Checkpoints(Path(sys.argv[1]))
found = folder.newest()
if found:
    t.restore(found[0])
while t.n < 30:
    r = t.step()
    print(r.step, repr(r.loss), flush=True)
    folder.save(t.n, t.checkpoint())
"""


def test_a_run_killed_at_random_times_gives_the_losses_of_an_unbroken_one(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    t = Trainer(recipe, ToyBatches(recipe), Budget(tokens=40 * 128))
    unbroken = {r.step: r.loss for r in (t.step() for _ in range(30))}
    torch.set_num_threads(threads)

    rng, seen = random.Random(5), {}
    paths = os.pathsep.join(str(ROOT / p) for p in ("sdk", "cloud", "."))
    for attempt in range(4):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": paths},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        kill_after = None if attempt == 3 else rng.randrange(1, 8)
        for n, line in enumerate(child.stdout, 1):
            step, loss = line.split()
            seen[int(step)] = float(loss)
            if n == kill_after:
                time.sleep(rng.random() * 0.02)  # somewhere between the step and the end of its checkpoint
                child.send_signal(signal.SIGKILL)  # what it told before it died is read to the end
        child.stdout.close()
        assert child.wait() == (0 if kill_after is None else -signal.SIGKILL)
    assert seen == unbroken
