"""A master becomes the best file that fits a budget, or one sentence says why not."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfar.errors import FileError, NearfarError, UnsupportedError, UsageError, WeightsError
from nearfar.forms import ROWS_VERSION
from nearfar.gguf_reader import GGUFFile, TensorType
from nearfar.llm import LLM
from nearfar.lower import open_lower
from nearfar.master import WIDTHS, Master, Point, bits, pair_names, with_pair
from nearfar.pack import choose, pack, parse_bytes, writer_of
from nearfar.quant import dequantize
from nearfar.weights import Weights
from tests.master_file import RANK, frontier, write_master_file

# The same sums in another order, on logits of up to 3; now and then an activation crosses a rounding boundary, and how
# often depends on the order in which this CPU's numpy adds (medians of .002 to .011 were seen).
MAX_LOGIT_ERROR, MEDIAN_LOGIT_ERROR = 0.1, 0.03


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_master_file(tmp_path_factory.mktemp("master") / "master.gguf")


def test_no_budget_is_ever_passed_and_more_bytes_never_give_a_worse_model(path: Path, tmp_path: Path) -> None:
    with Master.open(path) as master:
        sizes = [writer_of(master, p, tmp_path).n_bytes() for p in master.frontier]
        losses = []
        for budget in np.linspace(min(sizes), max(sizes) * 1.1, 40).astype(int):
            point, n = choose(master, int(budget))
            assert n <= budget
            losses.append(point.loss)
        assert losses == sorted(losses, reverse=True)
        assert losses[0] == max(p.loss for p in master.frontier)
        assert losses[-1] == min(p.loss for p in master.frontier)


@pytest.mark.parametrize("i", range(7))
def test_the_size_that_was_promised_is_the_size_of_the_file(path: Path, tmp_path: Path, i: int) -> None:
    with Master.open(path) as master:
        promised = writer_of(master, master.frontier[i], tmp_path).n_bytes()
        packed = pack(master, promised, tmp_path / "m.gguf")
    assert packed.n_bytes == promised == (tmp_path / "m.gguf").stat().st_size
    assert packed.point == master.frontier[i]


def test_below_the_floor_the_floor_is_named_and_nothing_is_written(path: Path, tmp_path: Path) -> None:
    with Master.open(path) as master:
        floor = min(writer_of(master, p, tmp_path).n_bytes() for p in master.frontier)
        with pytest.raises(UsageError, match=f"{floor:,}"):
            pack(master, floor - 1, tmp_path / "m.gguf")
        assert not list(tmp_path.iterdir())
        assert pack(master, floor, tmp_path / "m.gguf").n_bytes == floor


def test_a_packed_matrix_is_the_latent_with_its_pair_rounded_to_its_width(path: Path, tmp_path: Path) -> None:
    with Master.open(path) as master:
        point = master.frontier[5]
        writer_of(master, point, tmp_path / "m.gguf").write()
        weights = Weights.open(tmp_path / "m.gguf")
        for m, width in zip(master.matrices[1:], point.assignment[1:], strict=True):
            kind, shape, _ = weights.raw(f"{m.name}.weight")
            assert (kind, shape) == (WIDTHS[width], m.shape)
            a, b = (master._f32(name) for name in pair_names(m.name, width))
            w = with_pair(master._f32(f"{m.name}.weight"), a, b)
            np.testing.assert_allclose(w, master._f32(f"{m.name}.weight") + b @ a, atol=1e-6)
            error = np.abs(weights.f32(f"{m.name}.weight") - w).mean() / np.abs(w).mean()
            assert error < {"t": 0.6, "3": 0.25, "4": 0.12, "8": 0.01}[width], (m.name, width)


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_engines_run_every_mixture_of_widths_alike(path: Path, tmp_path: Path, backend: str) -> None:
    if backend == "native":
        pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
    ids = np.random.default_rng(0).integers(7, 300, 20).astype(np.int32)
    with Master.open(path) as master:
        for i, point in enumerate(master.frontier):
            writer_of(master, point, tmp_path / f"{i}.gguf").write()
            logits = []
            for name in ("numpy", backend):
                lower = open_lower(Weights.open(tmp_path / f"{i}.gguf"), name)
                h = lower.forward(lower.embed(ids), lower.new_kv(len(ids), "f32"), 0, 4)
                logits.append(lower.logits(h, "final"))
            error = np.abs(logits[0] - logits[1])
            assert error.max() < MAX_LOGIT_ERROR, point
            assert np.median(error) < MEDIAN_LOGIT_ERROR, point


def test_a_packed_model_answers_and_its_exits_never_fire(path: Path, tmp_path: Path) -> None:
    calibrated = {
        "nearfar.calibration.id": "of other tensors",
        "nearfar.exit.2.tau": 0.1,
        "nearfar.exit.2.temperature": 3.0,
        "nearfar.exit.2.isotonic_x": [0.0, 1.0],
        "nearfar.exit.2.isotonic_y": [0.9, 1.0],
    }
    old = write_master_file(tmp_path / "master.gguf", extra=calibrated)
    with Master.open(old) as master:
        pack(master, 10**7, tmp_path / "m.gguf")
    with GGUFFile.open(tmp_path / "m.gguf") as file:
        assert not [k for k in file.metadata if k.startswith(("nearfar.master", "nearfar.calibration"))]
        assert "nearfar.exit.2.isotonic_x" not in file.metadata
        assert file.metadata["nearfar.rows"] == ROWS_VERSION
    (e,) = Weights.open(tmp_path / "m.gguf").config.exits
    assert (e.layer, e.tau, e.temperature, e.isotonic_x) == (2, 1.0, 1.0, ())
    with LLM.open(tmp_path / "m.gguf", cache="off") as llm:
        assert "exit" not in {t.source.split(".")[0] for t in llm.stream("the tin", max_tokens=8)}


def test_widths_are_named_by_letters_that_grow_with_their_bits() -> None:
    assert [round(bits(w), 2) for w in "t348"] == [1.69, 3.44, 4.5, 8.5]


@pytest.mark.parametrize(
    ("text", "n"), [("1.6MB", 1_600_000), ("900kB", 900_000), ("1500", 1500), ("1 MiB", 1 << 20), ("0.5mb", 500_000)]
)
def test_sizes_are_read_as_people_write_them(text: str, n: int) -> None:
    assert parse_bytes(text) == n


@pytest.mark.parametrize("text", ["", "MB", "-1", "1.6GB", "1,6MB", "nan", "1e6", "9" * 400])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected a size"):
        parse_bytes(text)


# ---- masters that are wrong


def broken(tmp_path: Path, message: str, **how: Any) -> None:
    path = write_master_file(tmp_path / "master.gguf", **how)
    with pytest.raises(WeightsError, match=message):
        Master.open(path)


def changed(name: str, to: Any) -> Any:
    return lambda n, kind, data: to(n, kind, data) if n == name else (n, kind, data)


A = pair_names("blk.1.ffn_down", "3")[0]


def test_a_pair_that_is_missing_misshapen_or_not_finite_is_named(tmp_path: Path) -> None:
    broken(tmp_path, f"no tensor {A}", change=changed(A, lambda *t: None))
    broken(tmp_path, f"{A} is F32", change=changed(A, lambda n, k, d: (n, k, d[:, :256].copy())))
    broken(tmp_path, "lora.blk.1.ffn_down.3.b is F32", change=changed(A, lambda n, k, d: (n, k, d[:1].copy())))
    broken(tmp_path, f"{A} is F16", change=changed(A, lambda n, k, d: (n, TensorType.F16, d)))
    bad = np.full((RANK, 512), np.nan, np.float32).view(np.uint8)

    def nan(path: Path) -> Path:
        with Master.open(path) as master:
            at = master.file.tensors[A].offset
        raw = bytearray(path.read_bytes())
        raw[at : at + 4] = bad.reshape(-1)[:4].tobytes()
        path.write_bytes(raw)
        return path

    with pytest.raises(WeightsError, match="not finite"):
        Master.open(nan(write_master_file(tmp_path / "master.gguf")))


def test_a_latent_that_is_missing_is_named(tmp_path: Path) -> None:
    broken(tmp_path, "no tensor blk.0.attn_k.weight", change=changed("blk.0.attn_k.weight", lambda *t: None))


@pytest.mark.parametrize(
    "assignment", ["", "8", "t" * 29, "8" * 30, "8" + "5" * 28, "8" + "t" * 27 + "é"], ids=lambda a: a[:3] + str(len(a))
)
def test_an_assignment_that_does_not_fit_is_refused(tmp_path: Path, assignment: str) -> None:
    broken(tmp_path, "expected 29 letters", points=[Point(assignment, 1.0)])


def test_a_frontier_that_is_missing_or_uneven_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="finite"):
        Master.open(write_master_file(tmp_path / "a.gguf", points=[Point("8" * 29, float("inf"))]))
    path = write_master_file(tmp_path / "b.gguf")
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"nearfar.master.losses", b"nearfar.master.lasses"))
    with pytest.raises(WeightsError, match="expected lists"):
        Master.open(path)


def test_a_model_is_no_master_and_a_master_is_no_model(path: Path, tmp_path: Path) -> None:
    with Master.open(path) as master:
        pack(master, 10**7, tmp_path / "m.gguf")
    with pytest.raises(UnsupportedError, match="expected 'nearfar-master'"):
        Master.open(tmp_path / "m.gguf")
    with pytest.raises(UnsupportedError, match="nearfar pack"):
        Weights.open(path)
    with pytest.raises(FileError):
        Master.open(tmp_path / "missing.gguf")


def test_damaged_masters_end_with_an_error_of_ours_or_a_sound_file(path: Path, tmp_path: Path) -> None:
    """Bytes of the header flipped, and files cut short: never another exception, never a file over the budget."""
    raw, rng = path.read_bytes(), np.random.default_rng(0)
    header = len(raw) // 200
    for i in range(60):
        damaged = bytearray(raw)
        for at in rng.integers(0, header if i % 2 else len(raw), 3):
            damaged[at] ^= 1 << int(rng.integers(8))
        if i % 5 == 0:
            damaged = damaged[: int(rng.integers(len(raw)))]
        (tmp_path / "damaged.gguf").write_bytes(damaged)
        with suppress(NearfarError), Master.open(tmp_path / "damaged.gguf") as master:
            assert pack(master, 10**7, tmp_path / "out.gguf").n_bytes <= 10**7


def test_the_pairs_rank_does_not_change_what_the_frontier_means(path: Path) -> None:
    with Master.open(path) as master:
        assert [p.assignment for p in master.frontier] == [p.assignment for p in frontier(len(master.matrices))]
        zero = np.zeros((0, 512), np.float32)
        w = master._f32("blk.1.ffn_down.weight")
        assert np.array_equal(with_pair(w, zero, np.zeros((256, 0), np.float32)), w)
        assert np.array_equal(
            dequantize(master.packed(master.matrices[1], "8"), TensorType.Q8_0, master.matrices[1].shape).shape,
            master.matrices[1].shape,
        )
