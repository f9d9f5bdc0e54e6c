"""One training, many budgets: what is trained is what the file holds, at every width."""

from __future__ import annotations

import argparse
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")
for package in ("tokenizers", "hassil", "safetensors", "matplotlib"):
    pytest.importorskip(package, reason=f"{package} is not installed (extra [train])")

from nearfar import master as sdk_master  # noqa: E402
from nearfar.errors import Cancelled, ConfigError, DataError, FileError, UsageError  # noqa: E402
from nearfar.gguf_reader import TensorType  # noqa: E402
from nearfar.master import WIDTHS, Master, Matrix, Point, pack_matrix  # noqa: E402
from nearfar.pack import pack, writer_of  # noqa: E402
from nearfar.quant import ACTIVATION_GRAIN, dequantize, fake_quantize_activations  # noqa: E402
from nearfar.weights import Weights  # noqa: E402
from nearfar_cloud.training import run  # noqa: E402
from nearfar_cloud.training import tokenizer as tokenizers  # noqa: E402
from nearfar_cloud.training.export import export  # noqa: E402
from nearfar_cloud.training.model import Decoder  # noqa: E402
from nearfar_cloud.training.multi import cli, search, study  # noqa: E402
from nearfar_cloud.training.multi.linear import MultiDecoder  # noqa: E402
from nearfar_cloud.training.multi.master import write_master  # noqa: E402
from nearfar_cloud.training.multi.rounding import rounded, rounded_rows, with_pair  # noqa: E402
from nearfar_cloud.training.multi.run import Options, open_parent, train_multi  # noqa: E402
from nearfar_cloud.training.multi.sampling import DRAWS, always, balanced, mean_bits, uniform  # noqa: E402
from nearfar_cloud.training.multi.trainer import MultiTrainer, Report  # noqa: E402
from nearfar_cloud.training.recipe import Recipe, Shape  # noqa: E402
from nearfar_cloud.training.run import train  # noqa: E402
from nearfar_cloud.training.schedule import Budget  # noqa: E402
from nearfar_cloud.training.tokenizer import RowTokenizer  # noqa: E402
from tests.cloud import mini_data  # noqa: E402
from tests.cloud.logits import engine_logits, torch_logits  # noqa: E402
from tests.cloud.toy_batches import ToyBatches, tiny_recipe  # noqa: E402
from tests.outside import llama_cpp_that_runs  # noqa: E402

# As in test_export: training keeps the rows of the head in f32, the file's head takes them as int8; now and then a
# last bit of a norm also moves an activation across a rounding boundary.  Logits are about 1 in size.
MAX_LOGIT_ERROR = 0.08
MEDIAN_LOGIT_ERROR = 0.03  # how often an activation crosses a rounding boundary depends on the CPU
# llama.cpp has the row's int8 scales at another grain for trits, and an f16 cache.
MAX_LOGIT_ERROR_OUTSIDE, MEDIAN_LOGIT_ERROR_OUTSIDE = 0.3, 0.05

WORDS = ("turn off the kitchen lights", "it is 2.5 degrees", "a journal of the day", "open the blinds")


@pytest.fixture(scope="module")
def tokenizer() -> RowTokenizer:
    return tokenizers.train(iter([f"{text} {n}" for text in WORDS for n in range(30)]), 300)


def float_shape(n_vocab: int, **changes: Any) -> Shape:
    return replace(Shape(n_vocab, 256, 3, 4, 2, 512, 128, exits=(1, 2), weights="float"), **changes)


