"""Blocks of 64 positions: which are free, which are whose, which are kept for the next one with the same beginning.

Numbers only; the blocks themselves lie in the executor.  A block is in one of three states:

    free      nobody needs what it holds
    cached    no sequence uses it, but the prefix cache knows what it holds: taken back when free ones run out
    used      `references` sequences hold it; a block with more than one reference is full and only read

A sequence takes its blocks next to each other where it can (a *run*), so that a swap is few large copies.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import pairwise

BLOCK = 64  # positions; what the attention kernel walks at a time


def n_blocks_of(n_positions: int) -> int:
    """Blocks that hold so many positions."""
    return -(-n_positions // BLOCK)


class KVPool:
    """Owns the numbers 0..n_blocks-1.  Every method is all or nothing."""

    def __init__(self, n_blocks: int) -> None:
        assert n_blocks > 0
        self.n_blocks = n_blocks
        self.references = [0] * n_blocks
        self.n_evicted = 0  # cached blocks that had to make room, so far
        self._free: set[int] = set(range(n_blocks))
        self._cached: OrderedDict[int, bytes] = OrderedDict()  # least recently used first -> its chain hash
        self._known: dict[bytes, int] = {}  # chain hash -> block, used or cached
        self._hash: dict[int, bytes] = {}  # the other way round

    # ------------------------------------------------------------ counts

    @property
    def n_free(self) -> int:
        """Blocks that `alloc` can give: free or only cached."""
        return len(self._free) + len(self._cached)

    @property
    def n_used(self) -> int:
        return self.n_blocks - self.n_free

    @property
    def n_cached(self) -> int:
        return len(self._cached)

    # ------------------------------------------------------------ taking and giving back

    def alloc(self, n: int, after: int | None = None) -> list[int]:
        """`n` blocks with one reference each, next to `after` and to each other where possible.

        The caller has looked at `n_free`: a plan never asks for more.
        """
        assert n <= self.n_free, (n, self.n_free)
        while len(self._free) < n:
            self._forget(next(iter(self._cached)))
            self.n_evicted += 1
        taken: list[int] = []
        at = -1 if after is None else after
        while len(taken) < n:
            at = at + 1 if at + 1 in self._free else self._run_start(n - len(taken))
            self._free.remove(at)
            taken.append(at)
        for block in taken:
            self.references[block] = 1
        return taken

    def _run_start(self, n: int) -> int:
        """Where the shortest run of free blocks that holds `n` begins, or the longest one if none does."""
        ordered = sorted(self._free)
        runs = []
        start = ordered[0]
        for a, b in pairwise([*ordered, self.n_blocks + 1]):
            if b != a + 1:
                runs.append((a - start + 1, start))
                start = b
        fitting = [run for run in runs if run[0] >= n]
        return min(fitting)[1] if fitting else max(runs, key=lambda run: (run[0], -run[1]))[1]

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each; cached ones are used again."""
        for block in blocks:
            assert self.references[block] or block in self._cached, block
            self._cached.pop(block, None)
            self.references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less to each; the last one leaves the block cached if its contents are known, free otherwise.

        The end of a chain is worth less than its beginning, so it is the first to be taken back.
        """
        for block in reversed(list(blocks)):
            assert self.references[block] > 0, block
            self.references[block] -= 1
            if self.references[block] == 0:
                if block in self._hash:
                    self._cached[block] = self._hash[block]
                else:
                    self._free.add(block)

    # ------------------------------------------------------------ the prefix cache

    def publish(self, block: int, chain: bytes) -> None:
        """Full block `block` holds what `chain` says (kv.prefix); the first block that says so stays the known one."""
        assert self.references[block] > 0
        if chain not in self._known and block not in self._hash:
            self._known[chain], self._hash[block] = block, chain

    def match(self, chains: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known beginning of `chains`.  Changes nothing."""
        found: list[int] = []
        for chain in chains:
            block = self._known.get(chain)
            if block is None:
                break
            found.append(block)
        return found

    def n_idle(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` count as free now and will not once they are shared."""
        return sum(block in self._cached for block in blocks)

    def clear_cache(self) -> None:
        """Forget what no sequence uses."""
        for block in list(self._cached):
            self._forget(block)

    def _forget(self, block: int) -> None:
        del self._known[self._cached.pop(block)]
        del self._hash[block]
        self._free.add(block)

    # ------------------------------------------------------------ for tests and metrics

    def check(self, tables: Iterable[Sequence[int]]) -> None:
        """Every block is in exactly one state, and its references are those of `tables`."""
        counted = [0] * self.n_blocks
        for table in tables:
            for block in table:
                counted[block] += 1
        assert counted == self.references, [
            (b, c, r) for b, (c, r) in enumerate(zip(counted, self.references, strict=True)) if c != r
        ]
        states = [(b in self._free) + (b in self._cached) + (self.references[b] > 0) for b in range(self.n_blocks)]
        assert states == [1] * self.n_blocks
        assert {self._known[h] for h in self._hash.values()} == set(self._hash)
