"""An answer that two machines make equals the oracle: the device's layers, the codec, the upper layers, the sampler."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nearfar.cancel import Cancel
from nearfar.collab import CHUNK, GRACE_S, Collaboration
from nearfar.collab_options import Collab
from nearfar.engine import Engine, Token
from nearfar.errors import ContextError, FileError, MismatchError, UpperError, UsageError
from nearfar.halves import split
from nearfar.journal import Journal
from nearfar.lower import Array, Lower, open_lower
from nearfar.lower_composed import Composed
from nearfar.sampling import Sampling
from nearfar.sequence import Notice
from nearfar.shared_sequence import Shared
from nearfar.upper import LocalLink, LocalUpper, Lost, News
from nearfar.weights import Weights
from nearfar.wire.codec import Codec
from nearfar.wire.messages import CodecId, CodecSpec, Mode, Open, Opened, Up
from tests.tiny import write_tiny

K, MAX_LEN, N = 2, 256, 40
PROMPT = [17, 3, 99, 42, 250, 7]
GREEDY, WARM = Sampling(), Sampling(temperature=1.0, top_k=40, seed=3)
CODECS = [CodecSpec(CodecId.FP16), CodecSpec(CodecId.INT8_OS, outliers=(3, 200)), CodecSpec(CodecId.INT4_OS)]
IDS = CodecSpec(CodecId.IDS)


class Pair:
    """A whole model and its two halves."""

    def __init__(
        self,
        folder: Path,
        arch: str = "llama",
        k: int = K,
        rows_at: int | None = None,
        tau: float = 0.02,
        extra: dict[str, object] | None = None,
    ) -> None:
        whole = Weights.open(write_tiny(folder / "m.gguf", arch, "F32", exits=(1, 2, 3), tau=tau, extra=extra))
        halves = split(whole, k, folder, rows_at=rows_at)
        self.rows_at = rows_at or k
        self.whole = open_lower(whole)
        self.device, self.upper = open_lower(Weights.open(halves.device)), open_lower(Weights.open(halves.upper))

    def oracle(self, codec: CodecSpec, sampling: Sampling, n: int = N, prompt: list[int] = PROMPT) -> list[int]:
        lower: Lower = self.whole
        if codec.id != CodecId.IDS:
            round_trip = Codec.of(codec, self.whole.config.d_model).round_trip
            lower = Composed(self.device, self.upper, self.rows_at, round_trip)
        engine = Engine(lower, MAX_LEN)
        s = engine.new_sequence(sampling, use_exits=False)
        s.continue_with(prompt)
        return [engine.step(s).id for _ in range(n)]

    def together(self, how: Collab) -> Collaboration:
        upper = LocalUpper(self.whole if how.by_ids else self.upper, MAX_LEN, max_run=8)
        return Collaboration(Engine(self.device, MAX_LEN), upper, how)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


def answer(c: Collaboration, sampling: Sampling, n: int = N, prompt: list[int] = PROMPT) -> tuple[list[Token], Shared]:
    s = c.new_sequence(sampling, use_exits=True)
    s.continue_with(prompt)
    tokens = [c.step(s) for _ in range(n)]
    s.finish()
    return tokens, s


def ids(tokens: list[Token]) -> list[int]:
    return [t.id for t in tokens]


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
@pytest.mark.parametrize("codec", [*CODECS, IDS], ids=lambda c: c.id.name)
@pytest.mark.parametrize("tau", [0.0, 0.012, 1.0])
def test_lossless_is_the_oracle_whatever_the_threshold(
    pair: Pair, codec: CodecSpec, sampling: Sampling, tau: float
) -> None:
    tokens, s = answer(pair.together(Collab(Mode.LOSSLESS, codec, tau)), sampling)
    assert ids(tokens) == pair.oracle(codec, sampling)
    assert s.ledger.counts.drafted
    assert s.ledger.final >= len(PROMPT) + N


@pytest.mark.parametrize("codec", [*CODECS, IDS], ids=lambda c: c.id.name)
def test_lossy_with_a_threshold_of_one_is_the_oracle(pair: Pair, codec: CodecSpec) -> None:
    tokens, s = answer(pair.together(Collab(Mode.LOSSY, codec, 1.0)), WARM)
    assert ids(tokens) == pair.oracle(codec, WARM)
    assert {t.source for t in tokens} == {"upper"}
    assert s.ledger.counts.asks == N


def test_lossy_below_one_decides_sure_tokens_on_the_device(pair: Pair) -> None:
    tokens, s = answer(pair.together(Collab(Mode.LOSSY, CODECS[1], 0.0)), GREEDY, 20)  # fewer than may wait
    assert {t.source for t in tokens} == {"exit.1"}
    assert s.ledger.counts.asks == 0
    assert {t.where for t in tokens} == {"device"}


def test_a_decaying_threshold_asks_early_and_decides_late(pair: Pair) -> None:
    """Confidences of the random model lie around 0.01: with a threshold of 0 the first tokens need up to 0.1."""
    c = pair.together(Collab(Mode.LOSSY, CODECS[1], 0.0, decay=30.0))
    s = c.new_sequence(GREEDY, use_exits=True)
    s.n_most = 30
    s.continue_with(PROMPT)
    sources = [c.step(s).source for _ in range(20)]
    assert sources[0] == "upper"
    assert set(sources[10:]) == {"exit.1"}
    with pytest.raises(UsageError, match="decay"):
        Collab(decay=-1.0)


@pytest.mark.parametrize("codec", [CODECS[1], IDS], ids=lambda c: c.id.name)
def test_a_decaying_threshold_changes_no_lossless_token(pair: Pair, codec: CodecSpec) -> None:
    tokens, _ = answer(pair.together(Collab(Mode.LOSSLESS, codec, 0.0, decay=4.0)), WARM)
    assert ids(tokens) == pair.oracle(codec, WARM)
    tokens, _ = answer(pair.together(Collab(Mode.LOSSY, codec, 1.0, decay=4.0)), WARM, 12)
    assert {t.source for t in tokens} == {"upper"}


class NearlySure:
    """The device half with measured confidences: exit 1 holds in 95 of 100, which is not enough to decide by itself."""

    def __init__(self, lower: Lower) -> None:
        exits = lower.config.exits
        flat = replace(exits[0], tau=1.0, isotonic_x=(0.0, 1.0), isotonic_y=(0.95, 0.95))
        self.inner = lower
        self.config = replace(lower.config, exits=(flat, *(replace(e, tau=1.0) for e in exits[1:])))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "drawn"])
@pytest.mark.parametrize("codec", [CODECS[1], IDS], ids=lambda c: c.id.name)
def test_a_greedy_draft_that_will_be_checked_stops_where_it_would_not_decide(
    pair: Pair, codec: CodecSpec, sampling: Sampling
) -> None:
    how = Collab(Mode.LOSSLESS, codec)
    c = Collaboration(Engine(NearlySure(pair.device), MAX_LEN), pair.together(how).upper, how)
    s = c.new_sequence(sampling, use_exits=True)
    s.tells_drafts = True
    s.continue_with(PROMPT)
    told = [c.step(s) for _ in range(3 * N)]
    final = ids([t for t in told if t.is_final])
    assert final == pair.oracle(codec, sampling, len(final))
    assert ("exit.1" in {t.source for t in told if not t.is_final}) == (sampling is GREEDY)
    assert s.ledger.counts.sure == 0  # nothing was promised for it


def test_a_device_alone_decides_by_its_own_threshold(pair: Pair) -> None:
    how = Collab(Mode.LOSSLESS, CODECS[1], window=8, lost="finish")
    upper = Flaky(LocalUpper(pair.upper, MAX_LEN), forgets=False)
    c = Collaboration(Engine(NearlySure(pair.device), MAX_LEN), upper, how)
    s = c.new_sequence(GREEDY, use_exits=True)
    s.continue_with(PROMPT)
    before = [c.step(s)]
    upper.links[0].cut()
    c._draft(s, None)  # into the dark, to be checked
    assert {d.head for d in s.ledger.drafts.values()} == {"exit.1"}
    alone = [c.step(s) for _ in range(N)]
    assert {t.source for t in alone} == {"exit.2"}
    engine = Engine(pair.device, MAX_LEN)
    plain = engine.new_sequence(GREEDY, use_exits=False)
    plain.continue_with(PROMPT + ids(before))
    assert ids(alone) == [engine.step(plain).id for _ in alone]


def test_drafts_that_no_link_has_checked_when_patience_ends_are_final_before_the_next_one(pair: Pair) -> None:
    """The clock may say so between two looks at it: after a step has looked, and before its draft does."""
    c, _ = flaky(pair, Collab(Mode.LOSSLESS, CODECS[1], 0.01, lost="finish"))
    s = c.new_sequence(GREEDY, use_exits=True)
    s.continue_with(PROMPT)
    c._begin(s, None)
    c._draft(s, None)
    assert s.ledger.n_provisional == 1
    s.lost_at = time.perf_counter() - 2 * GRACE_S  # as if nobody had answered since
    c._draft(s, None)
    assert [t.source.split(".")[0] for t in s.ready] == ["exit"] * 2
    assert s.ledger.n_provisional == 0


def test_a_first_hello_that_takes_long_leaves_the_device_no_less_patience(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Flaky):
        """A server that reads its file before it says hello, and has `Opened` under way when it has."""

        def open(self, opening: Open, cancel: Cancel | None = None) -> FlakyLink:
            link = super().open(opening)
            real, n_empty = link.receive, iter(range(3))
            link.receive = lambda t: [] if next(n_empty, None) is not None else real(t)  # type: ignore[method-assign]
            clock[0] += 2 * GRACE_S
            return link

    clock = [0.0]
    monkeypatch.setattr("nearfar.collab.time.perf_counter", lambda: clock[0])
    how = Collab(Mode.LOSSLESS, CODECS[1], 0.01, lost="finish")
    c = Collaboration(Engine(pair.device, MAX_LEN), Slow(LocalUpper(pair.upper, MAX_LEN)), how)
    tokens, _ = answer(c, GREEDY, 6)
    assert {t.source.split(".")[0] for t in tokens} <= {"upper", "verified"}
    assert ids(tokens) == pair.oracle(CODECS[1], GREEDY, 6)


def test_cloud_only_is_the_whole_model_in_few_asks(pair: Pair) -> None:
    tokens, s = answer(pair.together(Collab(Mode.CLOUD_ONLY, IDS)), WARM)
    assert ids(tokens) == pair.oracle(IDS, WARM)
    assert s.ledger.counts.asks == N // 8


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("arch", ["qwen3", "bitnet"])
def test_every_cut_of_every_family_is_exact(tmp_path: Path, arch: str, k: int) -> None:
    pair = Pair(tmp_path, arch, k)
    for codec in (CODECS[1], IDS):
        tokens, _ = answer(pair.together(Collab(Mode.LOSSLESS, codec, 0.01)), GREEDY, 24)
        assert ids(tokens) == pair.oracle(codec, GREEDY, 24)


@pytest.mark.parametrize("window", [1, 2, 7, 16])
def test_the_window_changes_the_asks_and_no_token(pair: Pair, window: int) -> None:
    tokens, _ = answer(pair.together(Collab(Mode.LOSSLESS, CODECS[0], 0.0, window=window)), GREEDY)
    assert ids(tokens) == pair.oracle(CODECS[0], GREEDY)


def test_a_device_that_is_always_right_asks_once_a_window(pair: Pair) -> None:
    """The drafts of a whole model are those of the same whole model above."""
    how = Collab(Mode.LOSSLESS, IDS, 0.0, window=8)
    c = Collaboration(Engine(pair.whole, MAX_LEN), LocalUpper(pair.whole, MAX_LEN), how)
    c.stages = c.stages[:0] + list(c.stages[-1:])
    c.stages[0] = type(c.stages[0])(0, pair.whole.config.n_layers, None, True)
    tokens, s = answer(c, GREEDY)
    assert ids(tokens) == pair.oracle(IDS, GREEDY)
    assert s.ledger.counts.retracted == 0
    assert {t.source for t in tokens} <= {"verified.full", "upper"}


def test_a_second_text_of_the_same_sequence_is_exact(pair: Pair) -> None:
    c = pair.together(Collab(Mode.LOSSLESS, CODECS[1], 0.01))
    tokens, s = answer(c, GREEDY, 10)
    longer = [*PROMPT, *ids(tokens), 5, 9]
    s.continue_with(longer)
    assert [c.step(s).id for _ in range(10)] == pair.oracle(CODECS[1], GREEDY, 10, longer)


def test_a_prompt_longer_than_a_chunk_is_sent_piece_by_piece(pair: Pair) -> None:
    prompt = [(7 * i) % 300 for i in range(150)]
    tokens, _ = answer(pair.together(Collab(Mode.LOSSLESS, CODECS[0])), GREEDY, 12, prompt)
    assert ids(tokens) == pair.oracle(CODECS[0], GREEDY, 12, prompt)


# ------------------------------------------------------------ links that fail


class Flaky:
    """A local upper side whose link can be cut; what is sent meanwhile is lost, as on a real one."""

    def __init__(self, inner: LocalUpper, *, forgets: bool = False) -> None:
        self.inner, self.forgets, self.where = inner, forgets, "cloud"
        self.links: list[FlakyLink] = []

    def open(self, opening: Open, cancel: Cancel | None = None) -> FlakyLink:
        self.links.append(FlakyLink(self, opening))
        return self.links[-1]

    def close(self) -> None: ...


class FlakyLink:
    model_fp = b""

    def __init__(self, upper: Flaky, opening: Open) -> None:
        self.upper, self.opening = upper, opening
        self.link = upper.inner.open(opening)
        self.traffic, self.max_run, self.max_context = self.link.traffic, self.link.max_run, MAX_LEN
        self.news: deque[News] = deque()
        self.is_up = True

    def cut(self) -> None:
        self.is_up = False
        self.news = deque([Lost("pulled out")])
        self.link.receive(0)  # what was under way is lost

    def mend(self) -> None:
        self.is_up = True
        if self.upper.forgets:
            self.link = self.upper.inner.open(self.opening)
        else:
            self.link.send(self.opening)

    def send(self, message: Up) -> None:
        if self.is_up:
            self.link.send(message)

    def receive(self, timeout_s: float) -> list[News]:
        told, self.news = list(self.news), deque()
        if self.is_up:
            told += self.link.receive(0)
        if not told:
            time.sleep(min(timeout_s, 0.001))
        return told

    def deadline_s(self) -> float:
        return 0.01

    def close(self) -> None:
        self.link.close()


def flaky(pair: Pair, how: Collab, *, forgets: bool = False) -> tuple[Collaboration, Flaky]:
    upper = Flaky(LocalUpper(pair.whole if how.by_ids else pair.upper, MAX_LEN), forgets=forgets)
    return Collaboration(Engine(pair.device, MAX_LEN), upper, how), upper


def through_breaks(c: Collaboration, upper: Flaky, prompt: list[int], every: int) -> tuple[list[int], Shared]:
    """An answer during which the link breaks at one token in `every`: its ids, and the sequence."""
    s = c.new_sequence(WARM, use_exits=True)
    s.continue_with(prompt)
    told = []
    for i in range(N):
        if i % every == every - 1:
            upper.links[0].cut()
            c._listen(s, 0.0)  # the device notices, and drafts on into the dark
            c._draft(s, None) if c._wants_draft(s) else None
            upper.links[0].mend()
        told.append(c.step(s).id)
    return told, s


@pytest.mark.parametrize("forgets", [False, True], ids=["same upper", "restarted upper"])
@pytest.mark.parametrize("codec", [CODECS[1], IDS], ids=lambda c: c.id.name)
def test_a_link_that_breaks_and_returns_changes_no_token(pair: Pair, codec: CodecSpec, forgets: bool) -> None:
    c, upper = flaky(pair, Collab(Mode.LOSSLESS, codec, 0.01, window=4), forgets=forgets)
    told, s = through_breaks(c, upper, PROMPT, 3)
    assert told == pair.oracle(codec, WARM)
    assert s.shares.opened > 6


@pytest.mark.parametrize("mode", [Mode.LOSSLESS, Mode.LOSSY])
@pytest.mark.parametrize("most", [0, 700])
def test_rows_over_the_cap_are_dropped_and_made_again_for_an_upper_side_that_forgets(
    pair: Pair, mode: Mode, most: int
) -> None:
    how = Collab(mode, CODECS[1], 0.01 if mode == Mode.LOSSLESS else 1.0, max_row_bytes=most)
    c, upper = flaky(pair, how, forgets=True)
    told, s = through_breaks(c, upper, PROMPT, 10)
    assert told == pair.oracle(CODECS[1], WARM)
    ledger = s.ledger
    assert ledger.counts.remade > N
    assert c.codec is not None
    assert len(ledger.rows) <= max(most // c.codec.row_bytes, ledger.n_rows - ledger.final + 1)


class OtherKernel:
    """A device whose second cache computes other rows, as after a change of kernels."""

    def __init__(self, lower: Lower) -> None:
        self.lower, self.caches, self.most = lower, list[object](), 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.lower, name)

    def new_kv(self, *args: object) -> object:
        self.caches.append(self.lower.new_kv(*args))  # type: ignore[arg-type]
        return self.caches[-1]

    def forward(self, h: Array, kv: object, first: int, last: int, cancel: Cancel | None = None) -> Array:
        self.most = max(self.most, len(h))
        rows = self.lower.forward(h, kv, first, last, cancel)  # type: ignore[arg-type]
        return rows if kv is self.caches[0] else rows * np.float32(1.5)


@pytest.mark.parametrize("mode", [Mode.LOSSLESS, Mode.LOSSY])
def test_rows_that_are_not_what_they_were_are_never_mixed_with_the_old_ones(pair: Pair, mode: Mode) -> None:
    upper = Flaky(LocalUpper(pair.upper, MAX_LEN), forgets=True)
    device = OtherKernel(pair.device)
    how = Collab(mode, CODECS[0], 0.01 if mode == Mode.LOSSLESS else 1.0, max_row_bytes=0)
    c = Collaboration(Engine(device, MAX_LEN), upper, how)  # type: ignore[arg-type]
    s = c.new_sequence(GREEDY, use_exits=True)
    prompt = PROMPT * 25
    s.continue_with(prompt)
    told = [c.step(s).id for _ in range(12)]
    upper.links[0].cut()
    c._listen(s, 0.0)
    upper.links[0].mend()
    told += [c.step(s).id for _ in range(12)]
    assert told == pair.oracle(CODECS[0], GREEDY, 24, prompt)  # the device's own cache made them all in the end
    assert device.most == CHUNK  # also when everything is computed anew
    assert any(cut.keep == 0 for cut in s.ledger.cuts)
    assert s.ledger.counts.remade == 0


def test_a_device_that_may_goes_on_alone_and_is_checked_again_when_the_link_is_back(pair: Pair) -> None:
    c, upper = flaky(pair, Collab(Mode.LOSSLESS, CODECS[0], 0.01, lost="finish"))
    s = c.new_sequence(GREEDY, use_exits=True)
    told: list[Notice] = []
    s.on_notice = told.append
    s.continue_with(PROMPT)
    before = [c.step(s) for _ in range(10)]
    assert ids(before) == pair.oracle(CODECS[0], GREEDY, 10)
    upper.links[0].cut()
    alone = [c.step(s) for _ in range(10)]
    assert {t.source.split(".")[0] for t in alone[-5:]} == {"exit"}
    assert Notice("degraded") in told
    upper.links[0].mend()
    after = [c.step(s) for _ in range(10)]
    text = PROMPT + ids(before) + ids(alone)
    n_alone = next(i for i, t in enumerate(after) if not t.source.startswith("exit"))
    text += ids(after[:n_alone])
    assert ids(after[n_alone:]) == pair.oracle(CODECS[0], GREEDY, 10 - n_alone, text)


def test_patience_ends(pair: Pair) -> None:
    c, upper = flaky(pair, Collab(Mode.LOSSLESS, CODECS[0], 0.01, patience_s=0.05))
    s = c.new_sequence(GREEDY, use_exits=True)
    s.continue_with(PROMPT)
    c.step(s)
    upper.links[0].cut()

    def to_the_end() -> None:
        for _ in range(N):
            c.step(s)

    with pytest.raises(UpperError, match=r"no upper side for 0\.05 s"):
        to_the_end()


def test_a_late_answer_is_told_and_lossy_may_decide_without_it(pair: Pair) -> None:
    for slow, source in (("wait", "upper"), ("finish", "exit.2")):
        c, upper = flaky(pair, Collab(Mode.LOSSY, CODECS[0], 1.0, slow=slow))  # type: ignore[arg-type]
        s = c.new_sequence(GREEDY, use_exits=True)
        told: list[Notice] = []
        s.on_notice = told.append
        s.continue_with(PROMPT)
        c.step(s)
        link = upper.links[0]
        real, link.receive = link.receive, lambda t: time.sleep(0.005) or []  # type: ignore[method-assign, func-returns-value]
        if slow == "finish":
            assert c.step(s).source == source
        else:
            for _ in range(20):
                c._draft(s, None) if c._wants_draft(s) else c._ask(s, None) if c._wants_ask(s) else c._wait(s)
        assert any(n.kind == "waiting" for n in told)
        link.receive = real  # type: ignore[method-assign]
        assert c.step(s).source == "upper"


# ------------------------------------------------------------ refusals


def test_rows_of_a_whole_model_and_schemas_and_penalties_are_refused(pair: Pair) -> None:
    with pytest.raises(UsageError, match="device half"):
        Collaboration(Engine(pair.whole, MAX_LEN), LocalUpper(pair.upper, MAX_LEN), Collab())
    with pytest.raises(UsageError, match="repetition penalty"):
        answer(pair.together(Collab()), Sampling(repetition_penalty=1.2))
    tokens, _ = answer(pair.together(Collab(codec=IDS)), Sampling(repetition_penalty=1.2), 12)
    assert ids(tokens) == pair.oracle(IDS, Sampling(repetition_penalty=1.2), 12)
    with pytest.raises(UsageError, match="cloud-only sends ids"):
        Collab(Mode.CLOUD_ONLY, CODECS[0])


def test_an_upper_side_that_opens_with_other_settings_is_noticed(pair: Pair) -> None:
    c, upper = flaky(pair, Collab())
    s = c.new_sequence(GREEDY, use_exits=True)
    s.continue_with(PROMPT)
    c.step(s)
    upper.links[0].news.append(Opened(0, 0, 0, 0, settings_hash=b"other"))
    with pytest.raises(UpperError, match="other settings"):
        c.step(s)


# ------------------------------------------------------------ a device that was killed


@pytest.mark.parametrize("codec", [CODECS[1], IDS], ids=lambda c: c.id.name)
@pytest.mark.parametrize("n_before", [0, 1, 7])
def test_an_answer_goes_on_behind_its_journal(pair: Pair, tmp_path: Path, codec: CodecSpec, n_before: int) -> None:
    how = Collab(Mode.LOSSLESS, codec, 0.01)
    upper = Flaky(LocalUpper(pair.whole if how.by_ids else pair.upper, MAX_LEN))
    told: list[int] = []
    for n in (n_before, N):  # the first process ends without a word
        c = Collaboration(Engine(pair.device, MAX_LEN), upper, how, b"fp")
        s = c.new_sequence(WARM, use_exits=True)
        s.continue_with(PROMPT)
        s.keep_in(tmp_path / "answer")
        tokens = [c.step(s) for _ in range(n)]
        assert ids(tokens)[: len(told)] == told
        told = ids(tokens)
    assert told == pair.oracle(codec, WARM)
    assert [t.source for t in tokens[:n_before]] == ["journal"] * n_before
    s.finish()
    assert not (tmp_path / "answer").exists()


def test_a_journal_of_another_answer_is_refused(pair: Pair, tmp_path: Path) -> None:
    c = pair.together(Collab(Mode.LOSSLESS, IDS))
    s = c.new_sequence(GREEDY, use_exits=True)
    s.continue_with(PROMPT)
    s.keep_in(tmp_path / "answer")
    c.step(s)
    for prompt, sampling, match in ((PROMPT, WARM, "other settings"), ([*PROMPT, 4], GREEDY, "another prompt")):
        other = c.new_sequence(sampling, use_exits=True)
        other.continue_with(prompt)
        other.keep_in(tmp_path / "answer")
        with pytest.raises(MismatchError, match=match):
            c.step(other)


class Named(LocalUpper):
    """An upper side that says which model it has."""

    def __init__(self, lower: Lower, name: bytes) -> None:
        super().__init__(lower, MAX_LEN)
        self.name = name

    def open(self, opening: Open, cancel: Cancel | None = None) -> LocalLink:
        link = super().open(opening, cancel)
        link.model_fp = self.name
        return link


def test_a_journal_goes_on_with_the_model_that_it_was_begun_with_and_with_no_other(pair: Pair, tmp_path: Path) -> None:
    path, truth = tmp_path / "answer", pair.oracle(IDS, GREEDY)

    def next_of(name: bytes) -> tuple[Token, Shared]:
        c = Collaboration(Engine(pair.device, MAX_LEN), Named(pair.whole, name), Collab(Mode.LOSSLESS, IDS), b"d" * 32)
        s = c.new_sequence(GREEDY, use_exits=True)
        s.continue_with(PROMPT)
        s.keep_in(path)
        try:
            return c.step(s), s
        finally:
            s.finish(done=False)

    assert next_of(b"a" * 32)[0].id == truth[0]
    kept = path.read_bytes()
    with pytest.raises(MismatchError, match="begun with another model on the upper side"):
        next_of(b"b" * 32)
    assert path.read_bytes() == kept
    for name in (b"a" * 32, b""):  # where nobody says, nothing can be compared
        assert next_of(name)[0].id == truth[0]


def test_a_failed_answer_leaves_its_journal(pair: Pair, tmp_path: Path) -> None:
    c, upper = flaky(pair, Collab(patience_s=0.01))
    s = c.new_sequence(GREEDY, use_exits=True)
    s.continue_with(PROMPT)
    s.keep_in(tmp_path / "answer")
    first = c.step(s)
    upper.links[0].cut()
    while s.ready:
        c.step(s)
    with pytest.raises(UpperError):
        c.step(s)
    s.finish(done=False)
    assert Journal.read(tmp_path / "answer").ids[0] == first.id


# ------------------------------------------------------------ ends, and what comes after them


@pytest.mark.parametrize(
    ("mode", "codec", "tau"),
    [
        (Mode.LOSSY, CODECS[0], 1.0),
        (Mode.LOSSY, IDS, 1.0),
        (Mode.LOSSLESS, CODECS[0], 0.01),
        (Mode.LOSSLESS, IDS, 0.01),
        (Mode.CLOUD_ONLY, IDS, None),
    ],
    ids=["lossy rows", "lossy ids", "lossless rows", "lossless ids", "cloud-only"],
)
def test_a_full_context_brings_one_token_more_than_positions(
    pair: Pair, mode: Mode, codec: CodecSpec, tau: float | None
) -> None:
    n_ctx = 20
    upper = LocalUpper(pair.whole if codec is IDS else pair.upper, n_ctx, max_run=8)
    c = Collaboration(Engine(pair.device, n_ctx), upper, Collab(mode, codec, tau))
    tokens, _ = answer(c, GREEDY, n_ctx - len(PROMPT) + 1)
    assert ids(tokens) == pair.oracle(codec, GREEDY, len(tokens))


def test_an_upper_side_with_a_smaller_context_is_an_error_that_says_so(pair: Pair) -> None:
    c = Collaboration(Engine(pair.device, 40), LocalUpper(pair.upper, 20), Collab(Mode.LOSSLESS, CODECS[0], 0.01))
    s = c.new_sequence(GREEDY, use_exits=True)
    s.continue_with(PROMPT)
    for _ in range(20 - len(PROMPT) + 1):
        c.step(s)
    with pytest.raises(ContextError, match="holds 20 positions"):
        c.step(s)


@pytest.mark.parametrize("codec", [CODECS[1], IDS], ids=lambda c: c.id.name)
def test_a_text_that_goes_on_behind_early_exits_is_exact(pair: Pair, codec: CodecSpec) -> None:
    c = pair.together(Collab(Mode.LOSSLESS, codec, 0.0))
    tokens, s = answer(c, GREEDY, 8)
    longer = [*PROMPT, *ids(tokens), 5, 9, 11]
    s.continue_with(longer)
    assert [c.step(s).id for _ in range(10)] == pair.oracle(codec, GREEDY, 10, longer)


def test_after_a_journal_that_could_not_be_opened_the_next_answer_is_right(pair: Pair, tmp_path: Path) -> None:
    c = pair.together(Collab(Mode.LOSSLESS, CODECS[1], 0.01))
    _, s = answer(c, GREEDY, 8)
    s.continue_with(PROMPT)
    s.keep_in(tmp_path / "nowhere" / "answer")
    with pytest.raises(FileError):
        c.step(s)
    s.finish(done=False)
    s.continue_with(PROMPT)
    assert [c.step(s).id for _ in range(8)] == pair.oracle(CODECS[1], GREEDY, 8)


def test_without_exits_every_token_is_asked_for(pair: Pair) -> None:
    c = pair.together(Collab(Mode.LOSSY, CODECS[0], 0.0))
    s = c.new_sequence(GREEDY, use_exits=False)
    s.continue_with(PROMPT)
    assert [c.step(s).source for _ in range(8)] == ["upper"] * 8


def test_one_late_answer_does_not_make_all_others_late(pair: Pair) -> None:
    c, upper = flaky(pair, Collab(Mode.LOSSY, CODECS[0], 1.0, slow="finish"))
    s = c.new_sequence(GREEDY, use_exits=True)
    s.continue_with(PROMPT)
    c.step(s)
    link = upper.links[0]
    real, link.receive = link.receive, lambda t: time.sleep(0.005) or []  # type: ignore[method-assign, func-returns-value]
    assert c.step(s).source == "exit.2"
    link.receive = real  # type: ignore[method-assign]
    link.deadline_s = lambda: 5.0  # type: ignore[method-assign]
    assert [c.step(s).source for _ in range(6)] == ["upper"] * 6


def test_a_context_that_is_full_of_drafts_before_anybody_answers_is_no_error(pair: Pair) -> None:
    n_ctx = 20
    upper = Flaky(LocalUpper(pair.upper, n_ctx))
    c = Collaboration(Engine(pair.device, n_ctx), upper, Collab(Mode.LOSSLESS, CODECS[0], 0.0, window=16))
    s = c.new_sequence(GREEDY, use_exits=True)
    s.continue_with(PROMPT)
    c._begin(s, None)
    upper.links[0].is_up = False
    while c._wants_draft(s):
        c._draft(s, None)
    assert len(s.ids) > n_ctx
    c._wait(s)  # nothing is there to hear yet
    upper.links[0].is_up = True
    n = n_ctx - len(PROMPT) + 1
    assert [c.step(s).id for _ in range(n)] == pair.oracle(CODECS[0], GREEDY, n)
