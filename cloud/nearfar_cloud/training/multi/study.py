"""The study: one training for many sizes against others, as loss and exact answers over the bytes of the file.

    python -m nearfar_cloud.training.multi.study --budget 10m --data data/ --out pack_study      (make pack-study)

A float twin is trained first; every arm then starts from it and sees the same rows, equally many:

    balanced              pairs inside the rounding, the mean width drawn first; assignments are searched
    uniform               every width drawn for itself; measured at the assignments of `balanced`
    beside                the paper's form, balanced, at those assignments; its pairs cost bytes (f16)
    shared                balanced, and latents, embedding and norms train along; searched
    alone t, 4, 8         three trainings, each of all weights for one width alone
    post-hoc              the twin rounded, nothing trained; searched

Widths are searched on some held-out rows and reported on others.  About 60 % of the budget is training (20 % the twin,
the rest the arms, by its speed); measuring takes what it takes, about as long on two cores.  A small model of its own:
matrices of 256, because the ternary and 3-bit types come in blocks of 256.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nearfar import env
from nearfar.errors import NearfarError, UsageError
from nearfar.master import Master, Point
from nearfar.pack import writer_of
from nearfar_cloud.training.dev import DevRows
from nearfar_cloud.training.finish import commit, machine
from nearfar_cloud.training.mix import Mix
from nearfar_cloud.training.multi.linear import Form, MultiDecoder
from nearfar_cloud.training.multi.master import write_master
from nearfar_cloud.training.multi.run import count, joined, measure, search_frontier, train_pairs
from nearfar_cloud.training.multi.sampling import Draw, always, balanced, uniform
from nearfar_cloud.training.multi.search import narrowest, widest
from nearfar_cloud.training.multi.trainer import MultiTrainer
from nearfar_cloud.training.recipe import RECIPES, Recipe, Shape
from nearfar_cloud.training.run import Log, dev_rows, set_threads
from nearfar_cloud.training.schedule import Budget, parse_seconds
from nearfar_cloud.training.tokenizer import RowTokenizer, load_or_train
from nearfar_cloud.training.trainer import Trainer

TWIN_SHARE = 0.2  # of the budget
ARMS_SHARE = 0.4  # all arms together
STEP_COST = 1.7  # of an arm's token in the twin's: the 8-bit assignment is computed as well
SEARCH_SHARE = 0.4  # of the held-out rows; the others report
F16 = 2  # bytes of a number of a pair that stays beside its matrix


@dataclass(frozen=True)
class Arm:
    """One training from the twin."""

    name: str
    draw: Draw | None  # None: nothing is trained
    form: Form = "inside"
    train_shared: bool = False
    searched: bool = False
    only: str = ""  # the one assignment that is reported; all of one width otherwise


def recipe() -> Recipe:
    """Pico with matrices that the packed types can hold."""
    shape = Shape(1024, 256, 4, 4, 2, 256, 256, (2,), weights="float")
    return replace(RECIPES["pico"], name="pack-study", shape=shape)


def arms(n_matrices: int) -> list[Arm]:
    return [
        Arm("balanced", balanced, searched=True),
        Arm("uniform", uniform),
        Arm("beside", balanced, form="beside"),
        Arm("shared", balanced, train_shared=True, searched=True),
        *(
            Arm(f"alone {w}", always(a), train_shared=True, only=a)
            for w, a in ((w, one_width(w, n_matrices)) for w in "t48")
        ),
        Arm("post-hoc", None, searched=True),
    ]


def one_width(width: str, n_matrices: int) -> str:
    """Every matrix at `width`; the embedding of 8 bits, of 4 beside trits."""
    return ("4" if width == "t" else "8") + width * (n_matrices - 1)


def study(
    data: Path,
    out: Path,
    budget: Budget,
    *,
    made: Recipe | None = None,
    points: int = 10,
    tries: int = 3,
    rows: int = 300,
) -> Path:
    """Train `made` (a float recipe) and the arms, measure; returns the path of `pack_study.json`, beside it a PNG."""
    out.mkdir(parents=True, exist_ok=True)
    log, made = Log(out / "log.jsonl", as_json=False), made or recipe()
    tokenizer = load_or_train(data, out / "tokenizer.json", made.shape.n_vocab)
    held_out = dev_rows(data, tokenizer, made, ())
    search_rows, report_rows = halves(held_out, rows)
    n_arms = sum(arm.draw is not None for arm in arms(1))
    twin_budget = part(budget, TWIN_SHARE)
    twin = Trainer(made, mix_of(data, tokenizer, made, out, made.seed), twin_budget)
    log.note(f"float twin, {made.shape.n_linear / 1e6:.2f} M weights in matrices")
    while twin.progress < 1:
        report = twin.step()
        if report.step % 50 == 0:
            log.note(f"{twin.progress:6.1%} step {report.step} loss {report.loss:.3f}")
    found: dict[str, list[dict[str, Any]]] = {}
    share = Budget(tokens=max(1, round(twin.tokens * ARMS_SHARE / n_arms / TWIN_SHARE / STEP_COST)))
    borrowed: list[str] = []  # assignments that `balanced` found
    untrained = MultiDecoder(twin.model)
    matrices = untrained.matrices
    ends = [Point(narrowest(matrices), 0.0), Point(widest(matrices), 0.0)]
    sizes = Master.open(write_master(untrained, tokenizer, out / "sizes.gguf", card={"name": made.name}, points=ends))
    for arm in arms(len(matrices)):
        log.note(arm.name)
        model = MultiDecoder(twin.model, form=arm.form, train_shared=arm.train_shared)
        if arm.draw is not None:
            mix = mix_of(data, tokenizer, made, out, made.seed + 1)
            train_pairs(MultiTrainer(model, made, mix, share, arm.draw), log)
        model.keep(True)
        assignments = [arm.only] if arm.only else [one_width(w, len(matrices)) for w in "t348"]
        if arm.searched:
            frontier = search_frontier(model, search_rows, log, points=points, tries=tries)
            assignments += [p.assignment for p in frontier]
            borrowed = borrowed or [p.assignment for p in frontier]
        elif not arm.only:
            assignments += borrowed
        found[arm.name] = sorted(
            (
                {"assignment": a, "bytes": file_bytes(sizes, model, a)} | figures(measure(model, report_rows, a))
                for a in dict.fromkeys(assignments)
            ),
            key=lambda point: int(point["bytes"]),
        )
        for point in found[arm.name]:
            log.note(f"{point['bytes']:9,} bytes loss {point['loss']:.3f} exact {point['exact']:.1%}")
    sizes.close()
    facts = {
        "machine": machine(),
        "commit": commit(),
        "budget": {"seconds": budget.seconds, "tokens": budget.tokens},
        "twin": {"tokens": twin.tokens, "seconds": round(twin.seconds, 1)},
        "rows": {"search": count(search_rows), "report": count(report_rows)},
    }
    path = out / "pack_study.json"
    path.write_text(json.dumps({"facts": facts, "arms": found}, indent=1), encoding="utf-8")
    plot(found, out / "pack_study.png")
    log.note(f"wrote {path} and {out / 'pack_study.png'}")
    return path


def part(budget: Budget, share: float) -> Budget:
    """A share of the budget, in the same unit."""
    if budget.tokens is not None:
        return Budget(tokens=max(1, round(budget.tokens * share)))
    return Budget(seconds=(budget.seconds or 0) * share)


def mix_of(data: Path, tokenizer: RowTokenizer, made: Recipe, out: Path, seed: int) -> Mix:
    return Mix(
        data,
        tokenizer,
        seq_len=made.seq_len,
        seed=seed,
        shares=made.shares,
        cache=out / "cache",
        prompt_weights=made.prompt_weights,
    )


def halves(sources: Mapping[str, DevRows], limit: int) -> tuple[DevRows, DevRows]:
    """Rows to search on and rows to report on, about `limit` in all; none is in both."""
    first, second = {}, {}
    for name, rows in sources.items():
        at = max(1, round(SEARCH_SHARE * len(rows.ids)))
        arrays = {f.name: getattr(rows, f.name) for f in fields(DevRows) if f.name != "n_rows"}
        first[name] = replace(rows, **{key: array[:at] for key, array in arrays.items()})
        second[name] = replace(rows, **{key: array[at:] for key, array in arrays.items()})
    return joined(first, round(SEARCH_SHARE * limit)), joined(second, round((1 - SEARCH_SHARE) * limit))


def file_bytes(master: Master, model: MultiDecoder, assignment: str) -> int:
    """Bytes of the whole file; pairs that stay beside their matrices are counted in f16."""
    beside = F16 * model.rank * sum(sum(m.shape) for m in model.matrices[1:]) if model.form == "beside" else 0
    return writer_of(master, Point(assignment, 0.0), Path()).n_bytes() + beside


def figures(found: Mapping[str, float]) -> dict[str, float]:
    return {"loss": round(found["loss.final"], 4), "exact": round(found["exact.final"], 4)}


def plot(found: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Loss and exact answers over the bytes; trained for one width alone as crosses."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), constrained_layout=True)
    # All trits are so far above the others that only a logarithm shows both.
    lowest = min(p["loss"] for points in found.values() for p in points)
    axes[0].set(yscale="log")
    for axis, key, less, title in (
        (axes[0], "loss", lowest - 0.002, f"held-out loss of answer tokens above {lowest:.3f} (nats)"),
        (axes[1], "exact", 0.0, "held-out answers exact"),
    ):
        for name, points in found.items():
            style = "x" if len(points) == 1 else ".-" if name != "post-hoc" else ".:"
            axis.plot([p["bytes"] / 1e6 for p in points], [p[key] - less for p in points], style, label=name, ms=8)
        axis.set(title=title, xlabel="file (MB)")
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="10m", help="60 %% of it is training (default: %(default)s)")
    parser.add_argument("--tokens", type=int, help="tokens instead of time")
    parser.add_argument("--data", help="folder of the corpora (default: NEARFAR_DATA)")
    parser.add_argument("--out", default="pack_study", help="folder of the figures (default: %(default)s)")
    parser.add_argument("--points", type=int, default=10, help="of each frontier (default: %(default)s)")
    parser.add_argument("--tries", type=int, default=3, help="exchanges measured at each (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=300, help="held-out rows (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads (default: all cores)")
    args = parser.parse_args(argv)
    try:
        data = args.data or env.data_dir()
        if not data or not Path(data).is_dir():
            raise UsageError("the study needs the folder of the corpora: --data DIR, or NEARFAR_DATA")
        set_threads(args.threads or env.threads())
        budget = Budget(tokens=args.tokens) if args.tokens else Budget(seconds=parse_seconds(args.budget))
        study(Path(data), Path(args.out), budget, points=args.points, tries=args.tries, rows=args.rows)
    except NearfarError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(main())