def with_random_pairs(parent: Decoder, **options: Any) -> MultiDecoder:
    torch.manual_seed(1)
    model = MultiDecoder(parent, **options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".b." in name:
                p.normal_(0, 0.01)
            if name.endswith("gain"):
                p.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def model(tokenizer: RowTokenizer) -> MultiDecoder:
    torch.manual_seed(0)
    return with_random_pairs(Decoder(float_shape(tokenizer.n_vocab)))


# ---- rounding


def matrices_to_round() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    plain = rng.normal(0, 0.05, (64, 512)).astype(np.float32)
    odd = plain.copy()
    odd[0], odd[1, :256] = 0, 0
    odd[2, 7] = 50
    odd[3] = 0.5 * np.tile([1, -1], 256)  # ties for the largest
    odd[4] = np.linspace(-4, 4, 512)
    odd[5, :16] = 1e-30
    odd[6] = np.arange(512) % 9 - 4  # halves after division
    return {"plain": plain, "odd": odd, "zeros": np.zeros((2, 256), np.float32), "tiny": plain * 1e-6}


@pytest.mark.parametrize("width", "t348")
@pytest.mark.parametrize("name", ["plain", "odd", "zeros", "tiny"])
def test_training_rounds_to_the_very_bits_of_the_file(width: str, name: str) -> None:
    w = matrices_to_round()[name]
    in_file = dequantize(pack_matrix(w, width), WIDTHS[width], w.shape)
    np.testing.assert_array_equal(rounded(torch.from_numpy(w), width).numpy(), in_file)


@pytest.mark.parametrize("width", "t348")
def test_training_rounds_rows_to_the_very_bits_of_the_engine(width: str) -> None:
    x = np.random.default_rng(1).normal(size=(5, 512)).astype(np.float32)
    x[1], x[2, 3] = 0, 1e4
    expected = fake_quantize_activations(x, ACTIVATION_GRAIN[WIDTHS[width]])
    np.testing.assert_array_equal(rounded_rows(torch.from_numpy(x), width).numpy(), expected)


def test_a_pair_is_added_with_the_same_bits_on_both_sides() -> None:
    rng = np.random.default_rng(2)
    w, a, b = (rng.normal(size=s).astype(np.float32) for s in ((96, 256), (4, 256), (96, 4)))
    mine = with_pair(*map(torch.from_numpy, (w, a, b))).numpy()
    np.testing.assert_array_equal(mine, sdk_master.with_pair(w, a, b))


def test_gradients_pass_the_rounding_as_if_it_were_not_there(model: MultiDecoder) -> None:
    linear = next(module for _, module in model.linears())
    g = torch.randn(256, 256)
    linear.matrix("attn_q", "t").backward(g)
    a, b = linear.a["attn_qt"], linear.b["attn_qt"]
    torch.testing.assert_close(a.grad, b.detach().mT @ g)
    torch.testing.assert_close(b.grad, g @ a.detach().mT)
    assert linear.latent.grad is None
    a.grad = b.grad = None


# ---- the file


IDS = np.random.default_rng(0).integers(7, 290, 40).astype(np.int32)
ASSIGNMENTS = ["8" * 22, "4" + "t" * 21, "8" + "3" * 21, "4" * 22, "8" + "t348t34" * 3]


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_every_packed_assignment_computes_what_training_computed(
    model: MultiDecoder, tokenizer: RowTokenizer, tmp_path: Path, backend: str
) -> None:
    if backend == "native":
        pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
    points = [Point(a, 1.0) for a in ASSIGNMENTS]
    write_master(model, tokenizer, tmp_path / "master.gguf", card={"name": "tiny"}, points=points)
    with Master.open(tmp_path / "master.gguf") as master:
        assert master.matrices == model.matrices
        assert list(master.frontier) == points
        for i, point in enumerate(points):
            writer_of(master, point, tmp_path / f"{i}.gguf").write()
            model.assign(point.assignment)
            mine = engine_logits(tmp_path / f"{i}.gguf", IDS, backend)
            for head, expected in torch_logits(model, IDS).items():
                error = np.abs(mine[head] - expected)
                assert error.max() < MAX_LOGIT_ERROR, (point.assignment, head)
                assert np.median(error) < MEDIAN_LOGIT_ERROR, (point.assignment, head)


def test_an_outside_engine_runs_every_packed_assignment(
    model: MultiDecoder, tokenizer: RowTokenizer, tmp_path: Path
) -> None:
    """Stock llama.cpp opens the files: types may differ from matrix to matrix.  Rows of trits are int8 by 256 there."""
    llama_cpp = llama_cpp_that_runs("Q8_0", "Q4_0", "TQ2_0")
    points = [Point(a, 1.0) for a in ASSIGNMENTS]
    write_master(model, tokenizer, tmp_path / "master.gguf", card={"name": "tiny"}, points=points)
    with Master.open(tmp_path / "master.gguf") as master:
        for i, point in enumerate(points):
            path = writer_of(master, point, tmp_path / f"{i}.gguf").write()
            llama = llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, logits_all=True, verbose=False)
            llama.eval(IDS.tolist())
            theirs, mine = llama.scores[: len(IDS)], engine_logits(path, IDS, "numpy")["final"]
            assert np.abs(theirs - mine).max() < MAX_LOGIT_ERROR_OUTSIDE, point
            assert np.median(np.abs(theirs - mine)) < MEDIAN_LOGIT_ERROR_OUTSIDE, point


