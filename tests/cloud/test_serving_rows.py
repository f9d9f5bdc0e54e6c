"""The prefix cache of rows: what one session of a tenant has computed the next one with the same rows need not."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from zlib import crc32

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="torch is not installed (extra [cloud])")
pytest.importorskip("nearfar_native._core", reason="the extension is not built")

from nearfar.sampling import Sampling
from nearfar.wire.codec import Codec
from nearfar.wire.messages import CodecId, CodecSpec
from nearfar_cloud.engine import Engine
from nearfar_cloud.gateway.packed_rows import PackedRows
from nearfar_cloud.kv.pool import BLOCK
from nearfar_cloud.kv.prefix import Chain
from nearfar_cloud.outside import ArrayRows, Question, RowPieces
from nearfar_cloud.types import Objective, Output, Request
from tests.cloud.outside import N_VOCAB, Reference, file, packed, upper_half
from tests.cloud.serving import check_empty, engine

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = ("llama", "F32")
D = 256
CODECS = [Codec.of(CodecSpec(i), D) for i in (CodecId.FP16, CodecId.INT8_OS, CodecId.INT4_OS)]
INT8 = CODECS[1]


def some_ids(seed: int, n: int) -> list[int]:
    rng = random.Random(f"text {seed}")
    return [rng.randrange(N_VOCAB) for _ in range(n)]


def rows_of(text: list[int], entry: int) -> np.ndarray:
    """What a device computes for a text: f32 [n, D] at layer `entry`."""
    reference = Reference(file(*MODEL), Sampling(), entry)
    reference.read(text)
    return reference.rows


def pieces_of(packed_rows: list[bytes], codec: Codec, rng: random.Random) -> Iterator[PackedRows]:
    """As they come over a network: cut anywhere."""
    cuts = sorted({0, len(packed_rows), *(rng.randrange(len(packed_rows)) for _ in range(6))})
    for a, b in itertools.pairwise(cuts):
        yield PackedRows(codec, tuple(packed_rows[a:b]))


def answer(e: Engine, rows: np.ndarray, codec: Codec, entry: int, tenant: str, rng: random.Random) -> Output:
    """A session that sends its rows, asks about the last few, and ends."""
    seq = e.submit(Request(entry=entry, outside=True, objective=Objective(tenant=tenant)))
    for piece in pieces_of(codec.encode(rows), codec, rng):
        e.append(seq, rows=piece)
    last = len(rows) - 1
    first = max(0, last - rng.choice((0, 0, 3)))
    e.ask(seq, Question(1, last, first, draft=tuple(range(last - first))))
    outputs = []
    while not outputs:
        outputs = e.step()
    e.abort(seq)
    e.step()
    (found,) = outputs
    assert not found.error, found
    return found


def told(out: Output) -> tuple[object, ...]:
    assert out.answer is not None
    return out.ids, out.answer.n_accept, out.answer.margin


def test_a_second_session_with_the_same_rows_computes_only_the_rest() -> None:
    rows = rows_of(some_ids(1, 200), 2)
    for model in (packed(*MODEL), upper_half(*MODEL)):
        e = engine(model=model)
        first = answer(e, rows, INT8, 2, "a", random.Random(1))
        before = e.counts.rows
        second = answer(e, rows, INT8, 2, "a", random.Random(1))
        assert told(second) == told(first)
        # 192 of 200 rows were there; rows through half of the layers count half.
        assert e.counts.rows - before == 4
        assert (e.counts.row_hits, e.counts.row_misses) == (3, 3)
        check_empty(e)


@pytest.mark.parametrize("other", ["tenant", "codec", "entry", "first row", "a row of the third block"])
def test_what_differs_shares_no_block_behind_it(other: str) -> None:
    text = some_ids(2, 200)
    rows, entry, codec, tenant, n_hits = rows_of(text, 2), 2, INT8, "a", 0
    e = engine(model=packed(*MODEL))
    answer(e, rows, codec, entry, tenant, random.Random(1))
    match other:
        case "tenant":
            tenant = "b"
        case "codec":
            codec = CODECS[0]
        case "entry":
            entry = 1  # the same numbers, elsewhere
        case "first row":
            rows = np.concatenate([rows_of([7, *text[1:]], 2)[:1], rows[1:]])
        case _:
            rows, n_hits = np.concatenate([rows[:140], rows[141:142], rows[141:]]), 2
    answer(e, rows, codec, entry, tenant, random.Random(1))
    assert e.counts.row_hits == n_hits


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(0, 10**6))
def test_answers_are_the_same_with_and_without_the_cache(seed: int) -> None:
    """Sessions of some tenants, texts that begin alike, three codecs, two entries, a pool that is too small for all."""
    rng = random.Random(seed)
    sessions = []
    for _ in range(rng.randint(2, 6)):
        text = some_ids(rng.randrange(2), rng.choice((65, 130, 150))) + some_ids(rng.randrange(9), rng.randint(1, 70))
        entry = rng.choice((1, 2))
        rest = rng.choice(CODECS), entry, rng.choice("aab"), rng.randrange(99)
        sessions.append((rows_of(text, entry), *rest))
    n_blocks = rng.choice((5, 9, 64))
    found = []
    for prefix_cache in (True, False):
        e = engine(model=packed(*MODEL), n_blocks=n_blocks, prefix_cache=prefix_cache)
        found.append([told(answer(e, *session[:-1], random.Random(session[-1]))) for session in sessions])
        assert prefix_cache or e.counts.row_hits == e.counts.cached_tokens == 0
        check_empty(e)
    assert found[0] == found[1]


# ---------------------------------------------------------------- the hash


def hashes(*pieces: ArrayRows | PackedRows) -> list[bytes]:
    rows = RowPieces(*pieces)
    return Chain(b"salt").upto(rows, len(rows))


def test_a_hash_of_rows_knows_no_pieces_and_every_byte() -> None:
    rng = random.Random(3)
    some = [rng.randbytes(INT8.row_bytes) for _ in range(2 * BLOCK)]
    whole = hashes(PackedRows(INT8, tuple(some)))
    assert len(set(whole)) == 2
    for _ in range(5):
        assert hashes(*pieces_of(some, INT8, rng)) == whole
    for row in (0, 63, 64, 127):
        changed = list(some)
        changed[row] = changed[row][:-1] + bytes([changed[row][-1] ^ 1])
        found = hashes(PackedRows(INT8, tuple(changed)))
        assert [a == b for a, b in zip(found, whole, strict=True)] == [row >= 64, False]


def test_the_same_bytes_of_another_codec_are_other_rows() -> None:
    """A row of int8 in 256 channels, and one of fp16 in fewer: as many bytes."""
    size = Codec.of(CodecSpec(CodecId.INT8_OS), 256).row_bytes
    fp16 = Codec.of(CodecSpec(CodecId.FP16), size // 2 - 1)
    outlier = Codec.of(CodecSpec(CodecId.INT8_OS, outliers=(5,)), 254)
    assert fp16.row_bytes == outlier.row_bytes == size
    rows = tuple(bytes([i]) * size for i in range(BLOCK))
    assert len({hashes(PackedRows(codec, rows))[0] for codec in (INT8, fp16, outlier)}) == 3
    floats = np.frombuffer(b"".join(rows), np.float32).reshape(BLOCK, -1)
    assert hashes(ArrayRows(floats)) != hashes(PackedRows(INT8, rows))


def test_rows_with_equal_checksums_are_told_apart() -> None:
    """Whoever adds the generator of the CRC to a row keeps its checksum: a chain of these would be no proof."""
    row = bytearray(random.Random(4).randbytes(INT8.row_bytes))
    twin = bytearray(row)
    for i, bit in enumerate("1" + format(0x04C11DB7, "032b")):
        twin[20 + i // 8] ^= int(bit) << (i % 8)
    assert bytes(twin) != bytes(row)
    assert crc32(twin) == crc32(row)
    rest = [bytes(INT8.row_bytes)] * (BLOCK - 1)
    assert hashes(PackedRows(INT8, (bytes(row), *rest))) != hashes(PackedRows(INT8, (bytes(twin), *rest)))
