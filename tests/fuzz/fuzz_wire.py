"""Fuzzes what comes from another machine, or out of a journal that somebody has touched.

    python tests/fuzz/fuzz_wire.py --seconds 600 [--seed N] [--findings DIR]

The first byte of an input chooses who reads the rest: one of the parsers of messages, a codec, the journal, or one of
the two machines, which gets a whole conversation of messages.  Inputs, limits and findings are those of fuzz_gguf.py:
anything but nearfar's own errors, much time or much memory.
"""

from __future__ import annotations

import argparse
import struct
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from nearfar import journal  # noqa: E402
from nearfar.errors import FileError, UpperError, UsageError, WireError  # noqa: E402
from nearfar.ledger import Draft, Ledger, Send  # noqa: E402
from nearfar.wire import pack, unpack  # noqa: E402
from nearfar.wire.codec import Codec  # noqa: E402
from nearfar.wire.messages import (  # noqa: E402
    CodecId,
    CodecSpec,
    Mode,
    Need,
    Open,
    Opened,
    Up,
    Verdict,
)
from nearfar.wire.session import Decide, UpperSession  # noqa: E402
from tests.fuzz.fuzz_gguf import Check, fuzz_plain, peak_mb  # noqa: E402
from tests.sdk import wire_examples as examples  # noqa: E402

ROW = 8  # bytes, of the machines' sessions
MAX_PIECES = 64


def pieces(data: bytes) -> Iterator[bytes]:
    """A conversation: each message behind its length, u16."""
    at = 0
    for _ in range(MAX_PIECES):
        if at + 2 > len(data):
            return
        (n,) = struct.unpack_from("<H", data, at)
        yield data[at + 2 : at + 2 + n]
        at += 2 + n


def conversation(messages: list[bytes]) -> bytes:
    return b"".join(struct.pack("<H", len(m)) + m for m in messages)


def read_client_hello(data: bytes) -> str:
    return type(unpack.unpack_client_hello(data)).__name__


def read_server_hello(data: bytes) -> str:
    return type(unpack.unpack_server_hello(data)).__name__


def read_load(data: bytes) -> str:
    return type(unpack.unpack_load(data)).__name__


def read_up(data: bytes) -> str:
    return type(unpack.unpack_up(data)[1]).__name__


def read_down(data: bytes) -> str:
    return type(unpack.unpack_down(data)[1]).__name__


def read_rows(data: bytes) -> str:
    """The next byte chooses codec and width; the rest is rows."""
    codec, body = codec_of(data[0] if data else 0), data[1:]
    rows = codec.decode([body[i : i + codec.row_bytes] for i in range(0, len(body), codec.row_bytes)])
    assert np.isfinite(rows).all()
    return f"{len(rows) > 0} rows"


