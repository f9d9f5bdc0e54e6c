"""What each exit would have said along answers made at full depth, and which tokens leave under given thresholds.

    prompt + answer at full depth -> trace (one pass, every head's rows) -> views (agreement, confidence) -> decide

A trace looks at the context that full depth saw, so one pass answers for every threshold.  While nothing that left has
differed, the engine with exits sees the same context: an answer is unchanged exactly where its loss here is zero.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nearfar.config import ExitConfig
from nearfar.engine import Engine
from nearfar.errors import ContextError, MissingExtraError, UsageError
from nearfar.eval.intervals import Interval, bootstrap, bootstrap_over, wilson
from nearfar.eval.metrics import calibration_error, ratio
from nearfar.eval.tasks import Figure, Row, Task, answer
from nearfar.exit import should_exit
from nearfar.forms import Parts, encode
from nearfar.lower import Lower

Array = NDArray[np.float32]

FULL = "full"
CURVE = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
CHUNK = 512  # rows whose logits are held at once


@dataclass(frozen=True, slots=True)
class Trace:
    """One answer of T tokens.  `rows[e]` [T, D]: the rows that exit `e` (a layer number) turned into its guesses."""

    id: str
    n_prompt: int
    tokens: NDArray[np.int32]  # [T]: what full depth chose
    sure: Array  # [T]: the largest probability at full depth
    rows: Mapping[int, Array]


@dataclass(frozen=True, slots=True)
class View:
    """What the exits said about one answer of T tokens; E exits, rising by layer."""

    n_prompt: int
    agree: NDArray[np.bool_]  # [E, T]: the exit's token is the one of full depth
    conf: NDArray[np.float64]  # [E, T]: calibrated confidence


def engine_of(model: Any) -> Engine:
    """The engine with exits behind an LLM.  Raises UsageError for a model that has none."""
    stepper = getattr(model, "stepper", None)
    if not isinstance(stepper, Engine):
        raise UsageError("exits live in nearfar's own engine: open the model with --backend native or numpy")
    if not stepper.lower.config.exits:
        raise UsageError("this model has no early exits (nearfar.exit_layers): nothing to calibrate or compare")
    return stepper


def trace(engine: Engine, name: str, prompt: Sequence[int], tokens: Sequence[int]) -> Trace:
    """Run `prompt` and `tokens` once through all layers and keep each exit's rows where an answer token was due.

    Of a device half "full depth" is its last exit, which ends every token.
    """
    lower, config = engine.lower, engine.lower.config
    ids = np.asarray([*prompt, *tokens][:-1], np.int32)
    kv = lower.new_kv(max(len(ids), 1), engine.kv_dtype, engine.kv_policy)
    h, start, rows = lower.embed(ids), 0, {}
    exits, last = [e.layer for e in config.exits], config.layers[1]
    for layer in sorted({*exits, last}):
        h = lower.forward(h, kv, start, layer)
        start = layer
        rows[layer] = h[len(prompt) - 1 :].copy()  # row i predicts answer token i
    best, sure = guesses(lower, rows[last], config.last_head)
    return Trace(name, len(prompt), best, sure, {e: rows[e] for e in exits})


def guesses(lower: Lower, rows: Array, head: str, temperature: float = 1.0) -> tuple[NDArray[np.int32], Array]:
    """rows [T, D] -> each row's likeliest token i32 [T] and its probability f32 [T]."""
    best, sure = np.empty(len(rows), np.int32), np.empty(len(rows), np.float32)
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        logits = lower.logits(np.ascontiguousarray(rows[part]), head)
        best[part], sure[part] = logits.argmax(1), max_softmax_rows(logits, temperature)
    return best, sure


def max_softmax_rows(logits: Array, temperature: float = 1.0) -> Array:
    """logits [T, V] -> f32 [T]; row by row what nearfar.exit.max_softmax computes."""
    z = (logits - logits.max(1, keepdims=True)) / np.float32(temperature)
    result: Array = 1.0 / np.exp(z).sum(1)
    return result


