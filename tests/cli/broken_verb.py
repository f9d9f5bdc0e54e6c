"""A verb that fails in a way nobody foresaw."""

from __future__ import annotations

import argparse

from nearfar.cli.verbs import Verbs


def add_verb(verbs: Verbs) -> None:
    verbs.add_parser("broken").set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    raise RuntimeError("out of biscuits")