def codec_of(which: int) -> Codec:
    specs = (CodecSpec(CodecId.FP16), CodecSpec(CodecId.INT8_OS, outliers=(0, 2)), CodecSpec(CodecId.INT4_OS))
    return Codec.of(specs[which % 3], (3, 64, 65)[which // 3 % 3])


def hear_as_upper(data: bytes) -> str:
    """A device's whole stream; whatever it says, the session stays within its limits."""
    opening = Open(b"s" * 16, 0, Mode.LOSSLESS, CodecSpec(CodecId.INT8_OS), 2)
    session = UpperSession(opening, ROW, max_positions=64, n_vocab=300)
    for piece in pieces(data):
        message = unpack.unpack_up(piece)[1]
        for effect in session.on(message):
            if isinstance(effect, Decide):
                session.decided(effect.ask.req, min(1, len(effect.draft)), 5)
    assert session.n_rows <= 64
    assert len(session.verdicts) <= 64
    return f"gen {session.gen > 0}, rows {session.n_rows > 0}, stale {session.n_stale > 0}"


def hear_as_device(data: bytes) -> str:
    """An upper side's whole stream; whatever it says, the prompt stays and indices rise."""
    ledger = device()
    for piece in pieces(data):
        match unpack.unpack_down(piece)[1]:
            case Opened() as opened:
                ledger.on_opened(opened)
            case Verdict() as verdict:
                ledger.on_verdict(verdict)
            case Need() as need:
                ledger.on_need(need)
    assert ledger.ids[:3] == [1, 2, 3]
    assert ledger.final <= len(ledger.ids)
    return f"final {ledger.final}, gen {ledger.gen > 0}"


def device() -> Ledger:
    """Three ids of a prompt, two drafts, an ask."""
    ledger = Ledger([1, 2, 3])
    ledger.add_rows(0, [bytes(ROW)] * 3)
    for token in (10, 11):
        ledger.add_draft(token, Draft("exit.2", 0.9))
        ledger.add_rows(len(ledger.rows), [bytes(ROW)])
    ledger.make_ask()
    return ledger


def read_journal(data: bytes) -> str:
    state = journal.parse(data)
    return f"{len(state.ids) > 0} ids, {state.n_torn > 0} torn"


READERS: tuple[Callable[[bytes], str], ...] = (
    read_up,
    read_down,
    read_client_hello,
    read_server_hello,
    read_load,
    read_rows,
    hear_as_upper,
    hear_as_device,
    read_journal,
)


def make_check() -> Check:
    """A function that gives a file to its reader and tells how far it came: "place | message"."""

    def check(path: Path) -> str:
        data = path.read_bytes()
        read = READERS[data[0] % len(READERS) if data else 0]
        try:
            return f"{read.__name__} | {read(data[1:])}"
        except (WireError, UpperError, UsageError, FileError) as error:
            lines = [f"{Path(f.filename).stem}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)[1:]]
            return f"{read.__name__} {' '.join(lines)} | {error}"

    return check


def seeds() -> list[bytes]:
    """A message of every kind, sound rows, conversations that come to something, a journal."""
    packed = examples.packed()
    up = [packed[type(m).__name__] for m in examples.UP]
    down = [packed[type(m).__name__] for m in examples.DOWN] + [packed["Ack"]]
    found = [(read_up, data) for data in up] + [(read_down, data) for data in down]
    found += [(read_client_hello, packed["ClientHello"]), (read_server_hello, packed["ServerHello"])]
    found += [(read_load, packed["Load"])]
    x = np.random.default_rng(0).normal(size=(2, 65)).astype(np.float32)
    for which in range(9):
        codec = codec_of(which)
        found.append((read_rows, bytes([which]) + b"".join(codec.encode(x[:, : codec.d]))))
    found.append((hear_as_upper, conversation([pack.pack_up(i, m) for i, m in enumerate(a_device_says(), 1)] + up)))
    verdict = pack.pack_down(2, Verdict(1, 0, 3, 1, (12,), 0.5))
    opened = pack.pack_down(1, Opened(0, 2, 0, 1))
    found.append((hear_as_device, conversation([opened, verdict])))
    found.append((hear_as_device, conversation([verdict, pack.pack_down(3, Need(0, 1)), *down])))
    written = journal.Journal.in_memory(journal.JournalHead(b"s" * 16, b"h" * 16, b"f" * 32, (1, 2, 3)))
    written.append([3, 4], [10, 11], [7, 8])
    found.append((read_journal, written.store.read()))
    return [bytes([READERS.index(read)]) + data for read, data in found]


def a_device_says() -> list[Up]:
    """Three rows and an ask."""
    ledger = Ledger([1, 2, 3])
    ledger.add_rows(0, [bytes(ROW)] * 3)
    return [effect.message for effect in ledger.make_ask() if isinstance(effect, Send)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=ROOT / "build" / "fuzz-findings")
    args = parser.parse_args()
    report = fuzz_plain(make_check(), seeds(), args.findings, seconds=args.seconds, seed=args.seed)
    for outcome, n in sorted(report.outcomes.items(), key=lambda item: -item[1])[:60]:
        print(f"{n:9d}  {outcome.split()[0]:15s} {report.messages[outcome].splitlines()[-1][:130]}")
    print(
        f"{report.runs} runs, {len(report.outcomes)} places, peak {peak_mb():.0f} MB, {len(report.findings)} findings"
    )
    for problem, path in report.findings.items():
        print(f"{path}: {problem}")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
