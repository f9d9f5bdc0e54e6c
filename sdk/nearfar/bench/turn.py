"""One turn of one engine: a prompt, then tokens, and the time of both.  What every speed figure is made of."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nearfar.llm import LLM
    from nearfar.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Turn:
    """Tokens and seconds, of the wall clock or of CPU time (all threads of the process)."""

    n_prompt: int
    n_tokens: int  # decoded after the one that the prompt ends with
    prefill_s: float
    decode_s: float

    @property
    def prefill(self) -> float:
        """Prompt tokens a second."""
        return self.n_prompt / max(self.prefill_s, 1e-9)

    @property
    def decode(self) -> float:
        """Decoded tokens a second."""
        return self.n_tokens / max(self.decode_s, 1e-9)


def measure(
    llm: LLM, n_prompt: int, n_tokens: int, *, cpu_time: bool = False, sequence: Sequence | None = None, seed: int = 0
) -> Turn:
    """Prefill `n_prompt` tokens into an empty cache, then decode `n_tokens` greedily at full depth, whatever they are.

    A `sequence` of an earlier turn is emptied and used again: `seed` must then be another one than that turn's.
    """
    from nearfar.sampling import Sampling

    clock = time.process_time if cpu_time else time.perf_counter
    if sequence is None:
        sequence = llm.stepper.new_sequence(Sampling(), use_exits=False)
    n_cached = sequence.continue_with([(seed + i) * 7919 % llm.tokenizer.n_vocab for i in range(1, n_prompt + 1)])
    assert n_cached == 0, "the whole prompt was to be computed"
    started = clock()
    llm.stepper.step(sequence)
    first = clock()
    for _ in range(n_tokens):
        llm.stepper.step(sequence)
    return Turn(n_prompt, n_tokens, first - started, clock() - first)
