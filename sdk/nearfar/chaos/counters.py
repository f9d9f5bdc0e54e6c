"""What a link has carried and done, for people and for programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(slots=True)
class Traffic:
    """One direction."""

    n_bytes: int = 0  # that arrived
    pieces: int = 0  # in so many goes: packets of a namespace, parts of a stream behind a proxy
    lost: int = 0  # pieces that were lost; behind a proxy they arrive late
    swallowed: int = 0  # bytes that never arrive: half-open, cut or reset meanwhile, a full queue

    def __str__(self) -> str:
        return f"{self.n_bytes} bytes ({self.lost} of {self.pieces} pieces lost)"


@dataclass(slots=True)
class Counters:
    """A link since it came up."""

    up: Traffic = field(default_factory=Traffic)  # from the device to the upper
    down: Traffic = field(default_factory=Traffic)
    connections: int = 0  # taken so far
    open: int = 0  # now
    refused: int = 0  # whoever is behind the proxy did not answer
    faults: Counter[str] = field(default_factory=Counter)  # by kind

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"faults": dict(self.faults)}  # asdict would count pairs

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> Counters:
        """What `as_json` gave."""
        ways = {name: Traffic(**facts[name]) for name in ("up", "down")}
        return cls(**facts | ways | {"faults": Counter(facts["faults"])})

    def as_text(self) -> str:
        """A line for people."""
        faults = ", ".join(f"{n} {kind}" for kind, n in sorted(self.faults.items())) or "none"
        return f"up {self.up}, down {self.down}, {self.connections} connections, {self.open} open; faults: {faults}"
