"""How a link is: rate, round trip, jitter, loss, blackouts.  Both tiers know these by the same names."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from nearfar.errors import UsageError


@dataclass(frozen=True, slots=True)
class Blackouts:
    """Spells without a link: seconds between them and seconds that each lasts, drawn evenly from (low, high)."""

    gap_s: tuple[float, float]
    length_s: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Profile:
    """A link that is alike both ways."""

    name: str
    rate_bit_s: float  # of each direction
    rtt_ms: float
    jitter_ms: float = 0.0  # a round trip takes rtt_ms ± jitter_ms
    loss: float = 0.0  # share of packets that a direction loses
    blackouts: Blackouts | None = None

    def __post_init__(self) -> None:
        if not self.rate_bit_s > 0:
            raise UsageError(f"rate_bit_s={self.rate_bit_s}: expected more than 0")
        if not 0 <= self.jitter_ms <= self.rtt_ms:
            raise UsageError(f"jitter_ms={self.jitter_ms}: expected 0..{self.rtt_ms}, the round trip")
        if not 0 <= self.loss < 1:
            raise UsageError(f"loss={self.loss}: expected a share from 0 to below 1")

    @property
    def rtt_s(self) -> float:
        return self.rtt_ms / 1e3

    @property
    def window(self) -> int:
        """Bytes that one connection has on its way at most: twice what the link holds, as a TCP window would be."""
        return max(256 << 10, int(2 * self.rtt_s * self.rate_bit_s / 8))

    def one_way_s(self, draws: Random) -> float:
        """Seconds from one end to the other; half of the round trip and half of its jitter."""
        return (self.rtt_ms + self.jitter_ms * draws.uniform(-1, 1)) / 2e3

    def serial_s(self, n_bytes: int) -> float:
        """Seconds in which the link takes so many bytes in."""
        return 8 * n_bytes / self.rate_bit_s


_WIFI = Profile("wifi", 100e6, 5, jitter_ms=3, loss=0.001)
PROFILES = {
    p.name: p
    for p in (
        Profile("lan", 1e9, 0.5),
        _WIFI,
        Profile("4g-good", 20e6, 50, loss=0.005),
        Profile("4g-bad", 2e6, 120, jitter_ms=40, loss=0.02),
        Profile("sat", 10e6, 600),
        Profile(
            "tunnel",
            _WIFI.rate_bit_s,
            _WIFI.rtt_ms,
            _WIFI.jitter_ms,
            _WIFI.loss,
            Blackouts(gap_s=(20, 60), length_s=(5, 30)),
        ),
    )
}


def profile(name: str) -> Profile:
    """The profile of that name.  Raises UsageError."""
    if name not in PROFILES:
        raise UsageError(f"{name!r}: expected a profile of {', '.join(PROFILES)}")
    return PROFILES[name]
