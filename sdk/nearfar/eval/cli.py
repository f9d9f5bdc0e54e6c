"""`nearfar eval` and `nearfar calibrate`: options in, table out.  Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfar.arguments import real, whole
from nearfar.cli.verbs import Verbs, add_engine_options, model_path, new_parser, open_model
from nearfar.errors import MissingDataError, MissingExtraError, NearfarError, UsageError
from nearfar.eval.progress import progress

if TYPE_CHECKING:
    from nearfar.eval.calibrate import Calibration
    from nearfar.eval.pair import Pair
    from nearfar.eval.report import Section
    from nearfar.eval.tasks import Prediction, Task
    from nearfar.llm import LLM


CONTROLS = ("arc_easy", "piqa", "winogrande", "blimp", "gsm8k")  # questions that nano is not expected to answer
TASKS = (
    "hwu64",
    "hwu64_typed",
    "snips",
    "clinc150",
    "slurp",
    "sgd",
    "home",
    "actions",
    "journal",
    "language",
    *CONTROLS,
)
EXITS = "exits"
EXIT_ROWS = 100  # rows of each task that the figures about exits are taken from
SPEED_ROWS = 20  # rows of each task that are timed with and without exits
TEXT_TOKENS = 8192
CALIBRATION_ROWS = 600  # answers of each data set


def add_verb(verbs: Verbs) -> None:
    """Both verbs."""
    _add_eval(verbs)
    _add_calibrate(verbs)


def _add_eval(verbs: Verbs) -> None:
    parser = new_parser(
        verbs,
        "eval",
        "measure a model on requests, calls and exits, with baselines",
        "nearfar eval nano --data data/",
        "nearfar eval nano --data data/ --tasks home,exits --limit 100",
        "nearfar eval nano --data data/ --save answers.jsonl",
        "nearfar eval --data data/ --table answers.jsonl",
        "nearfar eval model.gguf --text story.txt --lut fast",
        detail="Greedy answers; every figure with a 95 % interval and its baseline on the same rows. With --text "
        "only the perplexity of a text, and with --lut fast what lookups add to it: 0.5 % or more is too much.",
    )
    parser.add_argument("model", nargs="?", help="nano, or the path of a GGUF file")
    parser.add_argument("--data", metavar="DIR", help="folder of the corpora (default: NEARFAR_DATA)")
    parser.add_argument(
        "--tasks", type=_names, metavar="LIST", help=f"of {', '.join((*TASKS, EXITS))} (default: all that have data)"
    )
    parser.add_argument(
        "--limit",
        type=whole(1, 1 << 20),
        metavar="N",
        help="at most N rows of each task, spread evenly (default: all, but of long lists some hundreds)",
    )
    parser.add_argument("--no-grammar", action="store_true", help="leave out the constrained answers")
    parser.add_argument("--no-baselines", action="store_true", help="print stored baselines instead of fitting them")
    parser.add_argument("--save", metavar="FILE", help="store the answers (JSON lines)")
    parser.add_argument("--table", metavar="FILE", help="make the table from stored answers, without a model")
    parser.add_argument("--plot", metavar="PNG", help="draw what exits save against what they change (task exits)")
    parser.add_argument("--text", metavar="FILE", help="perplexity of this text (UTF-8, plain or .xz) and nothing else")
    parser.add_argument(
        "--tokens", type=whole(2, 1 << 30), default=TEXT_TOKENS, metavar="N", help="of the text (default %(default)s)"
    )
    add_engine_options(parser)
    parser.set_defaults(run=run_eval)


def _add_calibrate(verbs: Verbs) -> None:
    parser = new_parser(
        verbs,
        "calibrate",
        "choose exit thresholds that keep a promise, and write them into a copy of the file",
        "nearfar calibrate nano.gguf --data data/ -o nano-calibrated.gguf",
        "nearfar calibrate nano.gguf --data data/ --rows requests.jsonl --delta 0.05 -o loose.gguf",
        "nearfar calibrate fitted.gguf --data data/ --text stories.txt -o calibrated.gguf",
        "nearfar calibrate nano-device.gguf --upper nano-upper.gguf --data data/ -o device.gguf",
        detail="The answers come from held-out training rows, from what follows openings of the texts, and from more "
        "prompts; for answers like those, with 95 % confidence, at most "
        "a share DELTA of the tokens leaves early and differs from full depth. Full depth of a device half is the "
        "whole of what --upper names and itself, with what the codec does to the rows between them.",
    )
    parser.add_argument("model", help="nano, or the path of a GGUF file with exits")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the calibrated copy")
    parser.add_argument("--upper", metavar="FILE", help="of a device half: its upper half, or the whole model")
    parser.add_argument(
        "--codec",
        choices=("fp16", "int8", "int4", "ids"),
        default="int8",
        help="how the device half speaks to the layers above (default %(default)s; ids: --upper is a whole model)",
    )
    parser.add_argument("--data", metavar="DIR", help="folder of the corpora (default: NEARFAR_DATA)")
    parser.add_argument("--rows", metavar="FILE", help='more prompts, JSON lines {"prompt": [[text, is_control], …]}')
    parser.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="FILE",
        help="answers begin as every third sentence of this text, UTF-8, plain or .xz (repeatable)",
    )
    parser.add_argument(
        "--limit", type=whole(1, 1 << 20), default=CALIBRATION_ROWS, metavar="N", help="answers of each set"
    )
    parser.add_argument(
        "--delta", type=real(1e-4, 0.5), default=0.02, metavar="D", help="tolerated share (default %(default)s)"
    )
    parser.add_argument(
        "--plot", metavar="PNG", help="reliability plot (default: beside the output, if matplotlib is there)"
    )
    add_engine_options(parser)
    parser.set_defaults(run=run_calibrate)


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    unknown = [name for name in names if name not in (*TASKS, EXITS)]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{text!r}: expected some of {','.join((*TASKS, EXITS))}")
    return names


# ---------------------------------------------------------------- eval


def run_eval(args: argparse.Namespace) -> int:
    """`nearfar eval`: the table of one model, or of stored answers."""
    from nearfar.corpora import data_folder
    from nearfar.eval.tasks import load_predictions

    if args.text is not None:
        return run_text(args)
    if (args.model is None) == (args.table is None):
        raise UsageError("expected a model, or --table with stored answers, and not both")
    wants_exits = args.model is not None and (args.tasks is None or EXITS in args.tasks)
    if args.plot and not wants_exits:
        raise UsageError("--plot draws what the task exits finds: expected a model, and exits among --tasks")
    started = time.perf_counter()
    folder = data_folder(args.data)
    tasks, without = load_tasks(folder, args.tasks)
    tasks = [task.first(args.limit or (None if args.table else task.usual_rows)) for task in tasks]
    facts: dict[str, Any] = {"model": args.model, "table": args.table, "limit": args.limit}
    about_exits: list[Section] = []
    if args.table:
        predictions = load_predictions(Path(args.table))
    else:
        with open_model(args, args.model) as llm:
            facts["backend"] = llm.backend
            tasks, others = runnable(llm, tasks)
            without += others
            predictions = ask(llm, tasks, grammar=not args.no_grammar, save=Path(args.save) if args.save else None)
            if wants_exits:
                about_exits, facts["exit_curves"] = exit_section(llm, tasks, args.plot)
    sections = [s for task in tasks if (s := section(task, predictions, folder, fit=not args.no_baselines))]
    facts["seconds"] = round(time.perf_counter() - started, 1)
    _print([*sections, *about_exits, *without], facts, args.json)
    return 0


def run_text(args: argparse.Namespace) -> int:
    """`nearfar eval MODEL --text FILE`: perplexity; with `--lut fast` of both ways to multiply, and the verdict."""
    from nearfar.eval.perplexity import LutGate, lut_gate, perplexity, read_text, text_ids
    from nearfar.lower import open_lower
    from nearfar.options import EngineOptions
    from nearfar.tokenizer import tokenizer_from_metadata
    from nearfar.weights import Weights

    if args.model is None:
        raise UsageError("--text needs a model: nano, or the path of a GGUF file")
    if args.backend == "llama":
        raise UsageError("--text runs in nearfar's own engine: expected --backend native or numpy")
    with Weights.open(model_path(args.model)) as weights:
        tokenizer = tokenizer_from_metadata(weights.file.metadata)
        ids = text_ids(tokenizer, read_text(Path(args.text)), args.tokens)
        exact = open_lower(weights, args.backend, EngineOptions(threads=args.threads))
        facts: dict[str, Any] = {"model": args.model, "text": args.text, "backend": exact.name, "tokens": len(ids)}
        if args.lut == "fast":
            fast = open_lower(weights, args.backend, EngineOptions(threads=args.threads, lut="fast"))
            gate = lut_gate(exact, fast, ids)
        else:
            figure = perplexity(exact, ids)
            gate = LutGate(len(ids), figure, figure)
    facts["perplexity"] = round(gate.exact, 4)
    lines = [f"perplexity {gate.exact:.3f} over {gate.n_tokens} tokens, engine {exact.name}"]
    if args.lut == "fast":
        facts |= {"perplexity_lut_fast": round(gate.fast, 4), "rise": round(gate.rise, 6), "passed": gate.passed}
        verdict = "may run with --lut fast" if gate.passed else "is to run without --lut fast"
        lines.append(f"by lookup  {gate.fast:.3f}, {100 * gate.rise:+.3f} %: this model {verdict}")
    print(json.dumps(facts, ensure_ascii=False) if args.json else "\n".join(lines))
    return 0


def load_tasks(folder: Path, names: Sequence[str] | None) -> tuple[list[Task], list[Section]]:
    """The named tasks, with the official test files of their sets where the folder has them.

    Of all tasks (`names` None) those are passed over that lack a file or a package: a section says so for each.
    Raises DataError and MissingExtraError for tasks that were named, and where there is nothing at all to run.
    """
    from nearfar.eval.catalog import LOADERS

    tasks: list[Task] = []
    without: list[Section] = []
    reasons: list[NearfarError] = []
    for name in TASKS if names is None else [name for name in names if name != EXITS]:
        try:
            tasks += LOADERS[name](folder)
        except (MissingDataError, MissingExtraError) as error:
            if names is not None:
                raise
            reasons.append(error)
            missing = f"{error.path.name} missing" if isinstance(error, MissingDataError) else str(error)
            without.append(not_run(name, missing))
    if reasons and not tasks:
        raise reasons[0]
    return tasks, without


def not_run(name: str, reason: str) -> Section:
    """The place of a task in the table that could not be run."""
    from nearfar.eval.report import Section

    return Section(name, name, 0, {}, notes=[f"n/a: {reason}"])


def runnable(llm: LLM, tasks: Sequence[Task]) -> tuple[list[Task], list[Section]]:
    """Tasks that this engine can answer, and a section for each other one: likelihoods are our own engine's."""
    from nearfar.engine import Engine

    if isinstance(llm.stepper, Engine):
        return list(tasks), []
    reason = "its likelihoods need nearfar's own engine (--backend native or numpy)"
    return [t for t in tasks if t.ask is None], [not_run(t.name, reason) for t in tasks if t.ask is not None]


