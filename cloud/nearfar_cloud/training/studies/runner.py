"""The course of a study: set up, plan the tokens, train arms side by side, report.  What `nearfar study` calls.

    data -> tokenizer, held-out rows -> warm-up -> tokens of an arm -> [arm | arm] ... -> study_NAME.json, .png

Arms run two at a time, each on one thread in a process of its own (worker.py), all on equally many tokens.  Their
figures stay in the folder: a study that was stopped goes on where it was, and parents are trained once.  study.py says
how a study is written.

A budget of time becomes tokens by a short warm-up in both processes; `plan_NAME.json` keeps it, so that a study that
goes on has the same tokens.  With `--tokens` no timing decides anything, and one machine finds the same figures again.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from nearfar.errors import Cancelled, UsageError
from nearfar_cloud.training.finish import commit, machine
from nearfar_cloud.training.mix import Mix, data_hash
from nearfar_cloud.training.recipe import Recipe
from nearfar_cloud.training.run import has_compiler, interrupt_flag
from nearfar_cloud.training.schedule import Budget
from nearfar_cloud.training.studies import held_out
from nearfar_cloud.training.studies.course import LOOKS
from nearfar_cloud.training.studies.study import Arm, Job, Lab, Report, Study, fingerprint
from nearfar_cloud.training.studies.worker import WARM_UP, Worker, study_of
from nearfar_cloud.training.tokenizer import load_or_train

WORKERS = 2
WARM_UP_STEPS = 40
USED = 0.93  # of the time that is left when the plan is made: the rest is for what it does not foresee
FEWEST_STEPS = 8  # of an arm: a study of fewer says nothing


@dataclass(frozen=True)
class Options:
    """What `nearfar study` was asked for."""

    data: Path
    out: Path
    budget: Budget
    seeds: tuple[int, ...] = (1, 2)
    compiled: bool = True

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise UsageError(f"seeds {self.seeds}: expected different whole numbers from 0 on, at least one")


@dataclass(frozen=True)
class Costs:
    """Seconds of the parts of a run, as the warm-up found them in the two processes side by side."""

    setup_s: float
    first_s: float  # the first step of a shape: the compiler's
    look_s: float
    last_look_s: float
    token_s: float

    def run_s(self, cost: float, tokens: int) -> float:
        """A whole run on `tokens` tokens that cost as much as `cost` times as many of the study's recipe."""
        return self.setup_s + LOOKS * self.look_s + self.last_look_s + cost * tokens * self.token_s


def run_study(module: str, options: Options) -> Path:
    """Run the STUDY of `module` and return the path of its JSON; beside it lies a PNG.

    Raises ArmFailed (its message names the arm and has its last lines), Cancelled after Ctrl-C, UsageError where the
    budget is too short, DataError and MissingDataError for the folder of the corpora.
    """
    begun = time.perf_counter()
    study = study_of(module)
    recipe, lab = set_up(study, options)
    arms = study.arms(recipe)
    workers = [Worker() for _ in range(WORKERS)]
    try:
        tokens, lab = plan(module, arms, recipe, lab, options, workers, begun)
        jobs = jobs_of(module, arms, tokens, lab, options.seeds)
        train(study, jobs, workers)
    finally:
        for worker in workers:
            worker.stop()
    report = report_of(study, recipe, jobs, lab, options, time.perf_counter() - begun)
    path = options.out / f"study_{study.name}.json"
    path.write_text(json.dumps(report, indent=1), encoding="utf-8")
    study.plot(report, path.with_suffix(".png"))
    return path


