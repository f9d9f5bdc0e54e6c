"""An engine in a process of its own that measures when it is told to: what peers.py and busy.py drive.

One process an engine, so that the waiting threads of one never share a process with the work of another, and each is
quiet while it is not its turn.  Run as a script this file is that process: JSON lines in, JSON lines out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any


def new_parser(doc: str | None, *, threads: tuple[int, ...], rounds: int, tokens: int) -> argparse.ArgumentParser:
    """The options of a bench that lets engines take turns on random models; `doc` is its docstring."""
    from nearfar.bench.random_model import default_folder
    from nearfar.cli.roofline import numbers

    summary, examples = (doc or "").split("\n\n")[:2]
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    default = ",".join(map(str, threads))
    add("--only", action="append", metavar="SIZE:TYPE", help="a model (repeatable)")
    add("--threads", type=numbers(1, 256), default=threads, metavar="N,..", help=f"default {default}")
    add("--rounds", type=int, default=rounds, metavar="N", help="turns (default %(default)s)")
    add("--tokens", type=int, default=tokens, metavar="N", help="tokens of a turn (default %(default)s)")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="for nearfar: lut=fast, ...")
    add("--no-llama-cpp-python", action="store_true", help="without llama-cpp-python")
    add("--folder", type=Path, default=default_folder(), help="where random models are kept")
    add("--delete", action="store_true", help="delete each model after its rows")
    add("--json", action="store_true", help="a JSON line a row instead of the table")
    return parser


class EngineProcess:
    """Owns the process.  `options` go to LLM.open (backend, threads, lut, ...)."""

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        try:
            self.facts = self.ask(path=str(path), options=options)
        except BaseException:
            self.close()
            raise

    def ask(self, **question: Any) -> dict[str, Any]:
        """The answer of the process.  Raises RuntimeError with its own words if it failed or died."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": f"ended with {self.process.wait()}"}
        if "error" in answer:
            raise RuntimeError(f"{question}: {answer['error']}")
        return answer

    def prefill(self, n_prompt: int, *, cpu_time: bool = False) -> float:
        """Prompt tokens a second, of the wall clock or of CPU time (all threads of the process)."""
        return float(self.ask(prompt=n_prompt, tokens=0, cpu_time=cpu_time)["prefill"])

    def decode(self, n_prompt: int, n_tokens: int, *, cpu_time: bool = False) -> float:
        """Tokens a second, decoded greedily at full depth behind a prompt."""
        return float(self.ask(prompt=n_prompt, tokens=n_tokens, cpu_time=cpu_time)["decode"])

    def idle_cpu(self, seconds: float) -> float:
        """Share of one CPU that the process uses while nothing is asked of it, right after a token."""
        return float(self.ask(idle=seconds)["share"])

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve() -> None:
    """Answer the questions on stdin until it ends: the first opens the model."""
    from nearfar.errors import NearfarError
    from nearfar.llm import LLM
    from nearfar.sampling import Sampling

    llm = sequence = None
    for n_turns, line in enumerate(sys.stdin):
        question = json.loads(line)
        try:
            if llm is None or sequence is None:
                started = time.perf_counter()
                llm = LLM.open(question["path"], **question["options"])
                sequence = llm.stepper.new_sequence(Sampling(), use_exits=False)
                answer = {"backend": llm.backend, "open_s": time.perf_counter() - started} | _facts(llm)
            elif "idle" in question:
                answer = {"share": _idle(llm, sequence, question["idle"])}
            else:
                answer = _measure(llm, sequence, n_turns, question["prompt"], question["tokens"], question["cpu_time"])
        except NearfarError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


def _facts(llm: Any) -> dict[str, Any]:
    """What the reader of a figure wants to know of the engine."""
    if llm.backend == "native":
        panels = llm.stepper.lower.panels()
        return {
            "isa": llm.stepper.lower.isa,
            "kinds": sorted({p.kind for p in panels}),
            "bytes_a_token": sum(p.n_bytes for p in panels),
        }
    if llm.backend.startswith("llama"):
        import llama_cpp

        return {"version": llama_cpp.__version__, "cpu": llama_cpp.llama_print_system_info().decode()}
    return {}


def _measure(llm: Any, sequence: Any, seed: int, n_prompt: int, n_tokens: int, cpu_time: bool) -> dict[str, float]:
    from nearfar.bench.turn import measure

    turn = measure(llm, n_prompt, n_tokens, cpu_time=cpu_time, sequence=sequence, seed=seed)
    return {"prefill": turn.prefill, "decode": turn.decode}


def _idle(llm: Any, sequence: Any, seconds: float) -> float:
    llm.stepper.step(sequence)
    cpu = time.process_time()
    time.sleep(seconds)
    return (time.process_time() - cpu) / seconds


if __name__ == "__main__":
    serve()
