"""The GGUF reader: what the `gguf` package writes reads back the same; what is damaged is refused in words."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import gguf as oracle
import numpy as np
import pytest

from nearfar.errors import FileError, GGUFError, UnsupportedError
from nearfar.gguf_reader import BLOCKS, MAX_ARRAY, GGUFFile, TensorInfo, TensorType
from tests.gguf_bytes import ARRAY, STRING, U32, array, gguf, kv, string, tensor, u32, u64
from tests.paths import SHARED, needs_shared
from tests.tiny import ARCHITECTURES, WEIGHT_TYPES, write_tiny

HUGE = 1 << 63
FOUR_FLOATS = struct.pack("<4f", 1, 2, 3, 4)


@pytest.fixture
def opened(tmp_path: Path):
    """Write bytes to a file and open it."""

    def open_(data: bytes) -> GGUFFile:
        path = tmp_path / "x.gguf"
        path.write_bytes(data)
        return GGUFFile.open(path)

    return open_


# ---- agreement with the gguf package


def _sample(path: Path) -> dict[str, object]:
    """A file with every kind of value, written by the oracle; returns what must be read."""
    w = oracle.GGUFWriter(path, "llama")
    w.add_uint8("n.u8", 255)
    w.add_int8("n.i8", -128)
    w.add_uint16("n.u16", 65535)
    w.add_int16("n.i16", -32768)
    w.add_uint32("n.u32", 2**32 - 1)
    w.add_int32("n.i32", -(2**31))
    w.add_uint64("n.u64", 2**64 - 1)
    w.add_int64("n.i64", -(2**63))
    w.add_float32("n.f32", 0.5)
    w.add_float64("n.f64", 0.1)
    w.add_bool("b.yes", True)
    w.add_bool("b.no", False)
    w.add_string("s.text", "grüß dich, 世界 🙂")
    w.add_array("a.int", [1, -2, 3])
    w.add_array("a.float", [0.5, -0.25])
    w.add_array("a.bool", [True, False])
    w.add_array("a.text", ["a", "", "ä", "🙂" * 50, "\0"])
    w.add_array("a.bytes", b"\x00\x01\xff")
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return {
        "general.architecture": "llama",
        "n.u8": 255,
        "n.i8": -128,
        "n.u16": 65535,
        "n.i16": -32768,
        "n.u32": 2**32 - 1,
        "n.i32": -(2**31),
        "n.u64": 2**64 - 1,
        "n.i64": -(2**63),
        "n.f32": 0.5,
        "n.f64": 0.1,
        "b.yes": True,
        "b.no": False,
        "s.text": "grüß dich, 世界 🙂",
        "a.int": [1, -2, 3],
        "a.float": [0.5, -0.25],
        "a.bool": [True, False],
        "a.text": ["a", "", "ä", "🙂" * 50, "\0"],
        "a.bytes": [0, 1, 255],
    }


def test_every_kind_of_value_reads_back_as_the_gguf_package_wrote_it(tmp_path: Path) -> None:
    expected = _sample(tmp_path / "kv.gguf")
    with GGUFFile.open(tmp_path / "kv.gguf") as file:
        assert file.metadata == expected
        assert [type(v) for v in file.metadata.values()] == [type(v) for v in expected.values()]
        assert file.version == 3
        assert file.tensors == {}


@pytest.mark.parametrize("weight_type", WEIGHT_TYPES)
def test_tensors_lie_where_the_gguf_package_finds_them(weight_type: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "llama", weight_type, n_layers=1, tied=False)
    truth = {t.name: t for t in oracle.GGUFReader(path).tensors}
    with GGUFFile.open(path) as file:
        assert list(file.tensors) == list(truth)
        for name, info in file.tensors.items():
            t = truth[name]
            assert (info.type, info.offset, info.n_bytes) == (t.tensor_type, t.data_offset, t.n_bytes)
            assert info.shape == tuple(int(n) for n in reversed(t.shape))
            np.testing.assert_array_equal(file.raw(name), t.data.view(np.uint8).reshape(-1))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_metadata_of_a_whole_model_equals_that_of_the_gguf_package(arch: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", arch, n_layers=1, exits=(1,))
    fields = {k: f for k, f in oracle.GGUFReader(path).fields.items() if not k.startswith("GGUF.")}
    with GGUFFile.open(path) as file:
        assert file.metadata == {k: f.contents() for k, f in fields.items()}


@needs_shared
@pytest.mark.parametrize(("name", "n", "word"), [("gpt-2", 50257, "Ġthe"), ("phi-3", 32064, "\u2581the")])
def test_real_vocabularies_are_read_whole(name: str, n: int, word: str) -> None:
    with GGUFFile.open(SHARED / "tokenizers" / f"ggml-vocab-{name}.gguf") as file:
        lists = {k.rpartition(".")[2]: v for k, v in file.metadata.items() if isinstance(v, list)}
    assert {len(lists[key]) for key in ("tokens", "token_type", "scores") if key in lists} == {n}
    assert word in lists["tokens"]


def test_block_sizes_are_those_of_the_gguf_package() -> None:
    sizes = {TensorType(int(t)): size for t, size in oracle.GGML_QUANT_SIZES.items()}
    assert sizes == BLOCKS
    assert {t.name for t in BLOCKS} == {t.name for t in oracle.GGML_QUANT_SIZES}


def test_strings_that_are_not_utf8_keep_their_bytes(opened) -> None:
    file = opened(gguf([kv("t", ARRAY, array(STRING, 2, string(b"\xff\x80") + string(b"ok")))]))
    assert [s.encode("utf-8", "surrogateescape") for s in file.metadata["t"]] == [b"\xff\x80", b"ok"]


def test_one_text_that_is_not_utf8_can_still_be_printed(opened) -> None:
    assert opened(gguf([kv("t", STRING, string(b"a\xffb"))])).metadata["t"] == "a\ufffdb"


def test_version_2_reads_like_version_3(opened) -> None:
    file = opened(gguf([kv("k", U32, u32(7))], version=2))
    assert (file.version, file.metadata) == (2, {"k": 7})


@pytest.mark.parametrize("alignment", [8, 32, 256, 4096])
def test_the_stated_alignment_moves_the_tensors(alignment: int, opened) -> None:
    kvs, entry = [kv("general.alignment", U32, u32(alignment))], tensor("a")
    head = len(b"GGUF") + 20 + len(kvs[0]) + len(entry)
    data = b"GGUF" + u32(3) + u64(1) + u64(1) + kvs[0] + entry + bytes(-head % alignment) + FOUR_FLOATS
    file = opened(data)
    assert file.tensors["a"].offset % alignment == 0
    assert file.raw("a").view("<f4").tolist() == [1, 2, 3, 4]


def test_views_are_read_only_and_outlive_the_file(opened) -> None:
    with opened(gguf([], [tensor("a")], FOUR_FLOATS)) as file:
        view = file.raw("a")
    assert not view.flags.writeable
    assert view.view("<f4").sum() == 10


def test_trailing_bytes_are_no_harm(opened) -> None:
    assert opened(gguf([], [tensor("a")], FOUR_FLOATS + b"\0" * 100)).raw("a").size == 16


# ---- files that are no files, or of another kind


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"nothing\.gguf: no such file"):
        GGUFFile.open(tmp_path / "nothing.gguf")


def test_a_folder_is_said_to_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is a folder: expected a GGUF file"):
        GGUFFile.open(tmp_path)


def test_an_empty_file_is_said_to_be_empty(opened) -> None:
    with pytest.raises(FileError, match=r"x\.gguf is empty"):
        opened(b"")


def test_a_pipe_is_refused_at_once_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="pipe is not a plain file"):
        GGUFFile.open(tmp_path / "pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(gguf())
    path.chmod(0)
    with pytest.raises(FileError, match="cannot be read"):
        GGUFFile.open(path)


@pytest.mark.parametrize("name", ["file/below", "a\0b", "n" * 300], ids=["below a file", "NUL", "too long"])
def test_a_path_that_cannot_be_looked_at_is_a_file_error(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"GGUF")
    with pytest.raises(FileError, match="cannot be read"):
        GGUFFile.open(tmp_path / name)


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (b"GGUX", "it starts with b'GGUX', expected b'GGUF'"),
        (b"PK\x03\x04....", "a PyTorch or zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"tjgg\x01", "from before GGUF"),
        (b"GG", "it starts with b'GG'"),
    ],
)
def test_a_wrong_magic_is_named_and_known_lookalikes_explained(start: bytes, said: str, opened) -> None:
    with pytest.raises(GGUFError, match=re.escape(said)):
        opened(start)


@pytest.mark.parametrize(
    ("version", "said"), [(0, "version 0"), (1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")]
)
def test_other_versions_are_refused(version: int, said: str, opened) -> None:
    with pytest.raises(GGUFError, match=said):
        opened(gguf(version=version))


# ---- damage


def _whole() -> bytes:
    kvs = [
        kv("general.architecture", STRING, string("llama")),
        kv("a.number", U32, u32(7)),
        kv("a.list", ARRAY, array(U32, 3, u32(1) + u32(2) + u32(3))),
        kv("a.words", ARRAY, array(STRING, 3, string("one") + string("") + string("three"))),
    ]
    entries = [tensor("first", (8, 2), 0, 0), tensor("second", (256,), TensorType.TQ2_0, 64)]
    return gguf(kvs, entries, bytes(64) + bytes(66))


def test_the_whole_sample_is_sound(opened) -> None:
    file = opened(_whole())
    assert len(file.metadata) == 4
    assert file.tensors["first"].shape == (2, 8)


@pytest.mark.parametrize("tenth", range(10))
def test_a_file_cut_anywhere_is_refused_in_words(tenth: int, opened) -> None:
    whole = _whole()
    for cut in range(tenth, len(whole), 10):
        with pytest.raises(FileError, match=r"x\.gguf.*(cut short|damaged|empty|it starts with)"):
            opened(whole[:cut])


def test_a_cut_names_what_was_being_read(opened) -> None:
    text = gguf([kv("general.architecture", STRING, string("llama"))])
    with pytest.raises(GGUFError, match=r"the value of 'general\.architecture' at byte 64 needs 5 bytes, 2 are left"):
        opened(text[: text.index(b"llama") + 2])
    words = gguf([kv("words", ARRAY, array(STRING, 2, string("one") + string("three")))])
    with pytest.raises(GGUFError, match="the value of 'words' passes the end of the file"):
        opened(words[: words.index(b"three") + 2])
    with pytest.raises(GGUFError, match=r"the value of 'n' at byte 37 needs 4 bytes, 3 are left"):
        opened(gguf([kv("n", U32, u32(1))])[:40])
    with pytest.raises(GGUFError, match=r"second \[256\] TQ2_0 needs 66 bytes at byte \d+, 65 are there"):
        opened(_whole()[:-1])


@pytest.mark.parametrize("n", [HUGE, (1 << 64) - 1, HUGE - 1, 1 << 32, 1000])
@pytest.mark.parametrize(
    "build",
    [
        lambda n: gguf(n_tensors=n),
        lambda n: gguf(n_kv=n),
        lambda n: gguf([string(b"key", n) + u32(U32) + u32(1)]),
        lambda n: gguf([kv("k", STRING, string(b"text", n))]),
        lambda n: gguf([kv("k", ARRAY, array(U32, n, u32(1)))]),
        lambda n: gguf([kv("k", ARRAY, array(STRING, n, string("x")))]),
        lambda n: gguf([kv("k", ARRAY, array(STRING, 2, string("x") + string("y", n)))]),
        lambda n: gguf([], [string(b"name", n) + tensor("a")[9:]], FOUR_FLOATS),
        lambda n: gguf([], [tensor("a", (n,))], FOUR_FLOATS),
        lambda n: gguf([], [tensor("a", (4, n))], FOUR_FLOATS),
        lambda n: gguf([], [tensor("a", (n, n, n, n))], FOUR_FLOATS),
        lambda n: gguf([], [tensor("a", offset=n // 32 * 32)], FOUR_FLOATS),
    ],
    ids=[
        "tensors",
        "keys",
        "key-length",
        "text-length",
        "array",
        "array-of-text",
        "text-in-array",
        "name-length",
        "dimension",
        "second-dimension",
        "all-dimensions",
        "offset",
    ],
)
def test_counts_and_sizes_beyond_the_file_are_refused(build, n: int, opened) -> None:
    with pytest.raises(GGUFError, match=r"x\.gguf: "):
        opened(build(n))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (gguf([kv("k", U32, u32(1)), kv("k", U32, u32(1))]), "the key 'k' occurs twice"),
        (gguf([kv("", U32, u32(1)) + b"\0"]), "a key at byte 32 is 0 bytes long, expected 1..65535"),
        (gguf([kv(b"\xff", U32, u32(1))]), "a key b'\\xff' is not printable text"),
        (gguf([kv(b"k\x1b[31m", U32, u32(1))]), "a key b'k\\x1b[31m' is not printable text"),
        (gguf([kv("k", 13, u64(1))]), "'k' is of type 13, expected 0..12"),
        (gguf([kv("k", ARRAY, array(13, 1, u64(1)))]), "'k' is of type 13, expected 0..12"),
        (gguf([kv("k", ARRAY, array(ARRAY, 1, array(U32, 1, u32(1))))]), "an array of arrays"),
        (gguf([kv("k", 7, b"\2")]), "a truth value of 2, expected 0 or 1"),
        (gguf([kv("k", ARRAY, array(7, 2, b"\1\3"))]), "a truth value of 3, expected 0 or 1"),
        (gguf([kv("general.alignment", U32, u32(0))]), "general.alignment=0: expected a power of two"),
        (gguf([kv("general.alignment", U32, u32(48))]), "general.alignment=48"),
        (gguf([kv("general.alignment", U32, u32(1 << 31))]), "general.alignment=2147483648"),
        (gguf([kv("general.alignment", STRING, string("32"))]), "general.alignment=32"),
        (gguf([kv("general.alignment", 7, b"\1")]), "general.alignment=True"),
        (gguf([], [tensor("a", ())], FOUR_FLOATS), "0 dimensions, expected 1..4"),
        (gguf([], [tensor("a", (1,) * 5)], FOUR_FLOATS), "5 dimensions, expected 1..4"),
        (gguf([], [tensor("a", (0,))], FOUR_FLOATS), "has the shape [0]"),
        (gguf([], [tensor("a", (4, 0))], FOUR_FLOATS), "has the shape [0, 4]"),
        (gguf([], [tensor("", (4,)) + b"\0"], FOUR_FLOATS), "a tensor's name at byte 32 is 0 bytes long"),
        (gguf([], [tensor("n" * 65)], FOUR_FLOATS), "is 65 bytes long, expected 1..64"),
        (gguf([], [tensor(b"\xc3")], FOUR_FLOATS), "a tensor's name b'\\xc3' is not printable text"),
        (gguf([], [tensor(b"a\0")], FOUR_FLOATS), "is not printable text"),
        (gguf([], [tensor("a"), tensor("a", offset=32)], bytes(64)), "two tensors are named a"),
        (gguf([], [tensor("a", (16,)), tensor("b", offset=32)], bytes(64)), "a and b overlap at byte"),
        (gguf([], [tensor("a"), tensor("b")], bytes(64)), "overlap"),
        (gguf([], [tensor("a", offset=16)], bytes(64)), "a starts at 16, expected a multiple of 32"),
        (gguf([], [tensor("a", (40,), TensorType.Q8_0)], bytes(99)), "blocks of 32 weights"),
        (gguf([], [tensor("a", (128,), TensorType.TQ1_0)], bytes(99)), "blocks of 256 weights"),
        (gguf([], [tensor("a", (4,), 1000, 1 << 40)], bytes(64)), "a [4] number 1000 needs 1 bytes"),
    ],
)
def test_damage_is_refused_with_the_reason(data: bytes, said: str, opened) -> None:
    with pytest.raises(GGUFError, match=re.escape(said)):
        opened(data)


def test_an_absurdly_long_list_is_refused_before_it_is_built(opened) -> None:
    with pytest.raises(GGUFError, match=f"has {MAX_ARRAY + 1} elements"):
        opened(gguf([kv("k", ARRAY, array(0, MAX_ARRAY + 1, bytes(MAX_ARRAY + 1)))]))


# ---- types that are not computed with


@pytest.mark.parametrize("kind", [TensorType.IQ2_XXS, TensorType.Q5_1, TensorType.I32, TensorType.F64])
def test_an_unsupported_type_is_named_when_the_tensor_is_read(kind: TensorType, opened) -> None:
    weights, size = BLOCKS[kind]
    file = opened(gguf([], [tensor("a", (weights,), kind)], bytes(size)))
    with pytest.raises(UnsupportedError, match=f"a is of type {kind.name}; this engine reads F32, F16"):
        file.raw("a")


@pytest.mark.parametrize(("number", "name"), [(36, "I2_S"), (77, "number 77"), ((1 << 32) - 1, "number 4294967295")])
def test_a_type_of_unknown_size_opens_and_is_named_when_read(number: int, name: str, opened) -> None:
    file = opened(gguf([], [tensor("a", (256,), number, 32), tensor("b")], FOUR_FLOATS.ljust(32) + bytes(100)))
    assert file.raw("b").size == 16
    assert file.tensors["a"] == TensorInfo("a", TensorType(number), (256,), file.tensors["b"].offset + 32, 100)
    with pytest.raises(UnsupportedError, match=f"a is of type {name};"):
        file.raw("a")


def test_a_tensor_that_is_not_there_is_named(opened) -> None:
    with pytest.raises(GGUFError, match="no tensor named 'b' among its 1"):
        opened(gguf([], [tensor("a")], FOUR_FLOATS)).raw("b")
