"""The GGUF writer: what it writes, the `gguf` package and our reader both read back."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf as oracle
import numpy as np
import pytest

from nearfar.errors import FileError, UsageError
from nearfar.gguf_reader import BLOCKS, READABLE, GGUFFile, TensorType, ValueType
from nearfar.gguf_writer import GGUFWriter
from nearfar.quant import dequantize

VALUES: list[tuple[str, object, ValueType | None]] = [
    ("text", "grüß 🙂", None),
    ("text.empty", "", None),
    ("yes", True, None),
    ("whole", 7, None),
    ("whole.negative", -7, None),
    ("number", 0.1, None),
    ("u8", 255, ValueType.U8),
    ("i8", -128, ValueType.I8),
    ("u16", 65535, ValueType.U16),
    ("i16", -32768, ValueType.I16),
    ("u64", 2**64 - 1, ValueType.U64),
    ("i64", -(2**63), ValueType.I64),
    ("f64", 0.1, ValueType.F64),
    ("numpy.whole", np.int64(3), None),
    ("list.text", ["a", "", "ä\0b"], None),
    ("list.bool", [True, False], None),
    ("list.whole", [1, -2, 3], None),
    ("list.number", [0.5, -0.25], None),
    ("list.u32", [2, 4], ValueType.U32),
    ("list.empty", [], ValueType.F32),
    ("array.f32", np.array([1.5, 2.5], np.float32), None),
    ("array.u8", np.arange(5, dtype=np.uint8), None),
    ("array.bool", np.array([True, False]), None),
]


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def test_values_read_back_the_same_in_our_reader_and_in_the_gguf_package(tmp_path: Path) -> None:
    w = GGUFWriter(tmp_path / "v.gguf")
    for key, value, kind in VALUES:
        w.add(key, value, kind)
    path = w.write()
    fields = oracle.GGUFReader(path).fields
    with GGUFFile.open(path) as file:
        assert list(file.metadata) == [key for key, _, _ in VALUES]
        for key, value, _ in VALUES:
            expected = np.float32(0.1).item() if key == "number" else _plain(value)
            assert file.metadata[key] == expected
            assert type(file.metadata[key]) is type(expected)
            assert len(fields[key].data) == 0 or fields[key].contents() == expected  # it cannot show an empty list


@pytest.mark.parametrize(
    ("value", "number"),
    [(7, 4), (-7, 5), (0.5, 6), (True, 7), ("x", 8), ([1, 2], 5), ([0.5], 6), (np.zeros(2, np.uint32), 4)],
)
def test_a_value_gets_the_type_that_llama_cpp_expects(value: object, number: int, tmp_path: Path) -> None:
    w = GGUFWriter(tmp_path / "v.gguf")
    w.add("k", value)
    w.write()
    assert int(oracle.GGUFReader(tmp_path / "v.gguf").fields["k"].types[-1]) == number


def test_token_bytes_that_are_not_utf8_survive_a_round_trip(tmp_path: Path) -> None:
    w = GGUFWriter(tmp_path / "v.gguf")
    w.add("t", [b"\xff\x80".decode("utf-8", "surrogateescape"), "ok"])
    path = w.write()
    assert path.read_bytes().count(b"\xff\x80") == 1
    with GGUFFile.open(path) as file:
        assert file.metadata["t"][0].encode("utf-8", "surrogateescape") == b"\xff\x80"


@pytest.mark.parametrize("kind", sorted(READABLE), ids=lambda t: t.name)
def test_raw_tensors_read_back_the_same_in_both_readers(kind: TensorType, tmp_path: Path) -> None:
    weights, size = BLOCKS[kind]
    raw = np.random.default_rng(0).integers(0, 256, 3 * 5 * size, dtype=np.uint8)
    w = GGUFWriter(tmp_path / "t.gguf")
    w.add("general.architecture", "llama")
    w.add_tensor("one", np.ones(3, np.float32))  # 12 bytes: the next tensor needs padding
    w.add_tensor("two", raw, kind, (3, 5 * weights))
    path = w.write()
    truth = {t.name: t for t in oracle.GGUFReader(path).tensors}["two"]
    np.testing.assert_array_equal(truth.data.view(np.uint8).reshape(-1), raw)
    with GGUFFile.open(path) as file:
        assert (file.tensors["two"].type, file.tensors["two"].shape) == (kind, (3, 5 * weights))
        np.testing.assert_array_equal(file.raw("two"), raw)
        assert file.raw("one").view("<f4").tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", [TensorType.F32, TensorType.F16, TensorType.BF16, TensorType.Q8_0, TensorType.Q4_0])
def test_float_tensors_are_rounded_to_the_type_asked_for(kind: TensorType, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    w = GGUFWriter(tmp_path / "t.gguf")
    w.add_tensor("x", x, kind)
    with GGUFFile.open(w.write()) as file:
        y = dequantize(file.raw("x"), kind, (2, 64))
    np.testing.assert_allclose(y, x, atol={"F32": 0, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 2e-2, "Q4_0": 0.3}[kind.name])


def test_the_file_ends_on_a_whole_block_of_padding(tmp_path: Path) -> None:
    w = GGUFWriter(tmp_path / "t.gguf")
    w.add_tensor("x", np.zeros(3, np.float32))
    assert w.write().stat().st_size % 32 == 0


@pytest.mark.parametrize(
    ("add", "said"),
    [
        (lambda w: (w.add("k", 1), w.add("k", 2)), "each key once"),
        (lambda w: w.add("", 1), "expected 1..65535 bytes"),
        (lambda w: w.add("general.alignment", 64), "always aligns to 32"),
        (lambda w: w.add("k", 1 << 32), "does not fit U32"),
        (lambda w: w.add("k", [1 << 31]), "does not fit I32"),
        (lambda w: w.add("k", -1, ValueType.U8), "does not fit U8"),
        (lambda w: w.add("k", 0.5, ValueType.U8), "expected whole numbers"),
        (lambda w: w.add("k", "x", ValueType.U8), "expected numbers"),
        (lambda w: w.add("k", 1, ValueType.STRING), "expected text"),
        (lambda w: w.add("k", [1, "x"]), "a list of 2 types"),
        (lambda w: w.add("k", []), "a list of 0 types"),
        (lambda w: w.add("k", None), "expected text, a truth value"),
        (lambda w: w.add("k", np.zeros(2, complex)), "has no GGUF type"),
        (lambda w: w.add_tensor("n" * 64, np.zeros(1, np.float32)), "expected 1..63 bytes"),
        (lambda w: [w.add_tensor("x", np.zeros(1, np.float32)) for _ in "12"], "each name once"),
        (lambda w: w.add_tensor("x", np.zeros(5, np.uint8), TensorType.F32, (1,)), "is 4 bytes, got 5"),
        (lambda w: w.add_tensor("x", np.zeros(4, np.uint8), TensorType.F32), "expected 1..4 dimensions"),
        (lambda w: w.add_tensor("x", np.zeros((0, 4), np.float32)), "dimensions of 1 or more"),
        (lambda w: w.add_tensor("x", np.zeros((1, 33), np.float32), TensorType.Q8_0), "blocks of 32 weights"),
        (lambda w: w.add_tensor("x", np.full(4, np.nan, np.float32)), "must be finite"),
    ],
)
def test_what_cannot_be_written_is_refused_when_it_is_added(add, said: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=said):
        add(GGUFWriter(tmp_path / "x.gguf"))


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    w = GGUFWriter(path)
    w.add("k", 1)
    with pytest.raises(FileError, match=r"x\.gguf cannot be written: No space left on device"):
        w.write()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_writing_into_a_folder_that_is_not_there_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot be written: No such file or directory"):
        GGUFWriter(tmp_path / "no" / "x.gguf").write()


def test_the_header_is_what_the_format_says(tmp_path: Path) -> None:
    w = GGUFWriter(tmp_path / "x.gguf")
    w.add("k", 1)
    assert w.write().read_bytes().startswith(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k")
