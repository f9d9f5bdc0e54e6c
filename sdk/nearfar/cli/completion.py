"""`nearfar completion`: a script for bash, zsh or fish, made from the parser itself so that it cannot lag behind."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass

from nearfar.cli.verbs import Verbs, new_parser


def add_verb(verbs: Verbs) -> None:
    parser = new_parser(
        verbs,
        "completion",
        "print the shell's completion script",
        'eval "$(nearfar completion bash)"        # in ~/.bashrc',
        'eval "$(nearfar completion zsh)"         # in ~/.zshrc, after compinit',
        "nearfar completion fish > ~/.config/fish/completions/nearfar.fish",
    )
    parser.add_argument("shell", choices=tuple(_SCRIPTS))
    parser.set_defaults(run=run)


@dataclass(frozen=True)
class Option:
    name: str  # --json
    takes_value: bool
    values: tuple[str, ...]  # allowed values, if they are few
    help: str


@dataclass(frozen=True)
class Verb:
    name: str
    help: str
    options: tuple[Option, ...]
    values: tuple[str, ...]  # allowed values of its positional arguments


def run(args: argparse.Namespace) -> int:
    from nearfar.cli.main import build_parser

    script = _SCRIPTS[args.shell](read_verbs(build_parser()))
    print(json.dumps({"shell": args.shell, "script": script}) if args.json else script)
    return 0


def read_verbs(parser: argparse.ArgumentParser) -> list[Verb]:
    """The verbs of a parser with their options."""
    found = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    help_of = {choice.dest: choice.help or "" for choice in found._choices_actions}
    return [_verb(name, help_of.get(name, ""), sub) for name, sub in found.choices.items()]


def _verb(name: str, summary: str, parser: argparse.ArgumentParser) -> Verb:
    options = [
        Option(option, a.nargs != 0, tuple(map(str, a.choices or ())), (a.help or "") % vars(a) if a.help else "")
        for a in parser._actions
        for option in a.option_strings
        if option.startswith("--")
    ]
    values = [str(v) for a in parser._actions if not a.option_strings for v in a.choices or ()]
    return Verb(name, summary, tuple(options), tuple(values))


def bash(verbs: Iterable[Verb]) -> str:
    """Verbs first, then the verb's options, an option's values, or files."""
    verbs = list(verbs)
    valued = "".join(
        f'    {verb.name}:{option.name}) COMPREPLY=($(compgen -W {_word(option.values)} -- "$word")); return ;;\n'
        for verb in verbs
        for option in verb.options
        if option.values
    )
    plain = "".join(
        f"    {verb.name}) words={_word([*(o.name for o in verb.options), *verb.values])} ;;\n" for verb in verbs
    )
    return f"""\
_nearfar() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" verb="${{COMP_WORDS[1]}}" words=
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W {_word([*(v.name for v in verbs), "--help", "--version"])} -- "$word")); return
  fi
  case "$verb:$before" in
{valued}    *) ;;
  esac
  case "$verb" in
{plain}    *) ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word") $(compgen -f -- "$word"))
}}
complete -o filenames -F _nearfar nearfar"""


def zsh(verbs: Iterable[Verb]) -> str:
    """zsh reads bash's script through its own bridge."""
    return "autoload -U +X bashcompinit && bashcompinit\n" + bash(verbs)


def fish(verbs: Iterable[Verb]) -> str:
    verbs = list(verbs)
    lines = [f"complete -c nearfar -n __fish_use_subcommand -f -a {v.name} -d {_quoted(v.help)}" for v in verbs]
    for verb in verbs:
        seen = f'complete -c nearfar -n "__fish_seen_subcommand_from {verb.name}"'
        lines += [f"{seen} -f -a {_word(verb.values)}"] if verb.values else []
        for option in verb.options:
            value = f" -x -a {_word(option.values)}" if option.values else " -r" if option.takes_value else ""
            lines.append(f"{seen} -l {option.name.removeprefix('--')}{value} -d {_quoted(option.help)}")
    return "\n".join(lines)


def _word(words: Iterable[str]) -> str:
    return shlex.quote(" ".join(words))


def _quoted(text: str) -> str:
    """A single-quoted word of fish, where only backslash and quote are special."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SCRIPTS = {"bash": bash, "zsh": zsh, "fish": fish}
