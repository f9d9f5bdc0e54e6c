"""The upper side within this process: what it holds is what the device thinks it holds."""

from __future__ import annotations

from pathlib import Path

from nearfar.engine import Engine
from nearfar.lower import open_lower
from nearfar.sampling import Sampling
from nearfar.upper import LocalUpper, News
from nearfar.weights import Weights
from nearfar.wire.messages import Ask, CodecId, CodecSpec, Ids, Mode, Open, Verdict
from tests.tiny import write_tiny

PROMPT = (5, 9, 200, 7)


def test_a_text_goes_on_behind_the_stop_id_that_ended_a_run(tmp_path: Path) -> None:
    lower = open_lower(Weights.open(write_tiny(tmp_path / "m.gguf")), "numpy")
    engine = Engine(lower, 64)
    s = engine.new_sequence(Sampling(temperature=1.0, seed=3), use_exits=False)
    s.continue_with(list(PROMPT))
    wanted = [engine.step(s).id for _ in range(6)]
    stop = next(i for i in range(1, 4) if wanted[i] not in wanted[:i])
    opening = Open(b"s" * 16, 0, Mode.CLOUD_ONLY, CodecSpec(CodecId.IDS), 0, s.sampling, (wanted[stop],))
    link = LocalUpper(lower, 64).open(opening)

    def ask(req: int, pos: int, run: int) -> list[int]:
        """Send the ids up to `pos`, and ask behind it."""
        text = (*PROMPT, *wanted)
        link.send(Ids(0, 0, text[: pos + 1]))
        link.send(Ask(req, 0, pos, pos, run=run))
        news: list[News] = []
        while more := link.receive(0.0):
            news += more
        return [v.ids[0] for v in news if isinstance(v, Verdict)]

    n = len(PROMPT)
    assert ask(1, n - 1, 60) == wanted[: stop + 1]
    for i in range(stop, 5):
        assert ask(2 + i, n + i, 1) == [wanted[i + 1]]