def note(study: str, text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {study}: {text}", file=sys.stderr, flush=True)


# ------------------------------------------------------------ set up


def set_up(study: Study, options: Options) -> tuple[Recipe, Lab]:
    """The study's recipe with the tokenizer's vocabulary, and the lab with all that runs read there."""
    recipe, cache = study.recipe, options.out / "cache"
    options.out.mkdir(parents=True, exist_ok=True)
    data_sha256 = data_hash(options.data, sorted({*recipe.shares.stable, *recipe.shares.decay}))
    path = tokenizer_path(options.out, recipe.shape.n_vocab, data_sha256)
    if not path.is_file():
        note(study.name, f"training a tokenizer of {recipe.shape.n_vocab} tokens")
    tokenizer = load_or_train(options.data, path, recipe.shape.n_vocab)
    rows = cache / f"held-out-{recipe.seq_len}-{recipe.micro_rows}-{tokenizer.sha256[:8]}-{data_sha256[:8]}.npz"
    if not rows.is_file():
        note(study.name, "reading the rows")
        held_out.make(rows, options.data, tokenizer, recipe)
    # Every source is tokenised here, once, and read from the cache by the arms.
    Mix(options.data, tokenizer, seq_len=recipe.seq_len, seed=recipe.seed, shares=recipe.shares, cache=cache)
    shape = replace(recipe.shape, n_vocab=tokenizer.n_vocab)  # a folder of few rows has fewer merges
    compiled = options.compiled and has_compiler()
    if options.compiled and not compiled:
        note(study.name, "no C++ compiler was found: training without torch's compiler, at about half the speed")
    return replace(recipe, shape=shape), Lab(options.data, options.out, path, rows, data_sha256, "fp32", compiled)


def tokenizer_path(out: Path, n_vocab: int, data_sha256: str) -> Path:
    """Where the tokenizer of a size and a folder of corpora stays."""
    return out / f"tokenizer-{n_vocab}-{data_sha256[:8]}.json"


def fast_precision() -> str:
    """bf16 where this CPU multiplies it, f32 elsewhere."""
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    return "bf16" if has_bf16 else "fp32"


# ------------------------------------------------------------ plan


def plan(
    module: str,
    arms: Sequence[Arm],
    recipe: Recipe,
    lab: Lab,
    options: Options,
    workers: Sequence[Worker],
    begun: float,
) -> tuple[int, Lab]:
    """Tokens of an arm, and the lab with the precision in which all arms compute."""
    study = study_of(module)
    path = options.out / f"plan_{study.name}.json"
    asked = {
        "budget": asdict(options.budget),
        "seeds": list(options.seeds),
        "data_sha256": lab.data_sha256,
        "compiled": lab.compiled,
        "arms": [[arm.name, arm.recipe.sha256] for arm in arms],
    }
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["asked"] == asked:
            note(study.name, f"going on with {found['tokens']} tokens an arm in {found['precision']}")
            return int(found["tokens"]), replace(lab, precision=found["precision"])
    costs, lab = warm_up(module, recipe, lab, workers, 2 if options.budget.tokens else WARM_UP_STEPS)
    tokens = tokens_of(options, arms, recipe, costs, time.perf_counter() - begun)
    note(study.name, f"{tokens} tokens an arm in {lab.precision}, {1 / costs.token_s:.0f} a second and process")
    text = json.dumps({"asked": asked, "tokens": tokens, "precision": lab.precision, "costs": asdict(costs)}, indent=1)
    path.write_text(text, encoding="utf-8")
    return tokens, lab


def tokens_of(options: Options, arms: Sequence[Arm], recipe: Recipe, costs: Costs, spent_s: float) -> int:
    """Tokens of an arm, whole steps; UsageError where a budget of time, less what is spent of it, is too short."""
    if options.budget.tokens is not None:
        return -(-options.budget.tokens // step_tokens(recipe)) * step_tokens(recipe)
    seconds, n_seeds = options.budget.seconds or 0, len(options.seeds)
    fewest = FEWEST_STEPS * step_tokens(recipe)
    tokens = affordable(arms, n_seeds, recipe, costs, USED * (seconds - spent_s))
    if tokens < fewest:
        needed = spent_s + duration(arms, n_seeds, recipe, costs, fewest) / USED
        raise UsageError(
            f"a budget of {seconds:.0f} s is too short for this study here: setting up took {spent_s:.0f} s, "
            f"and with {FEWEST_STEPS} steps of each arm it needs about {needed:.0f} s"
        )
    return tokens


def warm_up(module: str, recipe: Recipe, lab: Lab, workers: Sequence[Worker], steps: int) -> tuple[Costs, Lab]:
    """What a run costs with all processes at work, and the precision: bf16 only where it computes what f32 does."""
    study = study_of(module)
    for precision in dict.fromkeys((fast_precision(), "fp32")):
        lab = replace(lab, precision=precision)
        note(study.name, f"warming up in {precision}" + (" with torch's compiler" if lab.compiled else ""))
        for i, worker in enumerate(workers):
            folder = lab.out / "arms" / study.name / f"{WARM_UP}-{i}"
            arm, tokens = Arm(WARM_UP, recipe), steps * step_tokens(recipe)
            worker.begin(Job(module, arm, recipe.seed, tokens, lab, folder, {}, ""))
        found = [worker.end()[1] for worker in workers]
        if all(f.pop("same") for f in found):
            return Costs(**{key: fmean(f[key] for f in found) for key in found[0]}), lab
        note(study.name, f"{precision} with these options does not compute what plain f32 does on this machine")
        lab = replace(lab, compiled=lab.compiled and precision != "fp32")
    return warm_up(module, recipe, replace(lab, compiled=False), workers, steps)


def step_tokens(recipe: Recipe) -> int:
    """Tokens of a step at the batch size that a run ends with."""
    return max(recipe.batch_tokens[1], recipe.micro_tokens)


def affordable(arms: Sequence[Arm], n_seeds: int, recipe: Recipe, costs: Costs, seconds: float) -> int:
    """The largest number of tokens, in whole steps, with which all the arms end in `seconds`; 0 if none does."""
    step, low, high = step_tokens(recipe), 0, 1
    while duration(arms, n_seeds, recipe, costs, high * step) <= seconds:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        fits = duration(arms, n_seeds, recipe, costs, middle * step) <= seconds
        low, high = (middle, high) if fits else (low, middle)
    return low * step


def duration(arms: Sequence[Arm], n_seeds: int, recipe: Recipe, costs: Costs, tokens: int) -> float:
    """Seconds until the last of all runs has ended, on WORKERS processes that take them in the order of `order`."""
    runs = [(arm, seed) for seed in range(n_seeds) for arm in arms if seed == 0 or not arm.once]
    todo = sorted(runs, key=lambda run: order(run[0]))
    free, ended = [0.0] * WORKERS, dict[tuple[str, int], float]()
    for arm, seed in todo:
        ready = max((max(ended.get((name, s), 0.0) for s in (0, seed)) for name in arm.needs), default=0.0)
        first = free.index(min(free))
        other_shape = costs.first_s if arm.recipe.shape != recipe.shape else 0.0
        free[first] = max(free[first], ready) + other_shape + costs.run_s(arm.cost, tokens)
        ended[arm.name, seed] = free[first]
    return max(free)


def order(arm: Arm) -> tuple[int, float]:
    """Parents go first, then the longest."""
    return (0 if arm.parent else 1, -arm.cost)


# ------------------------------------------------------------ train


def jobs_of(module: str, arms: Sequence[Arm], tokens: int, lab: Lab, seeds: Sequence[int]) -> list[Job]:
    """Every run, each after those that it needs, in the order of `order` otherwise."""
    study = study_of(module)
    made: dict[tuple[str, int], Job] = {}
    by_name = {arm.name: arm for arm in arms}

    def job_of(arm: Arm, seed: int) -> Job:
        seed = seeds[0] if arm.once else seed
        if (arm.name, seed) not in made:
            parents = {name: job_of(by_name[name], seed) for name in arm.needs}
            key = fingerprint(arm, seed, tokens, lab, {name: p.key for name, p in parents.items()})
            slug = re.sub(r"[^a-z0-9]+", "-", arm.name.lower()).strip("-")
            folder = lab.out / "arms" / study.name / f"{slug}-s{seed}-{key[:10]}"
            folders = {name: p.folder for name, p in parents.items()}
            made[arm.name, seed] = Job(module, arm, seed, tokens, lab, folder, folders, key)
        return made[arm.name, seed]

    for arm in sorted(arms, key=order):
        for seed in seeds:
            job_of(arm, seed)
    return list(made.values())


def train(study: Study, jobs: Sequence[Job], workers: Sequence[Worker]) -> None:
    """Every job that is not finished, as soon as those it needs are."""
    done = {job.folder for job in jobs if job.figures() is not None}
    todo = [job for job in jobs if job.folder not in done]
    if done:
        note(study.name, f"{len(done)} of {len(jobs)} runs are finished already")
    begun = time.perf_counter()
    with interrupt_flag() as interrupted:
        while len(done) < len(jobs):
            for worker in workers:
                ready = next((job for job in todo if done.issuperset(job.parents.values())), None)
                if worker.job is None and ready is not None:
                    todo.remove(ready)
                    worker.begin(ready)
            busy = {worker.connection: worker for worker in workers if worker.job is not None}
            for connection in wait(list(busy), timeout=0.5):
                job, figures = busy[connection].end()  # type: ignore[index]
                done.add(job.folder)
                note(
                    study.name,
                    f"{len(done)} of {len(jobs)} after {time.perf_counter() - begun:.0f} s: {job.title}: "
                    f"loss {figures['loss']:.3f} exact {figures['exact']:.1%}",
                )
            if interrupted():
                raise Cancelled("stopped; finished arms are kept, and the same command goes on with the others")


# ------------------------------------------------------------ report


def report_of(study: Study, recipe: Recipe, jobs: Sequence[Job], lab: Lab, options: Options, seconds: float) -> Report:
    """study_NAME.json: facts of the run, the figures of every arm by seed with mean and spread, and the finding.

    "arms" and "parents" are {name: {"seeds": {seed: figures}, "mean": {...}, "spread": {...}}}, spread being the
    largest minus the smallest.
    """
    rows = held_out.load(lab.held_out)
    report: Report = {
        "study": study.name,
        "question": study.question,
        "machine": machine(),
        "torch": torch.__version__,
        "commit": commit(),
        "precision": lab.precision,
        "compiled": lab.compiled,
        "threads": 1,
        "processes": WORKERS,
        "budget": asdict(options.budget),
        "tokens_per_arm": jobs[0].tokens,
        "seconds": round(seconds, 1),
        "seeds": list(options.seeds),
        "recipe": asdict(recipe),
        "weights": {"matrices": recipe.shape.n_linear, "embedding": recipe.shape.n_embedding},
        "data_sha256": lab.data_sha256,
        "held_out_rows": {name: int((r.doc.max(axis=1) + 1).sum()) for name, r in rows.items()},
        "arms": {},
        "parents": {},
    }
    for arm in {job.arm.name: job.arm for job in sorted(jobs, key=_listed(study, recipe))}.values():
        runs = {str(job.seed): job.figures() for job in jobs if job.arm.name == arm.name}
        report["parents" if arm.parent else "arms"][arm.name] = summary(runs)
    report["finding"] = study.finding(report)
    return report


def _listed(study: Study, recipe: Recipe) -> Callable[[Job], int]:
    names = [arm.name for arm in study.arms(recipe)]
    return lambda job: names.index(job.arm.name)


def summary(runs: Mapping[str, Any]) -> dict[str, Any]:
    """seed -> figures, with mean and spread (largest minus smallest) of every number at the top level."""
    first = next(iter(runs.values()))
    numbers = [key for key, value in first.items() if isinstance(value, (int, float))]
    values = {key: [run[key] for run in runs.values()] for key in numbers}
    return {
        "seeds": dict(runs),
        "mean": {key: fmean(v) for key, v in values.items()},
        "spread": {key: max(v) - min(v) for key, v in values.items()},
    }


def table(report: Report) -> str:
    """Arms, parents and the finding, for people."""
    lines = [
        f"{report['question']}",
        f"{report['tokens_per_arm'] / 1e6:.2f} M tokens an arm, seeds {', '.join(map(str, report['seeds']))}; "
        "mean (largest minus smallest)",
        "",
        f"{'arm':32} {'held-out loss':>18} {'exact':>18}",
    ]
    for name, arm in (*report["arms"].items(), *report["parents"].items()):
        mean, spread = arm["mean"], arm["spread"]
        label = name if name in report["arms"] else f"({name})"
        loss = f"{mean['loss']:.3f} ({spread['loss']:.3f})"
        exact = f"{mean['exact']:.1%} ({spread['exact']:.1%})"
        lines.append(f"{label:32} {loss:>18} {exact:>18}")
    lines += ["", *(f"{key}: {value}" for key, value in report["finding"].items())]
    return "\n".join(lines)
