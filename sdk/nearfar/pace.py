"""How far to draft ahead of the upper side: the window that brings the most tokens a second.

With acceptance `a` a window of n drafts brings on average E(n) = (1 - a^(n+1)) / (1 - a) tokens a round (Leviathan et
al. 2211.17192, equation 1), and a round takes the time to draft them and what the link and the upper layers take beyond
what drafting hides.  All of it is measured while the answer goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

MAX_WINDOW = 16
_NEW = 0.1  # weight of a new measurement


def expected_tokens(a: float, n: int) -> float:
    """Tokens that a round with `n` drafts brings, each accepted with probability `a`."""
    return n + 1.0 if a >= 1 else (1 - a ** (n + 1)) / (1 - a)


@dataclass(slots=True)
class Pace:
    """What has been seen of one upper side.  Seconds."""

    accepted: float = 0.7  # share of the drafts that hold
    draft_s: float = 0.005  # one draft
    reply_s: float = 0.05  # from an ask to its verdict
    pass_s: float = 0.0  # what the other side takes for it by itself; 0: not known yet

    def drafted(self, seconds: float) -> None:
        self.draft_s += _NEW * (seconds - self.draft_s)

    def replied(self, seconds: float, pass_s: float, n_accept: int, n_refused: int) -> None:
        self.reply_s += _NEW * (seconds - self.reply_s)
        self.pass_s += _NEW * (pass_s - self.pass_s) if self.pass_s else pass_s
        for _ in range(n_accept):
            self.accepted += _NEW * (1 - self.accepted)
        if n_refused:
            self.accepted -= _NEW * self.accepted

    def window(self, most: int = MAX_WINDOW) -> int:
        """Drafts ahead of the last final token, 1..most.

        Drafting goes on while a verdict is under way, so a window that takes as long as the reply hides all of it; the
        round then costs what is left of the reply.
        """
        return max(range(1, most + 1), key=lambda n: (self.rate(n), -n))

    def rate(self, n: int) -> float:
        """Tokens a second with `n` drafts ahead."""
        return expected_tokens(self.accepted, n) / max(n * self.draft_s, self.reply_s)

    def prefers_runs(self, run: int, most: int = MAX_WINDOW) -> bool:
        """Whether the other side is faster by itself: one reply, then a pass for each of `run` tokens."""
        alone = run / (self.reply_s + (run - 1) * self.pass_s)
        return self.pass_s > 0 and alone > self.rate(self.window(most))
