"""Rows that leave the device below its last layers: the halves overlap, and the answer is the oracle's all the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nearfar.cancel import Cancel
from nearfar.collab import Collab, Collaboration
from nearfar.engine import Engine, stages
from nearfar.errors import Cancelled, MismatchError, UsageError
from nearfar.eval.pair import open_pair
from nearfar.halves import check_pair, split
from nearfar.importers import import_model
from nearfar.ledger import Draft
from nearfar.llm import LLM
from nearfar.lower import Lower, open_lower
from nearfar.lower_composed import Composed
from nearfar.sampling import Sampling
from nearfar.share import how_of, self_test
from nearfar.upper import LocalUpper
from nearfar.weights import Weights
from nearfar.wire.codec import Codec
from nearfar.wire.fingerprint import FOR_ROWS, compare, own_parts, parts, split_of
from nearfar.wire.golden import Golden, as_json
from nearfar.wire.messages import CodecId, CodecSpec, Mode
from tests.paths import SHARED, needs_shared
from tests.sdk.test_collab import (
    CODECS,
    GREEDY,
    IDS,
    MAX_LEN,
    PROMPT,
    WARM,
    N,
    Pair,
    answer,
    flaky,
    ids,
    through_breaks,
)
from tests.tiny import write_tiny

PLACES = [(1, 2), (1, 3), (2, 3)]  # (R, K) of a model of four layers with exits after 1, 2 and 3
INT8 = CODECS[1]
LONG = [(7 * i) % 300 for i in range(150)]


@pytest.fixture(scope="module", params=PLACES, ids=lambda p: f"rows of {p[0]}, cut at {p[1]}")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    rows_at, k = request.param
    return Pair(tmp_path_factory.mktemp("pair"), k=k, rows_at=rows_at)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The one with an exit below, at and above the row layer."""
    return Pair(tmp_path_factory.mktemp("wide"), k=3, rows_at=2)


# ------------------------------------------------------------ exactness


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("codec", [*CODECS, IDS], ids=lambda c: c.id.name)
@pytest.mark.parametrize("tau", [0.0, 0.012, 1.0])
def test_lossless_is_the_oracle_whatever_the_threshold(
    pair: Pair, codec: CodecSpec, sampling: Sampling, tau: float
) -> None:
    tokens, s = answer(pair.together(Collab(Mode.LOSSLESS, codec, tau)), sampling, 24)
    assert ids(tokens) == pair.oracle(codec, sampling, 24)
    assert s.ledger.counts.drafted


@pytest.mark.parametrize("codec", [*CODECS, IDS], ids=lambda c: c.id.name)
def test_lossy_with_a_threshold_of_one_is_the_oracle(pair: Pair, codec: CodecSpec) -> None:
    tokens, s = answer(pair.together(Collab(Mode.LOSSY, codec, 1.0)), WARM, 24)
    assert ids(tokens) == pair.oracle(codec, WARM, 24)
    assert {t.source for t in tokens} == {"upper"}
    assert s.ledger.counts.asks == 24


@pytest.mark.parametrize("forgets", [False, True], ids=["same upper", "restarted upper"])
def test_a_link_that_breaks_and_returns_changes_no_token(pair: Pair, forgets: bool) -> None:
    c, upper = flaky(pair, Collab(Mode.LOSSLESS, INT8, 0.01, window=4), forgets=forgets)
    told, s = through_breaks(c, upper, LONG, 3)
    assert told == pair.oracle(INT8, WARM, N, LONG)
    assert s.shares.opened > 6


def test_a_device_alone_is_checked_again_when_the_link_is_back(wide: Pair) -> None:
    c, upper = flaky(wide, Collab(Mode.LOSSLESS, INT8, 0.01, lost="finish"))
    s = c.new_sequence(GREEDY, use_exits=True)
    s.continue_with(PROMPT)
    text = PROMPT + [c.step(s).id for _ in range(6)]
    upper.links[0].cut()
    text += [c.step(s).id for _ in range(10)]
    upper.links[0].mend()
    after = [c.step(s) for _ in range(10)]
    n_alone = next(i for i, t in enumerate(after) if not t.source.startswith("exit"))
    text += ids(after[:n_alone])
    assert ids(after[n_alone:]) == wide.oracle(INT8, GREEDY, 10 - n_alone, text)


