"""How two machines share an answer: everything that a caller of collab.py chooses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from nearfar.errors import UsageError
from nearfar.wire.messages import CodecId, CodecSpec, Mode

MAX_KEEP_S = 3600

Then = Literal["wait", "finish"]


@dataclass(frozen=True, slots=True)
class Collab:
    """How two machines share an answer.

    `tau`: threshold of every exit instead of the calibrated ones; 1: no exit is ever sure.
    `max_row_bytes`: so many bytes of rows are kept for a link that comes back; older ones are computed again then.
    `backlog`: lossy, where rows wait longer than a reply takes: they do ("wait"), or ids travel from there on ("ids"),
    if policy and upper side allow it; the rest of the answer is then that of the upper side's full model.
    `decay`: thresholds of the exits begin higher and come down to `tau` in the course of an answer (exit.decayed), the
    faster the larger it is; None: they do not.
    `window`: drafts that one ask has looked at, at most, or None for the number that pays.
    `in_flight`: asks under way at most; while they are, drafting goes on.
    `slow`: an ask that takes longer than the link's deadline is waited for, or (lossy) the device's best exit decides.
    `lost`: without a link the device waits, or goes on alone and its tokens are final ("finish").
    `patience_s`: a link that is lost so long ends the answer with UpperError (with "wait").
    `keep_s`: so long the other side is asked to keep what it has of an answer, for the next turn of a chat.
    `self_test`: of two halves that meet for the first time: remembered ("once"), in each LLM ("always"), or none.
    `audit`: lossy: the share of the tokens behind which the upper side is asked although an exit is sure; 0: none.
    """

    mode: Mode = Mode.LOSSLESS
    codec: CodecSpec = CodecSpec(CodecId.INT8_OS)  # noqa: RUF009 - frozen
    tau: float | None = None
    window: int | None = None
    in_flight: int = 2
    slow: Then = "wait"
    lost: Then = "wait"
    patience_s: float = 60.0
    keep_s: int = 0
    max_row_bytes: int | None = 64 << 20
    backlog: Literal["wait", "ids"] = "wait"
    audit: float = 0.01
    decay: float | None = None
    self_test: Literal["once", "always", "never"] = "once"

    def __post_init__(self) -> None:
        if self.tau is not None and not 0 <= self.tau <= 1:
            raise UsageError(f"tau={self.tau}: expected 0..1")
        if self.window is not None and not 1 <= self.window <= 256:
            raise UsageError(f"window={self.window}: expected 1..256 drafts")
        if not 1 <= self.in_flight <= 8:
            raise UsageError(f"in_flight={self.in_flight}: expected 1..8 asks")
        if self.decay is not None and not 0 <= self.decay < math.inf:
            raise UsageError(f"decay={self.decay}: expected 0 or more (CALM: 4), or None")
        if self.self_test not in ("once", "always", "never"):
            raise UsageError(f"self_test={self.self_test!r}: expected once, always or never")
        if not 0 <= self.audit <= 1:
            raise UsageError(f"audit={self.audit}: expected 0..1, a share of the tokens")
        if self.backlog not in ("wait", "ids"):
            raise UsageError(f"backlog={self.backlog!r}: expected wait or ids")
        if self.max_row_bytes is not None and self.max_row_bytes < 0:
            raise UsageError(f"max_row_bytes={self.max_row_bytes}: expected 0 or more, or None for no limit")
        if not self.patience_s > 0:
            raise UsageError(f"patience_s={self.patience_s}: expected more than 0 seconds")
        if not 0 <= self.keep_s <= MAX_KEEP_S:
            raise UsageError(f"keep_s={self.keep_s}: expected 0..{MAX_KEEP_S} seconds")
        if self.mode == Mode.CLOUD_ONLY and self.lost == "finish":
            raise UsageError("cloud-only has no device that could finish alone: expected lost='wait'")
        if self.mode == Mode.CLOUD_ONLY and not self.by_ids:
            raise UsageError(f"cloud-only sends ids, not rows as {self.codec.id.name}: expected the codec IDS")

    @property
    def by_ids(self) -> bool:
        return self.codec.id == CodecId.IDS