def test_the_packed_matrices_are_those_of_training_bit_for_bit(
    model: MultiDecoder, tokenizer: RowTokenizer, tmp_path: Path
) -> None:
    point = Point(ASSIGNMENTS[-1], 1.0)
    write_master(model, tokenizer, tmp_path / "master.gguf", card={"name": "tiny"}, points=[point])
    with Master.open(tmp_path / "master.gguf") as master:
        pack(master, 10**8, tmp_path / "m.gguf")
    weights = Weights.open(tmp_path / "m.gguf")
    model.assign(point.assignment)
    with torch.no_grad():
        np.testing.assert_array_equal(weights.f32("token_embd.weight"), model.head().numpy())
        for i, linear in model.linears():
            for name in linear.names:
                expected = linear.matrix(name, linear.widths[name]).numpy()
                np.testing.assert_array_equal(weights.f32(f"blk.{i}.{name}.weight"), expected)


def test_without_training_every_width_is_post_hoc_rounding(tokenizer: RowTokenizer) -> None:
    parent = Decoder(float_shape(tokenizer.n_vocab))
    untouched = MultiDecoder(parent)
    _, linear = next(untouched.linears())
    latent = parent.blocks[0].qkv.latent.detach()[:256].bfloat16().float()
    assert torch.equal(linear.matrix("attn_q", "4"), rounded(latent, "4"))


def test_pairs_beside_the_matrix_add_their_product_and_cannot_be_packed(
    tokenizer: RowTokenizer, tmp_path: Path
) -> None:
    beside = with_random_pairs(Decoder(float_shape(tokenizer.n_vocab)), form="beside")
    _, linear = next(beside.linears())
    x = torch.randn(3, 256)
    alone = torch.nn.functional.linear(rounded_rows(x, "8"), rounded(linear.latent_of("attn_q"), "8"))
    pair = x @ linear.a["attn_q8"].mT @ linear.b["attn_q8"].mT
    torch.testing.assert_close(linear(x, torch.float32)[0], alone + pair)
    with pytest.raises(ConfigError, match="no place"):
        write_master(beside, tokenizer, tmp_path / "m.gguf", card={}, points=[])


def test_shapes_without_whole_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiples of 256"):
        MultiDecoder(Decoder(Shape(64, 128, 2, 4, 2, 384, 64, exits=(1,), weights="float")))


