"""Frames between processes: what is sent comes, and bytes that are no frame are an error before they cost memory."""

from __future__ import annotations

import os
import random
import socket
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("msgspec", reason="msgspec is not installed (extra [cloud])")

import msgspec

from nearfar_cloud.executors.transport import DTYPES, PREFIX, Frame, Frames, Link, LinkEnded, WireError, encode


class Note(msgspec.Struct, tag=True):
    text: str
    n: int = 0


class Other(msgspec.Struct, tag=True):
    ids: list[int]


ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)
IDS = np.arange(5, dtype=np.int32)
FRAME = encode(Note("rows", 3), [ROWS, IDS])


def frames(**limits: int) -> Frames[Note | Other]:
    return Frames(Note | Other, **limits)


def same(found: Frame[Note | Other], message: msgspec.Struct, *arrays: np.ndarray) -> bool:
    pairs = zip(found.arrays, arrays, strict=True)
    return found.message == message and all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


def test_a_frame_cut_at_every_byte_is_whole_again() -> None:
    for cut in range(len(FRAME) + 1):
        reader = frames()
        found = [*reader.feed(FRAME[:cut]), *reader.feed(FRAME[cut:])]
        assert len(found) == 1
        assert same(found[0], Note("rows", 3), ROWS, IDS)
        assert reader.n_waiting == 0


@pytest.mark.parametrize("size", [1, 3, 17, 1000])
def test_many_frames_in_pieces_of_any_size(size: int) -> None:
    sent = [(Note(f"number {i}", i), ROWS[: i % 4]) if i % 3 else (Other([i]), IDS) for i in range(20)]
    stream = b"".join(encode(message, [array]) for message, array in sent)
    reader = frames()
    found = [f for at in range(0, len(stream), size) for f in reader.feed(stream[at : at + size])]
    assert all(same(f, message, array) for f, (message, array) in zip(found, sent, strict=True))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0, 3), (2, 3, 4, 1)])
def test_arrays_of_all_kinds_and_shapes(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.ones(shape, dtype)
    (found,) = frames().feed(encode(Note(""), [array]))
    assert found.arrays[0].shape == shape
    assert same(found, Note(""), array)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    yield a, b
    a.close()
    b.close()


@pytest.mark.parametrize("cut", range(len(FRAME)))
def test_a_link_that_ends_anywhere_within_a_frame_says_so(cut: int, pair: tuple[socket.socket, socket.socket]) -> None:
    pair[1].sendall(FRAME + FRAME[:cut])
    pair[1].close()
    link = Link[Note | Other](pair[0], Note | Other)
    assert len(link.read()) == 1
    with pytest.raises(WireError if cut else LinkEnded, match=f"after {cut} bytes" if cut else "closed"):
        link.read()


def prefixed(n_header: int, n_arrays: int, magic: bytes = b"nfc1") -> bytes:
    return PREFIX.pack(magic, n_header, n_arrays)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        (prefixed(2**32 - 1, 0), "4294967295 bytes of header"),
        (prefixed((8 << 20) + 1, 0), "bytes of header"),
        (prefixed(10, 2**64 - 1), "18446744073709551615 bytes of arrays"),
        (prefixed(10, (64 << 20) + 1), "bytes of arrays"),
        (prefixed(10, 10, b"GET "), "another protocol"),
        (bytes(16), "another protocol"),
    ],
)
def test_absurd_sizes_are_refused_at_the_prefix(prefix: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message):
        frames().feed(prefix)


def test_announced_memory_is_not_set_aside_before_it_comes() -> None:
    reader = frames()
    tracemalloc.start()
    try:
        assert reader.feed(prefixed(8 << 20, 64 << 20)) == []
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def framed(header: object, body: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else msgspec.msgpack.encode(header)
    return prefixed(len(raw), len(body)) + raw + body


A_NOTE = {"type": "Note", "text": "x"}


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (framed(b""), "header that is none"),
        (framed(b"\xc1\xc1"), "header that is none"),
        (framed(b"\x91" * 100_000), "header that is none"),
        (framed([A_NOTE]), "header that is none"),
        (framed([{"type": "Unknown"}, []]), "header that is none"),
        (framed([{"type": "Note", "text": 5}, []]), "header that is none"),
        (framed([{"type": "Other", "ids": ["x"]}, []]), "header that is none"),
        (framed([A_NOTE, [["|O", [1]]]], b"12345678"), "an array of '|O'"),
        (framed([A_NOTE, [["<f8", [1]]]], b"12345678"), "an array of '<f8'"),
        (framed([A_NOTE, [["<f4", [2]]]], b"1234"), "arrays of 8 bytes in a frame that holds 4"),
        (framed([A_NOTE, [["<f4", [2**40]]]], b"1234"), "arrays of 4398046511104 bytes"),
        (framed([A_NOTE, [["<f4", [2**63 - 1] * 4]]], b"1234"), "in a frame that holds 4"),
        (framed([A_NOTE, []], b"1234"), "arrays of 0 bytes in a frame that holds 4"),
        (framed([A_NOTE, [["<f4", [-1]], ["<f4", [2]]]], b"1234"), "from 0 up"),
        (framed([A_NOTE, [["<f4", [1, 1, 1, 1, 1]]]], b"1234"), "from 0 up"),
        (framed([A_NOTE, [["<f4", [0, 2**64 - 1]]]]), "absurd sizes"),
        (framed([A_NOTE, [["<f4", [0, 2**63 - 1]]]]), "absurd sizes"),
        (framed([A_NOTE, [["<f4", [2**26, 2**26, 0, 2**26]]]]), "absurd sizes"),
        (framed([A_NOTE, [["|u1", [0]]] * 5000]), "5000 arrays"),
    ],
)
def test_a_header_that_lies_is_refused(frame: bytes, message: str) -> None:
    with pytest.raises(WireError, match=message.replace("|", r"\|")):
        frames().feed(frame)


def test_random_damage_is_an_error_or_another_message_and_never_anything_else() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        damaged = bytearray(FRAME)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        if rng.random() < 0.2:
            damaged = bytearray(os.urandom(rng.randint(0, 60)))
        try:
            for found in frames(max_header=1000, max_arrays=1000).feed(bytes(damaged)):
                assert isinstance(found.message, Note | Other)
        except WireError:
            pass


def test_a_link_never_waits_for_a_reader_that_does_not_read(pair: tuple[socket.socket, socket.socket]) -> None:
    big = np.zeros(1 << 20, np.float32)
    writer, reader = Link[Note](pair[0], Note), Link[Note](pair[1], Note)
    for i in range(3):
        writer.post(Note("big", i), [big])
    assert writer.n_unsent > 2 * big.nbytes
    found: list[Frame[Note]] = []
    while len(found) < 3:
        found += reader.read()
        writer.flush()
    assert writer.n_unsent == 0
    assert [f.message.n for f in found] == [0, 1, 2]
    assert all(np.array_equal(f.arrays[0], big) for f in found)


def test_loopback_tcp_and_a_reader_that_is_gone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    sender, receiver = Link[Note](ours, Note), Link[Note](theirs, Note)
    sender.post(Note("over TCP"), [IDS])
    assert receiver.wait(10)
    (found,) = receiver.read()
    assert found.message.text == "over TCP"
    receiver.close()

    def talk_on() -> None:
        for _ in range(1000):
            sender.post(Note("into the void"), [ROWS])

    with pytest.raises(LinkEnded, match="gone"):
        talk_on()
    sender.close()