def views(lower: Lower, traces: Sequence[Trace], exits: Sequence[ExitConfig]) -> list[View]:
    """What `exits`, with their temperatures and isotonic maps, say along each trace."""
    truth = np.concatenate([t.tokens for t in traces]) if traces else np.zeros(0, np.int32)
    agree, conf = [], []
    for e in exits:
        rows = (
            np.concatenate([t.rows[e.layer] for t in traces])
            if traces
            else np.zeros((0, lower.config.d_model), np.float32)
        )
        best, raw = guesses(lower, rows, f"exit.{e.layer}", e.temperature)
        agree.append(best == truth)
        conf.append(np.interp(raw, e.isotonic_x, e.isotonic_y) if e.isotonic_x else raw.astype(np.float64))
    cuts = np.cumsum([len(t.tokens) for t in traces])[:-1]
    parts = zip(np.split(np.array(agree), cuts, axis=1), np.split(np.array(conf), cuts, axis=1), strict=True)
    return [View(t.n_prompt, *part) for t, part in zip(traces, parts, strict=False)]


def decide(v: View, taus: Sequence[float]) -> NDArray[np.int64]:
    """The exit that decides each token, i64 [T]: an index, or E for full depth.

    The engine's rule with its debt (engine.step): rows that left at an exit wait there, and with too many waiting, as
    after a prompt, a token goes on.  Exits that never fire (tau = 1) are no stage.
    """
    n_exits, n_tokens = v.conf.shape
    live = [e for e in range(n_exits) if taus[e] < 1]
    owed = dict.fromkeys(live, 0)
    decided = np.full(n_tokens, n_exits, np.int64)
    for t in range(n_tokens):
        waiting = v.n_prompt if t == 0 else 1
        for e in live:
            waiting += owed[e]
            owed[e] = 0
            if should_exit(float(v.conf[e, t]), taus[e], debt=waiting):
                owed[e] = waiting
                decided[t] = e
                break
    return decided


def loss(v: View, taus: Sequence[float]) -> float:
    """The share of an answer's tokens that left early and differ from full depth."""
    decided = decide(v, taus)
    early = np.flatnonzero(decided < len(v.agree))
    return float((~v.agree[decided[early], early]).sum()) / max(len(decided), 1)


def answers_at_full_depth(
    model: Any, tasks: Iterable[Task], n: int | None = None, heads: Engine | None = None
) -> Iterator[tuple[Row, Trace]]:
    """Greedy answers without exits, traced; rows that do not fit the context are passed over.

    `heads`: the exits are those of this engine, which runs along the answers of `model`.
    """
    engine = heads or engine_of(model)
    for task in tasks:
        for row in task.first(n).rows:
            try:
                completion = answer(model, task, row, constrained=False)
            except ContextError:
                continue
            if completion.ids:
                prompt = encode(task.prompt(row), model.tokenizer)
                t = trace(engine, f"{task.name}:{row.id}", prompt, completion.ids)
                yield row, t if heads is None else replace(t, tokens=np.asarray(completion.ids, np.int32))


def confidences(model: Any, prompt: Parts, tokens: Sequence[int]) -> dict[str, float]:
    """How sure each head was of a whole answer: the product of its largest probabilities, by "full", "exit.4", …"""
    engine = engine_of(model)
    t = trace(engine, "", encode(prompt, model.tokenizer), tokens)
    seen = views(engine.lower, [t], [ExitConfig(layer) for layer in t.rows])[0]
    named = {f"exit.{layer}": conf for layer, conf in zip(t.rows, seen.conf, strict=True)}
    return {name: float(np.exp(np.log(conf).sum())) for name, conf in {**named, FULL: t.sure}.items()}


