"""Large vocabularies: a table on the file's bytes and an index of hashes say what lists and dicts say."""

from __future__ import annotations

import struct
from array import array
from pathlib import Path

import numpy as np
import pytest

from nearfar import gguf_reader, text_table
from nearfar.errors import GGUFError, TokenizerError
from nearfar.gguf_reader import GGUFFile
from nearfar.gguf_writer import GGUFWriter
from nearfar.text_table import TextIndex, TextTable, Without, text_hash, text_hashes
from nearfar.tokenizer import tokenizer_from_metadata
from tests.gguf_bytes import ARRAY, STRING, gguf, kv, string
from tests.gguf_bytes import array as gguf_array
from tests.tiny import write_tiny


def table_of(raws: list[bytes]) -> TextTable:
    data, starts = b"xyz", array("Q")
    for raw in raws:
        data += struct.pack("<Q", len(raw))
        starts.append(len(data))
        data += raw
    starts.append(len(data) + 8)
    return TextTable(data + b"behind", starts)


@pytest.fixture
def raws() -> list[bytes]:
    """Random texts of every length that matters, some that are no UTF-8, none twice."""
    rng = np.random.default_rng(0)
    found = {rng.integers(0, 256, n, np.uint8).tobytes() for n in [*range(1, 40), *[7, 8, 9] * 500, 300, 5000]}
    return [*found, b"", b"a", "grün".encode(), b"\xff\xfe"]


def test_a_table_reads_as_the_list_of_its_texts(raws: list[bytes]) -> None:
    table, texts = table_of(raws), [raw.decode("utf-8", "surrogateescape") for raw in raws]
    assert len(table) == len(texts)
    assert list(table) == texts
    assert table == texts
    assert [table[i] for i in (0, 5, -1)] == [texts[i] for i in (0, 5, -1)]
    assert table[3:9] == texts[3:9]
    assert list(table.raws()) == raws
    assert table.has_empty
    assert not table_of([b"a", b"b"]).has_empty
    with pytest.raises(IndexError):
        table[len(texts)]


@pytest.mark.parametrize("few", [0, 3, 1 << 20])
def test_hashes_made_together_are_those_made_one_by_one(
    few: int, raws: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_table, "_FEW", few)
    monkeypatch.setattr(text_table, "_BLOCK", 100)
    assert text_hashes(table_of(raws)).tolist() == [text_hash(raw) for raw in raws]
    assert len({text_hash(raw) for raw in raws}) == len(raws)
    assert text_hash(b"a") != text_hash(b"a\0")


def test_an_index_finds_what_a_dict_finds(raws: list[bytes]) -> None:
    table = table_of(raws)
    index, known = TextIndex(table), {text: i for i, text in enumerate(table)}
    assert index.doubles() is None
    assert all(index[text] == i for text, i in known.items())
    assert len(index) == len(known)
    for absent in ("absent", "b", "\ud800", "gru"):
        assert index.get(absent) is None
        assert absent not in index


def test_texts_whose_hashes_collide_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [b"one", b"two", b"three", b"two", b"four"]
    monkeypatch.setattr(text_table, "text_hash", lambda raw: 7)
    monkeypatch.setattr(text_table, "text_hashes", lambda table: np.full(len(table), 7, np.uint64))
    index = TextIndex(table_of(texts[:3] + texts[4:]))
    assert [index[t.decode()] for t in (b"one", b"two", b"three", b"four")] == [0, 1, 2, 3]
    assert index.doubles() is None
    assert index.get("five") is None


def test_of_equal_texts_the_first_is_found_and_both_are_named() -> None:
    index = TextIndex(table_of([b"a", b"b", b"c", b"b", b"b"]))
    assert index["b"] == 1
    assert index.doubles() == (1, 3)


