"""What an engine has done since its start: for metrics and tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counts:
    """Sums over all steps; seconds are those of the engine's clock."""

    steps: int = 0
    rows: int = 0  # through all layers; those through some count in part
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    preempted: int = 0
    swapped: int = 0
    failed: int = 0
    cancelled: int = 0
    steps_after_cancel: int = 0  # steps that ran while a cancelled sequence had not been stopped yet: 1 each at most
    prefix_hits: int = 0  # blocks that a sequence found computed when it got memory, and full ones that it did not
    prefix_misses: int = 0
    row_hits: int = 0  # of these such as came as rows
    row_misses: int = 0
    prefix_evicted: int = 0  # blocks that only the prefix cache held, and that had to make room
    early_rows: int = 0  # positions from outside that ran before anybody asked
    early_lost: int = 0  # of these such as no question has used: cut, asked about again, given up
    plan_s: float = 0.0
    run_s: float = 0.0
    expected_s: float = 0.0  # of run_s, as the cost model said before
    commit_s: float = 0.0

    def found(self, n_hits: int, n_misses: int, *, rows: bool) -> None:
        """So many full blocks of a sequence were computed when it got memory, and so many were not."""
        self.prefix_hits += n_hits
        self.prefix_misses += n_misses
        if rows:
            self.row_hits += n_hits
            self.row_misses += n_misses
