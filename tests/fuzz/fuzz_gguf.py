"""Fuzzes what a GGUF file goes through before a model runs: header, tensors, weights, tokenizer, fingerprint.

    python tests/fuzz/fuzz_gguf.py --seconds 600 [--seed N] [--engine atheris|plain] [--findings DIR]

`atheris` (pip install atheris; chosen if it is there) steers by coverage of nearfar's own code; `plain` needs nothing
and takes every new place of a refusal as progress.  Both mutate the same way: fields that read as a small number get a
boundary value, spans are cut, doubled and exchanged between files, and now and then bytes turn at random.

A finding is any exception but nearfar's own, more than 2 s of processor time, or 200 MB more memory.  Its input is kept
in DIR, and the exit code is 1 (with atheris: libFuzzer's).
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import importlib.util
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, FunctionType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

MAX_SECONDS = 2.0  # of processor time
MAX_WAIT = 60  # seconds by the clock, with atheris: for what waits without computing; a busy machine stays below it
MAX_GROWTH_MB = 200
MAX_INPUT = 1 << 18
MAX_CORPUS = 400

Check = Callable[[Path], str]


def modules() -> tuple[Any, ...]:
    """The code under test, imported late: the command line needs none of it."""
    names = ("errors", "gguf_reader", "weights", "tokenizer", "wire.fingerprint", "wire.golden")
    return tuple(importlib.import_module(f"nearfar.{name}") for name in names)


def make_check() -> Check:
    """A function that puts a file through everything and tells how far it came: "place | message"."""
    errors, gguf_reader, weights, tokenizer, fingerprint, golden = modules()

    def check(path: Path) -> str:
        outcome = "file"
        try:
            with gguf_reader.GGUFFile.open(path) as file:
                for name in file.tensors:
                    with suppress(errors.UnsupportedError):
                        file.raw(name).sum()
                metadata = file.metadata
                for key in metadata:
                    file.encoded(key)
            outcome = "tensors"
            with suppress(errors.TokenizerError, errors.UnsupportedError):
                t = tokenizer.tokenizer_from_metadata(metadata)
                t.decode(t.encode("Hello wörld 🙂 <|e|>", add_bos=False, parse_special=True))
                outcome = "text"
            with weights.Weights.open(path) as w:
                for head in w.heads:
                    w.norm_gain(head)
                for name, info in w.file.tensors.items():
                    if info.type in gguf_reader.READABLE:
                        w.f32(name)
                fingerprint.model_fp(fingerprint.parts(w))
                golden.golden_prompts(w.file.metadata, w.config.n_vocab)
            return f"{outcome} | sound"
        except errors.NearfarError as e:
            lines = [f"{Path(f.filename).stem}:{f.lineno}" for f in traceback.extract_tb(e.__traceback__)[1:]]
            return f"{outcome} {' '.join(lines)} | {e}"

    return check


# ---- inputs


def seeds() -> list[bytes]:
    """Sound files of every shape that the readers know, as small as the blocks of their types allow."""
    from tests.gguf_bytes import ARRAY, STRING, U32, array, gguf, kv, string, tensor, u32
    from tests.tiny import write_tiny

    small = {"n_layers": 1, "d_model": 32, "d_ff": 32, "n_vocab": 272, "n_ctx": 16}
    big = {"n_layers": 1, "d_ff": 256, "n_heads": 2, "n_kv_heads": 1, "n_vocab": 272, "embedding_type": "TQ2_0"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "seed.gguf"
        models = [
            write_tiny(path, "llama", "F32", **small).read_bytes(),
            write_tiny(path, "qwen2", "Q8_0", tied=False, **small).read_bytes(),
            write_tiny(path, "qwen3", "F16", **small, head_dim=8).read_bytes(),
            write_tiny(path, "bitnet", "F32", **small | {"n_layers": 2}, exits=(1,)).read_bytes(),
            write_tiny(path, "bitnet-b1.58", "TQ1_0", **big).read_bytes(),
            write_tiny(path, "llama", "Q4_1", **small).read_bytes(),
            write_tiny(path, "llama", "Q2_K", **big | {"embedding_type": "Q5_K"}).read_bytes(),
            write_tiny(path, "qwen2", "Q3_K", **big | {"embedding_type": "Q4_K"}).read_bytes(),
            *halves(write_tiny(path, "llama", "F32", **small | {"n_layers": 2}, exits=(1,))),
        ]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "\u2581a", "h", "e", "he"]
    pieces = [
        kv("general.architecture", STRING, string("llama")),
        kv("general.alignment", U32, u32(64)),
        kv("tokenizer.ggml.model", STRING, string("llama")),
        kv("tokenizer.ggml.tokens", ARRAY, array(STRING, len(words), b"".join(map(string, words)))),
        kv("tokenizer.ggml.scores", ARRAY, array(6, len(words), bytes(4 * len(words)))),
        kv("tokenizer.ggml.token_type", ARRAY, array(5, len(words), u32(1) * len(words))),
    ]
    kinds = [kv(f"k{kind}", kind, bytes(size)) for kind, size in enumerate((1, 1, 2, 2, 4, 4, 4, 1)) if size]
    kinds += [
        kv(f"a{kind}", ARRAY, array(kind, 2, bytes(2 * size))) for kind, size in ((0, 1), (7, 1), (10, 8), (12, 8))
    ]
    entries = [tensor("one", (4, 2)), tensor("two", (256,), 34, 32), tensor("odd", (8,), 36, 96)]
    return [
        *models,
        gguf(pieces),
        gguf(kinds, entries, bytes(256)),
        gguf(),
        gguf(kinds, entries, bytes(256), version=2),
    ]


def halves(path: Path) -> tuple[bytes, bytes]:
    """The device half and the upper half of a model with an exit after its first layer."""
    from nearfar.halves import split
    from nearfar.weights import Weights
    from nearfar.wire.golden import Golden, as_json

    with Weights.open(path) as whole:
        two = split(whole, 1, path.parent, outliers=(3, 9), golden=as_json([Golden((1, 2), 3)]))
    return two.device.read_bytes(), two.upper.read_bytes()


INTERESTING = [
    0,
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    10,
    13,
    31,
    32,
    33,
    36,
    63,
    64,
    65,
    127,
    128,
    255,
    256,
    257,
    511,
    65535,
    65536,
]
INTERESTING += [(1 << n) + d for n in (20, 24, 31, 32, 62, 63, 64) for d in (-1, 0, 1)]


def mutate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One to four changes to a file; `other` lends spans."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        if not out:
            break
        rng.choice(_CHANGES)(out, other, rng)
    return bytes(out[:MAX_INPUT])


def _place(data: bytes | bytearray, rng: random.Random) -> int:
    """A byte, mostly of the header's start."""
    return rng.randrange(min(len(data), rng.choice((32, 256, 1024, 4096, 8192, len(data)))))


