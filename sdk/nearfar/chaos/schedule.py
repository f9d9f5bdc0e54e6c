"""What goes wrong, and when: drawn from a seed before anything runs, kept as JSON, played again from it.

{"seed": 7, "unit": "s", "faults": [{"at": 1.5, "kind": "stall", "seconds": 0.4},
                                    {"at": 9.0, "kind": "cut", "way": "down", "n_bytes": 137}]}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from random import Random
from typing import Any

from nearfar.chaos.profiles import Profile
from nearfar.errors import FileError, UsageError

# kind -> what it does
LINK_FAULTS = {
    "reset": "every open connection is reset (RST) at both ends",
    "cut": "n_bytes more go through in one direction, then the connection that carried the last one is reset",
    "stall": "nothing moves for some seconds, then all of it does",
    "half-open": "open connections stay and swallow everything; new ones work",
    "blackout": "what is sent within some seconds is lost; TCP sends it again when its timers run out",
}
UPPER_FAULTS = {
    "kill": "SIGKILL to whoever serves the upper layers; a new process after some seconds",
    "stop": "SIGSTOP, and SIGCONT after some seconds",
    "evict": "the upper forgets the rows and cache of the answer",
    "swap": "SIGKILL, then for some seconds a process with other weights in its place",
}
DEVICE_FAULTS = {
    "device": "SIGKILL to the device; a new process takes the answer up from its journal",
}
KINDS = LINK_FAULTS | UPPER_FAULTS | DEVICE_FAULTS
_LASTING = {"stall", "blackout", "kill", "stop", "swap"}
WAYS = ("up", "down")
UNITS = ("s", "token")  # seconds since the link came up, or tokens of the run
MAX_BYTES = 16 << 20  # of a file


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong at `at`, in the unit of its schedule."""

    at: float
    kind: str
    seconds: float = 0.0  # how long, of those that last
    way: str = "up"  # cut: up leads from the device to the upper, down back
    n_bytes: int = 0  # cut: how many more go through

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"a fault of kind {self.kind!r}: expected one of {', '.join(KINDS)}")
        if self.way not in WAYS:
            raise UsageError(f"a fault with the way {self.way!r}: expected up or down")
        for name in ("at", "seconds", "n_bytes"):
            if not 0 <= getattr(self, name) < 1e12:
                raise UsageError(f"a fault with {name}={getattr(self, name)}: expected 0 or more")

    def as_json(self) -> dict[str, Any]:
        """What differs from the defaults."""
        defaults = {f.name: f.default for f in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != defaults[name]}


@dataclass(frozen=True, slots=True)
class Schedule:
    """Faults in order of time, and the seed that they were drawn from."""

    seed: int
    unit: str = "s"
    faults: tuple[Fault, ...] = ()

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise UsageError(f"a schedule in {self.unit!r}: expected one of {', '.join(UNITS)}")
        if list(self.faults) != sorted(self.faults, key=lambda f: f.at):
            raise UsageError("a schedule out of order: expected faults with rising times")

    def __len__(self) -> int:
        return len(self.faults)

    def with_faults(self, faults: Sequence[Fault]) -> Schedule:
        return Schedule(self.seed, self.unit, tuple(sorted(faults, key=lambda f: f.at)))

    def to_json(self) -> str:
        """One line."""
        return json.dumps({"seed": self.seed, "unit": self.unit, "faults": [f.as_json() for f in self.faults]})

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Raises UsageError where it is not what `to_json` writes."""
        try:
            facts = json.loads(text)
            faults = tuple(_fault(f) for f in facts["faults"])
            return cls(_number(facts, "seed", int), str(facts.get("unit", "s")), faults)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"not a schedule of faults ({type(error).__name__}: {error}); expected {_SHAPE}") from None


_SHAPE = '{"seed": 7, "unit": "s", "faults": [{"at": 1.5, "kind": "stall", "seconds": 0.4}, ..]}'


def _fault(facts: dict[str, Any]) -> Fault:
    if unknown := set(facts) - {f.name for f in fields(Fault)}:
        raise UsageError(
            f"a fault with {', '.join(sorted(unknown))}: expected {', '.join(f.name for f in fields(Fault))}"
        )
    seconds = _number(facts, "seconds", float, 0.0)
    n_bytes = _number(facts, "n_bytes", int, 0)
    return Fault(_number(facts, "at", float), facts["kind"], seconds, facts.get("way", "up"), n_bytes)


def _number(facts: dict[str, Any], name: str, kind: type, default: Any = None) -> Any:
    value = facts.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise UsageError(f"{name}={value!r} in a schedule: expected a number")
    return value


def read(path: Path) -> Schedule:
    """The schedule in a file.  Raises FileError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise FileError(f"{path}: more than {MAX_BYTES} bytes; expected a schedule of faults")
    try:
        return Schedule.from_json(data.decode())
    except ValueError as error:  # UsageError is one
        raise FileError(f"{path}: {error}") from None


def draw(
    seed: int,
    kinds: Sequence[str],
    every: float,
    until: float,
    *,
    unit: str = "s",
    seconds: tuple[float, float] = (0.2, 3.0),
    max_cut: int = 4096,
) -> Schedule:
    """One fault of `kinds` somewhere within every stretch of `every` units, up to `until`."""
    draws = Random(f"{seed} faults")
    faults = []
    for stretch in range(int(until / every)):
        at = (stretch + draws.random()) * every
        kind = draws.choice(list(kinds))
        length, way, n_bytes = draws.uniform(*seconds), draws.choice(WAYS), draws.randrange(max_cut)
        faults.append(
            Fault(
                float(int(at)) if unit == "token" else round(at, 3),
                kind,
                seconds=round(length, 3) if kind in _LASTING else 0.0,
                way=way if kind == "cut" else "up",
                n_bytes=n_bytes if kind == "cut" else 0,
            )
        )
    return Schedule(seed, unit, tuple(faults))


def blackouts(profile: Profile, seed: int, until_s: float) -> Schedule:
    """The blackouts that a profile has by itself within so many seconds."""
    draws, faults = Random(f"{seed} blackouts"), []
    at = 0.0
    while profile.blackouts is not None:
        at += draws.uniform(*profile.blackouts.gap_s)
        if at >= until_s:
            break
        length = draws.uniform(*profile.blackouts.length_s)
        faults.append(Fault(round(at, 3), "blackout", round(length, 3)))
        at += length
    return Schedule(seed, "s", tuple(faults))


def merged(a: Schedule, b: Schedule) -> Schedule:
    """The faults of both, with the seed of the first."""
    assert a.unit == b.unit  # nobody can order seconds among tokens
    return a.with_faults([*a.faults, *b.faults])
