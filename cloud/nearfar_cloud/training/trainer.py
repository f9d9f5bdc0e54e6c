"""One loop, one step: batch in, weights updated.  The walk: mix -> trainer.step (model, losses) -> run -> export."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from nearfar.errors import NearfarError
from nearfar_cloud.training import schedule
from nearfar_cloud.training.bitlinear import BitLinear
from nearfar_cloud.training.checkpoint import Checkpoint, check_same_run
from nearfar_cloud.training.losses import chunk_loss, head_loss
from nearfar_cloud.training.model import Decoder
from nearfar_cloud.training.muon import Muon
from nearfar_cloud.training.recipe import Recipe
from nearfar_cloud.training.schedule import Budget, Phase

MAX_BAD_STEPS = 3  # in a row, with a loss or gradient that is not finite
MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum")  # what the optimizers keep of each parameter
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Batch(Protocol):
    """Packed rows, as mix.Batch draws them; all [B, T]."""

    @property
    def ids(self) -> NDArray[Any]: ...
    @property
    def targets(self) -> NDArray[Any]: ...
    @property
    def weights(self) -> NDArray[Any]: ...
    @property
    def pos(self) -> NDArray[Any]: ...
    @property
    def doc(self) -> NDArray[Any]: ...


class Batches(Protocol):
    """Where batches come from: the same state gives the same batches (mix.Mix)."""

    data_sha256: str

    def next_batch(self, n_sequences: int, phase: Phase, width: int) -> Batch: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True, slots=True)
class Report:
    """What one step did.  Losses are nats a token, weighted as the step weighs them."""

    step: int
    phase: Phase
    tokens: int  # seen so far, with padding
    seconds: float  # of training so far
    lr: float
    loss: float
    exit_layer: int  # 0 and a loss of 0 where the shape has no exits
    exit_loss: float
    grad_norm: float
    skipped: bool = False


class Trainer:
    """Owns the latents, the optimizer's moments and the position in the run."""

    def __init__(
        self,
        recipe: Recipe,
        batches: Batches,
        budget: Budget,
        *,
        precision: str = "fp32",
        compiled: bool = False,
        device: str = "cpu",
        teacher: Decoder | None = None,
    ) -> None:
        """`teacher`: a model with the same tokenizer; `recipe.distill` of the loss is then the divergence from it."""
        torch.manual_seed(recipe.seed)
        self.recipe, self.batches, self.budget, self.precision = recipe, batches, budget, precision
        self.model = Decoder(recipe.shape).to(device)  # drawn on the CPU: the same start everywhere
        self.teacher = teacher.to(device).requires_grad_(False) if teacher is not None else None
        self.teacher_sha256 = teacher.sha256 if teacher is not None else "none"
        self.optimizers = _optimizers(self.model, recipe)
        self.n, self.tokens, self.seconds, self.bad_steps = 0, 0, 0.0, 0
        self.chunk: Callable[..., Any] = chunk_loss
        if compiled:
            self._compile()

    def _compile(self) -> None:
        for model in (self.model, self.teacher):
            if model is not None:
                for module in (*model.blocks, model.output_norm, *model.exit_norms.values()):
                    module.compile(dynamic=False)
        self.chunk = torch.compile(chunk_loss, dynamic=False)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    @property
    def progress(self) -> float:
        return self.budget.progress(self.seconds, self.tokens)

    @property
    def phase(self) -> Phase:
        return schedule.phase(self.progress, self.recipe)

    def step(self) -> Report:
        """One update of the weights."""
        start = time.perf_counter()
        progress, phase = self.progress, self.phase
        exits = self.recipe.shape.exits
        exit_layer = exits[self.n % len(exits)] if exits else 0
        micro = [
            self.batches.next_batch(rows, phase, columns)
            for _ in range(schedule.micro_batches(progress, self.recipe))
            for rows, columns in self.recipe.passes
        ]
        whole = [thinned(as_tensors(b), self.recipe.prompt_stride, self.n) for b in micro]
        total = sum(float(t.weights[t.targets >= 0].sum()) for t in whole)
        tensors = [Tensors(*(x.to(self.model.device) for x in t)) for t in whole]
        sums = torch.zeros(3, device=self.model.device)
        for batch in tensors:
            sums += self._backward(batch, exit_layer, phase, total)
        lr = schedule.learning_rate(progress, self.recipe)
        grad_norm = self._update(lr, phase, float(sums[0]))
        self.n += 1
        self.tokens += sum(b.ids.size for b in micro)
        self.seconds += time.perf_counter() - start
        loss, exit_loss = (sums[1:] / max(total, 1e-9)).tolist()
        return Report(
            self.n, phase, self.tokens, self.seconds, lr, loss, exit_layer, exit_loss, grad_norm, self.bad_steps > 0
        )

    def _backward(self, batch: Tensors, exit_layer: int, phase: Phase, total: float) -> Tensor:
        """Add the gradients of one micro-batch; its loss sums, f32 [3]."""
        decay = phase == "decay"
        head = self.model.head(q8_embedding=decay)
        wanted = (exit_layer,) if exit_layer else ()
        final, exits = self.model(batch.ids, batch.pos, batch.doc, head, self.dtype, wanted)
        sums = head_loss(
            final,
            exits.get(exit_layer),
            head,
            batch.targets,
            batch.weights,
            exit_weight=self.recipe.exit_weight,
            kl=self.recipe.exit_kl if decay else 0.0,
            dtype=self.dtype,
            chunk=self.chunk,
            teacher=self._taught(batch),
            distill=self.recipe.distill,
        )
        (sums[0] / max(total, 1e-9)).backward()
        return sums.detach()

    def _taught(self, batch: Tensors) -> tuple[Tensor, Tensor] | None:
        """The teacher's rows f32 [B, T, E] and the table [V, E] that makes logits of them."""
        if self.teacher is None:
            return None
        with torch.no_grad():
            table = self.teacher.head(q8_embedding=False)
            return self.teacher(batch.ids, batch.pos, batch.doc, table, self.dtype, ())[0], table

    def _update(self, lr: float, phase: Phase, loss: float) -> float:
        """Clip and step; a step that is not finite is skipped, three in a row stop the run.  Returns the norm."""
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip))
        if torch.isfinite(torch.tensor([norm, loss])).all():
            self.bad_steps = 0
            for optimizer in self.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                    group["weight_decay"] = self.recipe.weight_decay if group["decays"] and phase == "stable" else 0.0
                optimizer.step()
        else:
            self.bad_steps += 1
        self.model.zero_grad(set_to_none=True)
        if self.bad_steps == MAX_BAD_STEPS:
            raise NearfarError(
                f"step {self.n + 1}: loss {loss}, gradient norm {norm} at lr {lr:.2e}, the third step in a row that is "
                f"not finite; batches were drawn up to {self.batches.state()}; lower peak_lr or look at the data"
            )
        return norm

    def checkpoint(self) -> Checkpoint:
        """Everything that `restore` needs to go on as if nothing had happened."""
        tensors = {f"model.{k}": v.detach().cpu().clone() for k, v in self.model.state_dict().items()}
        for name, p in self.model.named_parameters():
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(p, {}).items():
                    tensors[f"optimizer.{key}.{name}"] = value.detach().cpu().clone()
        tensors["rng"] = torch.get_rng_state()
        state = {
            "recipe": self.recipe.name,
            "recipe_sha256": self.recipe.sha256,
            "data_sha256": self.batches.data_sha256,
            "teacher_sha256": self.teacher_sha256,
            "precision": self.precision,
            "step": self.n,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "phase": self.phase,
            "bad_steps": self.bad_steps,
            "mix": self.batches.state(),
        }
        return Checkpoint(tensors, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up a run where `checkpoint` left it.  DataError when recipe, data or teacher differ."""
        state, tensors = checkpoint.state, checkpoint.tensors
        hashes = {"recipe": self.recipe.sha256, "data": self.batches.data_sha256, "teacher": self.teacher_sha256}
        check_same_run(state, **hashes)
        self.batches.restore(state["mix"])
        self.model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
        for name, p in self.model.named_parameters():
            saved = {key: tensors[at].to(p.device) for key in MOMENTS if (at := f"optimizer.{key}.{name}") in tensors}
            for optimizer in self.optimizers:
                if saved and any(p is q for group in optimizer.param_groups for q in group["params"]):
                    optimizer.state[p] = dict(saved)
        torch.set_rng_state(tensors["rng"])
        self.precision = state["precision"]
        self.n, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.bad_steps = state["bad_steps"]


class Tensors(NamedTuple):
    """A Batch as torch sees it; all [B, T]."""

    ids: Tensor
    targets: Tensor
    weights: Tensor
    pos: Tensor
    doc: Tensor


def as_tensors(batch: Batch) -> Tensors:
    """The batch's arrays as tensors that share their memory."""
    return Tensors(*(torch.from_numpy(x) for x in (batch.ids, batch.targets, batch.weights, batch.pos, batch.doc)))


def thinned(batch: Tensors, stride: int, n: int) -> Tensors:
    """Of the prompt's targets (weight below 1) only each `stride`-th keeps its loss, times `stride`.

    Which ones depends on the step `n`: over `stride` steps the expected loss is the same and the head costs less.
    """
    if stride == 1:
        return batch
    prompt = batch.weights < 1
    kept = (batch.pos + n) % stride == 0
    weights = torch.where(prompt, torch.where(kept, batch.weights * stride, 0.0), batch.weights)
    return batch._replace(weights=weights)


def _optimizers(model: Decoder, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """The recipe's choice for the latents, AdamW for the rest; weight decay pulls on the latents only."""
    linears = [m for m in model.modules() if isinstance(m, BitLinear)]
    latents: dict[str, Any] = {"params": [m.latent for m in linears], "decays": True}
    mine = {id(p) for p in latents["params"]}
    others = {"params": [p for p in model.parameters() if id(p) not in mine], "decays": False}
    if recipe.optimizer == "muon":
        return [Muon([latents | {"rows": [m.sizes for m in linears]}], lr=recipe.peak_lr), _adamw([others], recipe)]
    return [_adamw([latents, others], recipe)]


def _adamw(groups: list[dict[str, Any]], recipe: Recipe) -> torch.optim.AdamW:
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=recipe.betas, weight_decay=0.0, fused=True)
