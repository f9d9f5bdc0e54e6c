"""The self-test of a split model, by itself, where two builds meet for the first time; what passed is remembered.

    Opened ─> a pair that is known? ── yes ─> go on
                                    └─ no ──> the prompts of nearfar.golden go the real way ─> known from now on

A pair is this build with this device half and codec, and one process of the upper side, which says a random number
(`epoch`) when an answer begins: another build of it is another process.  The file holds digests and nothing else:

    USER CACHE/self-tests     one pair a line, 32 hexadecimal digits, the newest last
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from nearfar import env
from nearfar.cancel import Cancel
from nearfar.errors import MismatchError, UpperError

MOST_PAIRS = 64
_LINE = re.compile(r"[0-9a-f]{32}")


@dataclass(slots=True)
class SelfTest:
    """Call it with the epoch of whoever has opened.

    `half`: gives what stands for the device's side of the pair; `test` goes the real way and raises MismatchError where
    another token comes.  `is_forgetful`: nothing is read or written, each LLM tests anew.
    """

    half: Callable[[], bytes]
    test: Callable[[Cancel | None], None]
    is_forgetful: bool = False
    path: Path = field(default_factory=lambda: env.user_cache_dir() / "self-tests")
    met: set[int] = field(default_factory=set)  # by this LLM

    def __call__(self, epoch: int, cancel: Cancel | None = None) -> None:
        """Raises MismatchError, Cancelled, and what forbids to send.  0: this process, thus this build."""
        if not epoch or epoch in self.met:
            return
        pair = blake2b(b"%d %s" % (epoch, self.half()), digest_size=16).hexdigest()
        if not self.is_forgetful and pair in read(self.path):
            self.met.add(epoch)
            return
        try:
            self.test(cancel)
        except MismatchError:
            raise
        except UpperError:  # it could not be carried out: the answer itself will say why, or the next one tests
            return
        self.met.add(epoch)
        if not self.is_forgetful:
            remember(self.path, pair)


def build_of(engine: str) -> bytes:
    """What tells this build from others: version, `engine`, kernels that are forced, the compiled file."""
    from nearfar import __version__

    facts: list[object] = [__version__, engine, env.isa(), sys.platform]
    core = sys.modules.get("nearfar_native._core")
    if engine == "native" and core is not None and core.__file__:
        found = os.stat(core.__file__)
        facts += [found.st_size, found.st_mtime_ns]
    return repr(facts).encode()


def read(path: Path) -> list[str]:
    """The pairs of a file; lines that are none, and a file that cannot be read, count for nothing."""
    try:
        with open(path, encoding="ascii", errors="replace") as f:
            text = f.read(MOST_PAIRS * 33)
    except OSError:
        return []
    return [line for line in text.split("\n") if _LINE.fullmatch(line)]


def remember(path: Path, pair: str) -> None:
    """As far as the folder can be written: what is not remembered is tested again."""
    lines = [*(line for line in read(path) if line != pair), pair][-MOST_PAIRS:]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")
        os.replace(temporary, path)
