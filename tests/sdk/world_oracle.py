"""What kind of answer, device and network a world has, and what its text must be."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate

from nearfar.wire.messages import Mode

BREAKS = ("reset", "half-open", "restart")  # they wait until much is under way
FAULTS = (*BREAKS, "evict", "fail", "kill", "kill between", "power loss")


class Unsound(AssertionError):
    """The machines broke a promise."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What kind of answer, device, network."""

    mode: Mode = Mode.LOSSLESS
    by_ids: bool = False
    n_tokens: int = 30
    n_prompt: int = 3
    window: int = 4
    n_asks: int = 2  # open at once
    run: int = 1  # cloud-only: tokens of an ask
    right: float = 0.7  # chance that a draft is the oracle's token
    sure: float = 0.5
    n_vocab: int = 50
    n_stops: int = 0  # ids that end the text
    faults: tuple[str, ...] = FAULTS
    p_fault: float = 0.02  # of a step
    is_late: bool = True  # what a broken stream had under way may come after all
    is_eager: bool = False  # the device sends before `Opened` has come
    repeats: bool = False  # asks are repeated after a while; without it, nothing may depend on that
    finishes: bool = False  # lossy: the device decides while it waits; lossless: it goes on without a link
    most_rows: int | None = None  # that the device keeps; None: all
    wobbles: float = 0.0  # chance that dropped rows come out otherwise when they are made again
    audit: float = 0.0  # lossy: chance that the upper side is asked behind a token that the device decides


def setting(rng: random.Random, n_tokens: int = 30, p_fault: float = 0.02) -> Setting:
    """Any kind of answer."""
    mode = rng.choice((Mode.LOSSLESS, Mode.LOSSLESS, Mode.LOSSLESS, Mode.LOSSY, Mode.CLOUD_ONLY))
    return Setting(
        mode,
        by_ids=mode == Mode.CLOUD_ONLY or rng.random() < 0.5,
        n_tokens=n_tokens,
        n_prompt=rng.choice((1, 3, 17)),
        window=rng.randint(1, 16),
        n_asks=rng.choice((1, 2, 4, 16)),
        run=rng.choice((1, 2, 7, 100)),
        right=rng.choice((0.0, 0.3, 0.7, 0.9, 1.0)),
        sure=rng.choice((0.0, 0.5, 0.9)),
        n_vocab=rng.choice((2, 50, 50, 1000)),
        n_stops=rng.choice((0, 0, 1)),
        p_fault=p_fault * rng.choice((0.1, 0.5, 1, 2)),
        faults=FAULTS if rng.random() < 0.3 else tuple(rng.choices((*FAULTS, "reset", "half-open"), k=3)),
        is_late=rng.random() < 0.5,
        is_eager=rng.random() < 0.3,
        repeats=rng.random() < 0.3,
        finishes=rng.random() < 0.4,
        audit=rng.choice((0.0, 0.1, 1.0)),
        most_rows=rng.choice((None, 0, 1, 10)),
        wobbles=rng.choice((0.0, 0.5)),
    )


def row_of(before: bytes, token: int) -> bytes:
    """The row of a position: of its own id and the row before it."""
    return blake2b(before + token.to_bytes(4, "little"), digest_size=8).digest()


def token_of(row: bytes, n_vocab: int) -> int:
    """What the upper layers say behind a row."""
    return int.from_bytes(blake2b(row, digest_size=4, key=b"oracle").digest(), "little") % n_vocab


def rows_of(ids: Iterable[int], before: bytes = b"") -> list[bytes]:
    """Of consecutive positions, the first one behind the row `before`."""
    return list(accumulate(ids, row_of, initial=before))[1:]


def oracle(prompt: list[int], n: int, s: Setting) -> list[int]:
    """The text without a device, a network or faults."""
    ids, row = list(prompt), rows_of(prompt)[-1]
    while len(ids) < len(prompt) + n:
        ids.append(token_of(row, s.n_vocab))
        if ids[-1] < s.n_stops:
            break
        row = row_of(row, ids[-1])
    return ids