def ask(
    llm: LLM, tasks: Sequence[Task], *, grammar: bool, save: Path | None = None
) -> dict[tuple[str, str], list[Prediction]]:
    """Every task's answers by (task, mode): free, with the exits that may fire, and under a grammar (llguidance).

    `save` gets each mode's answers as soon as they are complete: a run that is stopped keeps what it has.
    """
    from nearfar.eval import exits
    from nearfar.eval.report import EARLY, FREE, SCHEMA
    from nearfar.eval.tasks import predict, save_predictions, speaks_rows

    answers: dict[tuple[str, str], list[Prediction]] = {}
    modes = [FREE]
    if llm.config and any(e.tau < 1 for e in llm.config.exits):
        modes.append(EARLY)
    if grammar and _has_llguidance():
        modes.append(SCHEMA)
    elif grammar:
        print("without the column about grammars: pip install 'nearfar[schema]'", file=sys.stderr)
    has_exits = bool(llm.config and llm.config.exits) and speaks_rows(llm)
    for task in tasks:
        for mode in [FREE] if task.ask else [m for m in modes if m != SCHEMA or task.schema]:
            wants_scores = mode == FREE and has_exits and task.name.startswith("clinc150")
            scores: Callable[..., Mapping[str, float]] | None = (
                (lambda prompt, ids: exits.confidences(llm, prompt, ids)) if wants_scores else None
            )
            found = predict(llm, task, constrained=mode == SCHEMA, exits=mode == EARLY, scores=scores)
            answers[task.name, mode] = list(progress(found, len(task.rows), f"{task.name} {mode}"))
            if save is not None:
                save_predictions(save, {(task.name, mode): answers[task.name, mode]}, append=len(answers) > 1)
    return answers


