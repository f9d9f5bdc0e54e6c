"""The course of one training run: data, trainer, held-out figures, checkpoints, and at the end the model's file.

    data -> tokenizer -> mix -> [step step step ... checkpoint + dev] -> report, curves, card, GGUF

`train` is what `nearfar train` calls.  It may be killed at any time; `resume=True` goes on from the last checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, TextIO

import torch

from nearfar.errors import Cancelled, FileError, NearfarError, UsageError
from nearfar_cloud.training import dev, rows, tokenizer
from nearfar_cloud.training.checkpoint import Checkpoints, read
from nearfar_cloud.training.dev import DevRows
from nearfar_cloud.training.finish import commit, finish
from nearfar_cloud.training.homes import HomeGenerator
from nearfar_cloud.training.journals import JournalGenerator
from nearfar_cloud.training.mix import SHORT_ROWS, Mix
from nearfar_cloud.training.parent import open_parent, open_teacher
from nearfar_cloud.training.recipe import RECIPES, Recipe
from nearfar_cloud.training.schedule import Budget
from nearfar_cloud.training.trainer import Report, Trainer

DEV_ROWS = {"intents": 300, "home": 150, "sgd": 24, "journals": 40}  # rows of each source that are looked at
SAME_LOSS = 0.5  # nats between two precisions in the first steps: far more than rounding, far less than a fault
WATCHED = ("intents", "home")  # the best checkpoint is the best here


@dataclass(frozen=True)
class Options:
    """What `nearfar train` was asked for."""

    data: Path
    out: Path
    budget: Budget
    resume: bool = False
    without: tuple[str, ...] = ()
    checkpoint_s: float = 60.0
    progress_s: float = 10.0
    compiled: bool = True
    device: str = "cpu"
    teacher: Path | None = None  # a run or a checkpoint that is distilled
    as_json: bool = False


class Log:
    """Progress for people or programs on `stream`, and every step in `log.jsonl`."""

    def __init__(self, path: Path, *, as_json: bool, stream: TextIO | None = None) -> None:
        self.file = path.open("a", encoding="utf-8")
        self.as_json, self.stream = as_json, stream or sys.stdout

    def write(self, record: dict[str, Any], line: str | None = None) -> None:
        """Keep the record; show it, or `line`, where there is one."""
        text = json.dumps(record)
        self.file.write(text + "\n")
        if line is not None:
            self.file.flush()
            print(text if self.as_json else line, file=self.stream, flush=True)

    def note(self, text: str) -> None:
        self.write({"kind": "note", "text": text}, text)


def train(recipe: Recipe, options: Options, recipes: Mapping[str, Recipe] = RECIPES) -> Path:
    """Run `recipe` to the end of its budget and return the path of the GGUF file.

    `recipes`: those that may have made the teacher, whose tokenizer a new run takes.

    Raises Cancelled after Ctrl-C (a checkpoint is written first), DataError for data that is missing or differs from
    the checkpoint's and for a teacher with another tokenizer, FileError without disk space or without a sound
    checkpoint.
    """
    options.out.mkdir(parents=True, exist_ok=True)
    log = Log(options.out / "log.jsonl", as_json=options.as_json)
    checkpoints = Checkpoints(options.out / "checkpoints")
    saved, damaged = checkpoints.newest() or (None, [])
    if saved is not None and not options.resume:
        raise UsageError(
            f"{options.out} holds a run at step {saved.state['step']}: --resume it, or name another folder"
        )
    for sentence in damaged:
        log.note(f"{sentence}; going on from the one before it")

    path = options.out / "tokenizer.json"
    if options.teacher and not path.is_file():
        open_parent(options.teacher, recipes).tokenizer.save(path)
    tok = tokenizer_of(recipe, options)
    mix = Mix(
        options.data,
        tok,
        seq_len=recipe.seq_len,
        short_len=recipe.short[1] if recipe.short else None,
        seed=recipe.seed,
        without=options.without,
        shares=recipe.shares,
        cache=options.out / "cache",
        prompt_weights=recipe.prompt_weights,
    )
    if options.compiled and not has_compiler():
        log.note("no C++ compiler was found: training without torch's compiler, at about half the speed")
        options = replace(options, compiled=False)
    held_out = dev_rows(options.data, tok, recipe, mix.without)
    precision = saved.state["precision"] if saved else choose_precision(recipe, mix, options, log)
    trainer = Trainer(
        recipe,
        mix,
        options.budget,
        precision=precision,
        compiled=options.compiled,
        device=options.device,
        teacher=open_teacher(options.teacher, tok, recipes) if options.teacher else None,
    )
    if saved is not None:
        trainer.restore(saved)
        log.note(f"resumed at step {trainer.n}, {trainer.tokens} tokens, {trainer.seconds:.0f} s")
    code = commit()
    _loop(trainer, checkpoints, held_out, options, log)

    path = finish(trainer, tok, mix, held_out, options.out, code=code)
    log.write({"kind": "done", "path": str(path)}, f"wrote {path}")
    return path


def tokenizer_of(recipe: Recipe, options: Options) -> tokenizer.RowTokenizer:
    """The tokenizer of the run's folder; trained from the data if there is none.  UsageError when the sizes differ."""
    path = options.out / "tokenizer.json"
    if path.is_file():
        tok = tokenizer.RowTokenizer.load(path)
    else:
        tok = tokenizer.train(tokenizer.training_texts(options.data, options.without), recipe.shape.n_vocab)
        tok.save(path)
    if tok.n_vocab != recipe.shape.n_vocab:
        raise UsageError(f"{path} has {tok.n_vocab} tokens, {recipe.name} is made for {recipe.shape.n_vocab}")
    return tok