def test_a_second_text_of_the_same_sequence_is_exact(pair: Pair) -> None:
    c = pair.together(Collab(Mode.LOSSLESS, INT8, 0.01))
    tokens, s = answer(c, GREEDY, 10)
    for more in ([5, 9], LONG):
        longer = [*PROMPT, *ids(tokens), *more]
        s.continue_with(longer)
        assert [c.step(s).id for _ in range(10)] == pair.oracle(INT8, GREEDY, 10, longer)
        s.finish()


def test_a_text_that_is_stopped_in_its_prompt_goes_on_exactly(wide: Pair) -> None:
    class Third(Cancel):
        """Stops the third time that somebody asks."""

        def __init__(self) -> None:
            super().__init__()
            self.left = 3

        def check(self) -> None:
            self.left -= 1
            if not self.left:
                self.set()
            super().check()

    c = wide.together(Collab(Mode.LOSSLESS, INT8, 0.01))
    s = c.new_sequence(GREEDY, use_exits=True)
    s.continue_with(LONG)
    with pytest.raises(Cancelled):
        c.step(s, cancel=Third())
    s.finish(done=False)
    s.continue_with(LONG)
    assert [c.step(s).id for _ in range(8)] == wide.oracle(INT8, GREEDY, 8, LONG)


@pytest.mark.parametrize("arch", ["qwen3", "bitnet"])
def test_every_family_is_exact(tmp_path: Path, arch: str) -> None:
    pair = Pair(tmp_path, arch, 3, rows_at=1)
    for codec in (INT8, IDS):
        tokens, _ = answer(pair.together(Collab(Mode.LOSSLESS, codec, 0.01)), GREEDY, 24)
        assert ids(tokens) == pair.oracle(codec, GREEDY, 24)


@needs_shared
@pytest.mark.parametrize("mode", [Mode.LOSSLESS, Mode.LOSSY])
@pytest.mark.parametrize(("rows_at", "k"), [(1, 2), (2, 4), (3, 4)])
def test_a_trained_model_is_exact(tmp_path: Path, rows_at: int, k: int, mode: Mode) -> None:
    path = tmp_path / "stories260K.gguf"
    import_model(SHARED / "weights" / "stories260K.bin", path)
    with Weights.open(path) as whole:
        two = split(whole, k, tmp_path, rows_at=rows_at, make_exit=True)
    device, upper = open_lower(Weights.open(two.device)), open_lower(Weights.open(two.upper))
    prompt = [1, 403, 407, 261, 378]
    for codec in (CodecSpec(i) for i in CodecId if i is not CodecId.IDS):
        composed = Composed(device, upper, rows_at, Codec.of(codec, device.config.d_model).round_trip)
        alone = Engine(composed, MAX_LEN)
        s = alone.new_sequence(WARM, use_exits=False)
        s.continue_with(prompt)
        right = [alone.step(s).id for _ in range(48)]
        how = Collab(mode, codec, 1.0 if mode is Mode.LOSSY else 0.4)
        tokens, shared = answer(
            Collaboration(Engine(device, MAX_LEN), LocalUpper(upper, MAX_LEN), how), WARM, 48, prompt
        )
        assert ids(tokens) == right
        if mode is Mode.LOSSLESS:
            assert shared.ledger.counts.accepted


# ------------------------------------------------------------ what the device computes, and when rows leave


class Watched:
    """A `Lower` that writes down what it runs."""

    def __init__(self, inner: Lower) -> None:
        self.inner = inner
        self.ran: list[tuple[int, int, int]] = []  # first, last, rows

    def forward(self, h: np.ndarray, kv: object, first: int, last: int, cancel: Cancel | None = None) -> np.ndarray:
        found: np.ndarray = self.inner.forward(h, kv, first, last, cancel)  # type: ignore[arg-type]
        self.ran.append((first, last, len(h)))
        return found

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)


def watched(pair: Pair, how: Collab) -> tuple[Collaboration, Watched]:
    lower = Watched(pair.device)
    return Collaboration(Engine(lower, MAX_LEN), LocalUpper(pair.upper, MAX_LEN), how), lower  # type: ignore[arg-type]


def test_the_rows_of_a_prompt_have_left_before_the_layers_above_them_run(wide: Pair) -> None:
    c, lower = watched(wide, Collab(Mode.LOSSLESS, INT8, 1.0))
    s = c.new_sequence(GREEDY, use_exits=True)
    s.continue_with(LONG)
    c._begin(s, None)
    assert lower.ran == [(0, 2, 64), (0, 2, 64), (0, 2, 21)]
    assert s.ledger.sent == len(LONG) - 1
    c._draft(s, None)
    assert lower.ran[3:] == [(0, 2, 1), (2, 3, len(LONG))]


