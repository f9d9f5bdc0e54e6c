"""Long answers and real text beside llama.cpp: token for token where arithmetic is exact, else the same perplexity.

In F32 both engines multiply the same numbers and differ by the order of sums, far below the gap between two likely
tokens.  With quantized weights the integer products are equal but a last bit of a norm can move an activation across
a rounding boundary, so that long greedy answers part at a near-tie: there the measure is perplexity on real text.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from nearfar.eval.perplexity import perplexity, read_text, text_ids
from nearfar.gguf_reader import GGUFFile, TensorType
from nearfar.gguf_writer import GGUFWriter
from nearfar.importers import import_model
from nearfar.llm import MODELS
from nearfar.lower import open_lower
from nearfar.options import EngineOptions
from nearfar.quant import dequantize, pack_ternary, unpack_ternary
from nearfar.tokenizer import tokenizer_from_metadata
from nearfar.weights import Weights
from tests.paths import SHARED, needs_shared
from tests.tiny import ARCHITECTURES, write_tiny

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra [llama])")
pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")

N_TOKENS = 220
N_TEXT = 8192  # tokens
WINDOW = 256
MAX_PERPLEXITY_DIFF = 0.001  # relative


def outside(path: Path, n_ctx: int) -> object:
    f32 = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(str(path), n_ctx=n_ctx, n_threads=1, logits_all=True, verbose=False, type_k=f32, type_v=f32)


def their_greedy(path: Path, prompt: list[int], n: int) -> list[int]:
    llama = outside(path, len(prompt) + n + 1)
    ids, new = [], prompt
    while len(ids) < n:
        llama.eval(new)
        new = [int(llama.scores[llama.n_tokens - 1].argmax())]
        ids += new
    return ids


def our_greedy(path: Path, prompt: list[int], n: int) -> list[int]:
    with Weights.open(path) as weights:
        lower = open_lower(weights, "native", EngineOptions(threads=2))
        kv, ids, new = lower.new_kv(len(prompt) + n + 1, "f32"), [], prompt
        while len(ids) < n:
            h = lower.forward(lower.embed(np.array(new, np.int32)), kv, 0, lower.config.n_layers)
            new = [int(lower.logits(h[-1:])[0].argmax())]
            ids += new
    return ids


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stories") / "stories260K.gguf"
    import_model(SHARED / "weights" / "stories260K.bin", path)
    return path


@needs_shared
@pytest.mark.parametrize("text", ["Once upon a time", "One day, Tim and Sue went to the", "The dog was sad because"])
def test_a_long_story_is_the_same_in_llama_cpp_token_for_token(stories: Path, text: str) -> None:
    with Weights.open(stories) as weights:
        prompt = tokenizer_from_metadata(weights.file.metadata).encode(text)
    assert our_greedy(stories, prompt, N_TOKENS) == their_greedy(stories, prompt, N_TOKENS)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_long_answer_of_every_architecture_is_the_same_in_llama_cpp(tmp_path: Path, arch: str) -> None:
    path = write_tiny(tmp_path / "m.gguf", arch, "F32", seed=5, n_layers=2)
    prompt = [17, 3, 99, 42, 250, 7]
    assert our_greedy(path, prompt, N_TOKENS) == their_greedy(path, prompt, N_TOKENS)


def as_k_blocks(codes: np.ndarray, d: np.ndarray, kind: TensorType) -> np.ndarray:
    """Trits + 1 u8 [n, 256] and their scales [n, 1] as blocks of a K type that hold exactly d * trit."""
    n = len(codes)
    f16 = d.astype("<f2").view(np.uint8)

    def same(byte: int, count: int) -> np.ndarray:
        return np.full((n, count), byte, np.uint8)

    def pairs(q: np.ndarray) -> np.ndarray:  # 2 bits: two halves of 32 bytes, four fields each
        f = q.reshape(n, 2, 4, 32)
        return (f[:, :, 0] | f[:, :, 1] << 2 | f[:, :, 2] << 4 | f[:, :, 3] << 6).reshape(n, 64)

    def nibbles(q: np.ndarray, run: int) -> np.ndarray:
        f = q.reshape(n, -1, 2, run)
        return (f[:, :, 0] | f[:, :, 1] << 4).reshape(n, -1)

    ones = np.concatenate([same(1, 8), same(0x11, 4)], axis=1)  # eight 6-bit scales and mins of 1
    if kind is TensorType.Q2_K:
        parts = [same(0x11, 16), pairs(codes), f16, f16]
    elif kind is TensorType.Q3_K:
        q = codes + np.uint8(3)  # trit + 4
        high = (q >> 2).reshape(n, 8, 32)
        mask = np.bitwise_or.reduce([high[:, i] << i for i in range(8)])
        parts = [mask, pairs(q & 3), same(0x11, 8), same(0xAA, 4), f16]
    elif kind is TensorType.Q4_K:
        parts = [f16, f16, ones, nibbles(codes, 32)]
    elif kind is TensorType.Q5_K:
        parts = [f16, f16, ones, same(0, 32), nibbles(codes, 32)]
    else:
        q = codes + np.uint8(31)  # trit + 32
        parts = [nibbles(q & 15, 64), pairs(q >> 4), same(1, 16), f16]
    return np.concatenate(parts, axis=1).reshape(-1)


def as_type(raw: np.ndarray, shape: tuple[int, ...], kind: TensorType) -> np.ndarray:
    """A TQ2_0 matrix in the bytes of another type, exactly where that type can."""
    if kind in (TensorType.Q2_K, TensorType.Q3_K, TensorType.Q4_K, TensorType.Q5_K, TensorType.Q6_K):
        trits, d = unpack_ternary(raw, TensorType.TQ2_0, shape)
        return as_k_blocks((trits.reshape(-1, 256) + 1).astype(np.uint8), d.reshape(-1, 1), kind)
    values = dequantize(raw, TensorType.TQ2_0, shape)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind.name]).view(np.uint8).reshape(-1)


def requantized(source: Path, target: Path, kind: TensorType) -> Path:
    """A copy whose layers' matrices are of type `kind`."""
    with GGUFFile.open(source) as file:
        writer = GGUFWriter(target)
        for key in file.metadata:
            writer.add_encoded(key, file.encoded(key))
        for name, info in file.tensors.items():
            raw = np.array(file.raw(name))
            if info.type is TensorType.TQ2_0:
                writer.add_tensor(name, as_type(raw, info.shape, kind), kind, info.shape)
            else:
                writer.add_tensor(name, raw, info.type, info.shape)
        writer.write()
    return target


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_trits_go_into_every_k_type_exactly(kind: str) -> None:
    """Of the helper above: what it writes dequantizes to the same numbers."""
    trits = np.random.default_rng(1).integers(-1, 2, (3, 512)).astype(np.int8)
    raw = pack_ternary(trits, 0.37, TensorType.TQ2_0)
    there = dequantize(as_type(raw, trits.shape, TensorType[kind]), TensorType[kind], trits.shape)
    assert np.array_equal(there, dequantize(raw, TensorType.TQ2_0, trits.shape))


