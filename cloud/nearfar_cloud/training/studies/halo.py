"""Fine-tuning in few bits: plain rounding against Hadamard rotations where channels stick out (HALO, arXiv 2501.02625).

    a float parent -> outlier channels put in -> SNIPS rows, every product of a matrix in 8 or 4 bits -> held-out SNIPS

The parent has seen calls to homes and services, stories and chats, but no rows with intents: SNIPS is new to it.
Large models grow outlier channels; one of this size does not, so they are put in.  A channel's gain in a norm is
multiplied by `FACTOR` and its column in the matrix behind divided by it: activations get outliers, and the function of
the model stays the same, to the last bit in f32 because the factor is a power of two.  (Its fine-tuning does not: AdamW
moves each weight by about the rate, which is 16 times as much for a column that was made 16 times as small.  Hence the
arm "fp32 without outliers", and hence a small rate.)

Norms, attention, head and optimizer are f32 in every arm but "bf16", which computes all in it.  Numerics only: nothing
is claimed about speed, which would need kernels for GPUs (there: torchao.float8).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nearfar.errors import DataError
from nearfar_cloud.training import checkpoint, dev, rows
from nearfar_cloud.training.bitlinear import BitLinear
from nearfar_cloud.training.checkpoint import Checkpoint
from nearfar_cloud.training.dev import DevRows
from nearfar_cloud.training.mix import Shares
from nearfar_cloud.training.model import Block, Decoder
from nearfar_cloud.training.recipe import DEVICE_FIRST, RECIPES, Recipe
from nearfar_cloud.training.rows import Row
from nearfar_cloud.training.schedule import Budget
from nearfar_cloud.training.studies import held_out
from nearfar_cloud.training.studies.course import Course, batches, trainer_of
from nearfar_cloud.training.studies.plots import bars, canvas, save
from nearfar_cloud.training.studies.rotated import Level, product_errors, rotate_products
from nearfar_cloud.training.studies.row_batches import RowBatches
from nearfar_cloud.training.studies.study import Arm, Figures, Job, Report, Study
from nearfar_cloud.training.tokenizer import RowTokenizer
from nearfar_cloud.training.trainer import Tensors, Trainer, as_tensors

PARENT = "parent"
PARENT_TOKENS = 3  # of an arm's tokens
RATE = 5e-4  # of the fine-tuning
CHANNELS, FACTOR = 4, 16.0  # that stick out before each matrix, and how far
DEV_ROWS = 300
EXAMPLE_ROWS = 8  # sequences that the errors of one product are measured on
NORMS = (("attn_norm", "qkv"), ("attn_sub_norm", "wo"), ("ffn_norm", "gate_up"), ("ffn_sub_norm", "down"))
ERRORS = ("forward", "input_gradient", "weight_gradient")  # of product_errors
PRODUCTS: tuple[tuple[int, Level], ...] = ((8, 0), (8, 1), (8, 2), (4, 0), (4, 1), (4, 2))  # bits, level


# ---------------------------------------------------------------- arms


def recipe() -> Recipe:
    """Pico in floats, at half the rate that suits ternary weights; no intents."""
    known = RECIPES["pico"]
    shares = (DEVICE_FIRST.stable, DEVICE_FIRST.decay)
    without = Shares(*({name: share for name, share in phase.items() if name != "intents"} for phase in shares))
    return replace(known, name="halo", shape=replace(known.shape, weights="float"), peak_lr=2e-3, shares=without)


def arms(recipe: Recipe) -> list[Arm]:
    """The parent, what f32 and bf16 make of it, and the products in few bits."""
    n = recipe.micro_tokens
    tuned = replace(recipe, peak_lr=RATE, decay_from=0.5, weight_decay=0.0, batch_tokens=(n, n))

    def arm(name: str, cost: float, *, bits: int | None = None, level: Level = 0, **more: Any) -> Arm:
        options = {"bits": bits, "level": level, "precision": "fp32", "outliers": True} | more
        return Arm(name, tuned, options, needs=(PARENT,), cost=cost)

    # The costs are of f32 without torch's compiler against compiled bf16; elsewhere the study ends before its time.
    return [
        Arm(PARENT, recipe, parent=True, once=True, cost=PARENT_TOKENS),
        arm("fp32 without outliers", 2.4, outliers=False),
        arm("fp32", 2.4),
        arm("bf16", 1.5, precision="bf16"),
        arm("int8 plain", 2.4, bits=8),
        arm("int8 HALO-1", 2.9, bits=8, level=1),
        arm("int8 HALO-2", 3.7, bits=8, level=2),
        arm("int4 plain", 2.4, bits=4),
        arm("int4 HALO-2", 3.7, bits=4, level=2),
    ]


def train(job: Job) -> Figures:
    """One run of one arm."""
    return train_parent(job) if job.arm.name == PARENT else fine_tune(job)


def train_parent(job: Job) -> Figures:
    """Train it; leave its weights and the rows of SNIPS for the arms, and find the errors of its products."""
    tokenizer = RowTokenizer.load(job.lab.tokenizer)
    trainer = trainer_of(job, job.recipe, batches(job, job.recipe), PARENT_TOKENS * job.tokens)
    store_snips(job.folder, job.lab.data, tokenizer, job.recipe)
    course = Course(job, {"snips": load_dev(job.folder)})
    course.follow(trainer, looks=0)
    checkpoint.write(job.folder / "model.safetensors", Checkpoint(dict(trainer.model.state_dict()), {}))
    examples = as_tensors(row_batches(job, tokenizer, job.folder).next_batch(EXAMPLE_ROWS, "decay", job.recipe.seq_len))
    return course.figures(trainer.model) | {"products": product_table(trainer.model, examples, job.seed)}


def fine_tune(job: Job) -> Figures:
    """SNIPS in the arm's arithmetic.  "loss" and "exact" are in it as well, "loss_fp32" and "exact_fp32" are not."""
    options, parent = job.arm.options, job.parents[PARENT]
    rows_of_seed = row_batches(job, RowTokenizer.load(job.lab.tokenizer), parent)
    trainer = Trainer(job.recipe, rows_of_seed, Budget(tokens=job.tokens), precision=options["precision"])
    trainer.model.load_state_dict(checkpoint.read(parent / "model.safetensors").tensors)
    if options["outliers"]:
        inject_outliers(trainer.model, CHANNELS, FACTOR, seed=job.seed)
    if options["bits"]:
        rotate_products(trainer.model, bits=options["bits"], level=options["level"])
    course = Course(job, {"snips": load_dev(parent)})
    course.dtype = trainer.dtype
    course.curve.append((0, course.look(trainer.model)))
    course.follow(trainer)
    found = course.figures(trainer.model)
    rotate_products(trainer.model, bits=None, level=0)
    exact = held_out.overall(held_out.measure(trainer.model, course.rows, torch.float32))
    more = {"loss_fp32": exact["loss"], "exact_fp32": exact["exact"], "rows_sha256": rows_of_seed.digest.hexdigest()}
    return found | more


