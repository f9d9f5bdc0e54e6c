"""A window with sinks: what a row sees, constant memory, and real models far beyond the length they were trained for.

Also int8 keys and values: what they cost on real text.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from nearfar import LLM
from nearfar.cancel import Cancel
from nearfar.errors import Cancelled, ContextError, KVTruncated, NearfarError, UsageError
from nearfar.eval.perplexity import read_text, text_ids
from nearfar.importers import import_model
from nearfar.kv_cache import FULL, SLACK, Held, KVCache, KVDtype, Lambda, Policy, round_to, round_to_int8
from nearfar.llm import MODELS
from nearfar.lower import Lower, open_lower
from nearfar.lower_numpy import attention, rope_angles, rotate, softmax
from nearfar.options import EngineOptions
from nearfar.tokenizer import tokenizer_from_metadata
from nearfar.weights import Weights
from tests.paths import SHARED, needs_shared
from tests.tiny import write_tiny

MAX_ROUNDING = 1 / 254 + 1 / 2000  # of the largest of 32 values: half a step of 127, and the scale's own rounding
MAX_NAIVE_ERROR = 2e-5  # f32 angles and sums in another order, values of order 1
MAX_ENGINE_ERROR = 2e-3  # of rows of order 1 through four layers of F32 weights; now and then a key rounds otherwise
MAX_INT8_KL = 3e-3  # nats a token, mean; heads of 8 numbers, whose scale is a group's only one, are the worst case
MAX_INT8_RISE = 0.005  # of perplexity
MAX_FAR_RISE = 1.2  # perplexity far beyond the trained length, over that of fresh windows of the trained length
MIN_EXPLOSION = 2.0  # the same without a window
POLICY = Lambda(sink=5, window=70)
TRAINED = 512  # positions, of both real models


@pytest.fixture(scope="module", params=["numpy", "native"])
def lower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lower:
    if request.param == "native":
        pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
    # F32: numpy adds in another order when rows share a call, which int8 activations would amplify
    kind = "Q8_0" if request.param == "native" else "F32"
    path = write_tiny(tmp_path_factory.mktemp("far") / "m.gguf", "qwen2", kind, exits=(2,), n_layers=3)
    return open_lower(Weights.open(path), request.param, EngineOptions(threads=2))


def run(lower: Lower, ids: np.ndarray, kv: object, rows_a_call: int = 10**9, last: int | None = None) -> np.ndarray:
    parts = [ids[i : i + rows_a_call] for i in range(0, len(ids), rows_a_call)]
    depth = lower.config.n_layers if last is None else last
    return np.concatenate([lower.forward(lower.embed(part), kv, 0, depth) for part in parts])  # type: ignore[arg-type]


def some_ids(n: int) -> np.ndarray:
    return (np.arange(n) * 37 % 311).astype(np.int32)


# ---- the rule


@pytest.mark.parametrize("sink", [0, 1, 5, 30])
def test_a_row_sees_sinks_and_window_from_no_further_than_the_window(sink: int, lower: Lower) -> None:
    """The reference against the paper's formula, pair by pair: keys at 0, queries rotated to min(i - j, window)."""
    c, n, window = lower.config, 60, 20
    rng = np.random.default_rng(sink)
    q = rng.normal(size=(n, c.n_heads, c.head_dim)).astype(np.float32)
    k, v = rng.normal(size=(2, n, c.n_kv_heads, c.head_dim)).astype(np.float32)
    expected = np.zeros((n, c.n_heads, c.head_dim), np.float32)
    for i in range(n):
        seen = [j for j in range(i + 1) if j < sink or i - j < window]
        for h in range(c.n_heads):
            kv_head = h * c.n_kv_heads // c.n_heads
            turned = [
                rotate(q[i : i + 1, h : h + 1], *rope_angles(c, min(i - j, window), 1), c.rope_pairs) for j in seen
            ]
            scores = np.array([float(t[0, 0] @ k[j, kv_head]) for t, j in zip(turned, seen, strict=True)])
            expected[i, h] = softmax(scores / np.sqrt(c.head_dim)) @ v[seen, kv_head]

    turned_k = rotate(k, *rope_angles(c, 0, n), c.rope_pairs)
    turned_q = rotate(q, *rope_angles(c, 0, n), c.rope_pairs)
    far_q = rotate(q, *rope_angles(c, window, 1), c.rope_pairs)
    out = attention(turned_q, Held(turned_k, v, k[:sink], v[:sink]), 0, Lambda(sink, window), far_q)
    np.testing.assert_allclose(out, expected.reshape(n, -1), atol=MAX_NAIVE_ERROR)


