"""What a lost packet costs a TCP stream.  Behind a proxy nothing is ever lost, so a loss is told as the wait it causes.

A receiver hands on nothing behind a gap.  With three or more packets behind it their acknowledgements tell the sender
within one round trip (fast retransmit, RFC 5681); otherwise the sender's timer runs out (RFC 6298), and it doubles for
every retransmission that is lost as well.  Not told: slow start, and a window that shrinks with a loss.  The tier of
network namespaces has the kernel's own TCP instead.
"""

from __future__ import annotations

from random import Random

from nearfar.chaos.profiles import Profile

SEGMENT = 1448  # bytes of a stream in a packet of Ethernet
MIN_RTO_S = 0.2  # Linux; RFC 6298 says 1 s
SYN_RTO_S = 1.0  # of a connection that is not answered (RFC 6298, 2.1)
_DUPLICATES = 3  # packets behind a gap that make the sender notice


def rto_s(profile: Profile) -> float:
    """The sender's timer: round trip + 4 mean deviations; of an even draw from ±jitter that is half the jitter."""
    return profile.rtt_s + max(MIN_RTO_S, 2 * profile.jitter_ms / 1e3)


def recovery_s(profile: Profile, draws: Random, n_bytes: int, n_behind: int) -> float:
    """How much later `n_bytes` in one go arrive through losses, with `n_behind` bytes sent right behind; mostly 0."""
    if not profile.loss or draws.random() >= 1 - (1 - profile.loss) ** -(-n_bytes // SEGMENT):
        return 0.0
    wait = profile.rtt_s if n_behind >= _DUPLICATES * SEGMENT else rto_s(profile)
    timer = rto_s(profile)
    while draws.random() < profile.loss:  # the retransmission
        wait, timer = wait + timer, 2 * timer
    return wait


def wait_for_link_s(dark_s: float, timer: float) -> float:
    """When a sender whose link is away for `dark_s` seconds more tries with success: at timer, 3 timers, 7 timers .."""
    wait = 0.0
    while wait < dark_s:
        wait, timer = wait + timer, 2 * timer
    return wait


def handshake_s(profile: Profile, draws: Random, dark_s: float) -> float:
    """From the first SYN to the moment at which the client may send: a round trip, and 1, 3, 7 s for losses."""
    wait, timer = wait_for_link_s(dark_s, SYN_RTO_S), SYN_RTO_S
    while profile.loss and draws.random() < 1 - (1 - profile.loss) ** 2:  # SYN or its answer
        wait, timer = wait + timer, 2 * timer
    return wait + profile.rtt_s
