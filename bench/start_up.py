"""How long `import nearfar` takes, and how long from a started interpreter to the first token of nano."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from line import show, spread

BARE = "pass"
IMPORT = "import nearfar"
FIRST_TOKEN = """
import time; began = time.perf_counter()
import nearfar
from nearfar.forms import home_prompt
from nearfar.home import demo_home
with nearfar.load("nano") as llm:
    request = "turn off the kitchen lights in ten minutes"
    next(llm.stream(home_prompt(demo_home().setting(), request)))
    print(1000 * (time.perf_counter() - began))
"""


def wall_ms(code: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return 1000 * (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    runs = parser.parse_args().runs
    for code in (IMPORT, FIRST_TOKEN):
        wall_ms(code)  # the files are in the page cache afterwards
    extra = [wall_ms(IMPORT) - wall_ms(BARE) for _ in range(runs)]
    show("`import nearfar`, on top of a bare interpreter", spread(extra, "ms"), "under 150 ms, no torch")
    firsts = [
        float(subprocess.run([sys.executable, "-c", FIRST_TOKEN], check=True, capture_output=True, text=True).stdout)
        for _ in range(runs)
    ]
    show("interpreter started to first token (nano, import and load included)", spread(firsts, "ms"), "under 300 ms")


if __name__ == "__main__":
    main()
