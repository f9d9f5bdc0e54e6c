"""llama.cpp as the outside engine: imported where it is installed, and only trusted with types that it survives.

Its build follows the machine it was built on.  Some builds end in SIGSEGV on quantized matrices (seen with GCC 12 on a
CPU with AMX), which would take the whole run of the tests along; so a type is first tried in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import write_tiny

_TRY = """
import sys, llama_cpp
llama = llama_cpp.Llama(sys.argv[1], n_ctx=128, n_threads=1, logits_all=True, verbose=False)
for n in (1, 40):
    llama.eval(list(range(3, 3 + n)))
"""


def llama_cpp_that_runs(*weight_types: str) -> Any:
    """The module; skips where it is not installed, or where its build dies on a matrix of one of these types."""
    module = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra [llama])")
    for weight_type in weight_types:
        if code := _exit_code(weight_type):
            pytest.skip(
                f"this build of llama.cpp ends with exit code {code} on {weight_type}; build it without "
                "GGML_NATIVE (CONTRIBUTING.md)"
            )
    return module


@cache
def _exit_code(weight_type: str) -> int:
    """Of a process that runs 1 and 40 rows of a small model with such matrices."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny(Path(folder) / "m.gguf", "llama", weight_type, embedding_type="F32")
        return subprocess.run([sys.executable, "-c", _TRY, str(path)], capture_output=True, timeout=120).returncode