def test_a_float_twin_rounds_nothing_and_is_exported_as_floats(tokenizer: RowTokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    twin = Decoder(float_shape(tokenizer.n_vocab))
    path = export(twin, tokenizer, tmp_path / "m.gguf", card={"name": "twin"}, embedding=TensorType.F32)
    mine = engine_logits(path, IDS, "numpy")["final"]
    batch = torch.from_numpy(IDS.astype(np.int64))[None]
    with torch.no_grad():
        final, _ = twin(batch, torch.arange(len(IDS))[None], torch.zeros_like(batch), twin.embedding)
        expected = (final @ twin.embedding.mT)[0].numpy()
    assert np.abs(mine - expected).max() < 0.02  # the matrices of the file are F16


# ---- sampling


def sizes(n_layers: int = 6) -> list[Matrix]:
    shapes = [(256, 256), (128, 256), (128, 256), (256, 256), (512, 256), (512, 256), (256, 512)]
    layers = [Matrix(f"blk.{i}.{j}", s) for i in range(n_layers) for j, s in enumerate(shapes)]
    return [Matrix(sdk_master.EMBEDDING, (4096, 256)), *layers]


def histogram(draw: Any) -> np.ndarray:
    rng, of = np.random.default_rng(0), sizes()
    means = [mean_bits(draw(rng, of), of) for _ in range(2000)]
    return np.histogram(means, bins=10, range=(sdk_master.bits("t"), sdk_master.bits("8")))[0]


def test_balanced_draws_train_every_mean_width_alike_and_uniform_ones_crowd() -> None:
    flat, crowded = histogram(balanced), histogram(uniform)
    assert flat.min() > 140  # 200 expected in each tenth, a standard deviation of 13
    assert flat.max() < 260
    assert crowded.max() > 900
    assert (crowded == 0).sum() >= 5


def test_every_width_of_every_matrix_is_drawn() -> None:
    rng, of = np.random.default_rng(1), sizes()
    seen = [balanced(rng, of) for _ in range(300)]
    assert all(set(letters) == set("t348") for letters in list(zip(*seen, strict=True))[1:])
    assert {a[0] for a in seen} == {"4", "8"}


# ---- search


def test_the_search_is_never_worse_than_greedy_and_never_larger() -> None:
    of = sizes(1)
    rng = np.random.default_rng(0)
    alone = {(i, w): rng.uniform(0, 1) * (9 - sdk_master.bits(w)) for i, m in enumerate(of) for w in m.widths}
    coupled = rng.uniform(0, 0.5, (len(of), len(of)))

    def loss(assignment: str) -> float:
        narrow = np.array([8.5 - sdk_master.bits(w) for w in assignment])
        return float(sum(alone[i, w] for i, w in enumerate(assignment)) + narrow @ coupled @ narrow / 20)

    found = search.search(loss, of, points=12, tries=8)
    greedy = search.spread(search.chain(search.sensitivities(loss, of), of), of, 12)
    for assignment in greedy:
        room = search.n_bytes(assignment, of)
        assert min(p.loss for p in found if search.n_bytes(p.assignment, of) <= room) <= loss(assignment)
    assert any(loss(p.assignment) == p.loss and p.assignment not in greedy for p in found), "no exchange helped"
    assert found[0].assignment == search.narrowest(of)
    sizes_, losses = zip(*((search.n_bytes(p.assignment, of), p.loss) for p in found), strict=True)
    assert list(sizes_) == sorted(set(sizes_))
    assert list(losses) == sorted(losses, reverse=True)


def test_greedy_gives_up_first_what_costs_nothing() -> None:
    of = sizes(1)
    dear = {3, 7}

    def loss(assignment: str) -> float:
        return sum(8.5 - sdk_master.bits(w) for i, w in enumerate(assignment) if i in dear)

    steps = search.chain(search.sensitivities(loss, of), of)
    assert steps[0] == "8" * 8
    assert steps[-1] == "4" + "t" * 7
    cheap = next(s for s in steps if all(w != "8" for i, w in enumerate(s) if i not in dear))
    assert all(cheap[i] == "8" for i in dear)


# ---- training


@pytest.fixture
def toy() -> tuple[Recipe, Decoder]:
    torch.manual_seed(0)
    recipe = replace(tiny_recipe(), shape=Shape(64, 256, 2, 4, 2, 256, 64, exits=(1,), weights="float"))
    return recipe, Decoder(recipe.shape)


def test_steps_lower_the_loss_of_three_bits_and_leave_the_latents_alone(toy: tuple[Recipe, Decoder]) -> None:
    recipe, parent = toy
    model = MultiDecoder(parent)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = MultiTrainer(
        model, recipe, ToyBatches(recipe, always=True), Budget(tokens=20 * 128), always("8" + "3" * 14)
    )
    reports = []
    while trainer.progress < 1:
        reports.append(trainer.step())
    assert reports[-1].loss < 0.8 * reports[0].loss
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all(name.rpartition(".")[2].endswith("3") for name in moved), "only pairs of the width that was drawn"


def test_with_shared_weights_the_latents_move_and_stay_what_the_master_can_hold(toy: tuple[Recipe, Decoder]) -> None:
    recipe, parent = toy
    model = MultiDecoder(parent, train_shared=True)
    trainer = MultiTrainer(model, recipe, ToyBatches(recipe), Budget(tokens=4 * 128), balanced)
    before = next(m for _, m in model.linears()).latent.detach().clone()
    while trainer.progress < 1:
        trainer.step()
    _, linear = next(iter(model.linears()))
    assert not torch.equal(linear.latent, before)
    w = linear.latent_of("attn_q").detach().bfloat16().float()
    expected = rounded(with_pair(w, linear.a["attn_q4"], linear.b["attn_q4"]), "4")
    assert torch.equal(linear.matrix("attn_q", "4"), expected)


def test_the_same_tokens_give_the_same_pairs(toy: tuple[Recipe, Decoder]) -> None:
    recipe, parent = toy
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        model = MultiDecoder(parent)
        trainer = MultiTrainer(model, recipe, ToyBatches(recipe), Budget(tokens=3 * 128), balanced)
        while trainer.progress < 1:
            trainer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*found)