def test_a_row_has_left_before_the_layers_above_it_run(wide: Pair) -> None:
    c, lower = watched(wide, Collab(Mode.LOSSLESS, INT8, 1.0))
    s = c.new_sequence(GREEDY, use_exits=True)
    s.continue_with(PROMPT)
    c.step(s)
    while not c._wants_draft(s):
        c.step(s)
    sent: list[int] = []
    real = lower.forward

    def forward(h: np.ndarray, kv: object, first: int, last: int, cancel: Cancel | None = None) -> np.ndarray:
        if first == 2:
            sent.append(s.ledger.sent)
        return real(h, kv, first, last, cancel)

    lower.forward = forward  # type: ignore[method-assign]
    c._draft(s, None)
    assert sent == [len(s.ledger.rows)]


def test_an_ask_runs_no_layer_above_the_rows(wide: Pair) -> None:
    """Every token leaves at the exit after layer 1, so an ask has to bring its rows to layer 2, and no further."""
    c, lower = watched(wide, Collab(Mode.LOSSLESS, INT8, 0.0, window=4))
    s = c.new_sequence(GREEDY, use_exits=True)
    s.continue_with(PROMPT)
    c._begin(s, None)
    c._listen(s, 0.0)
    while s.ledger.n_provisional < 4:
        c._draft(s, None)
    assert [ran for ran in lower.ran if ran[0]] == []
    c._ask(s, None)
    assert [ran[:2] for ran in lower.ran if ran[0]] == [(1, 2)]
    assert len(s.owed[2]) == len(s.ledger.rows) == s.n_run