def figures(seen: Sequence[View], exits: Sequence[ExitConfig]) -> list[Figure]:
    """Agreement of each exit, and what leaves and what changes at the thresholds of `exits`."""
    out = []
    for i, e in enumerate(exits):
        counts = np.array([(v.agree[i].sum(), v.agree.shape[1]) for v in seen])
        out.append(Figure(f"exit.{e.layer} agrees with full depth", bootstrap(counts, ratio)))
    taus = [e.tau for e in exits]
    if all(tau >= 1 for tau in taus):
        return out
    decided = [decide(v, taus) for v in seen]
    for i, e in enumerate(exits):
        counts = np.array([((d == i).sum(), len(d)) for d in decided])
        out.append(Figure(f"tokens that leave at exit.{e.layer} (threshold {e.tau:.3g})", bootstrap(counts, ratio)))
    losses = np.array([loss(v, taus) for v in seen])
    out.append(Figure("tokens that left and differ", bootstrap(np.stack([losses, np.ones_like(losses)], 1), ratio)))
    out.append(Figure("answers unchanged", wilson(int((losses == 0).sum()), len(losses))))
    return out


def calibration_figures(lower: Lower, traces: Sequence[Trace], exits: Sequence[ExitConfig]) -> list[Figure]:
    """Each exit's expected calibration error: of the raw confidence, and of the one that the file's maps make of it."""
    out = []
    for name, configs in (("raw", [ExitConfig(e.layer) for e in exits]), ("as calibrated", exits)):
        seen = views(lower, traces, configs)
        for i, e in enumerate(exits):

            def error(drawn: NDArray[Any], seen: Sequence[View] = seen, i: int = i) -> float:
                conf, agree = ([getattr(seen[j], part)[i] for j in drawn] for part in ("conf", "agree"))
                return calibration_error(np.concatenate(conf), np.concatenate(agree))

            out.append(Figure(f"exit.{e.layer} calibration error, {name}", bootstrap_over(len(seen), error), unit=""))
    return out


@dataclass(frozen=True, slots=True)
class Point:
    """At threshold `tau`: the share of tokens that left early, and of those that are as at full depth."""

    tau: float
    left: float
    agreement: float


def curves(seen: Sequence[View], exits: Sequence[ExitConfig]) -> dict[str, list[Point]]:
    """Tokens saved against agreement, for each exit alone and for all at one threshold, loose to strict."""
    alone = {f"exit.{e.layer} alone": [e.layer] for e in exits}
    groups = alone if len(exits) < 2 else {**alone, "all exits": [e.layer for e in exits]}
    return {
        name: [_point(seen, [tau if e.layer in layers else 1.0 for e in exits], tau) for tau in CURVE]
        for name, layers in groups.items()
    }


def _point(seen: Sequence[View], taus: Sequence[float], tau: float) -> Point:
    n = left = differ = 0
    for v in seen:
        decided = decide(v, taus)
        early = np.flatnonzero(decided < len(v.agree))
        n += len(decided)
        left += len(early)
        differ += int((~v.agree[decided[early], early]).sum())
    return Point(tau, left / max(n, 1), 1 - differ / max(n, 1))


def plot_curves(found: Mapping[str, Sequence[Point]], out: Path) -> None:
    """Tokens saved against agreement as PNG.  Raises MissingExtraError."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise MissingExtraError("matplotlib", "train", "the plot of what exits save") from error
    figure, axis = pyplot.subplots(figsize=(5.6, 4.2))
    for name, points in found.items():
        axis.plot([p.left for p in points], [p.agreement for p in points], "o-", ms=3, label=name)
    axis.set(xlabel="share of tokens that leave early", ylabel="share of tokens as at full depth", xlim=(0, 1))
    axis.legend()
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def speed_up(model: Any, tasks: Sequence[Task], n: int = 40) -> Interval:
    """Wall time without exits over wall time with them, for `n` rows of each task; the bootstrap draws rows.

    Each row is answered both ways in turn, so that a slow moment of the machine hits both; the first is a warm-up.
    """
    times: list[tuple[float, float]] = []
    for task in tasks:
        for row in task.first(n).rows:
            try:
                pair = tuple(_decode_seconds(model, task, row, use) for use in (False, True))
            except ContextError:
                continue
            times.append((pair[0], pair[1]))
    return bootstrap(np.array(times[1:]).reshape(-1, 2), lambda s: s[..., 0] / s[..., 1])


def _decode_seconds(model: Any, task: Task, row: Row, exits: bool) -> float:
    started = time.perf_counter()
    completion = answer(model, task, row, constrained=False, exits=exits)
    return (time.perf_counter() - started) / max(len(completion.ids), 1)