def _field(data: bytearray, size: int, rng: random.Random) -> int:
    """A byte where a number begins that could be a type, a length, a count or an offset."""
    for _ in range(20):
        at = _place(data, rng)
        if at + size <= len(data) and 0 < int.from_bytes(data[at : at + size], "little") <= len(data):
            return at
    return _place(data, rng)


def _span(data: bytes | bytearray, rng: random.Random) -> tuple[int, int]:
    at = _place(data, rng)
    return at, at + rng.choice((1, 4, 8, 16, 64, 256, 1024))


def _set_number(out: bytearray, other: bytes, rng: random.Random) -> None:
    size = rng.choice((4, 8))
    at = _field(out, size, rng)
    old = int.from_bytes(out[at : at + size], "little")
    new = rng.choice((rng.choice(INTERESTING), old + 1, old - 1, old * 2, len(out), len(out) - at, -old))
    out[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")


def _turn_byte(out: bytearray, other: bytes, rng: random.Random) -> None:
    out[_place(out, rng)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _cut_end(out: bytearray, other: bytes, rng: random.Random) -> None:
    del out[_place(out, rng) :]


def _cut_span(out: bytearray, other: bytes, rng: random.Random) -> None:
    a, b = _span(out, rng)
    del out[a:b]


def _double_span(out: bytearray, other: bytes, rng: random.Random) -> None:
    a, b = _span(out, rng)
    out[b:b] = out[a:b] * rng.choice((1, 1, 2, 50))


def _overwrite_from_other(out: bytearray, other: bytes, rng: random.Random) -> None:
    if other:
        a, b = _span(other, rng)
        at = _place(out, rng)
        out[at : at + b - a] = other[a:b]


def _insert_from_other(out: bytearray, other: bytes, rng: random.Random) -> None:
    if other:
        a, b = _span(other, rng)
        at = _place(out, rng)
        out[at:at] = other[a:b]


_CHANGES = [_set_number, _set_number, _set_number, _turn_byte, _turn_byte, _cut_end, _cut_span, _double_span]
_CHANGES += [_overwrite_from_other, _insert_from_other]


# ---- limits


class TooSlow(BaseException):
    """Not an Exception, so that no handler of the code under test swallows it."""


@contextmanager
def processor_time_limit(seconds: float) -> Iterator[None]:
    """Processor time, not wall time: another program on the machine is no finding."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise TooSlow(f"more than {seconds} s of processor time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def peak_mb() -> float:
    """The most memory that this process has held so far."""
    with suppress(OSError, IndexError):  # Linux; its ru_maxrss starts at the size of whoever started the process
        return int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0]) / (1 << 10)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)  # macOS counts bytes


# ---- the plain engine


@dataclass
class Report:
    runs: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)  # place -> how often
    messages: dict[str, str] = field(default_factory=dict)  # place -> the first sentence said there
    findings: dict[str, Path] = field(default_factory=dict)  # what happened -> the input that made it happen


def fuzz_plain(
    check: Check,
    corpus: list[bytes],
    findings: Path,
    *,
    seconds: float = 1e9,
    max_runs: int = 1 << 62,
    seed: int = 0,
    max_growth_mb: float = MAX_GROWTH_MB,
    max_seconds: float = MAX_SECONDS,
) -> Report:
    """Mutate and check until the time or the runs are used up."""
    rng, report = random.Random(seed), Report()
    until = time.monotonic() + seconds
    peak = None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        first = list(corpus)  # as they are: they also set the memory that a sound file needs
        while report.runs < max_runs and time.monotonic() < until:
            warming = report.runs < len(first)
            data = first[report.runs] if warming else mutate(rng.choice(corpus), rng.choice(corpus), rng)
            report.runs += 1
            if not warming and peak is None:
                peak = peak_mb()
            path.write_bytes(data)
            problem = None
            try:
                with processor_time_limit(max_seconds):
                    outcome, _, message = check(path).partition(" | ")
            except (Exception, TooSlow) as e:
                frame = traceback.extract_tb(e.__traceback__)[-1]
                outcome = problem = f"{type(e).__name__} in {Path(frame.filename).name}:{frame.lineno}"
                message = traceback.format_exc()
            if peak is not None and peak_mb() > peak + max_growth_mb:
                problem = f"memory grew by {max_growth_mb:.0f} MB after {outcome}"
                peak = peak_mb()
            if problem and problem not in report.findings:
                print(f"FINDING {problem}\n{message}", file=sys.stderr)
                report.findings[problem] = _keep(findings, data)
            if outcome not in report.outcomes and len(corpus) < MAX_CORPUS:
                corpus.append(data)
            report.messages.setdefault(outcome, message)
            report.outcomes[outcome] = report.outcomes.get(outcome, 0) + 1
    return report


def _keep(folder: Path, data: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"finding-{hashlib.sha256(data).hexdigest()[:12]}.gguf"
    path.write_bytes(data)
    return path


# ---- atheris


def fuzz_atheris(check: Check, seconds: int, seed: int, findings: Path) -> None:
    """Coverage-guided, until the time is up or something is found; does not return."""
    import atheris

    for f in gc.get_objects():  # instrument_imports does not see through the loader of an editable install
        if isinstance(f, FunctionType) and str(f.__module__).startswith("nearfar."):
            atheris.instrument_func(f)
    folder = findings / "work"  # libFuzzer leaves without clean-up: what it learned stays for the next run
    (folder / "corpus").mkdir(parents=True, exist_ok=True)
    starts = seeds()
    for i, data in enumerate(starts):
        (folder / "corpus" / f"seed{i}").write_bytes(data)
    path = folder / "x.gguf"

    def one_input(data: bytes) -> None:
        path.write_bytes(data)
        try:
            with processor_time_limit(MAX_SECONDS):
                check(path)
        except TooSlow as e:
            raise RuntimeError(str(e)) from e  # libFuzzer keeps the input of an ordinary exception

    def custom_mutator(data: bytes, max_size: int, number: int) -> bytes:
        rng = random.Random(number)
        out = mutate(bytes(data), rng.choice(starts), rng) if rng.random() < 0.7 else atheris.Mutate(data, max_size)
        return bytes(out[:max_size])

    options = [f"-max_total_time={seconds}", f"-seed={seed or 1}", f"-timeout={MAX_WAIT}"]
    options += [f"-rss_limit_mb={peak_mb() + MAX_GROWTH_MB:.0f}", f"-max_len={MAX_INPUT}", "-print_final_stats=1"]
    options += [f"-artifact_prefix={findings}/", str(folder / "corpus")]
    atheris.Setup([sys.argv[0], *options], one_input, custom_mutator=custom_mutator)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=("atheris", "plain"), help="default: atheris if it is installed")
    parser.add_argument("--findings", type=Path, default=ROOT / "build" / "fuzz-findings")
    args = parser.parse_args()
    if args.engine is None:
        args.engine = "atheris" if importlib.util.find_spec("atheris") else "plain"
    print(f"engine {args.engine}, {args.seconds} s, seed {args.seed}, findings in {args.findings}")
    if args.engine == "atheris":
        fuzz_atheris(make_check(), args.seconds, args.seed, args.findings)
    report = fuzz_plain(make_check(), seeds(), args.findings, seconds=args.seconds, seed=args.seed)
    for outcome, n in sorted(report.outcomes.items(), key=lambda item: -item[1]):
        print(f"{n:9d}  {report.messages[outcome].splitlines()[-1]}")
    print(
        f"{report.runs} runs, {len(report.outcomes)} places, peak {peak_mb():.0f} MB, {len(report.findings)} findings"
    )
    for problem, path in report.findings.items():
        print(f"{path}: {problem}")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
