"""A device as a process of its own, so that it can be killed: answers for whoever reads its output.

    stdin    {"file": .., "upper": [..], "codec": "int8", "mode": "lossless", "tau": null, "token": ""}     once
             {"prompt": [..], "max_tokens": 96, "temperature": 0.0, "seed": 0, "journal": FILE}             an answer
    stdout   {"ready": pid}, then for each answer
             {"begin": tokens that the journal had}        again where the upper side could not be reached at first
             {"index": 0, "id": 17, "source": "upper", "kept": records in the journal when this was told}
             {"end": counts of the answer, "journal": [..] ids that it held in the end}  or {"failed": "Diverged: .."}
             or {"refused": why, "kept": ..}: the upper side has other weights; the same task again goes on where it was

It ends with its input.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from nearfar.errors import Diverged, FileError, MismatchError, NearfarError, UpperError
from nearfar.journal import MAX_BYTES, RECORD_BYTES, Journal, pack_head, parse
from nearfar.llm import LLM
from nearfar.sampling import Sampling
from nearfar.share import how_of
from nearfar.weights import Weights
from nearfar.wire.tls import Credentials

PATIENCE_S = 120.0  # for an upper side that is out of reach: longer than any fault lasts
AGAIN_S = 0.1


def main() -> int:
    settings = json.loads(sys.stdin.readline())
    with opened(settings) as llm:
        say({"ready": os.getpid()})
        for line in sys.stdin:
            try:
                task = json.loads(line)
                answer(llm, task)
            except MismatchError as error:
                say({"refused": str(error), "kept": n_kept(Path(task["journal"]))})
            except NearfarError as error:
                say({"failed": f"{type(error).__name__}: {error}"})
    return 0


@contextmanager
def opened(settings: dict[str, Any]) -> Iterator[LLM]:
    """The model, with its upper side."""
    file, codec = Path(settings["file"]), settings["codec"]
    with Weights.open(file) as weights:
        rows, packed = ("ids", "int8") if codec == "ids" else ("hidden", codec)
        how = how_of(weights, settings["mode"], rows, packed)
    how = replace(how, tau=settings["tau"], patience_s=PATIENCE_S)
    credentials = Credentials(token=settings["token"])
    with LLM.open(file, threads=1, upper=settings["upper"], collab=how, credentials=credentials) as llm:
        yield llm


def answer(llm: LLM, task: dict[str, Any]) -> None:
    """One answer.  Where nobody can be reached at first, the same call again: the journal knows what was told."""
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            tell(llm, task)
        except (MismatchError, Diverged):
            raise
        except UpperError:
            if time.monotonic() > until:
                raise
            time.sleep(AGAIN_S)
        else:
            return


def tell(llm: LLM, task: dict[str, Any]) -> None:
    """Tokens as they come."""
    path, prompt = Path(task["journal"]), task["prompt"]
    sampling = Sampling(temperature=task["temperature"], seed=task["seed"])
    say({"begin": n_kept(path)})
    stream = llm.stream(prompt, max_tokens=task["max_tokens"], sampling=sampling, journal=path)
    kept = Kept(path)
    try:
        for event in stream:
            say({"index": event.index, "id": event.id, "source": event.source, "kept": kept.n()})
        shared = stream.completion.stats.shared
        assert shared is not None  # there is an upper side
        say({"end": asdict(shared), "journal": kept.ids()})
    finally:
        kept.close()


def n_kept(path: Path) -> int:
    """Tokens in a journal that an earlier process left."""
    with suppress(FileError):
        return len(Journal.read(path).ids)
    return 0


class Kept:
    """What is in the journal, also after the answer has ended and taken the file's name away."""

    def __init__(self, path: Path) -> None:
        self.path, self._fd, self._head = path, -1, 0

    def n(self) -> int | None:
        """Records; None for an answer that was over before anybody could look."""
        if self._fd < 0:
            try:
                self._fd = os.open(self.path, os.O_RDONLY)
            except FileNotFoundError:
                return None
            self._head = len(pack_head(parse(self._read()).head))
        return (os.fstat(self._fd).st_size - self._head) // RECORD_BYTES

    def ids(self) -> list[int] | None:
        return None if self._fd < 0 else parse(self._read()).ids

    def _read(self) -> bytes:
        return os.pread(self._fd, MAX_BYTES, 0)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


def say(facts: dict[str, Any]) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    sys.exit(main())