def test_the_first_text_without_an_inner_byte_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_table, "_BLOCK", 2)
    fine = [b"a b", b"ab c", b"a  ", b"   "]  # a length of 32 is a space too: it is no byte of a text
    assert table_of([*fine, b"x" * 15 + b" " + b"x" * 16]).without_inner(32) is None
    for bad in (b" a", b"a ", b"ab", b"", b" ", b"  ", b"y" * 32):
        assert table_of([*fine, bad, *fine]).without_inner(32) == 4


def test_what_is_hidden_is_not_found() -> None:
    left = Without({"a": 0, "b": 1, "c": 2}, frozenset({1}))
    assert (left.get("a"), left.get("b"), left.get("c")) == (0, None, 2)
    assert list(left) == ["a", "c"]
    assert len(left) == 2


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every list of texts counts as a large one."""
    monkeypatch.setattr(gguf_reader, "LARGE", 1)


@pytest.mark.usefixtures("large")
def test_a_large_vocabulary_makes_the_ids_of_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tiny(tmp_path / "m.gguf", n_layers=1)
    text = "The rain in Spain <|e|> and the other one 🙂 \x00 \udcff naïve"
    with GGUFFile.open(path) as file:
        assert isinstance(file.metadata["tokenizer.ggml.tokens"], TextTable)
        compact = tokenizer_from_metadata(file.metadata)
    monkeypatch.setattr(gguf_reader, "LARGE", 1 << 16)
    with GGUFFile.open(path) as file:
        plain = tokenizer_from_metadata(file.metadata)
    for parse_special in (False, True):
        ids = plain.encode(text, parse_special=parse_special)
        assert compact.encode(text, parse_special=parse_special) == ids
        assert compact.decode(ids, skip_special=False) == plain.decode(ids, skip_special=False)
    assert compact.eog_ids == plain.eog_ids
    assert compact.vocab.marked == plain.vocab.marked
    assert dict(compact.vocab.written) == plain.vocab.written
    assert [compact.token_bytes(i) for i in range(320)] == [plain.token_bytes(i) for i in range(320)]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(
    ("tokens", "merges", "said"),
    [
        (["a", "b", "a"], ["a b"], "'a' is token 0 and token 2"),
        (["a", "b", ""], ["a b", "ab"], r"merges\[1\]='ab'"),
        (["a", "b"], ["a b", " b"], r"merges\[1\]=' b'"),
    ],
)
def test_a_large_vocabulary_is_checked_like_a_small_one(
    tokens: list[str], merges: list[str], said: str, tmp_path: Path
) -> None:
    def texts(key: str, values: list[str]) -> bytes:
        return kv(f"tokenizer.ggml.{key}", ARRAY, gguf_array(STRING, len(values), b"".join(map(string, values))))

    model = [kv("tokenizer.ggml.model", STRING, string("gpt2")), kv("tokenizer.ggml.pre", STRING, string("smollm"))]
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf([*model, texts("tokens", tokens), texts("merges", merges)]))
    with GGUFFile.open(path) as file, pytest.raises(TokenizerError, match=said):
        tokenizer_from_metadata(file.metadata)


@pytest.mark.usefixtures("large")
def test_a_table_that_passes_the_end_of_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    values = struct.pack("<Q", 1) + b"a" + struct.pack("<Q", 1 << 62) + bytes(8)
    path.write_bytes(gguf([kv("texts", ARRAY, gguf_array(STRING, 3, values))]))
    with pytest.raises(GGUFError, match="passes the end"):
        GGUFFile.open(path)


@pytest.mark.usefixtures("large")
def test_a_table_is_written_like_a_list(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", n_layers=1)
    key = "tokenizer.ggml.tokens"
    with GGUFFile.open(path) as file:
        w = GGUFWriter(tmp_path / "copy.gguf")
        w.add(key, file.metadata[key])
        with GGUFFile.open(w.write()) as copy:
            assert copy.metadata[key] == file.metadata[key]
            assert copy.encoded(key) == file.encoded(key)
