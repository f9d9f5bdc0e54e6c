"""The numpy specification against an outside engine: llama-cpp-python on the same files, token for token.

Where an argmax is a near-tie, two correct engines may differ; such a place is named, counted and bounded, not hidden:
the logits of both must agree there within the tolerance of the weight type.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest

from nearfar.forms import CALL_STOPS, home_prompt
from nearfar.home import demo_home
from nearfar.llm import LLM, MODELS
from nearfar.lower import Lower, open_lower
from nearfar.weights import Weights
from tests.outside import llama_cpp_that_runs
from tests.tiny import ARCHITECTURES, NATIVE_TYPES, QUANTIZED_TYPES, WEIGHT_TYPES, write_tiny

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (extra [llama])")

PROMPT = [17, 3, 99, 42, 250, 7]
N_TOKENS = 48
# |difference of logits|, whose spread is about 1.  Float weights: the order of summation; with F16 and BF16 llama.cpp
# also rounds the activations to the type.  Quantized weights: the products are equal, but a last bit of a norm or a
# softmax can move an activation across a rounding boundary, and a few such flips in four layers add up to this much.
# Q4_1: llama.cpp also rounds the sum of each 32 activations, by which it multiplies the offset, to f16; we do not.
MAX_LOGIT_DIFF = {"F32": 2e-4, "F16": 1e-2, "BF16": 5e-2} | dict.fromkeys(QUANTIZED_TYPES, 0.15)


class Outside:
    """llama.cpp with an f32 cache, run over a growing list of ids."""

    def __init__(self, path: Path) -> None:
        f32 = llama_cpp.GGML_TYPE_F32
        self.llama = llama_cpp.Llama(
            str(path), n_ctx=256, n_threads=1, logits_all=True, verbose=False, type_k=f32, type_v=f32
        )

    def logits(self, new_ids: list[int]) -> np.ndarray:
        self.llama.eval(new_ids)
        return self.llama.scores[self.llama.n_tokens - 1].copy()


class Ours:
    def __init__(self, lower: Lower) -> None:
        self.lower, self.kv = lower, lower.new_kv(256, "f32")

    def logits(self, new_ids: list[int]) -> np.ndarray:
        h = self.lower.forward(self.lower.embed(np.array(new_ids, np.int32)), self.kv, 0, self.lower.config.n_layers)
        return self.lower.logits(h[-1:])[0]


def greedy_side_by_side(path: Path, backend: str, tolerance: float) -> tuple[list[int], list[int]]:
    """Greedy ids of our engine, and the places where llama.cpp would take another one of a near-tie."""
    outside, ours = Outside(path), Ours(open_lower(Weights.open(path), backend))
    ids, ties, new = list(PROMPT), [], list(PROMPT)
    for _ in range(N_TOKENS):
        theirs, mine = outside.logits(new), ours.logits(new)
        assert np.abs(theirs - mine).max() < tolerance, f"after {len(ids)} ids"
        if theirs.argmax() != mine.argmax():
            gap = mine.max() - mine[theirs.argmax()]
            assert gap < 2 * tolerance  # follows from the line above; said for the reader
            ties.append(len(ids))
        new = [int(mine.argmax())]
        ids += new
    return ids, ties


@pytest.mark.parametrize(
    ("weight_type", "backend"),
    [(kind, "numpy") for kind in WEIGHT_TYPES] + [(kind, "native") for kind in NATIVE_TYPES],
)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_greedy_tokens_equal_llama_cpp(tmp_path: Path, arch: str, weight_type: str, backend: str) -> None:
    if backend == "native":
        pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
    embedding = "F32" if weight_type in ("F32", "F16", "BF16") else "Q8_0"
    llama_cpp_that_runs(weight_type, embedding)
    # ternary rows of 256: there one scale a row (ours) is one scale per 256 (llama.cpp's)
    d_ff = 256 if weight_type.startswith("TQ") else 512
    path = write_tiny(tmp_path / "m.gguf", arch, weight_type, embedding_type=embedding, seed=3, d_ff=d_ff)
    ids, ties = greedy_side_by_side(path, backend, MAX_LOGIT_DIFF[weight_type])
    if weight_type == "F32":
        assert not ties, f"tokens differ at {ties}"
    if ties:
        warnings.warn(f"{arch} {weight_type} {backend}: near-ties at {ties} of {len(ids)}", stacklevel=1)
    assert len(ties) <= 2


REQUESTS = (
    "turn off the kitchen lights in ten minutes",
    "is the front door locked",
    "set the bedroom thermostat to 21 degrees",
    "add oat milk to my shopping list",
    "play some jazz in the living room",
    "what time is it",
)


@pytest.mark.skipif(not (MODELS / "nano.gguf").is_file(), reason="no model is shipped in this tree")
@pytest.mark.parametrize("request_text", REQUESTS)
def test_the_shipped_model_makes_the_same_call_in_llama_cpp(request_text: str) -> None:
    """The same file, token for token, at full depth, all with an f32 cache."""
    llama_cpp_that_runs("TQ2_0", "Q8_0")
    prompt = home_prompt(demo_home().setting(), request_text)
    outside = Outside(MODELS / "nano.gguf")
    for backend in ("numpy", "native"):
        if backend == "native":
            pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
        with LLM.open(MODELS / "nano.gguf", backend=backend, kv_dtype="f32") as llm:
            stops = [i for name in CALL_STOPS if (i := llm.tokenizer.token_id(name)) is not None]
            call = llm.generate(prompt, max_tokens=64, stop_ids=stops, exits=False).ids
            new = llm.tokenizer.encode_parts(prompt)
        outside.llama.reset()
        theirs = []
        while len(theirs) < len(call):
            theirs.append(int(outside.logits(new).argmax()))
            new = theirs[-1:]
        assert theirs == call
