"""How long `import nearfar` takes, and how long from a started interpreter to the first token of nano."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from resource import RUSAGE_CHILDREN, getrusage

from line import plain_env, show, spread

BARE = "pass"
IMPORT = "import nearfar"
FIRST_TOKEN = """
import time; began, worked = time.perf_counter(), time.process_time()
import nearfar
from nearfar.forms import home_prompt
from nearfar.home import demo_home
with nearfar.load("nano") as llm:
    next(llm.stream(home_prompt(demo_home().setting(), "turn off the kitchen lights in ten minutes")))
    print(1000 * (time.perf_counter() - began), 1000 * (time.process_time() - worked))
"""


def ms(code: str) -> tuple[float, float]:
    """Wall and CPU milliseconds of a fresh interpreter that runs `code`."""
    began, before = time.perf_counter(), getrusage(RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, env=plain_env(), stdout=subprocess.DEVNULL)
    after = getrusage(RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return 1000 * (time.perf_counter() - began), 1000 * cpu


def first_token_ms() -> tuple[float, float]:
    """Wall and CPU milliseconds as the process itself counts them, from its first line."""
    command = [sys.executable, "-c", FIRST_TOKEN]
    done = subprocess.run(command, check=True, env=plain_env(), capture_output=True, text=True)
    wall, cpu = map(float, done.stdout.split())
    return wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    for code in (IMPORT, FIRST_TOKEN):
        ms(code)  # the files are in the page cache afterwards
    bare, imported = [ms(BARE) for _ in range(runs)], [ms(IMPORT) for _ in range(runs)]
    firsts = [first_token_ms() for _ in range(runs)]
    for i, clock in enumerate(("wall", "CPU")):
        extra = [a[i] - b[i] for a, b in zip(imported, bare, strict=True)]
        show(f"`import nearfar` on top of a bare interpreter, {clock}", spread(extra, "ms"), "under 150 ms")
        show(
            f"started interpreter to first token of nano, {clock}", spread([f[i] for f in firsts], "ms"), "under 300 ms"
        )


if __name__ == "__main__":
    main()
