"""The step loop: exits, rows that are owed, and steps that are cancelled in the middle."""

from __future__ import annotations

import numpy as np
import pytest

from nearfar.cancel import Cancel
from nearfar.config import ExitConfig
from nearfar.engine import Engine, stages
from nearfar.errors import Cancelled, UsageError
from nearfar.lower import Lower, open_lower
from nearfar.sampling import Sampling
from nearfar.sequence import Sequence
from nearfar.weights import Weights
from tests.tiny import write_tiny

PROMPT = [5, 17, 3, 99, 42]
CONF_TOLERANCE = 1e-5  # numpy sums in another order when a row comes in another batch; native does not


class CancelAt(Cancel):
    """Pressed by itself at the n-th look."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture(scope="module", params=["numpy", "native"])
def lower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Lower:
    if request.param == "native":
        pytest.importorskip("nearfar_native._core", reason="the compiled engine is not built")
    path = tmp_path_factory.mktemp("engine") / "m.gguf"
    # Ternary for native, whose rows do not depend on their batch.  Float for numpy, where a last bit of a row in
    # another batch would move an int8 activation across a rounding boundary.  tau: some tokens leave at each exit.
    weight_type, embedding = ("TQ2_0", "Q8_0") if request.param == "native" else ("F32", "F32")
    write_tiny(path, "bitnet", weight_type, n_layers=6, exits=(2, 4), tau=0.045, embedding_type=embedding, seed=4)
    return open_lower(Weights.open(path), request.param)


def run(lower: Lower, n: int, *, exits: bool = True, prompt: list[int] = PROMPT) -> tuple[Sequence, list]:
    engine = Engine(lower, max_len=256)
    s = engine.new_sequence(Sampling(temperature=1.0, seed=1), exits)
    s.ids = list(prompt)
    return s, [engine.step(s) for _ in range(n)]


def from_scratch(lower: Lower, ids: list[int], source: str) -> np.ndarray:
    """Logits of the last of `ids` at a head, with a fresh cache and no exit anywhere: what the engine must equal."""
    depth = lower.config.n_layers if source == "full" else int(source.removeprefix("exit."))
    h = lower.forward(lower.embed(np.array(ids, np.int32)), lower.new_kv(256), 0, depth)
    return lower.logits(h[-1:], "final" if source == "full" else source)[0]


def test_stages_cut_the_model_at_live_exits_only(lower: Lower) -> None:
    assert [(s.first, s.last, s.source) for s in stages(lower.config)] == [
        (0, 2, "exit.2"),
        (2, 4, "exit.4"),
        (4, 6, "full"),
    ]
    assert [(s.first, s.last) for s in stages(lower.config, use_exits=False)] == [(0, 6)]


def test_every_token_is_what_its_head_says_with_nothing_skipped_before(lower: Lower) -> None:
    s, tokens = run(lower, 40)
    assert {t.source for t in tokens} == {"exit.2", "exit.4", "full"}  # else this test shows nothing
    exits = {f"exit.{e.layer}": e for e in lower.config.exits}
    for i, token in enumerate(tokens):
        logits = from_scratch(lower, s.ids[: len(PROMPT) + i], token.source)
        p = np.exp(logits - logits.max())
        assert token.conf == pytest.approx(p.max() / p.sum(), abs=CONF_TOLERANCE)
        if token.source in exits:
            assert token.conf > exits[token.source].tau


def test_without_exits_every_token_has_full_depth(lower: Lower) -> None:
    _, tokens = run(lower, 10, exits=False)
    assert {t.source for t in tokens} == {"full"}


def test_a_long_prompt_does_not_leave_early(lower: Lower) -> None:
    _, tokens = run(lower, 1, prompt=list(range(100)))
    assert tokens[0].source == "full"  # 100 rows would be owed; 32 are allowed


def test_layers_never_lag_by_more_than_the_debt(lower: Lower) -> None:
    engine = Engine(lower, max_len=256)
    s = engine.new_sequence(Sampling(temperature=1.0, seed=2), True)
    s.ids = list(PROMPT)
    for _ in range(60):
        engine.step(s)
        lags = [s.n_run - s.kv.length(layer) for layer in range(lower.config.n_layers)]
        assert lags[0] == 0
        assert max(lags) <= 32
        waiting = {k: lags[k] - lags[k - 1] for k in (2, 4)}
        assert {layer: len(rows) for layer, rows in s.owed.items()} == {k: n for k, n in waiting.items() if n}


@pytest.mark.parametrize("looks", range(6))
def test_a_cancelled_step_changes_nothing(lower: Lower, looks: int) -> None:
    if lower.name == "native":
        cancel = Cancel()
        cancel.set()
    else:
        cancel = CancelAt(looks)
    _, expected = run(lower, 20)
    engine = Engine(lower, max_len=256)
    s = engine.new_sequence(Sampling(temperature=1.0, seed=1), True)
    s.ids = list(PROMPT)
    for i, token in enumerate(expected):
        n_ids = len(s.ids)
        try:
            got = engine.step(s, cancel=cancel)
        except Cancelled:
            assert len(s.ids) == n_ids
            got = engine.step(s)
            if lower.name == "numpy":
                cancel = CancelAt(looks)
        assert (got.id, got.source) == (token.id, token.source), i


def test_a_step_without_pending_ids_is_refused(lower: Lower) -> None:
    engine = Engine(lower, max_len=256)
    with pytest.raises(UsageError, match="T >= 1"):
        engine.step(engine.new_sequence(Sampling(), True))


def test_going_back_and_on_again_gives_the_same_tokens(lower: Lower) -> None:
    """A chat keeps the cache of the common beginning, whatever was owed there."""
    s, tokens = run(lower, 30)
    whole = list(s.ids)
    engine = Engine(lower, max_len=256)
    for keep in (len(PROMPT) + 1, len(PROMPT) + 7, len(PROMPT) + 23):
        n = s.continue_with(whole[:keep])
        assert 0 < n < keep
        again = [engine.step(s) for _ in range(5)]
        # an exit may be taken at another place (the debt differs), so compare with the truth, not with the first run
        for i, token in enumerate(again):
            logits = from_scratch(lower, s.ids[: keep + i], token.source)
            p = np.exp(logits - logits.max())
            assert token.conf == pytest.approx(p.max() / p.sum(), abs=CONF_TOLERANCE)
    assert len(tokens) == 30


def test_an_exit_whose_threshold_is_one_is_no_stage() -> None:
    assert ExitConfig(2).tau == 1.0
