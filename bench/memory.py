"""Peak memory of one request to the shipped model, beside what it is made of."""

from __future__ import annotations

import subprocess
import sys

from line import plain_env, show

PEAK = "\nimport resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
NUMPY = "import numpy"
REQUEST = """
import nearfar
from nearfar.forms import home_prompt
from nearfar.home import demo_home
llm = nearfar.load("nano")
llm.generate(home_prompt(demo_home().setting(), "turn off the kitchen lights in ten minutes"), max_tokens=64)
weights = sum(panel.n_bytes for panel in llm.stepper.lower.panels()) if llm.backend == "native" else 0
print((weights + llm._warm.kv.n_bytes) / 2**20)
"""


def mib(code: str) -> list[float]:
    """The numbers that a fresh interpreter prints, the last one its peak resident size."""
    command = [sys.executable, "-c", code + PEAK]
    done = subprocess.run(command, check=True, env=plain_env(), capture_output=True, text=True)
    return [float(word) for word in done.stdout.split()]


def main() -> None:
    (bare,) = mib("pass")
    (numpy,) = mib(NUMPY)
    own, peak = mib(REQUEST)
    show(
        "peak memory of a request to nano",
        f"{peak:.1f} MiB: interpreter {bare:.1f}, numpy {numpy - bare:.1f}, weights and cache {own:.1f}, "
        f"the rest {peak - numpy - own:.1f}",
        f"weights + cache + 40 MiB = {own + 40:.1f} MiB",
    )


if __name__ == "__main__":
    main()
