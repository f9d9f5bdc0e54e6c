"""Packed models in the core: the tokens of the device's engine on the same file, whoever else is served."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed (extra [train])")
native = pytest.importorskip("nearfar_native._core", reason="the extension is not built")

import nearfar  # noqa: E402
from nearfar.errors import NearfarError, UnsupportedError  # noqa: E402
from nearfar.llm import MODELS  # noqa: E402
from nearfar.sampling import Sampling  # noqa: E402
from nearfar_cloud.model.hf import load_folder  # noqa: E402
from nearfar_cloud.model.loader import load_gguf  # noqa: E402
from nearfar_cloud.model.packed import NativeDecoder, Packed, pack_folder, pack_gguf  # noqa: E402
from nearfar_cloud.scheduling.budget import Arrival, ChunkedPrefill  # noqa: E402
from nearfar_cloud.types import Request  # noqa: E402
from tests.cloud.serving import SIZES, Whole, check_empty, engine, loaded, request, run  # noqa: E402
from tests.cloud.test_serving_models import write_folder, write_mixture  # noqa: E402
from tests.tiny import write_tiny  # noqa: E402

NANO = MODELS / "nano.gguf"

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = [("llama", "F32"), ("llama", "Q4_K"), ("qwen2", "Q8_0"), ("qwen3", "Q4_0"), ("bitnet", "TQ2_0")]


@cache
def file(arch: str, weight_type: str) -> Path:
    """A random model of four layers, wide enough for blocks of 256."""
    sizes = SIZES | {"d_model": 256, "d_ff": 256}
    return Path(write_tiny(Path(mkdtemp()) / f"{arch}-{weight_type}.gguf", arch, weight_type, seed=3, **sizes))


def device_tokens(path: Path, req: Request) -> tuple[int, ...]:
    """What the engine of the device says, alone, at full depth, whatever the tokens are."""
    with nearfar.LLM.open(path, backend="native", threads=1) as llm:
        sequence = llm.stepper.new_sequence(req.sampling, use_exits=False)
        sequence.continue_with(list(req.ids))
        return tuple(llm.stepper.step(sequence).id for _ in range(req.max_tokens))


@pytest.mark.parametrize(("arch", "weight_type"), FILES)
def test_a_batch_in_the_core_says_what_the_device_says_alone(arch: str, weight_type: str) -> None:
    path = file(arch, weight_type)
    requests = [request(n) for n in range(6)]
    e = engine(ChunkedPrefill(70), Arrival(), model=pack_gguf(path))
    assert run(e, requests) == [device_tokens(path, r) for r in requests]
    check_empty(e)


def test_nano_says_the_same_on_the_device_and_in_the_core() -> None:
    rng = random.Random(5)
    requests = [
        Request(ids=tuple(rng.randrange(16, 4000) for _ in range(n)), max_tokens=12, sampling=Sampling())
        for n in (3, 70, 140)
    ]
    assert run(engine(model=pack_gguf(MODELS / "nano.gguf")), requests) == [
        device_tokens(MODELS / "nano.gguf", r) for r in requests
    ]


@pytest.mark.parametrize("seed", range(6))
def test_rows_are_the_same_however_they_are_cut(seed: int) -> None:
    rng = random.Random(seed)
    requests = [request(n) for n in rng.sample(range(30), 4)]
    model = pack_gguf(file("qwen3", "Q4_0"))
    alone = [run(engine(Whole(), model=model, prefix_cache=False), [r])[0] for r in requests]
    e = engine(ChunkedPrefill(rng.choice((64, 70, 200))), Arrival(), model=model, n_blocks=rng.choice((8, 20)))
    assert run(e, requests) == alone
    check_empty(e)


@cache
def folder(family: str) -> Path:
    """A random model of four layers with heads of 32, as a folder: tiles can attend to its blocks."""
    path = Path(mkdtemp())
    sizes = SIZES | {"d_model": 128, "n_heads": 4, "n_kv_heads": 2, "d_ff": 224}
    model = load_gguf(write_tiny(path / "m.gguf", family, "F32", seed=4, **sizes))
    return write_folder(path / "hf", model, family)


@pytest.mark.parametrize(
    ("form", "kv"), [("bf16", "auto"), ("w8", "auto"), ("q8_0", "auto"), ("w8", "int8"), ("q8_0", "int8")]
)
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("seed", range(3))
def test_rows_of_a_packed_folder_are_the_same_however_they_are_cut(
    form: str, kv: str, preemption: str, seed: int
) -> None:
    model = pack_folder(folder(("llama", "qwen2", "qwen3")[seed]), form)
    rng = random.Random(seed)
    requests = [request(n) for n in rng.sample(range(30), 5)]
    alone = [run(engine(Whole(), model=model, kv=kv, prefix_cache=False), [r])[0] for r in requests]
    n_blocks = rng.choice((6, 8, 20))
    e = engine(
        ChunkedPrefill(rng.choice((64, 70, 200))),
        Arrival(),
        model=model,
        kv=kv,
        n_blocks=n_blocks,
        preemption=preemption,
    )
    assert run(e, requests) == alone
    check_empty(e)


@pytest.mark.parametrize("kv", ["auto", "int8"])
@pytest.mark.parametrize("isa", native.isas_available())
def test_a_folder_in_bf16_agrees_with_its_floats_on_every_isa(
    isa: str, kv: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEARFAR_ISA", isa)
    r = Request(ids=tuple(range(90)), max_tokens=1, n_logprobs=8)
    ours, theirs = top(pack_folder(folder("qwen3"), "bf16"), r, kv), top(load_folder(folder("qwen3")), r)
    both = ours.keys() & theirs.keys()
    assert len(both) >= 6
    assert max(abs(ours[i] - theirs[i]) for i in both) < 0.1


def top(model: object, r: Request, kv: str = "auto") -> dict[int, float]:
    """The likeliest first ids with their log-probabilities."""
    e = engine(model=model, kv=kv)  # type: ignore[arg-type]
    e.submit(r)
    (out,) = e.step()
    return dict(out.logprobs[0].top)


def test_floats_agree_with_the_plain_form_in_torch() -> None:
    path = file("llama", "F32")
    requests = [Request(ids=tuple(range(n, n + 40)), max_tokens=8, n_logprobs=3) for n in (1, 90)]

    def told(model: object) -> list[float]:
        e = engine(model=model)  # type: ignore[arg-type]
        for r in requests:
            e.submit(r)
        return [p for _ in range(12) for out in e.step() for lp in out.logprobs for _, p in lp.top]

    # f16 keys and values here, f32 there.
    np.testing.assert_allclose(told(pack_gguf(path)), told(load_gguf(path)), atol=2e-3)


@pytest.mark.parametrize("form", ["w8", "q8_0"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_folder_packed_to_8_bits_is_near_its_floats(tmp_path: Path, family: str, form: str) -> None:
    folder = write_folder(tmp_path, loaded(family), family)
    r = Request(ids=tuple(range(40)), max_tokens=1, n_logprobs=8)
    ours, theirs = top(pack_folder(folder, form), r), top(loaded(family), r)
    both = ours.keys() & theirs.keys()
    assert len(both) >= 6
    assert max(abs(ours[i] - theirs[i]) for i in both) < 0.15


def test_what_cannot_be_packed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="mixture of experts is not packed"):
        pack_folder(write_mixture(tmp_path / "moe", "mixtral"))
    folder = write_folder(tmp_path / "llama", loaded(), "llama")
    with pytest.raises(UnsupportedError, match="this model has heads of 16"):
        engine(model=pack_folder(folder, "w8"), kv="int8")
    with pytest.raises(UnsupportedError, match="need the compiled engine"):
        engine(model=loaded(), kv="int8")
    with pytest.raises(UnsupportedError, match="expected one of bf16, w8, q8_0, q4_0"):
        pack_folder(folder, "int7")


def test_blocks_of_another_shape_and_spans_that_do_not_fit_are_refused() -> None:
    packed = pack_gguf(file("llama", "F32"))
    decoder = NativeDecoder(packed)
    heads, head_dim = packed.config.n_kv_heads, packed.config.head_dim
    k = [np.zeros((2, heads, head_dim, 64), np.uint16) for _ in range(4)]
    v = [np.zeros((2, heads, 64, head_dim), np.uint16) for _ in range(4)]
    h = np.zeros((3, packed.config.d_model), np.float32)
    spans, blocks = np.array([[0, 3, 0, 0]], np.int64), np.array([1], np.int32)
    store = native.PagedStore(k, v)
    forward = decoder._model.forward_paged
    assert forward(h, store, spans, blocks, 0, 4).shape == h.shape
    for bad in ([[0, 2, 0, 0]], [[1, 2, 0, 0]], [[0, 4, 0, 0]], [[0, 3, 63, 0]], [[0, 3, -1, 0]]):
        with pytest.raises(ValueError, match="spans"):
            forward(h, store, np.array(bad, np.int64), blocks, 0, 4)
    with pytest.raises(ValueError, match="does not have"):
        forward(h, store, spans, np.array([2], np.int32), 0, 4)
    with pytest.raises(ValueError, match="layers"):
        forward(h, store, spans, blocks, 0, 5)
    more_k, more_v = (np.zeros((2, heads + 1, *x[0].shape[2:]), np.uint16) for x in (k, v))
    with pytest.raises(ValueError, match="another shape"):
        forward(h, native.PagedStore([more_k] * 4, [more_v] * 4), spans, blocks, 0, 4)
    with pytest.raises(ValueError, match="different numbers of blocks"):
        native.PagedStore([k[0], np.concatenate([k[0], k[0]])], [v[0], np.concatenate([v[0], v[0]])])


def test_a_number_that_is_not_finite_ends_its_own_request_alone() -> None:
    packed = pack_gguf(file("qwen2", "Q8_0"))
    raw = packed.vectors["blk.2.attn_norm.weight"].copy()
    damaged = Packed(
        packed.config,
        packed.matrices,
        {**packed.vectors, "blk.2.attn_norm.weight": np.full_like(raw, np.inf)},
        packed.rope_pairs,
        "damaged",
        weights=packed.weights,
    )
    e = engine(model=damaged)
    e.submit(request(1))
    outs = [out for _ in range(3) for out in e.step()]
    assert [o.finish for o in outs] == ["error"]
    assert "finite" in outs[0].error
    check_empty(e)
    assert issubclass(UnsupportedError, NearfarError)