def _loop(trainer: Trainer, checkpoints: Checkpoints, held_out: dict[str, DevRows], options: Options, log: Log) -> None:
    """Steps until the budget is spent, with a progress line and a checkpoint now and then."""
    shown, kept, window = trainer.seconds, trainer.seconds, Window(trainer)
    best = best_so_far(checkpoints)
    with interrupt_flag() as interrupted:
        while trainer.progress < 1:
            before = trainer.phase
            if before == "stable" and trainer.n == 0:
                log.note(f"{trainer.recipe.name} {trainer.precision} {torch.get_num_threads()} threads")
            report = trainer.step()
            window.add(report)
            log.write({"kind": "step", **asdict(report)})
            if report.seconds - shown >= options.progress_s:
                shown = report.seconds
                record = window.summary(trainer)
                log.write(record, progress_line(record))
            ended = trainer.phase != before or trainer.progress >= 1
            if ended or interrupted() or report.seconds - kept >= options.checkpoint_s:
                kept = report.seconds
                best = _checkpoint(trainer, checkpoints, held_out, log, best, stable_end=before != trainer.phase)
            if interrupted():
                raise Cancelled(f"stopped at step {trainer.n}; --resume goes on from there")


def _checkpoint(
    trainer: Trainer,
    checkpoints: Checkpoints,
    held_out: dict[str, DevRows],
    log: Log,
    best: float,
    *,
    stable_end: bool,
) -> float:
    """Look at the held-out rows and save; returns the best dev loss so far.  A disk that is full ends nothing."""
    figures = {
        name: dev.evaluate(trainer.model, r, trainer.dtype, q8=trainer.phase == "decay") for name, r in held_out.items()
    }
    watched = [figures[name]["loss.final"] for name in WATCHED if name in figures]
    loss = sum(watched) / len(watched) if watched else float("inf")
    line = f"      dev {loss:.3f} " + " ".join(
        f"{name} {f['loss.final']:.2f} exact {f['exact.final']:.0%} label {f['label.final']:.0%}"
        for name, f in figures.items()
    )
    log.write({"kind": "dev", "step": trainer.n, "seconds": trainer.seconds, "loss": loss, "sources": figures}, line)
    try:
        saved = trainer.checkpoint()
        path = checkpoints.save(trainer.n, replace(saved, state={**saved.state, "dev_loss": loss}))
        if stable_end:
            checkpoints.keep(path, "stable-end")
        if loss < best:
            checkpoints.keep(path, "best")
    except (FileError, OSError) as error:
        log.note(f"{error}; will try again at the next checkpoint")
    return min(best, loss)


def best_so_far(checkpoints: Checkpoints) -> float:
    """The held-out loss of the best checkpoint that is kept; infinity without one that can be read."""
    path = checkpoints.path("best")
    try:
        return float(read(path).state["dev_loss"]) if path.is_file() else float("inf")
    except FileError:
        return float("inf")