def section(
    task: Task, predictions: Mapping[tuple[str, str], Sequence[Prediction]], folder: Path, *, fit: bool
) -> Section | None:
    """A task's part of the table, over the rows that were answered; None where there are no answers."""
    from nearfar.eval.baselines import baseline, stored_baseline
    from nearfar.eval.report import MODES, Section
    from nearfar.eval.tasks import in_order

    modes = [mode for mode in MODES if (task.name, mode) in predictions]
    if not modes:
        return None
    rows, _ = in_order(task.rows, predictions[task.name, modes[0]])
    figures = {mode: task.score(*in_order(task.rows, predictions[task.name, mode])) for mode in modes}
    cut = sum(p.finish == "context" for p in predictions[task.name, modes[0]])
    notes = [f"{cut} prompts did not fit the context and count as wrong"] if cut else []
    notes += task.notes(rows)
    try:
        beside = baseline(task.only(rows), folder) if fit else stored_baseline(task.name)
    except MissingExtraError as error:
        beside = stored_baseline(task.name)
        notes.append(f"baseline stored, of the whole split: {error}")
    return Section(task.name, task.split, len(rows), figures, beside, notes)


def exit_section(
    llm: LLM, tasks: Sequence[Task], plot: str | None = None
) -> tuple[list[Section], dict[str, list[dict[str, float]]]]:
    """What leaves early and what it changes, on some rows of each task that is answered by a call; the curves of it.

    Nothing for a model without exits.  Raises UsageError where `plot` asks for a picture of that.
    """
    from nearfar.eval import exits
    from nearfar.eval.report import FREE, Section
    from nearfar.eval.tasks import Figure, speaks_rows

    parts = [task.first(EXIT_ROWS) for task in tasks if task.ask is None and task.schema is not None]
    if not (llm.config and llm.config.exits and speaks_rows(llm) and parts):
        if plot:
            raise UsageError("--plot: expected a model with exits, trained on nearfar's rows, and a task")
        return [], {}
    lower, heads = exits.engine_of(llm).lower, llm.config.exits
    found = exits.answers_at_full_depth(llm, parts)
    traces = [t for _, t in progress(found, sum(len(p.rows) for p in parts), "exits")]
    seen = exits.views(lower, traces, heads)
    figures = [*exits.figures(seen, heads), *exits.calibration_figures(lower, traces, heads)]
    if any(e.tau < 1 for e in heads):
        figures.append(Figure("wall time at full depth / with exits", exits.speed_up(llm, parts, SPEED_ROWS), unit=""))
    curves = exits.curves(seen, heads)
    if plot:
        exits.plot_curves(curves, Path(plot))
    name = f"Exits, {EXIT_ROWS} rows of each task at most"
    notes = ["the baseline is full depth", f"exit.{heads[-1].layer} is the deepest: its agreement is what a gate asks"]
    shown = {label: [asdict(point) for point in points] for label, points in curves.items()}
    return [Section(EXITS, name, len(traces), {FREE: figures}, notes=notes)], shown


