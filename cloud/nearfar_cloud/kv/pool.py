"""Blocks of 64 positions: which are free, which are whose, which are kept for the next one with the same beginning.

Numbers only; the blocks themselves lie in the executor.  A block is in one of three states:

    free      nobody needs what it holds
    cached    no sequence uses it, but the prefix cache knows what it holds: taken back when free ones run out
    used      `references` sequences hold it; a block with more than one reference is full and only read

A sequence takes its blocks next to each other where it can (a *run*), so that a swap is few large copies.

Blocks are of two groups.  A *whole* one has memory in all layers; an *upper* one only from some layer on, and serves
sequences whose rows enter there or above.  Those take whole ones, too, once no upper one can be had.

    number     0 ............. n_whole ............. n_blocks
    memory     [0, L)          [k, L)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

BLOCK = 64  # positions; what the attention kernel walks at a time


def n_blocks_of(n_positions: int) -> int:
    """Blocks that hold so many positions."""
    return -(-n_positions // BLOCK)


class Room(NamedTuple):
    """Blocks of each group."""

    whole: int = 0
    upper: int = 0

    def for_(self, is_upper: bool) -> int:
        """Of use to a sequence; `is_upper`: to one that needs no memory below.  Below 0: whole ones are missing."""
        return self.whole + self.upper if is_upper and self.whole >= 0 else self.whole

    def taken(self, n: int, is_upper: bool) -> Room:
        """What a sequence that takes `n` of these gets: upper ones first, where they will do."""
        n_upper = min(n, self.upper) if is_upper else 0
        return Room(n - n_upper, n_upper)

    def plus(self, other: Room) -> Room:
        return Room(self.whole + other.whole, self.upper + other.upper)

    def minus(self, other: Room) -> Room:
        """Without `other`; for upper ones that somebody else counts on already, that one takes whole ones."""
        upper = self.upper - other.upper
        return Room(self.whole - other.whole + min(0, upper), max(0, upper))


class KVPool:
    """Owns the numbers 0..n_blocks-1, of which the last `n_upper` are upper ones.  Every method is all or nothing."""

    def __init__(self, n_blocks: int, n_upper: int = 0) -> None:
        assert 0 <= n_upper < n_blocks
        self.n_blocks, self.n_whole = n_blocks, n_blocks - n_upper
        self.references = [0] * n_blocks
        self.n_evicted = 0  # cached blocks that had to make room, so far
        # Of whole and of upper blocks.
        self._free: tuple[set[int], set[int]] = set(range(self.n_whole)), set(range(self.n_whole, n_blocks))
        # Least recently used first -> its chain hash.
        self._cached: tuple[OrderedDict[int, bytes], OrderedDict[int, bytes]] = OrderedDict(), OrderedDict()
        self._known: dict[bytes, int] = {}  # chain hash -> block, used or cached
        self._hash: dict[int, bytes] = {}  # the other way round

    # ------------------------------------------------------------ counts

    @property
    def n_free(self) -> int:
        """Blocks that `alloc` can give: free or only cached."""
        return sum(self.room)

    @property
    def room(self) -> Room:
        """The same by group."""
        return Room(*(len(free) + len(cached) for free, cached in zip(self._free, self._cached, strict=True)))

    def rooms(self, blocks: Collection[int]) -> Room:
        """How many of `blocks` are of each group."""
        n_upper = 0 if self.n_whole == self.n_blocks else sum(map(self._group, blocks))
        return Room(len(blocks) - n_upper, n_upper)

    def _group(self, block: int) -> int:
        """0: whole, 1: upper."""
        return block >= self.n_whole

    @property
    def n_used(self) -> int:
        return self.n_blocks - self.n_free

    @property
    def n_cached(self) -> int:
        return sum(map(len, self._cached))

    # ------------------------------------------------------------ taking and giving back

    def alloc(self, n: int, after: int | None = None, *, is_upper: bool = False) -> list[int]:
        """`n` blocks with one reference each, next to `after` and to each other where possible.

        `is_upper`: they need no memory in the lower layers.
        The caller has looked at `room`: a plan never asks for more.
        """
        room = self.room
        assert n <= room.for_(is_upper), (n, room, is_upper)
        taken: list[int] = []
        for group, n_here in reversed(list(enumerate(room.taken(n, is_upper)))):
            taken += self._alloc(group, n_here, after)
        for block in taken:
            self.references[block] = 1
        return taken

    def _alloc(self, group: int, n: int, after: int | None) -> list[int]:
        free = self._free[group]
        while len(free) < n:
            self._forget(next(iter(self._cached[group])))
            self.n_evicted += 1
        taken: list[int] = []
        at = -1 if after is None else after
        while len(taken) < n:
            at = at + 1 if at + 1 in free else self._run_start(free, n - len(taken))
            free.remove(at)
            taken.append(at)
        return taken

    def _run_start(self, free: set[int], n: int) -> int:
        """Where the shortest run of free blocks that holds `n` begins, or the longest one if none does."""
        ordered = sorted(free)
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
            cached = self._cached[self._group(block)]
            assert self.references[block] or block in cached, block
            cached.pop(block, None)
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
                    self._cached[self._group(block)][block] = self._hash[block]
                else:
                    self._free[self._group(block)].add(block)

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

    def n_idle(self, blocks: Iterable[int]) -> Room:
        """How many of `blocks` count as free now and will not once they are shared."""
        return self.rooms([block for block in blocks if block in self._cached[self._group(block)]])

    def clear_cache(self) -> None:
        """Forget what no sequence uses."""
        for block in [block for cached in self._cached for block in cached]:
            self._forget(block)

    def _forget(self, block: int) -> None:
        group = self._group(block)
        del self._known[self._cached[group].pop(block)]
        del self._hash[block]
        self._free[group].add(block)

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
        for b in range(self.n_blocks):
            free, cached = ([b in one for one in both] for both in (self._free, self._cached))
            assert sum(free) + sum(cached) + (self.references[b] > 0) == 1, b
            assert not (free + cached)[1 - self._group(b) :: 2].count(True), b
        assert {self._known[h] for h in self._hash.values()} == set(self._hash)
