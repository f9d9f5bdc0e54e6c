"""Random models of well-known sizes are real files: our engines and llama.cpp run them, and their numbers stay sane."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nearfar import LLM
from nearfar.bench.random_model import SIZES, TYPES, Recipe, cached, random_blocks, write
from nearfar.errors import UsageError
from nearfar.gguf_reader import BLOCKS, TensorType
from nearfar.gguf_writer import GGUFWriter
from nearfar.lower import open_lower
from nearfar.quant import all_finite, dequantize
from nearfar.weights import Weights

SHAPE = (192, 512)
MAX_LOGIT_GAP = 0.25  # of logits of deviation 1: random weights turn a last-bit difference into other int8 roundings


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_weights_of_every_type_have_the_deviation_that_keeps_activations_alive(kind: TensorType) -> None:
    raw = random_blocks(np.random.default_rng(0), SHAPE, kind)
    assert all_finite(raw, kind, SHAPE)
    w = dequantize(raw, kind, SHAPE)
    assert w.std() == pytest.approx(SHAPE[1] ** -0.5, rel=0.25)
    assert abs(w.mean()) < 0.15 * w.std()


def test_ternary_blocks_hold_trits_only() -> None:
    for kind in (TensorType.TQ1_0, TensorType.TQ2_0):
        w = dequantize(random_blocks(np.random.default_rng(0), SHAPE, kind), kind, SHAPE)
        assert len(np.unique(w)) == 3


def logits_of(path: Path, backend: str) -> np.ndarray:
    """[V] after 19 tokens."""
    with Weights.open(path) as weights:
        lower = open_lower(weights, backend)
        h = lower.forward(lower.embed(np.arange(1, 20, dtype=np.int32)), lower.new_kv(32), 0, weights.config.n_layers)
        return lower.logits(h[-1:])[0]


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0", "Q4_0", "Q4_K", "Q8_0"])
def test_the_native_engine_and_the_reference_agree_on_it(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("nearfar_native")
    path = cached(Recipe.parse(f"tiny:{kind}"), tmp_path)
    np.testing.assert_allclose(logits_of(path, "native"), logits_of(path, "numpy"), atol=MAX_LOGIT_GAP)


@pytest.mark.parametrize("kind", ["TQ2_0", "Q4_0", "Q6_K", "F16"])
def test_llama_cpp_writes_the_token_that_the_reference_holds_for_the_best(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    path = cached(Recipe.parse(f"tiny:{kind}"), tmp_path)
    with LLM.open(path, backend="llama") as llm:
        (token,) = llm.generate(range(1, 20), max_tokens=1).ids
    logits = logits_of(path, "numpy")
    assert logits[token] >= logits.max() - MAX_LOGIT_GAP


def test_every_size_has_the_shapes_that_its_architecture_asks_for(tmp_path: Path) -> None:
    """`Weights.open` compares each tensor with the header; one thin copy of each size keeps that quick."""
    for size, config in SIZES.items():
        assert config.d_q == config.n_heads * config.head_dim
        assert config.n_heads % config.n_kv_heads == 0
        assert all(n % 32 == 0 for n in (config.d_model, config.d_q, config.d_ff)), size
    path = write(Recipe.parse("tiny:Q2_K:Q6_K"), tmp_path / "m.gguf")
    with Weights.open(path) as weights:
        assert replace(weights.config, norm_eps=1e-5) == SIZES["tiny"]
        assert weights.file.tensors["token_embd.weight"].type is TensorType.Q6_K


def test_a_file_that_is_there_is_used_again_and_another_one_replaced(tmp_path: Path) -> None:
    recipe = Recipe.parse("tiny:Q4_0")
    path = cached(recipe, tmp_path)
    stamp = path.stat().st_mtime_ns
    assert cached(recipe, tmp_path).stat().st_mtime_ns == stamp
    path.write_bytes(b"cut short")
    assert cached(recipe, tmp_path).stat().st_size > 1000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bitnet-2b", "expected SIZE:TYPE"),
        ("bitnet-3b:Q4_0", "expected one of bitnet-2b"),
        ("bitnet-2b:IQ2_S", "expected one of TQ1_0"),
        ("qwen-0.5b:Q4_K", "blocks of 256: expected one of Q4_0"),
        ("llama-1b:Q4_0:Q9", "expected SIZE:TYPE"),
    ],
)
def test_what_cannot_be_made_is_refused_with_what_can(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Recipe.parse(text)


def test_a_tensor_made_late_must_have_the_size_that_was_announced(tmp_path: Path) -> None:
    w = GGUFWriter(tmp_path / "late.gguf")
    w.add_made("x", lambda: np.zeros(BLOCKS[TensorType.Q8_0][1], np.uint8), TensorType.Q8_0, (2, 32))
    with pytest.raises(UsageError, match="is 68 bytes, got 34"):
        w.write()
    assert list(tmp_path.iterdir()) == []