def test_rows_that_only_drafts_want_do_not_pile_up(wide: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither those of a long prompt nor those of drafts that all leave below them."""
    monkeypatch.setattr("nearfar.collab.MOST_WAITING", 64)
    for tau in (0.0, 0.012):
        c, lower = watched(wide, Collab(Mode.LOSSLESS, INT8, tau, window=4))
        s, told = c.new_sequence(GREEDY, use_exits=True), list[int]()
        s.continue_with(LONG[:130])
        for _ in range(100):
            told.append(c.step(s).id)
            assert len(s.owed.get(2, ())) < 64 + 4
        assert told == wide.oracle(INT8, GREEDY, 100, LONG[:130])
        assert lower.ran[:4] == [(0, 2, 64), (2, 3, 64), (0, 2, 64), (2, 3, 64)]


def test_layers_above_the_rows_catch_up_for_an_exit_above_them(wide: Pair) -> None:
    """What the device says at its last exit is what it says alone, though these rows waited there meanwhile."""
    c, _ = watched(wide, Collab(Mode.LOSSY, INT8, 1.0))
    s = c.new_sequence(GREEDY, use_exits=True)
    s.continue_with(LONG)
    c._begin(s, None)
    c._draft(s, None)
    assert s.candidate is not None
    token, draft = s.candidate
    h = wide.device.forward(wide.device.embed(np.asarray(LONG, np.int32)), wide.device.new_kv(MAX_LEN), 0, 3)
    logits = wide.device.logits(h[-1:], "exit.3")[0]
    assert (token, draft.head) == (int(logits.argmax()), "exit.3")
    assert draft == Draft("exit.3", pytest.approx(float(1 / np.exp(logits - logits.max()).sum()), rel=1e-3))


def test_stages_end_where_rows_are_wanted_and_no_head_looks_there(wide: Pair) -> None:
    config = wide.device.config
    found = [(s.first, s.last, s.exit is None, s.forced) for s in stages(config, use_exits=False, rows_at=2)]
    assert found[0] == (0, 2, True, False)
    assert (found[1][:2], found[1][3]) == ((2, 3), True)
    assert [(s.first, s.last, s.exit is None) for s in stages(config, rows_at=2)] == [
        (i, i + 1, False) for i in range(3)
    ]


# ------------------------------------------------------------ files


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("whole") / "m.gguf", exits=(1, 2, 3), tau=0.02)


def cut(whole: Path, folder: Path, k: int, rows_at: int, golden: str = "") -> tuple[Path, Path]:
    with Weights.open(whole) as weights:
        two = split(weights, k, folder, rows_at=rows_at, golden=golden)
    return two.device, two.upper


def test_halves_hold_their_layers_and_name_the_same_pair(whole: Path, tmp_path: Path) -> None:
    with Weights.open(whole) as model:
        two = split(model, 3, tmp_path, rows_at=1)
    with Weights.open(whole) as model, Weights.open(two.device) as device, Weights.open(two.upper) as upper:
        assert (device.config.layers, upper.config.layers) == ((0, 3), (1, 4))
        assert [(w.config.split_layer, w.config.row_layer) for w in (device, upper)] == [(3, 1)] * 2
        assert parts(device) == parts(upper)
        assert parts(device)["split"] == b"3 of 4, rows of 1"
        check_pair(device, upper)
        check_pair(device, model)
        theirs = parts(device)
        assert compare(theirs, own_parts(model, split_of(theirs, 4)), set(FOR_ROWS) - {"codec"}) == []
        for name in upper.file.tensors:
            np.testing.assert_array_equal(upper.file.raw(name), model.file.raw(name))


def test_files_of_another_row_layer_are_refused_by_the_part(whole: Path, tmp_path: Path) -> None:
    found = {r: cut(whole, tmp_path / str(r), 3, r) for r in (1, 2, 3)}
    for ours, theirs, said in ((1, 2, "3 of 4, rows of 1.*3 of 4, rows of 2"), (1, 3, "3 of 4, rows of 1.*3 of 4")):
        with Weights.open(found[ours][0]) as device, Weights.open(found[theirs][1]) as upper:
            with pytest.raises(MismatchError, match=rf"split \(theirs {said}\)"):
                check_pair(device, upper)
            assert {m.part for m in compare(parts(device), parts(upper))} == {"upper", "split"}


@pytest.mark.parametrize("rows_at", [-1, 0, 3])
def test_rows_leave_a_layer_that_the_device_has(whole: Path, tmp_path: Path, rows_at: int) -> None:
    with Weights.open(whole) as model, pytest.raises(UsageError, match=rf"rows of layer {rows_at} .*expected 1\.\.2"):
        split(model, 2, tmp_path / "out", rows_at=rows_at)
    assert not (tmp_path / "out").exists()


def test_a_pair_passes_its_self_test_and_fails_one_of_another_row_layer(whole: Path, tmp_path: Path) -> None:
    """The golden token is that of int4 rows of layer 1; the same rows of layer 3 bring another one."""
    int4, prompts = CodecSpec(CodecId.INT4_OS), [[(a * i) % 300 for i in range(1, 9)] for a in range(3, 40)]

    def says(folder: Path, rows_at: int) -> list[int]:
        device, upper = cut(whole, folder, 3, rows_at)
        below, above = open_lower(Weights.open(device)), open_lower(Weights.open(upper))
        composed = Composed(below, above, rows_at, Codec.of(int4, below.config.d_model).round_trip)
        rows = [composed.forward(composed.embed(np.asarray(p, np.int32)), composed.new_kv(16), 0, 4) for p in prompts]
        return [int(composed.logits(h[-1:])[0].argmax()) for h in rows]

    early, late = says(tmp_path / "1", 1), says(tmp_path / "3", 3)
    i = next(i for i in range(len(prompts)) if early[i] != late[i])
    golden = as_json([Golden(tuple(prompts[i]), early[i])])
    for rows_at in (1, 3):
        device, upper = cut(whole, tmp_path / f"golden {rows_at}", 3, rows_at, golden)
        with Weights.open(device) as weights:
            how = how_of(weights, "lossless", None, "int4")
        above = LocalUpper(open_lower(Weights.open(upper)), MAX_LEN)
        with LLM.open(device, threads=1, n_ctx=MAX_LEN, upper=above, collab=how) as llm:
            if rows_at == 1:
                assert self_test(llm) == 1
            else:
                with pytest.raises(MismatchError, match="1 of 1 prompts"):
                    self_test(llm)


def test_all_exits_are_measured_against_what_both_halves_say(whole: Path, tmp_path: Path) -> None:
    device, upper = cut(whole, tmp_path, 3, 1)
    with LLM.open(device, threads=1) as llm:
        found = open_pair(llm, device, upper, CodecId.INT4_OS)
        assert [e.layer for e in found.heads.lower.config.exits] == [1, 2, 3]
        below, above = open_lower(Weights.open(device)), open_lower(Weights.open(upper))
        composed = Composed(below, above, 1, Codec.of(CodecSpec(CodecId.INT4_OS), 256).round_trip)
        engine = Engine(composed, MAX_LEN)
        s = engine.new_sequence(GREEDY, use_exits=False)
        s.continue_with(PROMPT)
        right = [engine.step(s).id for _ in range(12)]
        assert found.oracle.generate(PROMPT, max_tokens=12, exits=False).ids == right
