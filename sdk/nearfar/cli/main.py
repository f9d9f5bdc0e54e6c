"""`nearfar`: find the verb, run it, turn every failure into one sentence and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from io import TextIOWrapper

from nearfar import __version__, env
from nearfar.cli.verbs import HelpFormatter, VerbParser
from nearfar.errors import NearfarError

# verb -> the module whose add_verb makes its parser; only the verb that is asked for is imported
VERBS = {
    "run": "nearfar.cli.run",
    "chat": "nearfar.cli.chat",
    "ask": "nearfar.cli.ask",
    "show": "nearfar.cli.show",
    "doctor": "nearfar.cli.doctor",
    "bench": "nearfar.cli.bench",
    "cache": "nearfar.cli.cache",
    "import": "nearfar.cli.import_",
    "pack": "nearfar.cli.pack",
    "split": "nearfar.cli.split",
    "eval": "nearfar.eval.cli",
    "calibrate": "nearfar.eval.cli",
    "fit-exit": "nearfar.eval.fit_exit_cli",
    "chaos": "nearfar.chaos.cli",
    "completion": "nearfar.cli.completion",
}

EXIT_CODES = """\
exit codes:
  0  done                                   8  training or evaluation data in the wrong form
  1  something failed                       9  the engine is at work for another thread
  2  arguments that cannot be used         10  another machine sent what makes no sense
  3  a file missing, cut short or damaged  11  the upper side refuses, or is out of reach
  4  a sound file this build cannot run    12  the policy forbids to send it
  5  more tokens than the context holds   130  stopped by Ctrl-C
  6  a schema that is wrong or cannot be satisfied
  7  an optional package is not installed

NEARFAR_DEBUG=1 shows where an unexpected failure came from; `nearfar doctor` lists every variable."""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `nearfar ARGV...`; the tree in errors.py says what the codes mean."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that lacks a character shows ? and not a crash
            stream.reconfigure(errors="replace")
    try:
        show_trace = env.debug_level() > 0
        args = build_parser(argv).parse_args(argv)
        code: int = args.run(args)
        sys.stdout.flush()
    except NearfarError as error:
        return _say(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _say("stopped", 130)
    except BrokenPipeError:  # the reader (head, less) has gone: nothing is wrong, nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # the boundary: a person reads this, not a programmer
        if show_trace:
            raise
        return _say(f"unexpected {type(error).__name__}: {error}; NEARFAR_DEBUG=1 shows where", 1)
    return code


def _say(sentence: str, code: int) -> int:
    print(f"nearfar: {sentence}", file=sys.stderr)
    return code


def build_parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser for ARGV: its verb alone, or, if it names none of ours, every verb of every installed house."""
    parser = argparse.ArgumentParser(
        prog="nearfar",
        description="A language model on the device that stops early where it is sure.",
        epilog=EXIT_CODES,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nearfar {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=VerbParser)
    if argv and argv[0] in VERBS:
        import_module(VERBS[argv[0]]).add_verb(verbs)
        return parser
    for module in dict.fromkeys(VERBS.values()):
        import_module(module).add_verb(verbs)
    for point in sorted(entry_points(group="nearfar.verbs")):
        try:
            point.load()(verbs)
        except ImportError as error:  # another house's trouble must not take our verbs along
            print(f"nearfar: the verb {point.name} is left out ({error})", file=sys.stderr)
    return parser


if __name__ == "__main__":
    sys.exit(main())
