"""Fingerprints name the part in which two machines differ; the self-test notices one that computes otherwise."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.errors import MismatchError, UsageError, WeightsError
from nearfar.gguf_reader import GGUFFile
from nearfar.halves import Halves, split
from nearfar.lower import open_lower
from nearfar.lower_composed import Composed
from nearfar.probes import CODECS, TEXTS, channels, golden, rows_at
from nearfar.tokenizer import tokenizer_from_metadata
from nearfar.weights import Weights
from nearfar.wire.codec import Codec, outlier_channels
from nearfar.wire.fingerprint import (
    FOR_IDS,
    PARTS,
    WHOLE,
    Split,
    compare,
    declared_parts,
    model_fp,
    outliers,
    own_parts,
    parts,
    split_of,
)
from nearfar.wire.golden import Golden, as_json, check_golden, golden_prompts
from nearfar.wire.messages import CodecSpec
from tests.edited import Edit, Tensors, edited
from tests.tiny import write_tiny

CHANNELS = (3, 17)
GOLDEN = (Golden((1, 2, 3), 7), Golden((4,), 5))


@cache
def whole_file(seed: int = 0, tied: bool = True) -> Path:
    return write_tiny(Path(mkdtemp()) / "m.gguf", n_layers=3, d_model=256, exits=(1, 2), seed=seed, tied=tied)


@cache
def halves(seed: int = 0, tied: bool = True) -> Halves:
    with Weights.open(whole_file(seed, tied)) as whole:
        return split(whole, 2, Path(mkdtemp()), outliers=CHANNELS, golden=as_json(GOLDEN))


def parts_of(path: Path) -> dict[str, bytes]:
    with Weights.open(path) as weights:
        return parts(weights)


def test_both_halves_name_the_same_pair() -> None:
    two = halves()
    assert parts_of(two.device) == parts_of(two.upper)
    assert set(parts_of(two.device)) == set(PARTS)
    assert model_fp(parts_of(two.device)) == two.fingerprint
    with Weights.open(two.device) as device, Weights.open(two.upper) as upper:
        assert device.file.metadata["nearfar.fingerprint"] == two.fingerprint.hex()
        assert set(own_parts(device)) == set(PARTS) - {"upper"}
        assert set(own_parts(upper)) == {"arch", "upper", "split", "codec", "sampler"}


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_serves_in_place_of_either_half(tied: bool) -> None:
    theirs = parts_of(halves(0, tied).device)
    with Weights.open(whole_file(0, tied)) as whole:
        ours = own_parts(whole, split_of(theirs, 3)) | {"codec": theirs["codec"]}  # a whole model has no channels
        assert compare(theirs, ours) == []
        assert ours == {name: theirs[name] for name in ours}
        assert compare(theirs, own_parts(whole), FOR_IDS) == []
        assert compare(theirs, own_parts(whole, Split(1, 1)))[0].part == "device"


def _tensor(name: str) -> Edit:
    def change(_: dict[str, object], tensors: Tensors) -> None:
        kind, shape, raw = tensors[name]
        raw[5] ^= 1
        tensors[name] = kind, shape, raw

    return change


def _key(key: str, value: object) -> Edit:
    return lambda meta, _: meta.update({key: value})


def _token(meta: dict[str, object], _: Tensors) -> None:
    meta["tokenizer.ggml.tokens"] = ["other", *list(meta["tokenizer.ggml.tokens"])[1:]]  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("role", "edit", "part"),
    [
        ("device", _tensor("blk.1.ffn_up.weight"), "device"),
        ("device", _tensor("token_embd.weight"), "device"),
        ("upper", _tensor("blk.2.attn_q.weight"), "upper"),
        ("upper", _tensor("output_norm.weight"), "upper"),
        ("upper", _tensor("token_embd.weight"), "upper"),
        ("device", _key("llama.rope.freq_base", 5000.0), "arch"),
        ("upper", _key("llama.context_length", 256), "arch"),
        ("device", _token, "tokenizer"),
        ("upper", _key("nearfar.codec.outlier_channels", [3]), "codec"),
        ("device", _key("nearfar.exit.1.norm", [1.0] * 256), "exits"),
        ("device", _key("nearfar.exit.2.tau", 0.75), "calibration"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_change_shows_in_its_part_and_in_no_other(role: str, edit: Edit, part: str) -> None:
    two = halves()
    theirs, ours = parts_of(edited(getattr(two, role), edit)), parts_of(two.upper if role == "device" else two.device)
    found = compare(theirs, ours, PARTS)
    assert [m.part for m in found] == [part]
    assert model_fp(theirs) != model_fp(ours)
    assert f"{part} (theirs {theirs[part][:6].hex()}…, ours {ours[part][:6].hex()}…)" == str(found[0])


def test_exits_and_their_calibration_are_the_device_s_own_business() -> None:
    two = halves()
    for edit in (_key("nearfar.exit.1.norm", [1.0] * 256), _key("nearfar.exit.2.tau", 0.75)):
        assert compare(parts_of(edited(two.device, edit)), parts_of(two.upper)) == []


def test_halves_of_two_models_are_told_apart() -> None:
    found = compare(parts_of(halves(1).device), parts_of(halves(0).upper))
    assert [m.part for m in found] == ["device", "upper"]
    assert compare(parts_of(halves(1).device), parts_of(halves(0).upper), FOR_IDS) == []  # one tokenizer


def test_a_pair_that_was_cut_elsewhere_is_told_apart(tmp_path: Path) -> None:
    with Weights.open(whole_file()) as whole:
        other = split(whole, 1, tmp_path)
    found = compare(parts_of(other.device), parts_of(halves().upper))
    assert "split (theirs 1 of 3, ours 2 of 3)" in map(str, found)


def test_a_part_that_the_other_side_lacks_is_a_difference() -> None:
    ours = parts_of(halves().upper)
    found = compare({name: part for name, part in ours.items() if name != "upper"}, ours)
    assert [str(m).split(",")[0] for m in found] == ["upper (theirs none"]


def test_parts_are_asked_of_a_place_where_the_model_can_be_cut() -> None:
    one, beyond, below = Split(1, 1), Split(3, 3), Split(-1, -1)
    for path, at in ((halves().device, one), (halves().upper, one), (whole_file(), beyond), (whole_file(), below)):
        with Weights.open(path) as weights, pytest.raises(UsageError, match=f"no model cut at layer {at.k}$"):
            own_parts(weights, at)
    for path, at in ((halves().device, Split(2, 1)), (whole_file(), Split(1, 2)), (whole_file(), Split(2, 0))):
        said = f"no model cut at layer {at.k}, with rows of layer {at.rows_at}$"
        with Weights.open(path) as weights, pytest.raises(UsageError, match=said):
            own_parts(weights, at)


@pytest.mark.parametrize("text", ["tensors 00", "upper 0", "upper xy", "upper", "", "UPPER 00", f"upper {'00' * 65}"])
def test_damaged_parts_are_refused(text: str) -> None:
    path = edited(halves().device, _key("nearfar.parts", ["arch 00", text]))
    with GGUFFile.open(path) as file, pytest.raises(WeightsError, match=r"nearfar\.parts holds"):
        declared_parts(file)


@pytest.mark.parametrize("value", [[3, 3], [17, 3], [256], [-1], ["3"], [0.5], list(range(17)), 3, "3"])
def test_damaged_channels_are_refused(value: object) -> None:
    path = edited(halves().device, _key("nearfar.codec.outlier_channels", value))
    with (
        Weights.open(path) as weights,
        pytest.raises(WeightsError, match=r"expected at most 16 rising channels of 0\.\.255"),
    ):
        outliers(weights.file, weights.config)


@given(st.dictionaries(st.sampled_from(PARTS), st.binary(max_size=40)), st.integers(1, 1024))
def test_parts_from_outside_never_break_anything(theirs: dict[str, bytes], n_layers: int) -> None:
    at = split_of(theirs, n_layers)
    assert at == WHOLE or 0 < at.rows_at <= at.k < n_layers
    ours = dict.fromkeys(PARTS, b"\x01" * 32)
    assert {m.part for m in compare(theirs, ours, PARTS)} == {n for n in PARTS if theirs.get(n) != ours[n]}
    for m in compare(theirs, ours, PARTS):
        assert str(m).isprintable()


def test_a_plain_split_is_read_back() -> None:
    assert split_of({"split": b"2 of 3"}, 3) == (2, 2)
    assert split_of({"split": b"2 of 3, rows of 1"}, 3) == (2, 1)
    for text in ("3 of 3", "0 of 3", "2 of 4", "2 of 3\n", "2 of 3, rows of 0", "1 of 3, rows of 2", "2 of 3, rows of"):
        assert split_of({"split": text.encode()}, 3) == WHOLE
    assert split_of({}, 3) == WHOLE


# ---------------------------------------------------------------- the self-test


def test_the_self_test_travels_in_the_device_half() -> None:
    with Weights.open(halves().device) as device, Weights.open(halves().upper) as upper:
        assert golden_prompts(device.file.metadata, 320) == GOLDEN
        assert golden_prompts(upper.file.metadata, 320) == ()


@pytest.mark.parametrize(
    "value",
    [
        7,
        "no json",
        "{}",
        "[" * 100_000,
        '[{"ids": [], "token": 1}]',
        '[{"ids": [320], "token": 1}]',
        '[{"ids": [-1], "token": 1}]',
        '[{"ids": [1], "token": true}]',
        '[{"ids": [1]}]',
        '[{"ids": "12", "token": 1}]',
        json.dumps([{"ids": [1] * 4097, "token": 1}]),
        json.dumps([{"ids": [1], "token": 1}] * 65),
    ],
)
def test_a_damaged_self_test_is_refused(value: object) -> None:
    path = edited(halves().device, _key("nearfar.golden", value))
    with GGUFFile.open(path) as file, pytest.raises(WeightsError, match=r"nearfar\.golden=.*split the model again"):
        golden_prompts(file.metadata, 320)


def test_a_machine_that_computes_something_else_fails_the_self_test() -> None:
    check_golden(GOLDEN, lambda ids: {1: 5, 3: 7}[len(ids)])
    with pytest.raises(MismatchError, match=r"1 of 2 prompts \(number 2\).*NEARFAR_ISA=ref"):
        check_golden(GOLDEN, lambda ids: 7)


def test_golden_tokens_are_the_same_under_every_codec_where_they_can_be(tmp_path: Path) -> None:
    with Weights.open(whole_file()) as whole:
        lower, tokenizer = open_lower(whole, "numpy"), tokenizer_from_metadata(whole.file.metadata)
        prompts = [tokenizer.encode(text) for text in TEXTS[:6]]
        found = channels(lower, 2, prompts)
        tests = golden(lower, 2, prompts, found)
        two = split(whole, 2, tmp_path, outliers=found, golden=as_json(tests))
    assert len(tests) == 4
    device, upper = Weights.open(two.device), Weights.open(two.upper)
    assert golden_prompts(device.file.metadata, 320) == tuple(tests)
    for codec in CODECS:
        spec = CodecSpec(codec, outliers=() if codec is CODECS[0] else outliers(device.file, device.config))
        pair = Composed(open_lower(device, "numpy"), open_lower(upper, "numpy"), 2, Codec.of(spec, 256).round_trip)
        check_golden(tests[:1], partial(says, pair))  # the clearest of them


def says(pair: Composed, ids: Sequence[int]) -> int:
    h = pair.forward(pair.embed(np.asarray(ids, np.int32)), pair.new_kv(len(ids)), 0, pair.config.n_layers)
    return int(pair.logits(h[-1:])[0].argmax())


def test_channels_come_from_the_rows_that_travel() -> None:
    with Weights.open(whole_file()) as whole:
        lower, ids = open_lower(whole, "numpy"), list(range(1, 320))
        rows = rows_at(lower, 2, ids)
        assert rows.shape == (319, 256)
        assert channels(lower, 2, [ids, []]) == outlier_channels(rows)
        alone = lower.forward(lower.embed(np.array(ids[:40], np.int32)), lower.new_kv(40), 0, 2)
        np.testing.assert_allclose(rows[:40], alone, atol=1e-4)