def _has_llguidance() -> bool:
    from importlib.util import find_spec

    return find_spec("llguidance") is not None


def _print(sections: Sequence[Section], facts: Mapping[str, Any], as_json: bool) -> None:
    from nearfar.eval import report

    if as_json:
        print(json.dumps(report.as_json(sections, **facts), ensure_ascii=False))
    else:
        print(report.as_text(sections))
        print(f"\n{facts['seconds']} s" + (f", engine {facts['backend']}" if "backend" in facts else ""))


# ---------------------------------------------------------------- calibrate


def run_calibrate(args: argparse.Namespace) -> int:
    """`nearfar calibrate`: fit, choose, report, and write the copy."""
    from nearfar.corpora import data_folder
    from nearfar.eval import calibrate as cal
    from nearfar.eval.tasks import openings_task

    started, out = time.perf_counter(), Path(args.output)
    source = model_path(args.model)
    if out.exists() and out.samefile(source):
        raise UsageError(f"{out}: expected another name than the model's; the thresholds go into a copy")
    with open_model(args, args.model) as llm:
        pair = _pair(llm, source, args)
        tasks = held_out(data_folder(args.data), args.rows)
        tasks += [openings_task(Path(text), args.limit) for text in args.text]
        result, mix = calibrate_copy(
            llm, source, out, tasks, limit=args.limit, delta=args.delta, pair=pair, oracle=args.codec if pair else ""
        )
    picture = Path(args.plot) if args.plot else out.with_suffix(".reliability.png")
    drawn = cal.plot(result, picture)
    if args.plot and not drawn:
        raise MissingExtraError("matplotlib", "train", "the reliability plot")
    facts = calibration_facts(result, mix) | {
        "output": str(out),
        "plot": str(picture) if drawn else None,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(facts, ensure_ascii=False) if args.json else calibration_text(result, facts))
    return 0


