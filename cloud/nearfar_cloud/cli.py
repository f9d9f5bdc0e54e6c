"""`nearfar cloud`: found by the sdk's command line through the entry-point group `nearfar.verbs`.

Each part of the house adds its own verbs; none imports an extra before it runs.
"""

from __future__ import annotations

import argparse
from typing import Any

from nearfar_cloud.gateway import certs_cli as certs
from nearfar_cloud.gateway import cli as gateway
from nearfar_cloud.planning import cli as planning


def add_verb(verbs: Any) -> None:
    """Add `cloud` to the subparsers of `nearfar`."""
    parser = verbs.add_parser(
        "cloud",
        help="serve a model to many; plan that: simulate, replay, profile, roofline",
        description="Serve many requests with one engine, and plan it.",
        epilog="examples:\n"
        "  nearfar cloud serve nano\n"
        "  nearfar cloud certs lan --host cloud.lan --client phone\n"
        "  nearfar cloud simulate --requests 100 --cv 4 --load 0.6\n"
        "  nearfar cloud roofline llama-8b --batch 16 --hardware h100-sxm\n"
        "  nearfar cloud simulate --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub = parser.add_subparsers(dest="cloud_verb", metavar="VERB", required=True)
    gateway.add_serve(sub)
    certs.add_certs(sub)
    planning.add_simulate(sub)
    planning.add_replay(sub)
    planning.add_profile(sub)
    planning.add_roofline(sub)
