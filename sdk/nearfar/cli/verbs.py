"""What every verb of the command line shares: how it joins, and the options that mean the same everywhere.

A verb is a function `add_verb(verbs)` that makes its parser and ends with `parser.set_defaults(run=run)`, where
`run(args) -> int` is the exit code.  A verb of another house is found through the entry-point group `nearfar.verbs`;
its module must import without that house's extras, so that `nearfar --help` works everywhere.
"""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from nearfar.arguments import real, whole
from nearfar.errors import FileError

if TYPE_CHECKING:
    from nearfar.llm import LLM
    from nearfar.sampling import Sampling

Verbs: TypeAlias = "argparse._SubParsersAction[VerbParser]"

SHIPPED = "nano"


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Examples keep their lines; options and their help share one."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=110)


class VerbParser(argparse.ArgumentParser):
    """A verb that may have verbs of its own beside its arguments: its first word decides."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.inner: dict[str, argparse.ArgumentParser] = {}

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if args and args[0] in self.inner:
            return self.inner[args[0]].parse_known_args(args[1:], namespace)
        return super().parse_known_args(args, namespace)

    def _with_json(self) -> VerbParser:
        self.add_argument("--json", action="store_true", help="print JSON for programs instead of text for people")
        return self


def new_parser(verbs: Verbs, name: str, summary: str, *examples: str, detail: str = "") -> VerbParser:
    """A verb's parser with its examples under `--help`; every verb has `--json`."""
    return verbs.add_parser(name, help=summary, **_looks(summary, examples, detail))._with_json()


def new_inner_parser(outer: VerbParser, name: str, summary: str, *examples: str, detail: str = "") -> VerbParser:
    """The parser of a verb's own verb, which looks as all do."""
    inner = VerbParser(prog=f"{outer.prog} {name}", **_looks(summary, examples, detail))._with_json()
    outer.inner[name] = inner
    return inner


def _looks(summary: str, examples: tuple[str, ...], detail: str) -> dict[str, Any]:
    return {
        "description": "\n".join([f"{summary[0].upper()}{summary[1:]}.", *textwrap.wrap(detail, 105)]),
        "epilog": "examples:\n" + "\n".join(f"  {line}" for line in examples),
        "formatter_class": HelpFormatter,
    }


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", choices=("native", "numpy", "llama"), help="force the engine (default: the best)")
    parser.add_argument("--threads", type=whole(1, 256), metavar="N", help="threads of the engine")
    parser.add_argument("--lut", choices=("off", "fast"), default="off", help="ternary matrices by lookup: not exact")
    parser.add_argument(
        "--cache", metavar="WHERE", help="packed matrices stay: auto (default: beside the model), off, or a folder"
    )
    parser.add_argument(
        "--head",
        choices=("file", "q4", "screened"),
        default="file",
        help="of 4.5 bits (other logits), or screened by a smaller copy (the same tokens)",
    )
    parser.add_argument("--kv", choices=("f16", "f32", "int8"), default="f16", help="keys and values (int8: near f16)")
    parser.add_argument(
        "--window",
        type=whole(1, 1 << 24),
        metavar="N",
        help="see the first 16 and the last N positions only: text of any length in constant memory",
    )
    parser.add_argument(
        "--n-ctx", type=whole(1, 1 << 24), metavar="N", help="positions of the cache (default: the model's)"
    )


def add_depth_options(parser: argparse.ArgumentParser) -> None:
    """Which layers decide, and how."""
    parser.add_argument("--no-exits", action="store_true", help="compute every token at full depth")
    parser.add_argument(
        "--speculate",
        action="store_true",
        help="as --no-exits, with drafts by the lowest exit, checked together",
    )


def depth_of(args: argparse.Namespace) -> dict[str, bool]:
    """Those options as the arguments of `LLM.stream`."""
    return {"exits": not args.no_exits, "speculate": args.speculate}