@pytest.mark.parametrize("dtype", ["f32", "f16", "int8"])
@pytest.mark.parametrize("policy", [FULL, POLICY, Lambda(0, 1), Lambda(100, 64), Lambda(3, 130)], ids=str)
def test_the_engine_follows_the_reference(dtype: KVDtype, policy: Policy, tmp_path: Path) -> None:
    pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
    for arch in ("llama", "qwen3"):
        weights = Weights.open(write_tiny(tmp_path / f"{arch}.gguf", arch, "F32", n_layers=2))
        numpy, native = (open_lower(weights, name, EngineOptions(threads=2)) for name in ("numpy", "native"))
        ids = some_ids(300)
        expected = run(numpy, ids, numpy.new_kv(300, dtype, policy))
        rows = run(native, ids, native.new_kv(300, dtype, policy))
        error = np.abs(rows - expected) / expected.std()
        assert np.median(error) < MAX_ENGINE_ERROR / 10
        assert np.quantile(error, 0.999) < MAX_ENGINE_ERROR * (30 if dtype == "int8" else 1)


def test_int8_rounds_each_32_numbers_of_a_head_to_127_steps() -> None:
    x = np.random.default_rng(0).normal(size=(50, 3, 80)).astype(np.float32) * np.float32(3e3)
    x[0, 0], x[1, 1, :32] = 0, 1e-12
    y = round_to(x, "int8")
    assert not y[0, 0].any()
    assert not y[1, 1, :32].any()
    for begin in (0, 32, 64):
        group, rounded = x[..., begin : begin + 32], y[..., begin : begin + 32]
        largest = np.abs(group).max(axis=-1, keepdims=True)
        assert (np.abs(group - rounded) <= MAX_ROUNDING * largest + 1e-12).all()
    assert np.isfinite(round_to_int8(np.full((1, 32), 3e38, np.float32))).all()


@pytest.mark.parametrize("dtype", ["f16", "int8"])
def test_a_row_does_not_depend_on_how_many_share_its_call(dtype: KVDtype, tmp_path: Path) -> None:
    lower_native = pytest.importorskip("nearfar.lower_native", reason="the compiled engine is not built")
    weights, ids = Weights.open(write_tiny(tmp_path / "m.gguf", "llama", "Q8_0", n_layers=2)), some_ids(300)
    for policy in (FULL, POLICY):
        rows = []
        for threads, rows_a_call in ((1, 300), (2, 1), (2, 7), (1, 130)):
            lower = lower_native.NativeLower(weights, EngineOptions(threads=threads))
            rows.append(run(lower, ids, lower.new_kv(300, dtype, policy), rows_a_call))
        assert all(np.array_equal(rows[0], r) for r in rows[1:])


# ---- cutting, forking, failing


def close(lower: Lower, a: np.ndarray, b: np.ndarray) -> None:
    if lower.name == "native":
        assert np.array_equal(a, b)
    else:  # numpy adds in another order when rows share a call: some keys round otherwise
        assert np.abs(a - b).mean() < 1e-2 * b.std()


