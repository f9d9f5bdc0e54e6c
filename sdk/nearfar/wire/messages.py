"""The words of the protocol, as plain dataclasses: what the machines on both sides read and write.

    device  Open, Rows | Ids, Ask, Cut, Commit, Ping, Close  ->  upper
    device  <-  Opened, Verdict, Need, Credit, Err, Pong          upper

A position is an index into the text, prompt included.  Row i is the input of layer k that the ids 0..i made; the upper
layers turn it into the token at position i + 1.  `gen` counts how often the device has taken rows back (`Cut`).
nearfar.proto says the same in protobuf; `rpc.py` translates, and checks every number before it comes here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeAlias

from nearfar.errors import UsageError
from nearfar.sampling import Sampling

PROTOCOL = 1
SAMPLER_VERSION = 1  # of nearfar.sampling: filters, their order, the noise
MAX_OUTLIERS = 16


class CodecId(IntEnum):
    """How a row travels (codec.py)."""

    FP16 = 1
    INT8_OS = 2
    INT4_OS = 3
    IDS = 4  # no row: the token's id


GROUPS = {CodecId.FP16: 0, CodecId.INT8_OS: 64, CodecId.INT4_OS: 32, CodecId.IDS: 0}


class Mode(IntEnum):
    """Who decides a token."""

    LOSSY = 1  # a sure exit decides at once
    LOSSLESS = 2  # whatever the exit drafts is checked by the upper layers
    CLOUD_ONLY = 3  # the upper side generates by itself


class Code(IntEnum):
    """What is wrong."""

    MISMATCH = 1  # weights, codec or settings of the two sides do not belong together
    DENIED = 2
    QUOTA = 3
    OVERLOADED = 4
    DIVERGED = 5  # rows that were sent twice differ
    BAD_FRAME = 6
    INTERNAL = 7


@dataclass(frozen=True, slots=True)
class CodecSpec:
    """A codec with its group size and the channels that travel beside it as fp16.  Raises UsageError."""

    id: CodecId
    group: int = -1  # -1: the codec's own
    outliers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.group == -1:
            object.__setattr__(self, "group", GROUPS[self.id])
        if self.group != GROUPS[self.id]:
            raise UsageError(f"codec {self.id.name} in groups of {self.group}: expected {GROUPS[self.id]}")
        if list(self.outliers) != sorted(set(self.outliers)) or len(self.outliers) > MAX_OUTLIERS:
            raise UsageError(f"outlier channels {list(self.outliers)[:20]}: expected at most {MAX_OUTLIERS}, rising")
        if self.outliers and (self.outliers[0] < 0 or not GROUPS[self.id]):
            raise UsageError(f"outlier channels {list(self.outliers)} of codec {self.id.name}: expected none")


# ------------------------------------------------------------ before any answer


@dataclass(frozen=True, slots=True)
class ClientHello:
    """Who asks: the fingerprint of the device's files, part by part, and what it can speak."""

    model_fp: bytes
    parts: Mapping[str, bytes]
    codecs: tuple[CodecSpec, ...]
    proto: tuple[int, ...] = (PROTOCOL,)
    sdk: str = ""
    region: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    max_context: int
    max_sessions: int
    idle_ttl_s: int
    max_run: int
    credit_bytes: int


@dataclass(frozen=True, slots=True)
class ServerHello:
    """Whether the two belong together; if not, `why` names the part and both fingerprints."""

    match: bool
    model_fp: bytes
    why: str
    codec: CodecSpec | None
    epoch: int  # of the server's process: another one has forgotten all sessions
    limits: Limits
    proto: int = PROTOCOL
    region: str = ""  # where the server is, as its operator says


@dataclass(frozen=True, slots=True)
class Load:
    queue_ms: float
    kv_free_bytes: int
    draining: bool


# ------------------------------------------------------------ device -> upper


@dataclass(frozen=True, slots=True)
class Open:
    """Begin or take up an answer.  `session`: 16 bytes of chance, chosen by the device."""

    session: bytes
    gen: int
    mode: Mode
    codec: CodecSpec
    row_layer: int  # 0 with ids
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    resume_token: bytes = b""
    want_hidden: bool = False
    version: int = SAMPLER_VERSION


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows pos0, pos0 + 1, ..., each packed by the codec of the session, with the checksum of each."""

    gen: int
    pos0: int
    data: tuple[bytes, ...]
    crc32: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        return sum(map(len, self.data))


@dataclass(frozen=True, slots=True)
class Ids:
    gen: int
    pos0: int
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ask:
    """Decide behind row `pos`, and check `draft`, the ids at verify_from + 1 .. pos, on the way.

    With ids the draft is empty: the ids are there.  `run` > 1 (ids only): go on by yourself for so many tokens.
    """

    req: int
    gen: int
    pos: int
    verify_from: int
    draft: tuple[int, ...] = ()
    run: int = 1
    deadline_ms: int = 0


@dataclass(frozen=True, slots=True)
class Cut:
    """Rows from `keep` on are void; a new generation begins."""

    gen: int
    keep: int


@dataclass(frozen=True, slots=True)
class Commit:
    """Positions below `upto` are safe with the device: their verdicts need not be kept."""

    upto: int


@dataclass(frozen=True, slots=True)
class Ping:
    n: int


@dataclass(frozen=True, slots=True)
class Close:
    """The answer is over.  `keep_s`: the text may go on (the next turn of a chat) within so many seconds."""

    reason: int = 0
    keep_s: int = 0


# ------------------------------------------------------------ upper -> device


@dataclass(frozen=True, slots=True)
class Opened:
    """What the upper side has of the session: `rows` are there, `absorbed` of them are in its cache."""

    gen: int
    rows: int
    absorbed: int
    epoch: int
    resume_token: bytes = b""
    settings_hash: bytes = b""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The first `n_accept` drafts from position `pos0` on hold; `ids[0]` is the token behind them.

    It replaces the first draft that does not hold, or follows the last one.  `margin`: between the two largest logits.
    """

    req: int
    gen: int
    pos0: int
    n_accept: int
    ids: tuple[int, ...]
    margin: float = 0.0
    state_hash: bytes = b""
    upper_us: int = 0
    hidden: bytes = b""


@dataclass(frozen=True, slots=True)
class Need:
    """Rows (or ids) from `from_pos` on are wanted (again): a gap, or the state was given up."""

    gen: int
    from_pos: int
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Credit:
    """Bytes of rows that may be under way; 0 with `retry_after_ms`: wait."""

    n_bytes: int
    retry_after_ms: int = 0


@dataclass(frozen=True, slots=True)
class Err:
    code: Code
    text: str
    retryable: bool = False
    retry_after_ms: int = 0


@dataclass(frozen=True, slots=True)
class Pong:
    n: int


Up: TypeAlias = Open | Rows | Ids | Ask | Cut | Commit | Ping | Close
Down: TypeAlias = Opened | Verdict | Need | Credit | Err | Pong
