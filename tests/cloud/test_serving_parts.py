"""The parts of the core by themselves: blocks, chains, drafts, the cost of a step."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="torch is not installed (extra [train])")

from nearfar_cloud.kv import prefix
from nearfar_cloud.kv.pool import BLOCK, KVPool, n_blocks_of
from nearfar_cloud.scheduling import propose
from nearfar_cloud.scheduling.cost import CostModel, features
from nearfar_cloud.scheduling.propose import NGram, NGramIndex
from nearfar_cloud.types import LayerRange, Request, Seq, Work


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6))
def test_blocks_are_conserved_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    n_blocks = rng.randint(1, 20)
    pool = KVPool(n_blocks, rng.choice((0, rng.randrange(n_blocks))))
    tables: list[list[int]] = []
    for i in range(60):
        roll = rng.random()
        if roll < 0.4 and pool.n_free:
            is_upper, before = rng.random() < 0.5, pool.room
            n = rng.randint(0, before.for_(is_upper))
            tables.append(pool.alloc(n, is_upper=is_upper))
            assert pool.rooms(tables[-1]) == before.taken(n, is_upper) == before.minus(pool.room)
            for j, block in enumerate(tables[-1]):
                if rng.random() < 0.5:
                    pool.publish(block, bytes([i, j]))
        elif roll < 0.6 and tables:
            shared = rng.choice(tables)[: rng.randint(1, 3)]
            pool.share(shared)
            tables.append(list(shared))
        elif roll < 0.7:
            known = [bytes([rng.randrange(60), j]) for j in range(3)]
            found = pool.match(known)
            idle, before = pool.n_idle(found), pool.room
            assert sum(idle) <= len(found)
            pool.share(found)
            assert pool.room == before.minus(idle)
            tables.append(found)
        elif tables:
            pool.release(tables.pop(rng.randrange(len(tables))))
        pool.check(tables)
    for table in tables:
        pool.release(table)
    pool.check([])
    pool.clear_cache()
    assert pool.n_free == pool.n_blocks
    assert pool.n_cached == 0


def test_blocks_of_a_sequence_lie_next_to_each_other_where_they_can() -> None:
    pool = KVPool(16)
    first = pool.alloc(4)
    second = pool.alloc(4)
    assert first == [0, 1, 2, 3]
    assert second == [4, 5, 6, 7]
    pool.release(first)
    assert pool.alloc(2, after=7) == [8, 9]
    assert pool.alloc(4) == [0, 1, 2, 3]  # the hole that fits, not the rest of the pool


def test_the_end_of_a_chain_is_taken_back_before_its_beginning() -> None:
    pool = KVPool(4)
    table = pool.alloc(3)
    chains = [b"a", b"b", b"c"]
    for block, chain in zip(table, chains, strict=True):
        pool.publish(block, chain)
    pool.release(table)
    assert pool.match(chains) == table
    pool.alloc(2)
    assert pool.n_evicted == 1
    assert pool.match(chains) == table[:2]


def test_a_chain_tells_apart_what_came_before_and_whose_it_is() -> None:
    ids = list(range(3 * BLOCK))
    one = prefix.Chain(prefix.salt("tenant", "model")).upto(ids, len(ids))
    assert len(set(one)) == 3
    assert prefix.Chain(prefix.salt("tenant", "model")).upto(ids, BLOCK + 5) == one[:1]
    other = [7, *ids[1:]]
    assert not set(one) & set(prefix.Chain(prefix.salt("tenant", "model")).upto(other, len(ids)))
    assert not set(one) & set(prefix.Chain(prefix.salt("other", "model")).upto(ids, len(ids)))
    assert prefix.salt("ab", "c") != prefix.salt("a", "bc")


def test_a_growing_text_keeps_the_hashes_that_it_has() -> None:
    chain, ids = prefix.Chain(b"s"), list(range(50))
    assert chain.upto(ids, 50) == []
    ids += range(100)
    first = chain.upto(ids, 130)
    assert len(first) == 2
    assert chain.upto(ids, 150)[:2] == first


@pytest.mark.parametrize(
    ("ids", "n", "drafts"),
    [
        ([1, 2, 3, 4, 9, 1, 2, 3], 2, [4, 9]),
        ([1, 2, 3, 4, 9, 1, 2, 3], 9, [4, 9, 1, 2, 3]),
        ([5, 1, 2, 7, 1, 2, 8, 1, 2], 1, [8]),  # the latest one
        ([1, 2, 3], 4, []),
        ([1], 4, []),
        ([3, 3, 3, 3], 2, [3]),
    ],
)
def test_what_followed_the_same_words_is_proposed(ids: list[int], n: int, drafts: list[int]) -> None:
    assert NGram().propose(ids, n) == drafts
    assert NGramIndex().propose(ids, n) == drafts


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_an_index_of_a_growing_text_proposes_what_the_whole_search_does(seed: int) -> None:
    rng, index, ids = random.Random(seed), NGramIndex(), list[int]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(propose, "LOOK_BACK", rng.choice((5, 30, 1000)))
        for _ in range(60):
            ids += [rng.randrange(rng.choice((2, 4))) for _ in range(rng.choice((1, 1, 1, 12)))]
            assert index.propose(ids, 5) == NGram().propose(ids, 5)


def work(n: int, start: int = 0, layers: tuple[int, int] = (0, 4)) -> Work:
    return Work(1, start, n, LayerRange(*layers), 0)


def test_the_cost_of_steps_is_learned_from_them() -> None:
    true = np.array([2e-3, 3e-4, 2e-7, 3e-8])
    rng, model = random.Random(1), CostModel(4)
    for _ in range(600):
        decodes = [work(1, rng.randint(10, 800)) for _ in range(rng.randint(0, 20))]
        prompt = [work(rng.choice((16, 64, 200)), rng.choice((0, 64, 256)))] if rng.random() < 0.5 else []
        if works := decodes + prompt:
            model.observe(works, float(true @ features(works, 4)) * rng.uniform(0.95, 1.05))
    for works in ([work(1, 100)] * 8, [work(128, 64)], [work(1, 300)] * 10 + [work(64)]):
        assert model.predict(works) == pytest.approx(float(true @ features(works, 4)), rel=0.15)
    assert model.predict([]) == 0


def test_a_step_that_took_far_too_long_is_not_learned_unless_it_repeats() -> None:
    model = CostModel(4)
    for _ in range(50):
        model.observe([work(8)], 0.01)
    before = model.predict([work(8)])
    model.observe([work(8)], 1.0)
    assert model.predict([work(8)]) == before
    assert model.n_outliers == 1
    for _ in range(20):
        model.observe([work(8)], 1.0)
    assert model.predict([work(8)]) == pytest.approx(1.0, rel=0.2)


def test_half_of_the_layers_count_half() -> None:
    assert features([work(10, 0, (0, 2))], 4)[1] == features([work(5)], 4)[1]


def test_chunks_shrink_along_a_prompt() -> None:
    model = CostModel(4)
    rng = random.Random(2)
    for _ in range(400):
        works = [work(rng.randint(1, 300), rng.randint(0, 3000))]
        model.observe(works, float(np.array([1e-3, 1e-4, 1e-7, 1e-7]) @ features(works, 4)))
    sizes = [model.most_rows(0.05, start, features([], 4), 1, 4096) for start in (0, 1000, 3000)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[2] >= 1
    assert model.most_rows(0.0, 0, features([], 4), 5, 10) == 5


def test_a_sequence_counts_what_its_layers_have_run() -> None:
    s = Seq.new(1, Request(ids=tuple(range(10)), max_tokens=4), 4, 0.0)
    assert s.gap() == Work(1, 0, 10, LayerRange(0, 4), 1)
    s.advance(Work(1, 0, 6, LayerRange(0, 2), 0))
    assert (s.reached, s.computed) == (6, 0)
    assert s.gap() == Work(1, 0, 6, LayerRange(2, 4), 0)
    s.advance(Work(1, 0, 6, LayerRange(2, 3), 0))
    s.advance(Work(1, 0, 6, LayerRange(3, 4), 0))
    assert [stage.layers for stage in s.stages] == [LayerRange(0, 4)]
    assert s.gap() == Work(1, 6, 4, LayerRange(0, 4), 1)
    s.advance(Work(1, 6, 4, LayerRange(0, 4), 1))
    assert s.gap() is None
    s.drafts = [1, 2]
    assert s.gap() is None
    s.ids.append(7)
    assert s.gap() == Work(1, 10, 3, LayerRange(0, 4), 3)
    assert s.gap().narrowed(s, 2).sample == 2  # type: ignore[union-attr]
    assert s.gap().narrowed(s, None, 2).sample == 0  # type: ignore[union-attr]
    assert n_blocks_of(64) == 1
    assert n_blocks_of(65) == 2