def add_upper_options(parser: argparse.ArgumentParser) -> None:
    """Whoever runs the upper layers, and how the two share an answer."""
    group = parser.add_argument_group("an upper side, which decides where this device is not sure")
    group.add_argument(
        "--upper",
        metavar="URL",
        action="append",
        help="grpcs://host:port, or grpc:// on this machine; again for the next one to try",
    )
    group.add_argument(
        "--mode",
        choices=("lossless", "lossy", "cloud-only"),
        default="lossless",
        help="every token as the upper layers say (default), sure ones as the device says, or all made there",
    )
    group.add_argument("--rows", choices=("hidden", "ids"), help="what travels (default: hidden rows of a device half)")
    group.add_argument(
        "--codec", choices=("fp16", "int8", "int4"), default="int8", help="of hidden rows (default int8)"
    )
    group.add_argument("--tau", type=real(0, 1), metavar="T", help="sure above this (default: as calibrated)")
    group.add_argument(
        "--decay", type=real(0, 1000), metavar="D", help="stricter early in an answer, by D (CALM: 4; default: not)"
    )
    group.add_argument(
        "--audit",
        type=real(0, 1),
        default=0.01,
        metavar="SHARE",
        help="lossy: ask behind this share of the sure tokens whether they are right (default %(default)s, 0: none)",
    )
    group.add_argument(
        "--lost", choices=("wait", "finish"), default="wait", help="without a link: wait, or go on alone"
    )
    group.add_argument(
        "--backlog",
        choices=("wait", "ids"),
        default="wait",
        help="lossy, when rows are more than the link carries: they wait, or ids travel from there on",
    )
    group.add_argument(
        "--self-test",
        choices=("once", "always", "never"),
        default="once",
        help="of two halves that meet for the first time: remembered (default), in each run, or none",
    )
    group.add_argument("--ca", metavar="FILE", help="certificates that are believed, PEM (default: the public ones)")
    group.add_argument("--token-file", metavar="FILE", help="a file with the key to show")
    group.add_argument("--client-cert", metavar="FILE", help="a certificate to show, PEM")
    group.add_argument("--client-key", metavar="FILE", help="its private key, PEM")
    group.add_argument("--local-only", action="store_true", help="nothing leaves this device, whatever else is said")


def upper_of(args: argparse.Namespace, keep_s: int = 0) -> dict[str, Any]:
    """Those options as arguments of `LLM.open`; none without `--upper`.  `keep_s`: of `Collab`."""
    if not args.upper:
        return {}
    from dataclasses import replace

    from nearfar.share import how_of
    from nearfar.weights import Weights
    from nearfar.wire.egress import Policy
    from nearfar.wire.tls import Credentials

    token = "" if args.token_file is None else _first_line(args.token_file)
    with Weights.open(model_path(args.model)) as weights:
        how = replace(
            how_of(weights, args.mode, args.rows, args.codec),
            tau=args.tau,
            decay=args.decay,
            audit=args.audit,
            lost=args.lost,
            backlog=args.backlog,
            self_test=args.self_test,
            keep_s=keep_s,
        )
    return {
        "upper": args.upper,
        "collab": how,
        "policy": Policy(local_only=args.local_only),
        "credentials": Credentials.read(args.ca, token, args.client_cert, args.client_key),
    }


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{path}: {error}; expected a text file with the key") from None


def add_sampling_options(parser: argparse.ArgumentParser, max_tokens: int = 256) -> None:
    parser.add_argument(
        "--max-tokens",
        type=whole(1, 1 << 20),
        default=max_tokens,
        metavar="N",
        help="stop after N (default %(default)s)",
    )
    parser.add_argument("--temperature", type=real(0, 100), default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-k", type=whole(0, 1 << 22), default=0, metavar="K", help="the K likeliest (0: all)")
    parser.add_argument("--top-p", type=real(0, 1), default=1.0, metavar="P", help="the likeliest that sum to P")
    parser.add_argument("--min-p", type=real(0, 1), default=0.0, metavar="P", help="at least P of the likeliest")
    parser.add_argument(
        "--repetition-penalty", type=real(0.1, 10), default=1.0, metavar="R", help="over 1: repeat less"
    )
    parser.add_argument("--seed", type=whole(0, (1 << 63) - 1), default=0, metavar="N", help="of the random draws")


def sampling_of(args: argparse.Namespace) -> Sampling:
    from nearfar.sampling import Sampling

    return Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
    )


def open_model(args: argparse.Namespace, model: str, **upper: Any) -> LLM:
    """`nano` is the shipped model, anything else the path of a GGUF file.  `upper`: what `upper_of` gives."""
    from nearfar.kv_cache import FULL, Lambda
    from nearfar.llm import LLM

    return LLM.open(
        model_path(model),
        backend=args.backend,
        threads=args.threads,
        n_ctx=args.n_ctx,
        kv_dtype=args.kv,
        kv_policy=FULL if args.window is None else Lambda(window=args.window),
        lut=args.lut,
        head=args.head,
        cache=args.cache,
        **upper,
    )


def model_path(model: str) -> Path:
    """The file behind a model's name.  Raises FileError where there is none."""
    path = shipped_path() if model == SHIPPED else Path(model)
    if path.is_file():
        return path
    if model == SHIPPED:
        raise FileError(f"{path}: the shipped model is missing from this installation; reinstall nearfar")
    raise FileError(f"{model}: no such file; expected {SHIPPED!r} (the shipped model) or the path of a GGUF file")


def shipped_path() -> Path:
    return Path(__file__).parents[1] / "models" / f"{SHIPPED}.gguf"