@pytest.mark.parametrize("dtype", ["f16", "int8"])
def test_cut_within_the_slack_and_run_again_gives_the_same_rows(lower: Lower, dtype: KVDtype) -> None:
    ids = some_ids(400)
    kv = lower.new_kv(400, dtype, POLICY)
    expected = run(lower, ids, kv)
    fork = kv.fork(400 - SLACK)
    kv.truncate(400 - SLACK)
    assert fork.length() == kv.length() == 400 - SLACK
    close(lower, run(lower, ids[-SLACK:], kv), expected[-SLACK:])
    del kv
    close(lower, run(lower, ids[-SLACK:], fork), expected[-SLACK:])


def test_a_deeper_cut_is_refused_and_cuts_nothing(lower: Lower) -> None:
    kv = lower.new_kv(1000, "f16", POLICY)
    run(lower, some_ids(500), kv)
    run(lower, some_ids(3), kv, last=2)  # the upper layer lags
    for cut in (kv.truncate, kv.fork):
        with pytest.raises(KVTruncated, match="cut to 100 positions"):
            cut(100)
    assert [kv.length(i) for i in range(3)] == [503, 503, 500]
    kv.truncate(0)
    close(lower, run(lower, some_ids(9), kv), run(lower, some_ids(9), lower.new_kv(9)))


def test_a_cut_among_the_sinks_brings_new_sinks(lower: Lower) -> None:
    ids, other = some_ids(200), some_ids(200)[::-1].copy()
    kv = lower.new_kv(200, "f16", POLICY)
    run(lower, ids[:20], kv)
    fork = kv.fork(2)
    kv.truncate(2)
    both = np.concatenate([ids[:2], other])[:200]
    expected = run(lower, both, lower.new_kv(200, "f16", POLICY))[2:]
    close(lower, run(lower, both[2:], kv), expected)
    close(lower, run(lower, both[2:], fork), expected)


