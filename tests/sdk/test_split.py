"""A model cut in two files: the halves say what the whole says, and neither is taken for what it is not."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest

from nearfar.engine import Engine, stages
from nearfar.errors import NearfarError, UnsupportedError, UsageError, WeightsError
from nearfar.halves import Halves, split
from nearfar.kv_cache import Lambda
from nearfar.llm import LLM, MODELS
from nearfar.lower import Lower, open_lower
from nearfar.lower_composed import Composed
from nearfar.options import EngineOptions
from nearfar.sampling import Sampling
from nearfar.speculate import Speculative
from nearfar.weights import Weights
from tests.edited import Edit, edited
from tests.tiny import write_tiny

NANO = MODELS / "nano.gguf"
IDS = np.array([5, 17, 3, 99, 42, 256, 8, 8, 131], np.int32)
# Every architecture, with a head of its own or without, floats and blocks, exits as keys.
MODELS_OF = [
    ("llama", "F32", True),
    ("llama", "Q4_K", False),
    ("qwen2", "Q8_0", True),
    ("qwen3", "BF16", False),
    ("bitnet", "TQ2_0", True),
    ("bitnet-b1.58", "TQ1_0", True),
]


@cache
def whole_file(
    arch: str = "llama", weight_type: str = "F32", tied: bool = True, exits: tuple[int, ...] = (1, 2, 3)
) -> Path:
    path = Path(mkdtemp()) / f"{arch}.gguf"
    return write_tiny(path, arch, weight_type, seed=7, exits=exits, tau=0.05, tied=tied)


@cache
def halves(k: int, *model: object) -> Halves:
    with Weights.open(whole_file(*model)) as whole:  # type: ignore[arg-type]
        return split(whole, k, Path(mkdtemp()))


def opened(path: Path, backend: str) -> Lower:
    if backend == "native":
        pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
    return open_lower(Weights.open(path), backend, EngineOptions(threads=1, cache="off"))


def all_logits(lower: Lower, k: int) -> list[np.ndarray]:
    """A prompt, then single rows, at every head up to layer `k` and at full depth: what tells two models apart."""
    kv, found = lower.new_kv(32), []
    for ids in (IDS[:5], IDS[5:6], IDS[6:]):
        h = lower.embed(ids)
        for first in range(k):
            h = lower.forward(h, kv, first, first + 1)
            found.append(lower.logits(h, f"exit.{first + 1}"))
        h = lower.forward(h, kv, k, 4)
        found += [h, lower.logits(h), lower.greedy(h)[0]]
    return found


# ---------------------------------------------------------------- the halves together


@pytest.mark.parametrize("backend", ["numpy", "native"])
@pytest.mark.parametrize("model", MODELS_OF, ids=lambda m: f"{m[0]}-{m[1]}")
@pytest.mark.parametrize("k", [1, 2, 3])
def test_halves_say_bit_for_bit_what_the_whole_model_says(k: int, model: tuple, backend: str) -> None:
    two = halves(k, *model)
    composed = Composed(opened(two.device, backend), opened(two.upper, backend), k)
    for got, expected in zip(all_logits(composed, k), all_logits(opened(whole_file(*model), backend), k), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.skipif(not NANO.is_file(), reason="nano is not trained yet")
@pytest.mark.parametrize("backend", ["numpy", "native"])
@pytest.mark.parametrize("k", range(1, 6))
def test_nano_is_the_same_model_wherever_it_is_cut(k: int, backend: str, tmp_path: Path) -> None:
    with Weights.open(NANO) as whole:
        two = split(whole, k, tmp_path, make_exit=True)
    composed = Composed(opened(two.device, backend), opened(two.upper, backend), k)
    found = []
    for lower in (composed, opened(NANO, backend)):
        kv, rows = lower.new_kv(32), []
        for ids in (IDS[:5], IDS[5:6], IDS[6:]):
            h = lower.forward(lower.embed(ids), kv, 0, 6)
            rows += [h, lower.logits(h)]
        engine = Engine(lower, 64)
        s = engine.new_sequence(Sampling(temperature=0.8, seed=3), use_exits=False)
        s.ids = IDS.tolist()
        found.append((rows, [engine.step(s).id for _ in range(24)]))
    for got, expected in zip(found[0][0], found[1][0], strict=True):
        np.testing.assert_array_equal(got, expected)
    assert found[0][1] == found[1][1]


def test_exits_decide_in_a_composed_model_as_in_the_whole_one() -> None:
    model = ("bitnet", "TQ2_0", True, (2, 3))
    two = halves(3, *model)
    backend = "native"
    composed = Composed(opened(two.device, backend), opened(two.upper, backend), 3)
    runs = []
    for lower in (composed, opened(whole_file(*model), backend)):
        engine = Engine(lower, 256)
        s = engine.new_sequence(Sampling(temperature=1.0, seed=5), True)
        s.ids = IDS.tolist()
        runs.append([(t.id, t.source) for t in (engine.step(s) for _ in range(60))])
    assert runs[0] == runs[1]
    assert {source for _, source in runs[0]} == {"exit.2", "exit.3", "full"}  # else this test shows nothing


def test_what_travels_is_what_the_codec_leaves_of_a_row() -> None:
    two = halves(2)
    below, above = opened(two.device, "numpy"), opened(two.upper, "numpy")
    composed = Composed(below, above, 2, lambda rows: np.round(rows * 64) / np.float32(64))
    h = below.forward(below.embed(IDS), below.new_kv(32), 0, 2)
    expected = above.forward(np.round(h * 64) / np.float32(64), above.new_kv(32), 2, 4)
    np.testing.assert_array_equal(composed.forward(composed.embed(IDS), composed.new_kv(32), 0, 4), expected)
    kv = composed.new_kv(32)
    in_steps = composed.forward(composed.forward(composed.embed(IDS), kv, 0, 2), kv, 2, 4)
    np.testing.assert_array_equal(in_steps, expected)


class Refusing:
    """A codec that gives up at the second call."""

    def __init__(self) -> None:
        self.left = 1

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        self.left -= 1
        if self.left < 0:
            raise UsageError("no more")
        return rows


def test_a_composed_call_that_fails_above_leaves_nothing_below() -> None:
    two = halves(2)
    composed = Composed(opened(two.device, "numpy"), opened(two.upper, "numpy"), 2, Refusing())
    kv = composed.new_kv(32)
    composed.forward(composed.embed(IDS[:4]), kv, 0, 4)
    with pytest.raises(UsageError, match="no more"):
        composed.forward(composed.embed(IDS[4:]), kv, 0, 4)
    assert [kv.length(i) for i in range(4)] == [4, 4, 4, 4]


def test_engines_that_do_not_meet_are_not_composed() -> None:
    two, other = halves(2), halves(2, "qwen3", "BF16", False)
    device, upper = opened(two.device, "numpy"), opened(two.upper, "numpy")
    with pytest.raises(UsageError, match="expected halves of one model"):
        Composed(device, opened(other.upper, "numpy"), 2)
    with pytest.raises(UsageError, match="do not meet at layer 3"):
        Composed(device, upper, 3)
    with pytest.raises(UsageError, match="do not meet"):
        Composed(upper, device, 2)
    with pytest.raises(UsageError, match="keeps every position"):
        Composed(device, upper, 2).new_kv(32, policy=Lambda())


# ---------------------------------------------------------------- the device half alone


@pytest.mark.parametrize("backend", ["numpy", "native"])
def test_a_device_half_answers_by_itself_and_its_last_exit_decides(backend: str) -> None:
    whole = opened(whole_file(), backend)
    with LLM.open(halves(2).device, backend=backend, threads=1) as llm:
        completion = llm.generate(IDS.tolist(), max_tokens=8, exits=False)
    ids = IDS.tolist()
    for event in completion.events:
        h = whole.forward(whole.embed(np.array(ids, np.int32)), whole.new_kv(64), 0, 2)
        assert event.id == whole.logits(h[-1:], "exit.2").argmax()
        assert event.source == "exit.2"
        ids.append(event.id)


def test_tokens_of_a_device_half_leave_at_its_lower_exits_too() -> None:
    lower = opened(halves(3, "bitnet", "TQ2_0").device, "native")
    assert [(s.first, s.last, s.source, s.forced) for s in stages(lower.config)] == [
        (0, 1, "exit.1", False),
        (1, 2, "exit.2", False),
        (2, 3, "exit.3", True),
    ]
    assert [(s.first, s.last, s.source) for s in stages(lower.config, use_exits=False)] == [(0, 3, "exit.3")]
    engine = Engine(lower, 256)
    s = engine.new_sequence(Sampling(temperature=1.0, seed=2), True)
    s.ids = IDS.tolist()
    tokens = [engine.step(s) for _ in range(60)]
    assert {t.source for t in tokens} == {"exit.1", "exit.2", "exit.3"}
    assert not [layer for layer in s.owed if layer >= 3]  # nobody will ever run them
    for i, token in enumerate(tokens):
        ids, depth = np.array(s.ids[: len(IDS) + i], np.int32), int(token.source.removeprefix("exit."))
        h = lower.forward(lower.embed(ids), lower.new_kv(256), 0, depth)
        again = Engine(lower, 256).lower.logits(h[-1:], token.source)[0]
        exit_config = next(e for e in lower.config.exits if e.layer == depth)
        assert token.conf == pytest.approx(1 / np.exp(again - again.max()).sum(), rel=1e-6), exit_config


def test_a_device_half_drafts_with_its_lower_exits() -> None:
    lower = opened(halves(3, "bitnet", "TQ2_0").device, "native")
    engine, runs = Engine(lower, 256), []
    for stepper in (engine, Speculative(engine, least_sure=0.0)):
        s = stepper.new_sequence(Sampling(), False)
        s.ids = IDS.tolist()
        runs.append([stepper.step(s) for _ in range(40)])
    assert [t.id for t in runs[0]] == [t.id for t in runs[1]]
    assert {t.source for t in runs[0]} == {"exit.3"}
    assert {t.source for t in runs[1]} <= {"draft.1", "exit.3"}
    with pytest.raises(UsageError, match="no early exits"):
        Speculative(Engine(opened(halves(1).device, "numpy"), 64))


def test_a_device_half_has_no_final_head(tmp_path: Path) -> None:
    for backend in ("numpy", "native"):
        lower = opened(halves(2).device, backend)
        h = lower.forward(lower.embed(IDS), lower.new_kv(32), 0, 2)
        with pytest.raises(UsageError, match=r"head .final.*exit\.1, exit\.2"):
            lower.logits(h)
        with pytest.raises(UsageError, match=r"layers \[0, 3\): the model has \[0, 2\)"):
            lower.forward(lower.embed(IDS), lower.new_kv(32), 0, 3)


# ---------------------------------------------------------------- the upper half alone


@pytest.mark.parametrize("backend", ["numpy", "native"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_upper_half_takes_rows_and_no_ids(tied: bool, backend: str) -> None:
    lower = opened(halves(2, "llama", "F32", tied).upper, backend)
    with pytest.raises(UsageError, match=r"layers \[2, 4\) and no embedding"):
        lower.embed(IDS)
    kv = lower.new_kv(32)
    with pytest.raises(UsageError, match=r"layers \[0, 4\): the model has \[2, 4\)"):
        lower.forward(np.zeros((1, 256), np.float32), kv, 0, 4)
    lower.forward(np.ones((3, 256), np.float32), kv, 2, 4)
    assert kv.length() == kv.length(2) == 3


def test_no_text_is_asked_of_an_upper_half() -> None:
    with pytest.raises(UsageError, match=r"upper half of a split model, layers \[2, 4\).*open the device half"):
        LLM.open(halves(2).upper)


def test_an_upper_half_holds_nothing_of_the_tokenizer_and_only_one_head() -> None:
    with Weights.open(halves(2, "llama", "F32", False).upper) as upper:
        assert upper.has("output.weight")
        assert not upper.has("token_embd.weight")
        assert not [key for key in upper.file.metadata if key.startswith(("tokenizer.", "nearfar.exit"))]
    with Weights.open(halves(2).upper) as upper:
        assert upper.head_name == "token_embd.weight"


# ---------------------------------------------------------------- what is refused


def _set(key: str, value: object) -> Edit:
    return lambda meta, _: meta.update({key: value})


def _cut(k: object) -> Edit:
    return lambda meta, _: meta.update({"nearfar.split_layer": k, "nearfar.row_layer": k})


def _drop(name: str) -> Edit:
    return lambda _, tensors: tensors.pop(name)


def _copy(old: str, new: str) -> Edit:
    return lambda _, tensors: tensors.update({new: tensors[old]})


@pytest.mark.parametrize(
    ("role", "edit", "error", "said"),
    [
        (
            "device",
            _set("nearfar.role", "middle"),
            UnsupportedError,
            "nearfar.role='middle': this engine knows full, device",
        ),
        ("device", _set("nearfar.role", "full"), WeightsError, "no tensor output_norm.weight"),
        ("device", _set("nearfar.role", "upper"), WeightsError, "an exit after layer 1 in an upper half"),
        ("upper", _set("nearfar.role", "device"), WeightsError, r"a device half cut at layer 2 with exits after \[\]"),
        (
            "device",
            _set("nearfar.version", 2),
            UnsupportedError,
            "nearfar.version=2: this build reads split models of version 1",
        ),
        ("device", _cut(0), WeightsError, r"nearfar.split_layer=0: expected 1\.\.3"),
        ("upper", _cut(4), WeightsError, r"nearfar.split_layer=4: expected 1\.\.3"),
        ("upper", _cut("2"), WeightsError, "nearfar.split_layer=2: expected the layer"),
        (
            "upper",
            _cut(1),
            WeightsError,
            r"no tensor blk\.1\.attn_norm.*layers \[1, 4\), of a llama model of 4",
        ),
        (
            "upper",
            _cut(3),
            WeightsError,
            r"blk\.2\.attn_norm\.weight has no place in the upper half",
        ),
        ("device", _set("nearfar.row_layer", 3), WeightsError, r"nearfar.row_layer=3: expected 1\.\.2"),
        ("upper", _set("nearfar.row_layer", 0), WeightsError, r"nearfar.row_layer=0: expected 1\.\.2"),
        ("upper", _set("nearfar.row_layer", "1"), WeightsError, "nearfar.row_layer=1: expected the layer that rows"),
        ("upper", _set("nearfar.row_layer", 1), WeightsError, r"no tensor blk\.1\.attn_norm.*layers \[1, 4\)"),
        (
            "device",
            _set("nearfar.exit_layers", [1]),
            WeightsError,
            r"exits after \[1\]: expected the last one after layer 2",
        ),
        ("device", _drop("token_embd.weight"), WeightsError, "no tensor token_embd.weight"),
        (
            "device",
            _drop("blk.1.ffn_up.weight"),
            WeightsError,
            r"no tensor blk\.1\.ffn_up.weight: the device half, layers \[0, 2\)",
        ),
        (
            "device",
            _copy("blk.0.attn_norm.weight", "output_norm.weight"),
            WeightsError,
            "output_norm.weight has no place",
        ),
        ("upper", _drop("output_norm.weight"), WeightsError, "no tensor output_norm.weight: the upper half"),
        ("upper", _drop("token_embd.weight"), WeightsError, "no tensor token_embd.weight"),
        (
            "upper",
            _copy("token_embd.weight", "output.weight"),
            WeightsError,
            "token_embd.weight has no place in the upper",
        ),
        ("upper", _copy("output_norm.weight", "exit.3.norm.weight"), WeightsError, "exit.3.norm.weight has no place"),
    ],
)
def test_a_file_that_is_not_what_its_role_says_is_refused(
    role: str, edit: Edit, error: type[NearfarError], said: str
) -> None:
    with pytest.raises(error, match=said):
        Weights.open(edited(getattr(halves(2), role), edit))


def test_a_model_is_cut_at_an_exit_or_one_is_made(tmp_path: Path) -> None:
    with Weights.open(whole_file(exits=(1,))) as whole:
        with pytest.raises(UsageError, match=r"no exit after layer 2 \(the model has exits after 1\).*--make-exit"):
            split(whole, 2, tmp_path)
        assert not list(tmp_path.iterdir())
        two = split(whole, 2, tmp_path, make_exit=True)
        final = whole.norm_gain("final")
    with Weights.open(two.device) as device:
        np.testing.assert_array_equal(device.norm_gain("exit.2"), final)
        assert [(e.layer, e.tau) for e in device.config.exits] == [(1, pytest.approx(0.05)), (2, 1.0)]
    with LLM.open(two.device, backend="numpy") as llm:
        assert set(llm.generate(IDS.tolist(), max_tokens=30).stats.by_source) == {"exit.1", "exit.2"}


@pytest.mark.parametrize("k", [-1, 0, 4, 5])
def test_both_halves_have_a_layer_at_least(k: int, tmp_path: Path) -> None:
    with Weights.open(whole_file()) as whole, pytest.raises(UsageError, match=rf"cut at layer {k}: .*expected 1\.\.3"):
        split(whole, k, tmp_path, make_exit=True)


def test_a_half_is_not_cut_again(tmp_path: Path) -> None:
    for path in (halves(2).device, halves(2).upper):
        with Weights.open(path) as half, pytest.raises(UsageError, match="half of a model that was cut"):
            split(half, 1, tmp_path)


def test_keys_that_nobody_knows_come_along(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", exits=(2,), extra={"general.license": "mine", "nearfar.card": "{}"})
    with Weights.open(path) as whole:
        two = split(whole, 2, tmp_path)
    for half in (two.device, two.upper):
        with Weights.open(half) as weights:
            assert weights.file.metadata["general.license"] == "mine"


_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from nearfar.errors import FileError
from nearfar.halves import split
from nearfar.weights import Weights
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Weights.open(sys.argv[1]) as whole:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
    try:
        split(whole, 2, Path(sys.argv[2]))
    except FileError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
@pytest.mark.parametrize("failing", ["device", "upper"])
def test_a_full_disk_leaves_neither_half(failing: str, tmp_path: Path) -> None:
    """Cut so that the half named is the larger one, under a limit between the two."""
    path = write_tiny(tmp_path / "m.gguf", exits=(2,), n_layers=3 if failing == "device" else 6)
    (tmp_path / "out").mkdir()
    with Weights.open(path) as whole:
        two = split(whole, 2, tmp_path)
    sizes = sorted((two.device.stat().st_size, two.upper.stat().st_size))
    limit = sum(sizes) // 2
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, path, tmp_path / "out", str(limit)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"m-{failing}.gguf cannot be written: File too large" in done.stdout
    assert not list((tmp_path / "out").iterdir())
