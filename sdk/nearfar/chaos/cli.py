"""`nearfar chaos`: a bad link to put between a device and its upper layers, and the faults that it plays."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from nearfar.arguments import real, whole
from nearfar.chaos.profiles import PROFILES, Profile, profile
from nearfar.chaos.schedule import KINDS, Schedule, blackouts, draw, merged, read
from nearfar.chaos.suite_cli import add_suite
from nearfar.cli.verbs import VerbParser, Verbs, new_inner_parser, new_parser
from nearfar.errors import UsageError

if TYPE_CHECKING:
    from nearfar.chaos.proxy import Address

A_DAY = 86400.0  # seconds: blackouts of a link that nobody gave a schedule are drawn so far ahead


def add_verb(verbs: Verbs) -> None:
    parser = new_parser(
        verbs,
        "chaos",
        "a bad link between two programs, with faults that a seed repeats",
        "nearfar chaos proxy --to 127.0.0.1:7070 --listen 127.0.0.1:7071 --profile 4g-bad --seed 7",
        "nearfar chaos schedule --profile tunnel --seed 7 --until 600",
        "nearfar chaos suite --tokens 2000",
        "nearfar chaos proxy --help",
    )
    parser.set_defaults(run=run)
    add_proxy(parser)
    add_schedule(parser)
    add_suite(parser)


def run(args: argparse.Namespace) -> int:
    raise UsageError("nearfar chaos: expected proxy, schedule or suite; nearfar chaos --help shows examples")


def add_proxy(chaos: VerbParser) -> None:
    parser = new_inner_parser(
        chaos,
        "proxy",
        "carry TCP connections over a bad link until Ctrl-C, then say what it carried",
        "nearfar chaos proxy --to 127.0.0.1:7070 --listen 127.0.0.1:7071 --profile 4g-bad --seed 7",
        "nearfar chaos proxy --to box.local:7070 --profile tunnel --faults faults.json --json",
        detail="A profile sets rate, round trip, jitter and loss; --faults FILE adds resets, cuts, stalls, half-open "
        "connections and blackouts, as `nearfar chaos schedule` prints them (without it: the profile's own blackouts). "
        "With --json a line says where it listens, and another at the end what it carried.",
    )
    parser.add_argument("--to", type=address, required=True, metavar="HOST:PORT", help="who is behind the link")
    parser.add_argument(
        "--listen",
        type=address,
        default=("127.0.0.1", 0),
        metavar="HOST:PORT",
        help="where to take connections (default: this machine only, a free port)",
    )
    parser.add_argument("--profile", choices=tuple(PROFILES), default="lan", help="how the link is (default lan)")
    parser.add_argument("--seed", type=whole(0, (1 << 63) - 1), default=0, metavar="N", help="of jitter, loss, faults")
    parser.add_argument("--faults", type=Path, metavar="FILE", help="what goes wrong, and when, as JSON")
    parser.add_argument("--for", dest="for_s", type=real(0, 1e9), metavar="S", help="end by itself after S seconds")
    parser.set_defaults(run=run_proxy)


def add_schedule(chaos: VerbParser) -> None:
    parser = new_inner_parser(
        chaos,
        "schedule",
        "print the faults that a seed draws, as the JSON that --faults takes",
        "nearfar chaos schedule --profile tunnel --seed 7 --until 600",
        "nearfar chaos schedule --seed 7 --every 5 --until 60 --kinds reset,cut,stall > faults.json",
        detail="With --every S one fault falls into every S seconds.  Kinds: "
        + ", ".join(f"{kind} ({what})" for kind, what in KINDS.items())
        + ".",
    )
    parser.add_argument("--profile", choices=tuple(PROFILES), default="lan", help="its blackouts come along")
    parser.add_argument("--seed", type=whole(0, (1 << 63) - 1), default=0, metavar="N")
    parser.add_argument("--until", type=real(0, A_DAY), default=600.0, metavar="S", help="seconds (default 600)")
    parser.add_argument("--every", type=real(0.01, A_DAY), metavar="S", help="a fault in every S seconds")
    parser.add_argument("--kinds", default="reset,cut,stall,half-open", metavar="K,..", help="default %(default)s")
    parser.set_defaults(run=run_schedule)


def address(text: str) -> Address:
    """An argparse type: HOST:PORT, [::1]:PORT."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: expected HOST:PORT, for example 127.0.0.1:7070")
    return host.removeprefix("[").removesuffix("]"), int(port)


def run_schedule(args: argparse.Namespace) -> int:
    kinds = args.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise UsageError(f"--kinds {unknown[0]!r}: expected some of {','.join(KINDS)}")
    found = blackouts(profile(args.profile), args.seed, args.until)
    if args.every is not None:
        found = merged(found, draw(args.seed, kinds, args.every, args.until))
    print(found.to_json())
    return 0


def run_proxy(args: argparse.Namespace) -> int:
    from nearfar.chaos.priority import ahead_of_others
    from nearfar.chaos.proxy import new_loop

    link = profile(args.profile)
    schedule = read(args.faults) if args.faults else blackouts(link, args.seed, A_DAY)
    ahead_of_others()
    with asyncio.Runner(loop_factory=new_loop) as runner:
        return runner.run(_serve(args, link, schedule))


async def _serve(args: argparse.Namespace, link: Profile, schedule: Schedule) -> int:
    from nearfar.chaos.proxy import LinkProxy

    proxy = LinkProxy(args.to, link, args.seed, schedule)
    host, port = await proxy.start(args.listen)
    began = monotonic()
    facts = {"listen": f"{host}:{port}", "to": "{}:{}".format(*args.to), "profile": link.name, "seed": args.seed}
    _say(args, facts, f"{facts['listen']} -> {facts['to']}, {link.name}, seed {args.seed}; Ctrl-C ends it")
    code = await _until_signal(args.for_s)
    await proxy.stop()
    seconds = round(monotonic() - began, 3)
    _say(args, {"seconds": seconds, **proxy.counters.as_json()}, f"{seconds:.1f} s: {proxy.counters.as_text()}")
    return code


async def _until_signal(for_s: float | None) -> int:
    """The exit code: 130 after Ctrl-C, 0 for an orderly end."""
    loop, codes = asyncio.get_running_loop(), asyncio.Queue[int]()
    loop.add_signal_handler(signal.SIGTERM, codes.put_nowait, 0)
    loop.add_signal_handler(signal.SIGINT, codes.put_nowait, 130)
    try:
        return await asyncio.wait_for(codes.get(), for_s)
    except TimeoutError:
        return 0


def _say(args: argparse.Namespace, facts: dict[str, Any], text: str) -> None:
    print(json.dumps(facts) if args.json else text, flush=True)
