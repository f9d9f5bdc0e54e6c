"""Lossy answers whose rows are more than the link carries: ids take over, where that is wanted and allowed."""

from __future__ import annotations

import pytest

from nearfar.cancel import Cancel
from nearfar.collab import Collaboration
from nearfar.collab_options import Collab
from nearfar.engine import Engine
from nearfar.errors import UpperError, UsageError
from nearfar.sampling import Sampling
from nearfar.sequence import Notice
from nearfar.shared_sequence import Shared
from nearfar.upper import LocalUpper
from nearfar.wire.messages import Close, Code, CodecId, CodecSpec, Err, Mode, Open, Up
from tests.sdk.test_collab import MAX_LEN, PROMPT, Flaky, FlakyLink, Pair

INT8, IDS = CodecSpec(CodecId.INT8_OS), CodecSpec(CodecId.IDS)
GREEDY, N = Sampling(), 24


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("pair"))


class ThinLink(FlakyLink):
    """One whose rows may be too many for it."""

    is_thin = False

    def __init__(self, upper: Flaky, opening: Open) -> None:
        super().__init__(upper, opening)
        self.sent: list[Up] = []

    def wants_ids(self) -> bool:
        return self.is_thin

    def send(self, message: Up) -> None:
        self.sent.append(message)
        super().send(message)


class TwoWays:
    """The upper half for rows and, unless that is refused, the whole model for ids."""

    where = "cloud"

    def __init__(self, pair: Pair, refuses: str = "") -> None:
        self.rows, self.ids = (Flaky(LocalUpper(lower, MAX_LEN)) for lower in (pair.upper, pair.whole))
        self.refuses, self.links = refuses, list[ThinLink]()

    def open(self, opening: Open, cancel: Cancel | None = None) -> ThinLink:
        by_ids = opening.codec == IDS
        if by_ids and self.refuses == "open":
            raise UpperError("nobody is there")
        self.links.append(ThinLink(self.ids if by_ids else self.rows, opening))
        if by_ids and self.refuses in ("news", "silence"):
            news = [Err(Code.MISMATCH, "rows only")] if self.refuses == "news" else []
            self.links[-1].receive = lambda timeout_s: news  # type: ignore[method-assign]
        return self.links[-1]

    def close(self) -> None: ...


def begun(pair: Pair, how: Collab, refuses: str = "") -> tuple[Collaboration, Shared, TwoWays, list[Notice]]:
    upper, told = TwoWays(pair, refuses), list[Notice]()
    c = Collaboration(Engine(pair.device, MAX_LEN), upper, how)
    s = c.new_sequence(GREEDY, use_exits=True)
    s.on_notice = told.append
    s.continue_with(PROMPT)
    return c, s, upper, told


def ids_of(c: Collaboration, s: Shared, n: int) -> list[int]:
    return [c.step(s).id for _ in range(n)]


def test_from_where_ids_take_over_the_answer_is_the_whole_models(pair: Pair) -> None:
    c, s, upper, told = begun(pair, Collab(Mode.LOSSY, INT8, 1.0, backlog="ids"))
    before = ids_of(c, s, 6)
    assert before == pair.oracle(INT8, GREEDY, 6)
    upper.links[0].is_thin = True
    after = ids_of(c, s, N)
    n_rows = next(n for n in range(3) if after[n:] == pair.oracle(IDS, GREEDY, N - n, PROMPT + before + after[:n]))
    assert after[:n_rows] == pair.oracle(INT8, GREEDY, n_rows, PROMPT + before)
    assert told.count(Notice("mode_changed")) == 1
    assert Notice("back") not in told
    assert len(upper.links) == 2
    assert isinstance(upper.links[0].sent[-1], Close)
    assert s.shared_stats().asks >= 6 + N
    # The next turn begins with rows again, also of positions that ids have stood for.
    s.finish()
    text = [*PROMPT, *before, *after, 5, 9]
    s.continue_with(text)
    assert ids_of(c, s, 6) == pair.oracle(INT8, GREEDY, 6, text)


def test_of_an_answer_that_has_changed_over_nothing_is_kept_for_the_next_turn(pair: Pair) -> None:
    """Which begins by rows: the other side would hold positions for nobody."""
    for is_thin in (False, True):
        c, s, upper, told = begun(pair, Collab(Mode.LOSSY, INT8, 1.0, backlog="ids", keep_s=300))
        ids_of(c, s, 2)
        upper.links[0].is_thin = is_thin
        ids_of(c, s, 6)
        s.finish()
        assert told.count(Notice("mode_changed")) == is_thin
        assert upper.links[-1].sent[-1] == Close(keep_s=0 if is_thin else 300)
        assert (s.kept is None) == is_thin


def test_sure_tokens_stay_the_devices_when_ids_take_over(pair: Pair) -> None:
    c, s, upper, told = begun(pair, Collab(Mode.LOSSY, INT8, 0.03, backlog="ids"))
    sources = [c.step(s).source]
    upper.links[0].is_thin = True
    sources += [c.step(s).source for _ in range(40)]
    assert told.count(Notice("mode_changed")) == 1
    assert {source.split(".")[0] for source in sources[4:]} == {"exit", "upper"}
    assert len(upper.links[1].sent) > 4


@pytest.mark.parametrize("refuses", ["open", "news"])
def test_where_ids_are_refused_rows_go_on(pair: Pair, refuses: str) -> None:
    c, s, upper, told = begun(pair, Collab(Mode.LOSSY, INT8, 1.0, backlog="ids"), refuses)
    tokens = ids_of(c, s, 4)
    upper.links[0].is_thin = True
    tokens += ids_of(c, s, N - 4)
    assert tokens == pair.oracle(INT8, GREEDY, N)
    assert Notice("mode_changed") not in told
    assert len(upper.links) == (1 if refuses == "open" else 2)  # nobody asks a second time
    s.finish()


@pytest.mark.parametrize(
    "how",
    [Collab(Mode.LOSSY, INT8, 1.0), Collab(Mode.LOSSLESS, INT8, 0.01, backlog="ids")],
    ids=["by default", "lossless"],
)
def test_nothing_changes_over_by_itself_and_a_lossless_answer_never(pair: Pair, how: Collab) -> None:
    c, s, upper, _ = begun(pair, how)
    tokens = ids_of(c, s, 2)
    upper.links[0].is_thin = True
    assert tokens + ids_of(c, s, N - 2) == pair.oracle(INT8, GREEDY, N)
    assert len(upper.links) == 1


def test_an_answer_that_ends_in_between_leaves_no_link(pair: Pair) -> None:
    c, s, upper, told = begun(pair, Collab(Mode.LOSSY, INT8, 1.0, backlog="ids"), "silence")
    ids_of(c, s, 2)
    upper.links[0].is_thin = True
    ids_of(c, s, 2)
    s.finish()
    assert told == []
    assert len(upper.links) == 2
    assert all(isinstance(link.sent[-1], Close) for link in upper.links)
    with pytest.raises(UsageError, match="backlog"):
        Collab(backlog="bytes")  # type: ignore[arg-type]