def _pair(llm: LLM, source: Path, args: argparse.Namespace) -> Pair | None:
    """What a device half is calibrated against; None for a whole model."""
    from nearfar.eval.pair import open_pair
    from nearfar.options import EngineOptions
    from nearfar.share import CODECS
    from nearfar.wire.messages import CodecId

    is_half = llm.config is not None and llm.config.role == "device"
    if is_half != bool(args.upper):
        what = "a device half, whose upper layers decide: expected --upper" if is_half else "a whole model: no --upper"
        raise UsageError(f"{source} is {what}")
    if not args.upper:
        return None
    options = EngineOptions(threads=args.threads, lut=args.lut, cache=args.cache, head=args.head)
    codec = CODECS.get(args.codec, CodecId.IDS)
    return open_pair(llm, source, model_path(args.upper), codec, backend=args.backend, options=options)


def calibrate_copy(
    llm: LLM,
    source: Path,
    out: Path,
    tasks: Sequence[Task],
    *,
    limit: int,
    delta: float,
    pair: Pair | None = None,
    oracle: str = "",
) -> tuple[Calibration, dict[str, int]]:
    """Measure `llm`, the open file `source`, and write its calibrated copy; also gives the answers per data set.

    `pair`, `oracle`: of a device half, what stands above it and how rows get there.
    """
    from nearfar.eval import calibrate as cal
    from nearfar.eval import exits
    from nearfar.eval.tasks import speaks_rows
    from nearfar.gguf_reader import GGUFFile

    engine = pair.heads if pair else exits.engine_of(llm)
    if not speaks_rows(llm):
        raise UsageError(f"{source} was not trained on nearfar's rows (no key nearfar.rows): nothing to ask it")
    total = sum(min(limit, len(task.rows)) for task in tasks)
    found = exits.answers_at_full_depth(pair.oracle if pair else llm, tasks, limit, pair.heads if pair else None)
    traces = [t for _, t in progress(found, total, "answers at full depth")]
    result = cal.calibrate(engine.lower, traces, delta=delta)
    mix = {task.name: sum(t.id.startswith(f"{task.name}:") for t in traces) for task in tasks}
    with GGUFFile.open(source) as file:
        cal.write_calibrated(file, out, result, mix, oracle)
    return result, mix


def held_out(folder: Path, more: str | None) -> list[Task]:
    """The held-out training rows of each set, and the prompts of `more`."""
    from nearfar.eval import calls, intents
    from nearfar.eval.tasks import prompts_task

    tasks = [*intents.dev_rows(folder), *calls.dev_rows(folder)]
    return [*tasks, prompts_task(Path(more))] if more else tasks


def calibration_facts(c: Calibration, mix: Mapping[str, int]) -> dict[str, Any]:
    """The calibration for `--json`; `mix`: answers per source."""
    return {
        "delta": c.delta,
        "delta_loose": c.delta_loose,
        "alpha": c.alpha,
        "answers": dict(c.n_answers),
        "mix": dict(mix),
        "exits": {
            f"exit.{e.layer}": {
                "temperature": round(e.temperature, 4),
                "tau": round(e.tau, 6),
                "tau_loose": None if e.tau_loose is None else round(e.tau_loose, 6),
                "ece_before": round(c.ece[e.layer][0], 5),
                "ece_after": round(c.ece[e.layer][1], 5),
            }
            for e in c.exits
        },
        "tested": [{"tau": list(s.taus), "mean_loss": round(s.mean_loss, 6), "p": s.p} for s in c.tested],
        "report": {k: {"value": i.value, "low": i.low, "high": i.high, "n": i.n} for k, i in c.report.items()},
    }


def calibration_text(c: Calibration, facts: Mapping[str, Any]) -> str:
    """The calibration for people."""
    from nearfar.eval.report import shown

    lines = [f"answers: {', '.join(f'{k} {n}' for k, n in c.n_answers.items())} ({_listed(facts['mix'])})"]
    for name, e in facts["exits"].items():
        fires = f"threshold {e['tau']:.4g}" if e["tau"] < 1 else "never fires: no threshold passed"
        if e["tau_loose"] is not None and e["tau_loose"] < e["tau"]:
            fires += f" ({e['tau_loose']:.4g} while an upper side is overloaded)"
        error = f"calibration error {e['ece_before']:.4f} -> {e['ece_after']:.4f}"
        lines.append(f"{name}: temperature {e['temperature']:.3f}, {error}, {fires}")
    last = c.tested[-1]
    lines.append(f"{len(c.tested)} thresholds tested; the last: mean loss {100 * last.mean_loss:.2f} %, p {last.p:.3g}")
    lines += [f"on answers that chose nothing, {name}: {shown(i)}" for name, i in c.report.items()]
    lines.append(f"wrote {facts['output']}" + (f" and {facts['plot']}" if facts["plot"] else ""))
    return "\n".join(lines)


def _listed(mix: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n}" for name, n in mix.items())