# ---- the whole way


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mini_data.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run_of_a_twin(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    """A finished run of a float twin, of a few steps."""
    out = tmp_path_factory.mktemp("twin")
    tok = tokenizers.train(tokenizers.training_texts(data), 512)
    tok.save(out / "tokenizer.json")
    shape = Shape(tok.n_vocab, 256, 2, 4, 2, 256, 128, exits=(1,))
    ternary = Recipe("micro", shape, seq_len=128, micro_rows=2, batch_tokens=(256, 512), precision="fp32")
    twin = replace(ternary, shape=replace(shape, weights="float"))
    train(twin, run.Options(data=data, out=out, budget=Budget(tokens=2048), compiled=False))
    return out, ternary


def test_from_a_run_to_files_of_any_size(data: Path, run_of_a_twin: tuple[Path, Recipe], tmp_path: Path) -> None:
    folder, recipe = run_of_a_twin
    out = tmp_path / "master.gguf"
    options = Options(folder, data, out, Budget(tokens=1024), points=4, tries=1, search_rows=20, as_json=True)
    assert train_multi(options, {"micro": recipe}) == out
    records = [json.loads(line) for line in out.with_suffix(".log.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in records].count("step") == 4
    with Master.open(out) as master:
        assert master.frontier[0].assignment == search.narrowest(master.matrices)
        assert [p.loss for p in master.frontier] == sorted((p.loss for p in master.frontier), reverse=True)
        made = json.loads(master.file.metadata["nearfar.card"])
        assert made["train"]["parent_sha256"] == replace(recipe, shape=replace(recipe.shape, weights="float")).sha256
        for budget in (10**6, 2 * 10**6):
            packed = pack(master, budget, tmp_path / "m.gguf")
            assert packed.n_bytes <= budget
            assert Weights.open(packed.path).config.n_layers == 2


def test_a_training_that_was_stopped_goes_on_as_if_nothing_had_happened(
    data: Path, run_of_a_twin: tuple[Path, Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, recipe = run_of_a_twin
    found, step = {}, MultiTrainer.step

    def stopped(self: MultiTrainer) -> Report:
        if self.n == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    for name in ("whole", "stopped"):
        out = tmp_path / f"{name}.gguf"
        options = Options(folder, data, out, Budget(tokens=1024), points=2, tries=0, search_rows=8, as_json=True)
        if name == "stopped":
            with monkeypatch.context() as patch:
                patch.setattr(MultiTrainer, "step", stopped)
                with pytest.raises(Cancelled, match="stopped at step 3; --resume goes on"):
                    train_multi(options, {"micro": recipe})
            with pytest.raises(UsageError, match="holds step 3: --resume it"):
                train_multi(options, {"micro": recipe})
            with pytest.raises(DataError, match="another set of options"):
                train_multi(replace(options, resume=True, draw="uniform"), {"micro": recipe})
            options = replace(options, resume=True)
        train_multi(options, {"micro": recipe})
        records = [json.loads(line) for line in out.with_suffix(".log.jsonl").read_text().splitlines()]
        found[name] = [(r["step"], r["loss"], r["bits"]) for r in records if r["kind"] == "step"]
        assert not out.with_suffix(".checkpoints").exists()
    assert found["stopped"] == found["whole"]
    assert (tmp_path / "stopped.gguf").stat().st_size == (tmp_path / "whole.gguf").stat().st_size


def test_a_parent_is_found_by_its_folder_or_its_checkpoint_and_others_are_refused(
    run_of_a_twin: tuple[Path, Recipe], tmp_path: Path
) -> None:
    folder, recipe = run_of_a_twin
    for path in (folder, folder / "checkpoints" / "stable-end.safetensors"):
        assert open_parent(path, {"micro": recipe}).recipe.shape.weights == "float"
    with pytest.raises(DataError, match="is none of"):
        open_parent(folder)
    with pytest.raises(DataError, match="micro"):
        open_parent(folder, {"micro": replace(recipe, seed=2)})
    with pytest.raises(FileError, match="expected the folder of a run"):
        open_parent(tmp_path)


def test_the_verb_needs_a_folder_of_corpora_and_sound_numbers(data: Path, tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    cli.add_verb(parser.add_subparsers())
    assert set(cli.DRAWS) == set(DRAWS)

    def verb(*args: str) -> int:
        parsed = parser.parse_args(["train-multi", "--from", str(tmp_path), "--tokens", "10", *args])
        return int(parsed.run(parsed))

    with pytest.raises(UsageError, match="no such folder"):
        verb("--data", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match="--rank 0"):
        verb("--data", str(data), "--rank", "0")
    with pytest.raises(UsageError, match="--points 1"):
        verb("--data", str(data), "--points", "1")


@pytest.mark.slow
def test_the_study_measures_every_arm_on_rows_that_were_not_searched(
    data: Path, run_of_a_twin: tuple[Path, Recipe], tmp_path: Path
) -> None:
    folder, recipe = run_of_a_twin
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    made = replace(recipe, shape=replace(recipe.shape, weights="float"))
    path = study.study(data, tmp_path, Budget(tokens=1280), made=made, points=3, tries=1, rows=40)
    arms = json.loads(path.read_text())["arms"]
    assert list(arms) == ["balanced", "uniform", "beside", "shared", "alone t", "alone 4", "alone 8", "post-hoc"]
    for points in arms.values():
        assert [p["bytes"] for p in points] == sorted(p["bytes"] for p in points)
        assert all(0 < p["loss"] < 20 for p in points)
    assert {p["assignment"] for p in arms["uniform"]} == {p["assignment"] for p in arms["balanced"]}
    heavier = {p["assignment"]: p["bytes"] for p in arms["beside"]}
    assert all(heavier[p["assignment"]] > p["bytes"] for p in arms["uniform"])
    assert path.with_suffix(".png").stat().st_size > 10_000
