"""Bytes of another machine to messages.  Nothing of them is believed: WireError for whatever is not as it must be.

    bytes -> at most MAX_MESSAGE -> protobuf -> every length against its limit -> every number, enum -> a dataclass

protobuf itself sets nothing aside that the bytes do not hold, so the size of a message bounds what reading it takes.
What a number means for one session (a position behind the context, a row of the wrong size) is `session.py`'s to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from enum import IntEnum
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from nearfar.errors import UsageError, WireError
from nearfar.sampling import Sampling
from nearfar.wire import nearfar_pb2 as pb
from nearfar.wire.messages import (
    MAX_OUTLIERS,
    Ask,
    ClientHello,
    Close,
    Code,
    CodecId,
    CodecSpec,
    Commit,
    Credit,
    Cut,
    Down,
    Err,
    Ids,
    Limits,
    Load,
    Mode,
    Need,
    Open,
    Opened,
    Ping,
    Pong,
    Rows,
    ServerHello,
    Up,
    Verdict,
)

MAX_MESSAGE = 1 << 20  # bytes of a whole message
MAX_ROWS = 16 << 10  # bytes of rows in one, unless it is a single row
MAX_IDS = 4096  # of one message: ids, drafts, accepted tokens
MAX_STOP_IDS = 256
MAX_TEXT = 4096  # bytes of a sentence for people
MAX_NAME = 64  # characters of a version, a region, the name of a part
MAX_LIST = 64  # codecs, versions and parts of a hello
MAX_TOKEN = 256  # bytes of a resume token
SESSION = 16  # bytes
FINGERPRINT = range(16, 65)  # bytes
STATE_HASH = (0, 8)  # bytes: none, or one

M = TypeVar("M", bound=Message)
E = TypeVar("E", bound=IntEnum)


# ------------------------------------------------------------ the four things that come


def unpack_up(data: bytes) -> tuple[int, Up]:
    """A message of a device and its number on the stream.  Raises WireError."""
    m = _parse(pb.Up, data)
    kind = m.WhichOneof("m")
    if kind is None:
        raise WireError("a message of a device without content: expected one of Open, Rows, Ids, Ask, ...")
    return m.seq, _UP[kind](getattr(m, kind))


def unpack_down(data: bytes) -> tuple[int, Down | None]:
    """The number of the last message that was taken in, and what is said beside it.  Raises WireError."""
    m = _parse(pb.Down, data)
    kind = m.WhichOneof("m")
    return m.ack_seq, None if kind is None else _DOWN[kind](getattr(m, kind))


def unpack_client_hello(data: bytes) -> ClientHello:
    """Raises WireError."""
    m = _parse(pb.ClientHello, data)
    for what, items in (("versions", m.proto), ("codecs", m.codecs), ("parts", m.parts)):
        _length(what, items, range(MAX_LIST + 1))
    for name, part in m.parts.items():
        _length("the name of a part", name, range(1, MAX_NAME + 1))
        _length("a part", part, range(1, FINGERPRINT.stop))  # one of them is plain text
    return ClientHello(
        model_fp=_bytes("model_fp", m.model_fp, FINGERPRINT),
        parts=dict(m.parts),
        codecs=tuple(_codec(spec) for spec in m.codecs),
        proto=tuple(m.proto),
        sdk=_text("sdk", m.sdk, MAX_NAME),
        region=_text("region", m.region, MAX_NAME),
    )


def unpack_server_hello(data: bytes) -> ServerHello:
    """Raises WireError."""
    m = _parse(pb.ServerHello, data)
    x = m.limits
    return ServerHello(
        match=m.match,
        model_fp=_bytes("model_fp", m.model_fp, FINGERPRINT if m.match else range(FINGERPRINT.stop)),
        why=_text("why", m.why, MAX_TEXT),
        codec=_codec(m.codec) if m.HasField("codec") else None,
        epoch=m.epoch,
        limits=Limits(x.max_context, x.max_sessions, x.idle_ttl_s, x.max_run, x.credit_bytes),
        proto=m.proto,
        region=_text("region", m.region, MAX_NAME),
    )


def unpack_load(data: bytes) -> Load:
    """Raises WireError."""
    m = _parse(pb.Load, data)
    return Load(_not_negative("queue_ms", m.queue_ms), m.kv_free_bytes, m.draining)


# ------------------------------------------------------------ device -> upper


def _open(m: pb.Open) -> Open:
    s = m.sampling
    try:
        sampling = Sampling(s.temperature, s.top_k, s.top_p, s.min_p, s.repetition_penalty, s.repetition_window, s.seed)
    except UsageError as error:
        raise WireError(f"an Open with {error}") from None
    return Open(
        session=_bytes("session", m.session, (SESSION,)),
        gen=m.gen,
        mode=_enum(Mode, m.mode),
        codec=_codec(m.codec),
        row_layer=m.row_layer,
        sampling=sampling,
        stop_ids=_numbers("stop_ids", m.stop_id, range(MAX_STOP_IDS + 1)),
        resume_token=_bytes("resume_token", m.resume_token, range(MAX_TOKEN + 1)),
        want_hidden=m.want_hidden,
        version=m.version,
    )


def _rows(m: pb.Rows) -> Rows:
    n, size = m.n, len(m.data)
    if not n or len(m.crc32) != n or not size or size % n:
        raise WireError(
            f"{size} bytes for {n} rows with {len(m.crc32)} checksums: expected rows of one size, a checksum for each"
        )
    if n > 1 and size > MAX_ROWS:
        raise WireError(f"{size} bytes of rows in one message: expected at most {MAX_ROWS}, or a single row")
    _fits(m.pos0, n)
    each = size // n
    return Rows(m.gen, m.pos0, tuple(m.data[i : i + each] for i in range(0, size, each)), tuple(m.crc32))


def _ids(m: pb.Ids) -> Ids:
    ids = _numbers("ids", m.id, range(1, MAX_IDS + 1))
    _fits(m.pos0, len(ids))
    return Ids(m.gen, m.pos0, ids)


def _ask(m: pb.Ask) -> Ask:
    if m.verify_from > m.pos or m.run < 1:
        raise WireError(
            f"an Ask from row {m.verify_from} to {m.pos} for {m.run} tokens: expected rising rows, 1 or more"
        )
    draft = _numbers("draft", m.draft, range(MAX_IDS + 1))
    return Ask(m.req, m.gen, m.pos, m.verify_from, draft, m.run, m.deadline_ms)


_UP: dict[str, Callable[[Any], Up]] = {
    "open": _open,
    "rows": _rows,
    "ids": _ids,
    "ask": _ask,
    "cut": lambda m: Cut(m.gen, m.keep),
    "commit": lambda m: Commit(m.upto),
    "ping": Ping,
    "close": lambda m: Close(m.reason, m.keep_s),
}


# ------------------------------------------------------------ upper -> device


def _opened(m: pb.Opened) -> Opened:
    token = _bytes("resume_token", m.resume_token, range(MAX_TOKEN + 1))
    settings = _bytes("settings_hash", m.settings_hash, range(FINGERPRINT.stop))
    return Opened(m.gen, m.rows, m.absorbed, m.epoch, token, settings)


def _verdict(m: pb.Verdict) -> Verdict:
    if m.n_accept > MAX_IDS:
        raise WireError(f"a Verdict that accepts {m.n_accept} drafts: expected at most {MAX_IDS}")
    _fits(m.pos0, m.n_accept + len(m.id))
    return Verdict(
        req=m.req,
        gen=m.gen,
        pos0=m.pos0,
        n_accept=m.n_accept,
        ids=_numbers("ids", m.id, range(1, MAX_IDS + 1)),
        margin=_not_negative("margin", m.margin),
        state_hash=_bytes("state_hash", m.state_hash, STATE_HASH),
        upper_us=m.upper_us,
        hidden=m.hidden,
    )


_DOWN: dict[str, Callable[[Any], Down]] = {
    "opened": _opened,
    "verdict": _verdict,
    "need": lambda m: Need(m.gen, m.from_pos, _text("reason", m.reason, MAX_TEXT)),
    "credit": lambda m: Credit(m.bytes, m.retry_after_ms),
    "err": lambda m: Err(_enum(Code, m.code), _text("text", m.text, MAX_TEXT), m.retryable, m.retry_after_ms),
    "pong": Pong,
}


# ------------------------------------------------------------ pieces


def _codec(m: pb.CodecSpec) -> CodecSpec:
    try:
        return CodecSpec(_enum(CodecId, m.id), m.group, _numbers("outliers", m.outlier, range(MAX_OUTLIERS + 1)))
    except UsageError as error:
        raise WireError(str(error)) from None


def _parse(kind: type[M], data: bytes) -> M:
    if len(data) > MAX_MESSAGE:
        raise WireError(f"a message of {len(data)} bytes: expected at most {MAX_MESSAGE}")
    try:
        message: M = kind.FromString(data)
    except DecodeError as error:
        raise WireError(f"{len(data)} bytes that are no {kind.DESCRIPTOR.name}: {error}") from None
    return message


def _length(what: str, value: Collection[object], expected: Collection[int]) -> None:
    if len(value) not in expected:
        few, many = min(expected), max(expected)
        raise WireError(f"{what} of length {len(value)}: expected {few}" + (f" to {many}" if many != few else ""))


def _numbers(what: str, value: Sequence[int], expected: Collection[int]) -> tuple[int, ...]:
    _length(what, value, expected)
    return tuple(value)


def _bytes(what: str, value: bytes, expected: Collection[int]) -> bytes:
    _length(what, value, expected)
    return value


def _text(what: str, value: str, most: int) -> str:
    """It may be shown in a terminal, which obeys control characters: none comes through."""
    if len(value.encode()) > most:
        raise WireError(f"{what} of {len(value)} characters: expected at most {most} bytes")
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in value)


def _enum(kind: type[E], value: int) -> E:
    try:
        return kind(value)
    except ValueError:
        raise WireError(f"{kind.__name__} {value}: expected one of {', '.join(str(int(e)) for e in kind)}") from None


def _not_negative(what: str, value: float) -> float:
    if math.isnan(value) or value < 0:
        raise WireError(f"{what} of {value}: expected 0 or more")
    return value


def _fits(pos0: int, n: int) -> None:
    if pos0 + n > 1 << 32:
        raise WireError(f"{n} positions from {pos0} on: expected them below 2^32")