class AtLook(Cancel):
    """Pressed by itself at the n-th look."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("n_before", [0, 3, 100, 290])
def test_a_call_that_fails_brings_back_what_it_had_forgotten(lower: Lower, n_before: int) -> None:
    ids = some_ids(1300)
    kv, whole = lower.new_kv(2000, "f16", POLICY), lower.new_kv(2000, "f16", POLICY)
    expected = run(lower, ids[: n_before + 70], whole)[n_before:]
    if n_before:
        run(lower, ids[:n_before], kv)
    n_bytes = kv.n_bytes
    rows = lower.embed(ids[n_before:])
    if lower.name == "native":
        rows[-1, 0] = np.nan  # found in the last chunk
        with pytest.raises(NearfarError, match="not finite"):
            lower.forward(rows, kv, 0, 3)
    else:
        with pytest.raises(Cancelled):
            lower.forward(rows, kv, 0, 3, AtLook(2))
    assert [kv.length(i) for i in range(3)] == [n_before] * 3
    assert kv.n_bytes == n_bytes
    close(lower, run(lower, ids[n_before : n_before + 70], kv), expected)


def test_memory_stays_constant_while_positions_go_on(tmp_path: Path) -> None:
    pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
    weights = Weights.open(write_tiny(tmp_path / "m.gguf", "llama", "F32", n_layers=1, d_model=64, d_ff=64))
    for backend in ("native", "numpy"):
        lower = open_lower(weights, backend, EngineOptions(threads=1))
        kv, sizes = lower.new_kv(2**31 - 1, "f16", Lambda(4, 256)), []
        ids = some_ids(128)
        for _ in range(0, 20_000 if backend == "native" else 4_000, 128):
            lower.forward(lower.embed(ids), kv, 0, 1)
            sizes.append(kv.n_bytes)
        assert kv.length() >= 4_000
        assert len(set(sizes[15:])) == 1  # from 2k positions on
        assert max(sizes) < 5 * sizes[0]  # window and slack are two and a half calls


def test_angles_are_right_a_million_positions_in(lower: Lower) -> None:
    c = lower.config
    cos, sin = rope_angles(c, 10**6, 1)
    angle = 10**6 * c.rope_base ** (-2 * np.arange(c.head_dim // 2) / c.head_dim)
    np.testing.assert_allclose(cos[0], np.cos(angle), atol=1e-7)
    np.testing.assert_allclose(sin[0], np.sin(angle), atol=1e-7)


# ---- through the front door


def test_an_answer_goes_on_beyond_the_trained_length(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "llama", "Q8_0", n_ctx=64, exits=(2,), tau=0.004, seed=2)
    prompt = list(range(5, 205))
    with LLM.open(path, kv_policy=Lambda(4, 48)) as llm, LLM.open(path, kv_policy=Lambda(4, 48)) as other:
        answer = llm.generate(prompt, max_tokens=300)
        assert len(answer.ids) == 300
        assert (
            other.generate(prompt, max_tokens=300, speculate=True).ids
            == other.generate(prompt, max_tokens=300, exits=False).ids
        )
        # A next turn that shares the whole beginning reads none of it again; one that turns off early reads it all.
        ids = prompt + answer.ids
        assert llm.generate([*ids, 7], max_tokens=1).stats.n_cached >= len(ids) - 1
        early = llm.generate([*ids[:100], 9, 9], max_tokens=20)
        assert early.stats.n_cached == 0
        assert early.ids == other.generate([*ids[:100], 9, 9], max_tokens=20).ids
    with LLM.open(path) as llm, pytest.raises(ContextError, match="64"):
        llm.generate(prompt)


def test_policies_that_make_no_sense_are_refused(lower: Lower) -> None:
    for sink, window in ((-1, 5), (3, 0), (0, 2**31)):
        with pytest.raises(UsageError, match="sinks"):
            Lambda(sink, window)
    with pytest.raises(UsageError, match="int4"):
        lower.new_kv(5, "int4")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="int8"):
        LLM.open(MODELS / "nano.gguf", backend="llama", kv_dtype="int8")
    with pytest.raises(UsageError, match="kv_policy"):
        LLM.open(MODELS / "nano.gguf", backend="llama", kv_policy=POLICY)
    assert isinstance(KVCache(lower.config, 5, "int8", POLICY), KVCache)


# ---- real models on real text


@pytest.fixture(scope="module", params=["nano", "stories260K"])
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Lower, np.ndarray]:
    """A model trained on 512 positions, and 12 times as many tokens of stories that it has not seen."""
    pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
    path = MODELS / "nano.gguf"
    if request.param != "nano":
        path = tmp_path_factory.mktemp("far") / "m.gguf"
        import_model(SHARED / "weights" / "stories260K.bin", path)
    weights = Weights.open(path)
    assert weights.config.n_ctx == TRAINED
    text = read_text(SHARED / "text" / "tinystories_valid_slice.txt.xz", 60_000)
    ids = text_ids(tokenizer_from_metadata(weights.file.metadata), text, 12 * TRAINED)
    assert len(ids) == 12 * TRAINED
    return open_lower(weights, "native", EngineOptions(threads=2)), ids


def log_probabilities(lower: Lower, ids: np.ndarray, dtype: KVDtype = "f16", policy: Policy = FULL) -> np.ndarray:
    """f64 [T, V]: after each token, what comes next."""
    kv, parts = lower.new_kv(len(ids), dtype, policy), []
    for begin in range(0, len(ids), 256):
        z = lower.logits(run(lower, ids[begin : begin + 256], kv)).astype(np.float64)
        z -= z.max(axis=1, keepdims=True)
        parts.append(z - np.log(np.exp(z).sum(axis=1, keepdims=True)))
    return np.concatenate(parts)


def losses(z: np.ndarray, ids: np.ndarray) -> np.ndarray:
    return -z[np.arange(len(ids) - 1), ids[1:]]


@needs_shared
def test_perplexity_far_beyond_the_trained_length_is_that_of_fresh_windows(story: tuple[Lower, np.ndarray]) -> None:
    lower, ids = story
    far = slice(8 * TRAINED, None)  # 8 to 12 times the trained length
    fresh = [losses(log_probabilities(lower, part), part) for part in np.split(ids[far], 4)]
    inside = np.exp(np.concatenate(fresh).mean())
    windowed = losses(log_probabilities(lower, ids, policy=Lambda(16, TRAINED // 2)), ids)
    full = losses(log_probabilities(lower, ids), ids)
    assert np.exp(windowed[far].mean()) < MAX_FAR_RISE * inside
    assert np.exp(full[far].mean()) > MIN_EXPLOSION * inside
    np.testing.assert_allclose(windowed[: TRAINED // 2], full[: TRAINED // 2])  # nothing has left the window yet


@needs_shared
def test_int8_keys_and_values_barely_move_what_a_model_foretells(story: tuple[Lower, np.ndarray]) -> None:
    lower, ids = story
    divergence, rise = [], []
    for part in np.split(ids[: 6 * TRAINED], 6):
        f16, int8 = log_probabilities(lower, part), log_probabilities(lower, part, "int8")
        divergence.append((np.exp(f16) * (f16 - int8)).sum(axis=1))
        rise.append(losses(int8, part) - losses(f16, part))
    assert 0 < np.mean(divergence) < MAX_INT8_KL
    assert abs(np.expm1(np.mean(rise))) < MAX_INT8_RISE


# ---- passkeys: a model whose weights are written by hand

ASK, SECRET, FILLER = 42, 100, 200  # ids; there are ten secrets and fifty fillers
LENGTH = 12_000  # there the angle between a query and the first keys is a right one


@pytest.fixture(scope="module")
def safe(tmp_path_factory: pytest.TempPathFactory) -> Lower:
    """One layer that answers ASK with the secret that it has seen, or with ASK if it has seen none.

    Dimension t of a row says "token t", 400 "a secret", 401 "a question".  The query of a question and the key of a
    secret meet in the slowest pair of the rotation (1.3e-4 rad a position), the value of a secret is its number.
    """
    pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
    path = write_tiny(tmp_path_factory.mktemp("safe") / "m.gguf", "llama", "F32", n_layers=1, d_model=512, head_dim=64)
    tensors = {t.name: t.data for t in gguf.GGUFReader(path, "r+").tensors}
    for name, x in tensors.items():
        x[...] = 1 if "norm" in name else 0
    np.fill_diagonal(tensors["token_embd.weight"], 1)
    tensors["token_embd.weight"][SECRET : SECRET + 10, 400] = 1
    tensors["token_embd.weight"][ASK, 401] = 1
    tensors["blk.0.attn_q.weight"][62, 401] = 1
    tensors["blk.0.attn_k.weight"][62, 400] = 1
    for i in range(10):
        tensors["blk.0.attn_v.weight"][i, SECRET + i] = 1
        tensors["blk.0.attn_output.weight"][SECRET + i, i] = 5
    for x in tensors.values():
        x.flush()
    return open_lower(Weights.open(path), "native", EngineOptions(threads=2))


def asked(lower: Lower, length: int, place: int, policy: Policy) -> np.ndarray:
    """The logits [V] after `length` tokens, a secret at `place` and the question at the end."""
    ids = FILLER + np.arange(length, dtype=np.int32) % 50
    ids[place], ids[-1] = SECRET + 7, ASK
    return lower.logits(run(lower, ids, lower.new_kv(length, "f16", policy), 128)[-1:])[0]


def test_a_passkey_in_sinks_or_window_is_found_and_one_that_left_is_gone(safe: Lower) -> None:
    policy = Lambda(sink=8, window=256)
    near = asked(safe, 257, 1, FULL)
    assert near.argmax() == SECRET + 7
    assert asked(safe, LENGTH, 1, FULL).argmax() == ASK  # too far: an angle that it never had at short distances
    from_sink = asked(safe, LENGTH, 1, policy)
    np.testing.assert_allclose(from_sink, near, atol=1e-3 * np.abs(near).max())  # as good as at the distance `window`
    for place in (7, LENGTH - 256, LENGTH - 2):
        assert asked(safe, LENGTH, place, policy).argmax() == SECRET + 7
    for place in (8, LENGTH // 2, LENGTH - 257):
        assert asked(safe, LENGTH, place, policy).argmax() == ASK
