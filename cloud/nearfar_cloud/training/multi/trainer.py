"""One loop, one step: draw an assignment, learn the answers and what 8 bits make of them.  Follows sampling.py."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nearfar.errors import NearfarError
from nearfar_cloud.training import schedule
from nearfar_cloud.training.checkpoint import Checkpoint
from nearfar_cloud.training.multi.linear import MultiDecoder
from nearfar_cloud.training.multi.sampling import Draw, mean_bits
from nearfar_cloud.training.recipe import Recipe
from nearfar_cloud.training.schedule import Budget
from nearfar_cloud.training.trainer import MAX_BAD_STEPS, MOMENTS, Batches, as_tensors

PAIR_LR = 3e-3
SHARED_LR = 1e-3  # of latents, embedding and norms, where they train as well
KL_WEIGHT = 1.0


@dataclass(frozen=True, slots=True)
class Report:
    """What one step did; losses are nats a token."""

    step: int
    tokens: int
    seconds: float
    lr: float
    bits: float  # mean width of the assignment that was drawn
    loss: float  # cross entropy at full depth
    kl: float  # from the 8-bit assignment
    grad_norm: float


class MultiTrainer:
    """Owns the pairs' moments and the position in the run.

    A batch is one micro-batch of the recipe, weighted as in the decay (answers count, prompts hardly).
    """

    def __init__(self, model: MultiDecoder, recipe: Recipe, batches: Batches, budget: Budget, draw: Draw) -> None:
        self.model, self.batches, self.budget, self.draw = model, batches, budget, draw
        self.recipe = replace(recipe, peak_lr=1.0, decay_from=max(recipe.decay_from, 0.5))  # rates are shares here
        self.rng = np.random.default_rng(recipe.seed)
        pairs = [p for name, p in model.named_parameters() if ".a." in name or ".b." in name]
        shared = [p for name, p in model.named_parameters() if ".a." not in name and ".b." not in name]
        groups = [{"params": pairs, "peak": PAIR_LR}]
        groups += [{"params": [p for p in shared if p.requires_grad], "peak": SHARED_LR}]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], betas=recipe.betas, weight_decay=0.0)
        self.n, self.tokens, self.seconds, self.bad_steps = 0, 0, 0.0, 0

    @property
    def progress(self) -> float:
        return self.budget.progress(self.seconds, self.tokens)

    def step(self) -> Report:
        """One update.  NearfarError after three steps in a row that were not finite."""
        start = time.perf_counter()
        lr = schedule.learning_rate(self.progress, self.recipe)
        batch = as_tensors(self.batches.next_batch(self.recipe.micro_rows, "decay", self.recipe.seq_len))
        exits = self.recipe.shape.exits
        exit_layer = exits[self.n % len(exits)]
        rows = ((batch.targets >= 0) & (batch.weights > 0)).flatten().nonzero().squeeze(1)
        assignment = self.draw(self.rng, self.model.matrices)
        with torch.no_grad():
            teacher = self._logits("8" * len(assignment), batch.ids, batch.pos, batch.doc, rows, None)[0]
        final, early = self._logits(assignment, batch.ids, batch.pos, batch.doc, rows, exit_layer)
        weights = batch.weights.flatten()[rows] / batch.weights.flatten()[rows].sum().clamp_min(1e-9)
        targets = batch.targets.flatten()[rows]
        ce, kl = cross_entropy(final, targets, weights), divergence(teacher, final, weights)
        (ce + KL_WEIGHT * kl + self.recipe.exit_weight * cross_entropy(early, targets, weights)).backward()
        ce_now, kl_now = float(ce.detach()), float(kl.detach())
        norm = self._update(lr, ce_now + kl_now)
        self.n, self.tokens = self.n + 1, self.tokens + batch.ids.numel()
        self.seconds += time.perf_counter() - start
        mean = mean_bits(assignment, self.model.matrices)
        return Report(self.n, self.tokens, self.seconds, lr, mean, ce_now, kl_now, norm)

    def checkpoint(self) -> Checkpoint:
        """What `restore` needs to go on as if nothing had happened; what is frozen is the parent's and stays out."""
        tensors = {}
        for name, p in self.model.named_parameters():
            if p.requires_grad:
                tensors[f"model.{name}"] = p.detach().clone()
            for key, value in self.optimizer.state.get(p, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value.detach().clone()
        state = {
            "step": self.n,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "bad_steps": self.bad_steps,
            "mix": self.batches.state(),
            "rng": self.rng.bit_generator.state,
        }
        return Checkpoint(tensors, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up a training of the same parent where `checkpoint` left it."""
        tensors, state = checkpoint.tensors, checkpoint.state
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if p.requires_grad:
                    p.copy_(tensors[f"model.{name}"])
                if moments := {k: tensors[at] for k in MOMENTS if (at := f"optimizer.{k}.{name}") in tensors}:
                    self.optimizer.state[p] = moments
        self.batches.restore(state["mix"])
        self.rng.bit_generator.state = state["rng"]
        self.n, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.bad_steps = state["bad_steps"]

    def _logits(
        self, assignment: str, ids: Tensor, pos: Tensor, doc: Tensor, rows: Tensor, exit_layer: int | None
    ) -> tuple[Tensor, Tensor]:
        """f32 [n, V] of the rows that carry a loss: full depth, and the exit (or full depth again)."""
        self.model.assign(assignment)
        head = self.model.head()
        final, exits = self.model(ids, pos, doc, head)
        early = final if exit_layer is None else exits[exit_layer]
        kept, kept_early = (x.flatten(0, 1).index_select(0, rows) for x in (final, early))
        return kept @ head.mT, kept_early @ head.mT

    def _update(self, lr: float, loss: float) -> float:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.recipe.clip))
        if np.isfinite([norm, loss]).all():
            self.bad_steps = 0
            for group in self.optimizer.param_groups:
                group["lr"] = lr * group["peak"]
            self.optimizer.step()
        else:
            self.bad_steps += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.bad_steps == MAX_BAD_STEPS:
            raise NearfarError(
                f"step {self.n + 1}: loss {loss}, gradient norm {norm}, the third step that is not finite"
            )
        return norm


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """logits [n, V], targets [n], weights [n] of sum 1 -> the weighted mean, f32 []"""
    return (weights * F.cross_entropy(logits, targets, reduction="none")).sum()


def divergence(teacher: Tensor, student: Tensor, weights: Tensor) -> Tensor:
    """KL(teacher || student) of logits [n, V], weighted; the teacher gets no gradient."""
    p, q = teacher.detach().log_softmax(-1), student.log_softmax(-1)
    return (weights * (p.exp() * (p - q)).sum(-1)).sum()
