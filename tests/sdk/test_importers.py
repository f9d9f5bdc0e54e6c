"""llama2.c checkpoints become GGUF files that our reference and llama.cpp run alike."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from nearfar.errors import FileError, NearfarError, TokenizerError, UnsupportedError, UsageError, WeightsError
from nearfar.gguf_reader import GGUFFile, TensorType
from nearfar.importers import Llama2cHeader, import_model, read_llama2c
from nearfar.lower_numpy import NumpyLower
from nearfar.quant import all_finite, dequantize, pack_ternary, unpack_ternary
from nearfar.tokenizer import tokenizer_from_metadata
from nearfar.weights import Weights
from tests.micro_lm import read_micro_lm
from tests.paths import SHARED, needs_shared

WEIGHTS = SHARED / "weights"
GREEDY_TOKENS = 64


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stories") / "stories260K.gguf"
    import_model(WEIGHTS / "stories260K.bin", path)
    return path


@needs_shared
def test_every_number_of_the_checkpoint_is_in_the_gguf_file(stories: Path) -> None:
    header, tensors = read_llama2c(WEIGHTS / "stories260K.bin")
    assert header == Llama2cHeader(64, 172, 5, 8, 4, 512, 512, tied=True)
    with Weights.open(stories) as w:
        assert (w.config.d_model, w.config.d_ff, w.config.n_kv_heads, w.config.head_dim) == (64, 172, 4, 8)
        assert w.head_name == "token_embd.weight"
        np.testing.assert_array_equal(w.f32("token_embd.weight"), tensors["token_embd"])
        for i in range(5):
            for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down", "ffn_up", "attn_norm"):
                np.testing.assert_array_equal(w.f32(f"blk.{i}.{part}.weight"), tensors[part][i])
        assert sum(t.n_bytes for t in w.file.tensors.values()) == 1_056_540 - 28 - 2 * 512 * 4 * 4  # less cos and sin


@needs_shared
def test_the_tokenizer_has_the_kinds_and_spaces_of_sentencepiece(stories: Path) -> None:
    with GGUFFile.open(stories) as file:
        meta = file.metadata
    tokens = meta["tokenizer.ggml.tokens"]
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"]
    assert meta["tokenizer.ggml.token_type"] == [2, 3, 3] + [6] * 256 + [1] * 253
    assert not any(" " in t for t in tokens)
    assert "\u2581the" in tokens
    assert len(meta["tokenizer.ggml.scores"]) == 512
    assert (meta["tokenizer.ggml.bos_token_id"], meta["tokenizer.ggml.eos_token_id"]) == (1, 2)


@needs_shared
def test_the_reference_engine_tells_the_story_that_llama_cpp_tells(stories: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="the extra [llama] is not installed")
    outside = llama_cpp.Llama(str(stories), n_ctx=512, n_threads=1, verbose=False)
    prompt = outside.tokenize(b"Once upon a time")
    theirs = []
    for token in outside.generate(prompt, temp=0.0):
        theirs.append(int(token))
        if len(theirs) == GREEDY_TOKENS:
            break

    with Weights.open(stories) as weights:
        lower = NumpyLower(weights)
        kv, ids, ours = lower.new_kv(512), list(prompt), []
        while len(ours) < GREEDY_TOKENS:
            h = lower.forward(lower.embed(np.array(ids, np.int32)), kv, 0, 5)
            ids = [int(lower.logits(h[-1:])[0].argmax())]
            ours += ids
    assert ours == theirs
    assert "Lily" in outside.detokenize(prompt + ours).decode()


@needs_shared
@pytest.mark.parametrize(
    "text", ["Once upon a time", "", " ", "  two  spaces", "Lily's 3 dogs!\n\tÄ 🙂", "ab" * 50, "<s> is text", "\u2581"]
)
def test_its_tokenizer_splits_text_as_llama_cpp_does(text: str, stories: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="the extra [llama] is not installed")
    outside = llama_cpp.Llama(str(stories), vocab_only=True, verbose=False)
    with GGUFFile.open(stories) as file:
        ours = tokenizer_from_metadata(file.metadata)
    theirs = outside.tokenize(text.encode(), add_bos=True, special=False)
    assert ours.encode(text) == theirs


# ---- a small checkpoint of our own, to be damaged


def _checkpoint(
    *, n_layers: int = 2, dim: int = 16, n_heads: int = 4, n_vocab: int = 260, tied: bool = True, base: float = 1e4
) -> bytes:
    header = Llama2cHeader(dim, 12, n_layers, n_heads, 2, n_vocab, 16, tied)
    signed_vocab = n_vocab if tied else -n_vocab
    rng, out = np.random.default_rng(0), [struct.pack("<7i", dim, 12, n_layers, n_heads, 2, signed_vocab, 16)]
    angle = np.arange(16)[:, None] * base ** (-np.arange(header.head_dim // 2) / (header.head_dim // 2))
    for name, shape in header.tensors().items():
        x = {"cos": np.cos(angle), "sin": np.sin(angle)}.get(name, rng.normal(size=shape))
        out.append(x.astype("<f4").tobytes())
    return b"".join(out)


def _tokenizer(n_vocab: int = 260) -> bytes:
    words = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(f"<0x{b:02X}>".encode() for b in range(256))]
    words += [b" x%d" % i for i in range(n_vocab - len(words))]
    return struct.pack("<i", 7) + b"".join(struct.pack("<fi", -float(i), len(w)) + w for i, w in enumerate(words))


def _put(folder: Path, model: bytes, tokenizer: bytes | None = None, name: str = "tok260.bin") -> Path:
    (folder / "m.bin").write_bytes(model)
    if tokenizer is not None:
        (folder / name).write_bytes(tokenizer)
    return folder / "m.bin"


@pytest.mark.parametrize("name", ["tok260.bin", "tokenizer.bin"])
def test_the_tokenizer_is_found_beside_the_checkpoint(name: str, tmp_path: Path) -> None:
    config = import_model(_put(tmp_path, _checkpoint(), _tokenizer(), name), tmp_path / "m.gguf")
    assert (config.arch, config.n_layers, config.n_vocab, config.n_ctx) == ("llama", 2, 260, 16)


def test_a_head_of_its_own_goes_over_as_output_weight(tmp_path: Path) -> None:
    src = _put(tmp_path, _checkpoint(tied=False), _tokenizer())
    import_model(src, tmp_path / "m.gguf")
    with Weights.open(tmp_path / "m.gguf") as w:
        np.testing.assert_array_equal(w.f32("output.weight"), read_llama2c(src)[1]["output"])


@pytest.mark.parametrize(
    ("model", "tokenizer", "error", "said"),
    [
        (_checkpoint()[:-1], _tokenizer(), WeightsError, "its header wants"),
        (_checkpoint() + b"\0", _tokenizer(), WeightsError, "its header wants"),
        (_checkpoint()[:20], _tokenizer(), WeightsError, "has 20 bytes"),
        (b"", _tokenizer(), WeightsError, "has 0 bytes"),
        (struct.pack("<7i", 8, -12, 2, 4, 2, 260, 16), _tokenizer(), WeightsError, "do not fit together"),
        (struct.pack("<7i", 9, 12, 2, 4, 2, 260, 16), _tokenizer(), WeightsError, "do not fit together"),
        (struct.pack("<7i", *[1 << 24] * 7), _tokenizer(), WeightsError, "do not fit together"),
        (struct.pack("<7i", 1 << 24, 1 << 24, 1 << 24, 1, 1, 1, 1), _tokenizer(), WeightsError, "its header wants"),
        (struct.pack("<I", 0x616B3432) + bytes(252), _tokenizer(), UnsupportedError, "version 1 or 2"),
        (struct.pack("<I", 0x54504F45) + bytes(252), _tokenizer(), UnsupportedError, "a micro-lm"),
        (b"GGUF" + bytes(252), _tokenizer(), UsageError, "a GGUF file already"),
        (_checkpoint()[:-4] + b"\0\0\x80\x7f", _tokenizer(), WeightsError, "sin holds a number that is not finite"),
        (_checkpoint(n_layers=1025, dim=4, n_heads=2), _tokenizer(), WeightsError, "llama.block_count=1025"),
        (_checkpoint(base=500_000.0), _tokenizer(), UnsupportedError, "rotation tables"),
        (_checkpoint(), None, UsageError, "no tok260.bin or tokenizer.bin beside"),
        (_checkpoint(), _tokenizer()[:-1], TokenizerError, "token 259 of 3 bytes"),
        (_checkpoint(), _tokenizer()[:40], TokenizerError, "token 2 of 6 bytes"),
        (_checkpoint(), _tokenizer() + b"x", TokenizerError, "a larger vocabulary"),
        (_checkpoint(), b"", TokenizerError, "ends after 0 tokens"),
        (_checkpoint(), _tokenizer().replace(b"<0x41>", b"<0x42>"), TokenizerError, "not a SentencePiece vocabulary"),
        (_checkpoint(), _tokenizer().replace(struct.pack("<f", -7), b"\0\0\xc0\x7f"), TokenizerError, "score nan"),
    ],
)
def test_what_is_no_checkpoint_is_refused_and_leaves_no_file(
    model: bytes, tokenizer: bytes | None, error: type[NearfarError], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        import_model(_put(tmp_path, model, tokenizer), tmp_path / "m.gguf")
    assert not (tmp_path / "m.gguf").exists()


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"m\.bin: no such file"):
        import_model(tmp_path / "m.bin", tmp_path / "m.gguf")
    with pytest.raises(FileError, match=r"t\.bin: no such file"):
        import_model(_put(tmp_path, _checkpoint()), tmp_path / "m.gguf", tmp_path / "t.bin")
    with pytest.raises(FileError, match="not a plain file"):
        import_model(tmp_path, tmp_path / "m.gguf")


def test_the_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    src = _put(tmp_path, _checkpoint(), _tokenizer())
    with pytest.raises(UsageError, match="source and destination are one file"):
        import_model(src, src)
    assert src.read_bytes() == _checkpoint()


# ---- real ternary weights in another format


@needs_shared
@pytest.mark.parametrize(("name", "zeros"), [("pro", 0.33), ("pico", 0.31)])
def test_micro_lm_is_read_to_its_last_byte(name: str, zeros: float) -> None:
    model = read_micro_lm(WEIGHTS / f"micro-lm-{name}-ternary.bin")
    assert (model.n_layers, model.n_heads, model.n_kv_heads, model.n_vocab) == (4, 4, 1, 256)
    assert len(model.matrices) == 24
    trits = np.concatenate([m.trits.ravel() for m in model.matrices.values()])
    assert set(np.unique(trits).tolist()) == {-1, 0, 1}
    assert np.mean(trits == 0) == pytest.approx(zeros, abs=0.02)
    for gain, bias in model.norms.values():  # LayerNorm: gains near one, biases near zero; a misread byte is neither
        assert 0.2 < gain.mean() < 3
        assert abs(bias.mean()) < 0.5


@needs_shared
@pytest.mark.parametrize("kind", [TensorType.TQ1_0, TensorType.TQ2_0, TensorType.Q4_0, TensorType.Q8_0])
def test_micro_lm_matrices_go_into_every_packed_type_exactly(kind: TensorType) -> None:
    for m in read_micro_lm(WEIGHTS / "micro-lm-pro-ternary.bin").matrices.values():
        raw = pack_ternary(m.trits, m.scale, kind)
        assert all_finite(raw, kind, m.trits.shape)
        np.testing.assert_array_equal(dequantize(raw, kind, m.trits.shape), m.trits * np.float32(np.float16(m.scale)))
        if kind in (TensorType.TQ1_0, TensorType.TQ2_0):
            np.testing.assert_array_equal(unpack_ternary(raw, kind, m.trits.shape)[0], m.trits)
