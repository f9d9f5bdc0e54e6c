"""Computes nothing: a step takes the time that the cost model expects, on a clock that jumps.

The engine, its pool and its policies are the real ones and run unchanged, so what is simulated is the machine alone.
After APEX (arXiv 2411.17651), which replays a trace step by step with times from measured profiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nearfar.config import ModelConfig
from nearfar.errors import UsageError
from nearfar_cloud.clock import VirtualClock
from nearfar_cloud.executors.base import Ask, BatchWork, Ids, ModelFacts, Result, Uppers
from nearfar_cloud.scheduling.cost import CostModel
from nearfar_cloud.types import Work

Tokens = Callable[[int, int], int]  # sequence, position -> id


def facts_of(config: ModelConfig) -> ModelFacts:
    """What the engine has to know of a model that is not there."""
    return ModelFacts("simulated", config.n_layers, config.d_model, config.n_vocab, config.n_ctx)


def seeded(seed: int, n_vocab: int) -> Tokens:
    """Ids below `n_vocab` that look drawn and depend on seed, sequence and position alone (splitmix64)."""

    def token(seq: int, position: int) -> int:
        x = (seed * 0x9E3779B97F4A7C15 + seq * 0xBF58476D1CE4E5B9 + position * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        return (x ^ (x >> 31)) % n_vocab

    return token


class SimExecutor:
    """An executor on `clock`, which has to be the engine's.

    `cost`: seconds of a step; read only, so it is never the model that the engine teaches.
    `tokens`: what is decided, whatever sampling, hooks and log-probabilities ask for (default: `seeded`).
    `swap_blocks`: how many blocks a tier holds; copying one takes `seconds_a_block`.
    """

    uppers = Uppers()

    def __init__(
        self,
        facts: ModelFacts,
        n_blocks: int,
        cost: CostModel,
        clock: VirtualClock,
        *,
        tokens: Tokens | None = None,
        swap_blocks: int = 0,
        seconds_a_block: float = 0.0,
    ) -> None:
        if cost.n_layers != facts.n_layers:
            raise UsageError(f"a cost model of {cost.n_layers} layers for a model of {facts.n_layers}")
        self.facts, self.n_blocks, self.cost, self.clock = facts, n_blocks, cost, clock
        self.tokens = tokens or seeded(0, facts.n_vocab)
        self.swap_blocks, self.seconds_a_block = swap_blocks, seconds_a_block
        self._copies: dict[int, int] = {}  # sequence -> blocks in the tier

    def run(self, batch: Sequence[BatchWork]) -> list[Result]:
        """Let the time of a step pass."""
        self.clock.advance(self.cost.predict([Work(w.seq, w.start, w.n, w.layers, 0) for w in batch]))
        return [Result() if w.ask is None else Result(self._decide(w.seq, w.ask)) for w in batch]

    def _decide(self, seq: int, ask: Ask) -> tuple[int, ...]:
        ids: list[int] = []
        for j in range(1 + len(ask.drafts)):
            ids.append(self.tokens(seq, ask.position + j))
            if j < len(ask.drafts) and ask.drafts[j] != ids[-1]:
                break
        return tuple(ids)

    # ------------------------------------------------------------ memory

    def can_swap(self, n_blocks: int) -> bool:
        return sum(self._copies.values()) + n_blocks <= self.swap_blocks

    def swap_out(self, seq: int, blocks: Ids) -> None:
        self._copies[seq] = len(blocks)
        self.clock.advance(len(blocks) * self.seconds_a_block)

    def swap_in(self, seq: int, blocks: Ids) -> None:
        del self._copies[seq]
        self.clock.advance(len(blocks) * self.seconds_a_block)

    def drop(self, seq: int) -> None:
        self._copies.pop(seq, None)