# ---------------------------------------------------------------- rows


def store_snips(folder: Path, data: Path, tokenizer: RowTokenizer, recipe: Recipe) -> None:
    """The encoded rows of SNIPS into `folder`: those to train on, and of those held out a sample, packed."""
    ids, written = [], []
    for row_ids, row_written in tokenizer.encode_rows(snips_rows(data, "train")):
        ids.append(row_ids)
        written.append(row_written)
    starts = np.cumsum([0, *(len(row) for row in ids)], dtype=np.int64)
    np.savez(folder / "snips.npz", ids=np.concatenate(ids), written=np.concatenate(written), starts=starts)
    sample = tokenizer.encode_rows(snips_rows(data, "dev")[:DEV_ROWS])
    label_end = {tokenizer.encode('","slots')[-1]}
    packed = dev.pack(sample, recipe.seq_len, recipe.micro_rows, tokenizer.pad_id, label_end)
    held_out.store(folder / "snips_dev.npz", {"snips": packed})


def snips_rows(data: Path, split: rows.Split) -> list[Row]:
    """The rows of SNIPS; split "dev" is a part of its train file that training leaves out."""
    found = [Row("snips", r.parts()) for r in rows.labelled(data, split) if r.space == "snips"]
    if not found:
        raise DataError(f"{data}: expected rows of SNIPS in the {split} split, found none; is the train file whole?")
    return found


def row_batches(job: Job, tokenizer: RowTokenizer, folder: Path) -> RowBatches:
    """Batches of the stored rows in the order of the job's seed; the loss is that of the answers."""
    with np.load(folder / "snips.npz") as stored:
        ids, written, starts = stored["ids"], stored["written"], stored["starts"]
    each = [(ids[a:b], written[a:b]) for a, b in pairwise(starts)]
    return RowBatches(each, job.recipe.seq_len, pad_id=tokenizer.pad_id, prompt_weight=0.0, seed=job.seed)


def load_dev(folder: Path) -> DevRows:
    return held_out.load(folder / "snips_dev.npz")["snips"]


# ---------------------------------------------------------------- outliers