def their_perplexity(path: Path, ids: np.ndarray) -> float:
    llama, losses = outside(path, WINDOW), []
    for start in range(0, len(ids) - 1, WINDOW):
        part = ids[start : start + WINDOW]
        llama.reset()
        llama.eval(part.tolist())
        z = llama.scores[: len(part) - 1].astype(np.float64)
        top = z.max(axis=-1)
        losses.append(top + np.log(np.exp(z - top[:, None]).sum(axis=-1)) - z[np.arange(len(z)), part[1:]])
    return float(np.exp(np.concatenate(losses).mean()))


@needs_shared
@pytest.mark.parametrize("kind", ["TQ2_0", "Q2_K", "Q3_K", "Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16"])
@pytest.mark.parametrize("text", ["tinystories_valid_slice.txt.xz", "books/aesop_fables_v-s-vernon-jones.txt.xz"])
def test_perplexity_on_real_text_is_that_of_llama_cpp(tmp_path: Path, kind: str, text: str) -> None:
    path = MODELS / "nano.gguf"  # its own layers are TQ2_0
    if kind != "TQ2_0":
        path = requantized(path, tmp_path / "m.gguf", TensorType[kind])
    with Weights.open(path) as weights:
        tokenizer = tokenizer_from_metadata(weights.file.metadata)
        ids = text_ids(tokenizer, read_text(SHARED / "text" / text, 40_000), N_TEXT)
        ours = perplexity(open_lower(weights, "native", EngineOptions(threads=2)), ids, WINDOW)
    theirs = their_perplexity(path, ids)
    assert abs(ours / theirs - 1) < MAX_PERPLEXITY_DIFF, f"{kind}: ours {ours:.4f}, llama.cpp {theirs:.4f}"
