"""`make run` and `make test` in a fresh clone without an environment, timed (pip downloads again unless asked)."""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from line import show

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=["run", "test"])
    parser.add_argument("--pip-cache", action="store_true", help="let pip use what it has downloaded and built before")
    args = parser.parse_args()
    env = dict(os.environ) if args.pip_cache else {**os.environ, "PIP_NO_CACHE_DIR": "1"}
    for target in args.targets:
        with tempfile.TemporaryDirectory() as folder:
            clone = Path(folder) / "nearfar"
            subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(clone)], check=True)
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            began = time.perf_counter()
            command = ["make", target, f"PYTHON={sys._base_executable}"]  # type: ignore[attr-defined]
            done = subprocess.run(command, cwd=clone, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            wall = time.perf_counter() - began
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if done.returncode:
                sys.exit(f"make {target} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            show(f"`make {target}` from nothing", f"{wall:.0f} s wall, {cpu:.0f} CPU s")


if __name__ == "__main__":
    main()
