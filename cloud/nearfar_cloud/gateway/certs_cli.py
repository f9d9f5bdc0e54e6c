"""`nearfar cloud certs`.  cryptography is imported when the verb runs, never before."""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nearfar.arguments import whole
from nearfar.errors import MissingExtraError

DAYS = 365


def add_certs(verbs: Any) -> None:
    """Add `certs` to the subparsers of `nearfar cloud`."""
    parser = verbs.add_parser(
        "certs",
        help="certificates for a server and devices of a network of your own",
        description="Make an authority, a certificate for a server and one for each device, in a folder that is yours\n"
        "alone. What is there stays: call it again to add devices. ca-key.pem signs: keep it off the server.",
        epilog="examples:\n"
        "  nearfar cloud certs lan --host cloud.lan --host 192.168.1.10 --client phone --client tablet\n"
        "  nearfar cloud serve model.gguf --collab-port 9090 --collab-host 0.0.0.0 \\\n"
        "      --tls-cert lan/server.pem --tls-key lan/server-key.pem --client-ca lan/ca.pem",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", help="where the files go; made if it is missing")
    parser.add_argument(
        "--host", action="append", metavar="NAME", help="a name or address of the server (default: this machine's)"
    )
    parser.add_argument("--client", action="append", default=[], metavar="NAME", help="a device (repeat for more)")
    parser.add_argument(
        "--days", type=whole(1, 36_500), default=DAYS, metavar="N", help="how long they hold (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print a line of JSON for each certificate")
    parser.set_defaults(run=run_certs)


def run_certs(args: argparse.Namespace) -> int:
    """Make what is missing and say what there is."""
    if find_spec("cryptography") is None:
        raise MissingExtraError("cryptography", "cloud", "nearfar cloud certs")
    from nearfar_cloud.gateway.certificates import here, make_folder

    for told in make_folder(Path(args.folder), args.host or here(), args.client, args.days):
        facts = {"file": str(told.path), "for": told.what, "until": told.until.isoformat(), "new": told.is_new}
        kept = "" if told.is_new else ", kept as it was"
        print(json.dumps(facts) if args.json else f"{told.path}  {told.what}, until {told.until:%Y-%m-%d}{kept}")
    return 0
