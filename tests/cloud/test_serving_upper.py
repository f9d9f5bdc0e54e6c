"""The upper half of a split model in the core: rows enter at its first layer, with the bits of the device's engine."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (extra [train])")
native = pytest.importorskip("nearfar_native._core", reason="the extension is not built")

from nearfar.errors import UsageError  # noqa: E402
from nearfar.halves import Halves, split  # noqa: E402
from nearfar.lower import open_lower  # noqa: E402
from nearfar.options import EngineOptions  # noqa: E402
from nearfar.weights import Weights  # noqa: E402
from nearfar_cloud.executors.local import LocalExecutor  # noqa: E402
from nearfar_cloud.gateway.served import open_served  # noqa: E402
from nearfar_cloud.model.attention import KVStore, Spans  # noqa: E402
from nearfar_cloud.model.decoder import Decoder  # noqa: E402
from nearfar_cloud.model.loader import Loaded, load_gguf  # noqa: E402
from nearfar_cloud.model.packed import NativeDecoder, Packed, pack_gguf  # noqa: E402
from nearfar_cloud.types import Request  # noqa: E402
from tests.cloud.test_planning_cli import nearfar  # noqa: E402
from tests.tiny import write_tiny  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
FILES = [("llama", "F32", True), ("llama", "Q4_K", False), ("qwen2", "Q8_0", True), ("bitnet", "TQ2_0", False)]
K, L = 2, 4
MAX_TORCH_ERROR = 2e-4  # of logits of about 1: torch sums in another order than the device's engine


@cache
def files(arch: str, weight_type: str, tied: bool) -> tuple[Path, Halves]:
    """A random model of four layers, and its halves."""
    folder = Path(mkdtemp())
    path = write_tiny(folder / "m.gguf", arch, weight_type, seed=5, n_layers=L, exits=(K,), tied=tied)
    with Weights.open(path) as whole:
        return path, split(whole, K, folder)


def rows_of(path: Path, n: int, start: int = 0) -> np.ndarray:
    """What a device sends for `n` ids: f32 [n, D], inputs of layer K."""
    lower = open_lower(Weights.open(path), "native", EngineOptions(threads=1, cache="off"))
    ids = np.random.default_rng(n + start).integers(0, 320, n).astype(np.int32)
    return lower.forward(lower.embed(ids), lower.new_kv(n), 0, K)


def run(loaded: Loaded | Packed, sessions: list[np.ndarray]) -> list[np.ndarray]:
    """Logits [n, V] of every row of each session, all in one batch that is cut in two."""
    store = KVStore(
        loaded.config.layers, 3 * len(sessions), loaded.config.n_kv_heads, loaded.config.head_dim, loaded.kv_dtype
    )
    model = NativeDecoder(loaded) if isinstance(loaded, Packed) else Decoder(loaded)
    model.attach(store)
    blocks = [np.arange(3 * i, 3 * i + 3, dtype=np.int32) for i in range(len(sessions))]
    found: list[list[np.ndarray]] = [[] for _ in sessions]
    for part in (slice(0, 70), slice(70, None)):
        pieces = [(i, rows[part]) for i, rows in enumerate(sessions) if len(rows[part])]
        spans = Spans.of([(len(rows), part.start, blocks[i]) for i, rows in pieces])
        h = model.forward(torch.from_numpy(np.concatenate([rows for _, rows in pieces])), spans, K, L)
        for (i, _), x in zip(pieces, model.logits(h).split([len(rows) for _, rows in pieces]), strict=True):
            found[i].append(x.numpy())
    return [np.concatenate(x) for x in found]


@pytest.mark.parametrize("model", FILES, ids=lambda m: f"{m[0]}-{m[1]}")
def test_rows_in_the_core_have_the_bits_of_the_device_s_engine(model: tuple[str, str, bool]) -> None:
    path, two = files(*model)
    sessions = [rows_of(path, 5), rows_of(two.device, 131), rows_of(path, 64)]
    upper = open_lower(Weights.open(two.upper), "native", EngineOptions(threads=1, cache="off"))
    for rows, got in zip(sessions, run(pack_gguf(two.upper), sessions), strict=True):
        h = upper.forward(rows, upper.new_kv(len(rows)), K, L)
        np.testing.assert_array_equal(got, upper.logits(h))


@pytest.mark.parametrize("model", FILES, ids=lambda m: f"{m[0]}-{m[1]}")
def test_an_upper_half_serves_as_the_whole_model_does(model: tuple[str, str, bool]) -> None:
    path, two = files(*model)
    sessions = [rows_of(path, 5), rows_of(path, 131)]
    for load in (pack_gguf, load_gguf):
        for got, expected in zip(run(load(two.upper), sessions), run(load(path), sessions), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_torch_computes_an_upper_half_as_the_device_s_engine_does() -> None:
    path, two = files("llama", "F32", True)
    sessions = [rows_of(path, 131)]
    upper = open_lower(Weights.open(two.upper), "numpy")
    expected = upper.logits(upper.forward(sessions[0], upper.new_kv(131, "f32"), K, L))
    np.testing.assert_allclose(run(load_gguf(two.upper), sessions)[0], expected, atol=MAX_TORCH_ERROR)


def test_blocks_are_kept_for_the_layers_that_are_there() -> None:
    path, two = files("llama", "F32", True)
    for load in (pack_gguf, load_gguf):
        half, whole = LocalExecutor(load(two.upper), 4), LocalExecutor(load(path), 4)
        assert half.store.block_bytes * 2 == whole.store.block_bytes
        assert (half.facts.n_layers, half.facts.first_layer) == (4, 2)
        assert (whole.facts.n_layers, whole.facts.first_layer) == (4, 0)


def test_an_upper_half_refuses_ids() -> None:
    _, two = files("llama", "F32", True)
    facts = LocalExecutor(pack_gguf(two.upper), 4).facts
    with pytest.raises(
        UsageError, match=r"ids for the upper half of a model, layers \[2, 4\): expected rows that enter"
    ):
        facts.check(Request(ids=(1, 2)), 4)


def test_a_device_half_is_not_served() -> None:
    _, two = files("llama", "F32", True)
    for load in (pack_gguf, load_gguf):
        with pytest.raises(UsageError, match=r"device half of a split model, layers \[0, 2\): serve the upper half"):
            load(two.device)


def test_an_upper_half_is_served_without_a_tokenizer() -> None:
    _, two = files("llama", "F32", True)
    served = open_served(str(two.upper))
    assert served.tokenizer is None
    assert served.weights is not None
    assert served.weights.config.role == "upper"


@pytest.mark.parametrize("verb", ["simulate", "replay", "profile", "roofline"])
@pytest.mark.parametrize("role", ["device", "upper"])
def test_serving_is_planned_for_whole_models(verb: str, role: str, tmp_path: Path) -> None:
    _, two = files("llama", "F32", True)
    out = ("--out", str(tmp_path / "fit.json"), "--quick") if verb == "profile" else ()
    with pytest.raises(UsageError, match=f"the {role} half of a split model"):
        nearfar(verb, str(getattr(two, role)), *out)