class Window:
    """Means over the steps since the last progress line."""

    def __init__(self, trainer: Trainer) -> None:
        self.tokens, self.seconds = trainer.tokens, trainer.seconds
        self.reports: list[Report] = []

    def add(self, report: Report) -> None:
        self.reports.append(report)

    def summary(self, trainer: Trainer) -> dict[str, Any]:
        """A progress record; the window starts anew."""
        r, last = self.reports, self.reports[-1]
        exits = {str(e): mean([x.exit_loss for x in r if x.exit_layer == e]) for e in trainer.recipe.shape.exits}
        rate = (last.tokens - self.tokens) / max(last.seconds - self.seconds, 1e-9)
        left = last.seconds * (1 / max(trainer.progress, 1e-9) - 1)
        self.reports, self.tokens, self.seconds = [], last.tokens, last.seconds
        return {
            "kind": "progress",
            "step": last.step,
            "phase": last.phase,
            "progress": round(trainer.progress, 4),
            "tokens": last.tokens,
            "tokens_per_s": round(rate),
            "lr": last.lr,
            "loss": mean([x.loss for x in r]),
            "exits": exits,
            "grad_norm": mean([x.grad_norm for x in r]),
            "skipped": sum(x.skipped for x in r),
            "left_s": round(left),
        }


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean; NaN of nothing."""
    return sum(values) / len(values) if values else float("nan")


def progress_line(record: dict[str, Any]) -> str:
    """One progress record for people."""
    exits = " ".join(f"exit.{e} {loss:.3f}" for e, loss in record["exits"].items())
    skipped = f" skipped {record['skipped']}" if record["skipped"] else ""
    return (
        f"{record['progress']:6.1%} {record['phase']:6} step {record['step']:6} {record['tokens'] / 1e6:6.2f} M tokens "
        f"{record['tokens_per_s']:5}/s lr {record['lr']:.1e} loss {record['loss']:.3f} {exits} "
        f"grad {record['grad_norm']:.2f}{skipped} left {record['left_s'] // 60}m{record['left_s'] % 60:02}s"
    )


def dev_rows(data: Path, tok: tokenizer.RowTokenizer, recipe: Recipe, without: Sequence[str]) -> dict[str, DevRows]:
    """A fixed sample of held-out rows of each source in DEV_ROWS, packed."""
    label_end = {tok.encode('","slots')[-1]}
    made: dict[str, type[HomeGenerator] | type[JournalGenerator]] = {
        "home": HomeGenerator,
        "journals": JournalGenerator,
    }
    packed = {}
    for name, n in DEV_ROWS.items():
        if name in without:
            continue
        if name in made:
            generator = made[name](data, recipe.seed, "dev")
            sample = [generator.row(i) for i in range(n)]
        else:
            sample = list(rows.FILE_SOURCES[name](data, "dev", rows.MAX_ROW_CHARS))
            random.Random(f"dev {name}").shuffle(sample)
        n_rows, width = recipe.passes[0 if name in SHORT_ROWS else -1]
        packed[name] = dev.pack(tok.encode_rows(sample[:n]), width, n_rows, tok.pad_id, label_end)
    return packed


def choose_precision(recipe: Recipe, mix: Mix, options: Options, log: Log) -> str:
    """The recipe's precision; for "auto" a few steps of each are timed, after a warm one, and the faster stays.

    bf16 is out where its losses are not those of fp32: torch's compiler has been seen to get it wrong on some CPUs.
    """
    if recipe.precision != "auto":
        return recipe.precision
    if options.device != "cpu":
        return "bf16"
    position, seconds, losses = mix.state(), {}, {}
    for precision in ("bf16", "fp32"):
        mix.restore(position)
        trainer = Trainer(recipe, mix, options.budget, precision=precision, compiled=options.compiled)
        try:
            trainer.step()
            start = time.process_time()
            losses[precision] = [trainer.step().loss for _ in range(3)]
            seconds[precision] = time.process_time() - start
        except NearfarError:  # three steps that were not finite
            continue
    mix.restore(position)
    if not all(abs(a - b) < SAME_LOSS for a, b in zip(losses.get("bf16", [inf]), losses["fp32"], strict=False)):
        log.note(f"bf16 does not compute what fp32 does on this machine (losses {losses}): training in fp32")
        return "fp32"
    choice = min(seconds, key=lambda p: seconds[p])
    figures = ", ".join(f"{p} {s / 3:.2f}" for p, s in seconds.items())
    log.note(f"CPU seconds a step: {figures}; training in {choice}")
    return choice


@contextmanager
def interrupt_flag() -> Iterator[Callable[[], bool]]:
    """Ctrl-C and SIGTERM set a flag instead of raising, so that a step is never cut; a second Ctrl-C raises."""
    hit: list[int] = []

    def set_flag(number: int, _: Any) -> None:
        if hit:
            raise KeyboardInterrupt
        hit.append(number)

    before = {s: signal.signal(s, set_flag) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(hit)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def has_compiler() -> bool:
    """Whether torch's compiler finds a C++ compiler to call."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "clang++"))


def set_threads(n: int | None) -> None:
    """Threads of torch; all the cores that this process may use unless told otherwise."""
    torch.set_num_threads(n or len(os.sched_getaffinity(0)))


def checked_device(name: str) -> str:
    """`name`, if torch can compute there; UsageError otherwise."""
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {name}: this PyTorch ({torch.__version__}) finds no GPU; train on cpu")
    return name
