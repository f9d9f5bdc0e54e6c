"""`nearfar chaos suite`: answers under faults until there are enough tokens; exit code 1 where one was wrong."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nearfar.arguments import real, whole
from nearfar.chaos.plan import FAULTS, Plan
from nearfar.chaos.profiles import PROFILES
from nearfar.cli.show import where_cut
from nearfar.cli.verbs import SHIPPED, VerbParser, model_path, new_inner_parser
from nearfar.errors import FileError, MissingExtraError, UsageError

if TYPE_CHECKING:
    from nearfar.chaos.suite import Leg, Setting

CODECS = ("fp16", "int8", "int4", "ids")
_TOLD = ("asks", "drafted", "accepted", "retracted", "reopened", "replayed", "near_ties")


def add_suite(chaos: VerbParser) -> None:
    parser = new_inner_parser(
        chaos,
        "suite",
        "share answers with a server while links and processes fail, and compare every token with the oracle",
        "nearfar chaos suite --tokens 2000",
        "nearfar chaos suite nano --at 4 --codecs int8,ids --tokens 100000 --fault-every 20 --seed 7 --json",
        "nearfar chaos suite model.gguf --at 16 --profile 4g-bad --faults reset,cut,device --save failing.json",
        detail="Splits the model, starts its server, and lets devices on emulated links answer at once. Faults are "
        "drawn from the seed, in tokens. Exit code 1: an answer was not the oracle's, told an index twice or not at "
        "all, or differs from its journal, or the server has not given everything back; the seed and the fewest "
        "faults that it takes are printed.",
    )
    parser.add_argument("model", nargs="?", default=SHIPPED, help="a whole GGUF file (default: the shipped model)")
    parser.add_argument("--at", type=whole(1, 1024), metavar="K", help="cut before layer K (default: the last exit)")
    parser.add_argument(
        "--rows-at", type=whole(1, 1023), metavar="R", help="rows leave the device below layer R <= K (default: K)"
    )
    parser.add_argument("--mode", choices=("lossless", "lossy", "cloud-only"), default="lossless")
    parser.add_argument("--codecs", default=",".join(CODECS), metavar="C,..", help="default: %(default)s")
    parser.add_argument("--tokens", type=whole(1, 1 << 40), default=10_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--answer-tokens", type=whole(1, 1 << 20), default=128, metavar="N", help="of one at most")
    parser.add_argument("--fault-every", type=whole(1, 1 << 20), default=20, metavar="N", help="tokens (default 20)")
    parser.add_argument("--faults", default=",".join(FAULTS), metavar="K,..", help="default: %(default)s")
    parser.add_argument("--profile", choices=tuple(PROFILES), default="lan", help="how the links are (default lan)")
    parser.add_argument("--tau", type=real(0, 1), metavar="T", help="exits are sure above this (default: calibrated)")
    parser.add_argument(
        "--temperature", type=real(0, 100), metavar="T", help="of all answers (default: 0 and 0.8 by turns)"
    )
    parser.add_argument("--seed", type=whole(0, (1 << 63) - 1), default=0, metavar="N", help="of everything drawn")
    parser.add_argument("--devices", type=whole(1, 64), default=3, metavar="N", help="at once (default 3)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="the schedule of the first failure, as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    _check_extras()
    from nearfar.chaos.suite import run as run_suite

    setting = _setting(args)
    signal.signal(signal.SIGTERM, _end)
    legs = run_suite(setting, None if args.json else _show)
    if not args.json:
        print(file=sys.stderr)
    result = _result(args, setting, legs)
    print(json.dumps(result) if args.json else report(result))
    failures = [failure for leg in legs for failure in leg.failures]
    if failures and args.save is not None:
        _save(args.save, failures[0].schedule.to_json())
    return 0 if all(leg.is_good for leg in legs) else 1


def _end(number: int, _: object) -> None:
    """Servers and devices end with us; a second signal (`timeout` sends two) must not keep them from it."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def _check_extras() -> None:
    from importlib.util import find_spec

    for package, extra in (("grpc", "collab"), ("torch", "cloud"), ("fastapi", "cloud")):
        if find_spec(package) is None:
            raise MissingExtraError(package, extra, "nearfar chaos suite")