def inject_outliers(model: Decoder, n_channels: int, factor: float, *, seed: int) -> None:
    """Before each matrix of a float model `n_channels` channels become `factor` times as large, their columns as small.

    A power of two leaves every result of the model the same to the last bit in f32.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.blocks:
            for norm, linear in NORMS:
                gain = block.get_parameter(f"{norm}.gain")
                chosen = torch.randperm(len(gain), generator=rng)[:n_channels]
                gain[chosen] *= factor
                block.get_parameter(f"{linear}.latent")[:, chosen] /= factor


def factors(model: Decoder, batch: Tensors) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What each matrix multiplies on a batch in f32: rows x [M, K], w [N, K], the output's gradient e [M, N]."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(module: torch.nn.Module, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
        linear = cast(BitLinear, module)
        for w, y in zip(linear.latent.split(linear.sizes), outputs, strict=True):
            y.retain_grad()
            found.append((inputs[0].detach(), w.detach(), y))

    linears = [getattr(cast(Block, block), linear) for block in model.blocks for _, linear in NORMS]
    handles = [linear.register_forward_hook(keep) for linear in linears]
    head = model.head(q8_embedding=False)
    final, _ = model(batch.ids, batch.pos, batch.doc, head, exits=())
    for handle in handles:
        handle.remove()
    told = (batch.targets >= 0) & (batch.weights > 0)
    F.cross_entropy(final[told] @ head.mT, batch.targets[told]).backward()
    for x, w, y in found:
        assert y.grad is not None
        yield x.flatten(0, -2), w, y.grad.flatten(0, -2)
    model.zero_grad(set_to_none=True)


def product_table(model: Decoder, batch: Tensors, seed: int) -> list[dict[str, Any]]:
    """Relative errors of one product of the model, the mean over its matrices, by outliers, bits and level."""
    table = []
    for outliers in (False, True):
        changed = copy.deepcopy(model)
        if outliers:
            inject_outliers(changed, CHANNELS, FACTOR, seed=seed)
        each = list(factors(changed, batch))
        for bits, level in PRODUCTS:
            errors = [product_errors(*factor, bits=bits, level=level) for factor in each]
            means = {name: float(np.mean([e[name] for e in errors])) for name in ERRORS}
            table.append({"outliers": outliers, "bits": bits, "level": level} | means)
    return table


# ---------------------------------------------------------------- what comes out


def finding(report: Report) -> dict[str, Any]:
    """Each arm's held-out loss above that of f32, exact answers, and the errors of one product with outliers."""
    means = {name: arm["mean"] for name, arm in report["arms"].items()}
    table = report["parents"][PARENT]["seeds"][str(report["seeds"][0])]["products"]
    return {
        "loss_above_fp32": {name: round(m["loss"] - means["fp32"]["loss"], 4) for name, m in means.items()},
        "exact": {name: round(m["exact"], 4) for name, m in means.items()},
        "loss_of_the_weights_in_fp32": {name: round(m["loss_fp32"], 4) for name, m in means.items()},
        "errors_of_one_product": {
            f"int{row['bits']} level {row['level']}": {name: round(row[name], 4) for name in ERRORS}
            for row in table
            if row["outliers"]
        },
    }


def plot(report: Report, path: Path) -> None:
    """Loss and exact answers of the arms, and the errors of one product by bits and level."""
    figure, axes = canvas(3)
    bars(axes[0], report["arms"], "loss", "held-out loss of SNIPS answers (nats)")
    axes[0].set_xscale("log")  # plain int4 is far off
    bars(axes[1], report["arms"], "exact", "held-out SNIPS answers exact")
    table = report["parents"][PARENT]["seeds"][str(report["seeds"][0])]["products"]
    for i, name in enumerate(ERRORS):
        for outliers in (True, False):
            rows_of = [row for row in table if row["outliers"] == outliers]
            x = [at + 0.25 * (i - 1) for at in range(len(rows_of))]
            label = f"{name.replace('_', ' ')}{'' if outliers else ', no outliers'}"
            style = {"color": f"C{i}", "fillstyle": "full" if outliers else "none"}
            axes[2].plot(x, [row[name] for row in rows_of], "o", label=label, **style)
    names = [f"int{bits}\nlevel {level}" for bits, level in PRODUCTS]
    axes[2].set(title="relative error of one product", yscale="log", xticks=range(len(names)), xticklabels=names)
    axes[2].grid(axis="y", alpha=0.4)
    axes[2].legend(fontsize=8)
    save(figure, path)


STUDY = Study(
    "halo",
    "Do Hadamard rotations keep fine-tuning in 8 and 4 bits near that in floats where channels stick out?",
    recipe(),
    arms,
    train,
    finding,
    plot,
)
