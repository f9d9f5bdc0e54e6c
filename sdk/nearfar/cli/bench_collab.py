"""`nearfar bench collab`: what a shared answer costs on each link, beside the ways that it competes with."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from nearfar.arguments import real, whole
from nearfar.cli.show import where_cut
from nearfar.cli.verbs import SHIPPED, VerbParser, model_path, new_inner_parser
from nearfar.errors import UsageError
from nearfar.machine import cpu_name

if TYPE_CHECKING:
    from nearfar.bench.collab.paced import Rate

Columns = tuple[tuple[str, str, str], ...]  # name of a figure, title, format
TIMES: Columns = (
    ("total_s", "s/answer", "{:.2f}"),
    ("ttft_ms", "ttft ms", "{:.0f}"),
    ("tbt_p50_ms", "tbt p50", "{:.0f}"),
    ("tbt_p95_ms", "p95", "{:.0f}"),
    ("tbt_p99_ms", "p99", "{:.0f}"),
    ("stall_p95_ms", "stall p95", "{:.0f}"),
    ("tokens_per_s", "tok/s", "{:.1f}"),
    ("device_s", "device s", "{:.2f}"),
    ("upper_s", "upper s", "{:.2f}"),
    ("link_s", "link s", "{:.2f}"),
    ("agrees_with_oracle", "= oracle", "{:.3f}"),
    ("agrees_with_full", "= full", "{:.3f}"),
)
WORK: Columns = (
    ("asked_share", "asked", "{:.3f}"),
    ("asks_per_token", "asks/tok", "{:.3f}"),
    ("bytes_up_per_token", "B up/tok", "{:.0f}"),
    ("bytes_down_per_token", "B down/tok", "{:.0f}"),
    ("kb_per_answer", "kB/answer", "{:.1f}"),
    ("upper_ms_per_token", "upper ms/tok", "{:.1f}"),
    ("upper_row_layers_per_token", "row-layers/tok", "{:.2f}"),
    ("cost_of_cloud_only", "cost", "{:.3f}"),
    ("dollars_per_mtok", "$/Mtok", "{:.3f}"),
    ("acceptance", "accepted", "{:.3f}"),
    ("retracted_per_token", "retracted/tok", "{:.3f}"),
    ("energy_j_per_token", "J/tok", "{:.2f}"),
)
LEGEND = """\
asked: share of tokens that the upper side decided or checked; stall p95: of each answer the longest time between two
tokens, of these the 95th of 100; cost: the upper side's busy time for a token, cloud-only's is 1; -: no such figure"""


def add_verb(outer: VerbParser) -> None:
    parser = new_inner_parser(
        outer,
        "collab",
        "compare ways to share an answer between this device and an upper side",
        "nearfar bench collab",
        "nearfar bench collab nano --at 4 --profiles lan,4g-good --answers 8 --json",
        "nearfar bench collab model.gguf --at 16 --device-rate 0,0 --upper-rate 0,0",
        detail="Both sides run here, so each gets a stated rate: STEP,ROW milliseconds that a pass of n rows "
        "through all layers takes at least (STEP + n ROW; 0,0: as fast as it is). The links are emulated. "
        "ttft, tbt: milliseconds to the first token and between tokens. stall p95: of each answer the longest time "
        "between two tokens, and of these the 95th of 100 (of few answers: the longest). asked: share of tokens that "
        "the upper side decided or checked. cost: the upper side's busy time for a token, with cloud-only's as 1; with "
        "--dollars-per-hour X also in dollars, ms a token * X / 3.6 for a million tokens, as if no step were shared. "
        "J: what this machine's processors took, both sides and all else on it, where Linux tells it.",
    )
    parser.add_argument(
        "model", nargs="?", default=SHIPPED, help="path of a whole GGUF file (default: the shipped model)"
    )
    parser.add_argument("--at", type=whole(1, 1024), metavar="K", help="cut before layer K (default: the last exit)")
    parser.add_argument(
        "--rows-at", type=whole(1, 1023), metavar="R", help="rows leave the device below layer R <= K (default: K)"
    )
    parser.add_argument(
        "--profiles", default="lan,wifi,4g-good,4g-bad,sat", metavar="NAMES", help="default: %(default)s"
    )
    parser.add_argument("--systems", metavar="NAMES", help="some of the rows only, separated by commas")
    parser.add_argument("--prompts", default="home,text", metavar="KINDS", help="home, text (default: both)")
    parser.add_argument("--answers", type=whole(1, 10_000), default=4, metavar="N", help="of each kind (default 4)")
    parser.add_argument("--tokens", type=whole(2, 1 << 16), default=48, metavar="N", help="of an answer at most")
    parser.add_argument("--device-rate", default="30,0.3", metavar="STEP,ROW", help="default: %(default)s")
    parser.add_argument("--upper-rate", default="37,0.4", metavar="STEP,ROW", help="default: %(default)s")
    parser.add_argument("--seed", type=whole(0, 1 << 31), default=0, help="of the links")
    parser.add_argument("--dollars-per-hour", type=real(0, 1e6), metavar="X", help="what the upper machine costs")
    parser.add_argument("--plot", metavar="FILE", help="a picture of it, PNG (extra [train])")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from nearfar.bench.collab.compare import compare, names_of
    from nearfar.bench.collab.energy import Meter
    from nearfar.bench.collab.systems import Files
    from nearfar.chaos.profiles import profile
    from nearfar.halves import checked_rows_at, split
    from nearfar.weights import Weights

    profiles = [profile(name) for name in args.profiles.split(",")]
    kinds = args.prompts.split(",")
    if unknown := set(kinds) - {"home", "text"}:
        raise UsageError(f"--prompts {','.join(sorted(unknown))}: expected home, text")
    wanted = names_of(args.systems)
    device_rate, upper_rate = _rate(args.device_rate, "--device-rate"), _rate(args.upper_rate, "--upper-rate")
    path, meter = model_path(args.model), Meter()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        whole_model = stack.enter_context(Weights.open(path))
        exits = [e.layer for e in whole_model.config.exits]
        if args.at is None and not exits:
            raise UsageError(f"{path} has no exits: --at says where to cut")
        k = args.at or exits[-1]
        rows_at = checked_rows_at(k, args.rows_at)
        halves = split(whole_model, k, folder, rows_at=rows_at, make_exit=k not in exits)
        files = Files(path, halves.device, halves.upper)
        runs = compare(
            files,
            rows_at,
            whole_model.config.n_layers,
            profiles,
            kinds,
            wanted,
            n_answers=args.answers,
            max_tokens=args.tokens,
            device_rate=device_rate,
            upper_rate=upper_rate,
            meter=meter,
            dollars_per_hour=args.dollars_per_hour,
            seed=args.seed,
            progress=None if args.json else lambda text: print(text, file=sys.stderr, flush=True),
        )
    result = {
        "model": args.model,
        "cut": k,
        "rows_at": rows_at,
        "cpu": cpu_name(),
        "device_rate_ms": args.device_rate,
        "upper_rate_ms": args.upper_rate,
        "answers": args.answers,
        "tokens": args.tokens,
        "dollars_per_hour": args.dollars_per_hour,
        "energy": {"zones": [zone.name for zone in meter.zones], "why_not": meter.why_not or None},
        "rows": runs,
    }
    if args.plot:
        from nearfar.bench.collab.plot import plot

        plot(runs, Path(args.plot))
    print(json.dumps(result) if args.json else report(result))
    return 0


def report(result: dict[str, Any]) -> str:
    """Two tables for each link and kind of prompt: when tokens come, and what they take."""
    lines = [
        f"{result['model']}, {where_cut(result['cut'], result['rows_at'])}, {result['cpu']}; "
        f"emulated rates (ms a pass, ms a row): device {result['device_rate_ms']}, upper {result['upper_rate_ms']}",
        LEGEND,
    ]
    if result["energy"]["why_not"]:
        lines.append(f"no energy: {result['energy']['why_not']}")
    for link, kind in dict.fromkeys((row["link"], row["prompts"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["link"], row["prompts"]) == (link, kind)]
        for columns in (TIMES, WORK):
            lines += [
                f"\n{link}, {kind}",
                *_table(rows, [c for c in columns if any(row[c[0]] is not None for row in rows)]),
            ]
        if n := sum(row["resumes"] for row in rows):
            lines.append(f"links that came back: {n:g}, rows sent again: {sum(row['replayed_rows'] for row in rows):g}")
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str, str]]) -> list[str]:
    """A line of titles, and one for each row."""
    names = ["", *(row["system"] for row in rows)]
    cells = [[title for _, title, _ in columns]]
    cells += [["-" if row[key] is None else text.format(row[key]) for key, _, text in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    first = max(map(len, names))
    return [
        f"{name:<{first}}  " + "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True))
        for name, line in zip(names, cells, strict=True)
    ]


def _rate(text: str, option: str) -> Rate | None:
    from nearfar.bench.collab.paced import Rate

    try:
        step, row = (float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} {text!r}: expected two numbers, STEP,ROW in milliseconds") from None
    if not (0 <= step < 1e5 and 0 <= row < 1e5):
        raise UsageError(f"{option} {text}: expected 0 up to 100000 milliseconds")
    return Rate(step, row) if step or row else None
