"""`nearfar cache`: the packed matrices that models have left for the next time: a list, and a way to be rid of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from nearfar import env
from nearfar.cli.verbs import Verbs, new_parser
from nearfar.errors import FileError
from nearfar.panel_store import AUTO, OFF, Stored, stored


def add_verb(verbs: Verbs) -> None:
    parser = new_parser(
        verbs,
        "cache",
        "list or remove the packed matrices of models",
        "nearfar cache",
        "nearfar cache model.gguf --remove",
        "nearfar cache ~/models --json",
        detail="Large models are packed once for the kernels of this machine and mapped the next time. What is removed "
        "is packed again when its model is opened.",
    )
    parser.add_argument(
        "place",
        nargs="*",
        type=Path,
        help="models, or folders (default: the current folder, the user's cache folder, NEARFAR_CACHE)",
    )
    parser.add_argument("--remove", action="store_true", help="remove what is listed")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for place in args.place:
        if not place.exists():
            raise FileError(f"{place}: no such file or folder")
    found = stored(args.place or default_places())
    if args.remove:
        for one in found:
            with suppress(FileNotFoundError):  # another process was faster
                one.path.unlink()
    facts = {"files": [facts_of(one) for one in found], "bytes": sum(one.n_bytes for one in found)}
    facts["removed"] = args.remove
    print(json.dumps(facts) if args.json else report(found, args.remove))
    return 0


def default_places() -> list[Path]:
    wanted = env.cache()
    named = [] if wanted in (None, AUTO, OFF) else [Path(wanted or "")]
    return [p for p in (Path.cwd(), env.user_cache_dir() / "panels", *named) if p.is_dir()]


def facts_of(one: Stored) -> dict[str, Any]:
    facts: dict[str, Any] = {"path": str(one.path), "bytes": one.n_bytes, "sound": one.key is not None}
    if one.key is not None:
        facts |= {"layout": one.key.layout, "layers": [one.key.first, one.key.last]}
    return facts


def report(found: Iterable[Stored], removed: bool) -> str:
    lines = []
    for one in found:
        what = "unfinished, damaged or of another version"
        if one.key is not None:
            what = f"layers [{one.key.first}, {one.key.last}), layout {one.key.layout}"
        lines.append(f"{'removed ' * removed}{one.path}  {one.n_bytes / 1e6:.1f} MB, {what}")
    return "\n".join(lines) or "no packed matrices here: name a model or a folder to look elsewhere"