def _setting(args: argparse.Namespace) -> Setting:
    """Raises UsageError, FileError."""
    from nearfar.chaos.suite import Setting
    from nearfar.halves import checked_rows_at
    from nearfar.weights import Weights

    codecs = tuple(args.codecs.split(","))
    if unknown := [codec for codec in codecs if codec not in CODECS]:
        raise UsageError(f"--codecs {unknown[0]!r}: expected some of {', '.join(CODECS)}")
    if args.mode == "cloud-only" and codecs != ("ids",):
        raise UsageError("--mode cloud-only sends ids: expected --codecs ids")
    if args.mode == "lossy" and args.tau != 1:
        raise UsageError("--mode lossy is the oracle's only where no exit decides: expected --tau 1")
    kinds = tuple(args.faults.split(","))
    plan = Plan(args.seed, kinds, args.fault_every, args.answer_tokens, args.temperature)
    path = model_path(args.model)
    with Weights.open(path) as weights:
        exits = [e.layer for e in weights.config.exits]
    if args.at is None and not exits:
        raise UsageError(f"{path} has no exits: --at says where to cut")
    k = args.at or exits[-1]
    link = PROFILES[args.profile]
    rows_at = checked_rows_at(k, args.rows_at)
    return Setting(path, k, plan, codecs, args.mode, args.tau, args.tokens, args.devices, link, rows_at)


def _show(leg: Leg, n_tokens: int) -> None:
    """One line that stays where it is."""
    speed = leg.tokens / max(leg.seconds, 1e-9)
    left = max(0.0, n_tokens - leg.tokens) / max(speed, 1e-9)
    text = f"{leg.codec}: {leg.tokens} of {n_tokens} tokens, {speed:.0f} tokens/s, {left:.0f} s left"
    print(f"\r{text}, {len(leg.failures)} failures ", end="", file=sys.stderr, flush=True)


def _result(args: argparse.Namespace, setting: Setting, legs: Sequence[Leg]) -> dict[str, Any]:
    return {
        "model": args.model,
        "cut": setting.k,
        "rows_at": setting.rows_at or setting.k,
        "mode": setting.mode,
        "profile": setting.profile.name,
        "seed": setting.plan.seed,
        "tokens": sum(leg.tokens for leg in legs),
        "answers": sum(leg.answers for leg in legs),
        "faults": dict(sum((leg.faults for leg in legs), Counter())),
        "seconds": round(sum(leg.seconds for leg in legs), 1),
        "codecs": [_leg(leg) for leg in legs],
    }


def _leg(leg: Leg) -> dict[str, Any]:
    failures = [{**asdict(f), "schedule": json.loads(f.schedule.to_json())} for f in leg.failures]
    return {
        "codec": leg.codec,
        "tokens": leg.tokens,
        "answers": leg.answers,
        "faults": dict(leg.faults),
        **{name: leg.counts[name] for name in _TOLD},
        "refused": leg.refused,
        "seconds": round(leg.seconds, 1),
        "not_given_back": {name: {"now": now, "before": then} for name, (now, then) in leg.kept.items()},
        "strangers_got": leg.strangers_got,
        "failures": failures,
    }


def report(result: dict[str, Any]) -> str:
    """For people."""
    n_faults = sum(result["faults"].values())
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(result["faults"].items()))
    lines = [
        f"{result['model']}, {where_cut(result['cut'], result['rows_at'])}, {result['mode']}, {result['profile']}, "
        f"seed {result['seed']}: {result['tokens']} tokens in {result['answers']} answers, {result['seconds']:.0f} s",
        f"{n_faults} faults: {kinds or 'none'}",
    ]
    for leg in result["codecs"]:
        lines.append(
            f"{leg['codec']:>5}: {leg['tokens']} tokens, {leg['retracted']} of {leg['drafted']} drafts retracted, "
            f"{leg['reopened']} connections again, {leg['replayed']} rows again, {leg['near_ties']} near ties, "
            f"{leg['refused']} times other weights refused"
        )
        lines += [f"       not given back: {name} {n['now']:g}, {n['before']:g} before"
                  for name, n in leg["not_given_back"].items()]  # fmt: skip
        if leg["strangers_got"]:
            lines.append(f"       a server with other weights was trusted: {json.dumps(leg['strangers_got'])}")
        for failure in leg["failures"]:
            lines.append(f"       answer {failure['answer']}: {'; '.join(failure['wrong'])}")
            lines.append(f"       seed {result['seed']}, it takes {json.dumps(failure['schedule'])}")
    n_wrong = sum(len(leg["failures"]) for leg in result["codecs"])
    lines.append("every token is the oracle's" if not n_wrong else f"{n_wrong} answers are wrong")
    return "\n".join(lines)


def _save(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from None
