"""How long a reader waits when something fails: a link that drops, one that was dark for a while, a server that dies.

    python bench/recovery.py --profile 4g-good --drops 20 --blackouts 5 --kills 20 --json

drop      every connection is reset and none comes back for a while; the device may go on alone (`lost="finish"`).
          From the reset to the device's next token, beside the mean time between tokens before it (they come in bursts,
          as verdicts do).
blackout  nothing arrives for --dark seconds.  From the link's return to the next final token, beside the round trip.
kill      SIGKILL to the server that is in use, while another one stands by at a second address.  From the kill to the
          next final token; the other server has to get all rows again.

Everything runs on this machine; the server that was killed is started again when the other one has taken over.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from nearfar.bench.collab.prompts import OPENINGS
from nearfar.chaos.profiles import PROFILES, Profile
from nearfar.chaos.proxy import RunningLink, running
from nearfar.chaos.schedule import Fault
from nearfar.chaos.upper_process import UpperProcess, serving
from nearfar.cli.verbs import SHIPPED, model_path
from nearfar.collab_options import Collab
from nearfar.halves import split
from nearfar.llm import LLM, Stream, TokenEvent
from nearfar.machine import cpu_name
from nearfar.sampling import Sampling
from nearfar.weights import Weights
from nearfar.wire.tls import Credentials

TOKEN = "recovery"  # that both servers take
STEADY = 32  # tokens before anything fails
DROP_S = 3.0  # without a link after a drop: longer than the device needs for its next token
AWAY_S = 3.0  # a server that was killed; longer than a failover


@dataclass(frozen=True, slots=True)
class Side:
    """A server, and the link to it."""

    upper: UpperProcess
    link: RunningLink

    @property
    def url(self) -> str:
        return f"grpc://{self.link.address[0]}:{self.link.address[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHIPPED)
    parser.add_argument("--at", type=int, default=4, metavar="K")
    parser.add_argument("--profile", choices=tuple(PROFILES), default="4g-good")
    parser.add_argument("--drops", type=int, default=20, metavar="N")
    parser.add_argument("--blackouts", type=int, default=5, metavar="N")
    parser.add_argument("--dark", type=float, default=10.0, metavar="S")
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    profile = PROFILES[args.profile]
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        with Weights.open(model_path(args.model)) as whole:
            halves = split(whole, args.at, folder)
            n_ctx = whole.config.n_ctx
        sides = [stack.enter_context(side(halves.upper, folder / str(i), 4 * n_ctx, profile)) for i in range(2)]
        result: dict[str, Any] = {"cpu": cpu_name(), "model": args.model, "cut": args.at, "profile": profile.name}
        result |= {"rtt_ms": profile.rtt_ms}
        result["drop"] = drops(halves.device, sides[0], args.drops)
        result["blackout"] = blackouts(halves.device, sides[0], args.blackouts, args.dark)
        result["kill"] = kills(halves.device, sides, args.kills)
    print(json.dumps(result) if args.json else report(result))
    return 0


@contextmanager
def side(upper_file: Path, folder: Path, n_positions: int, profile: Profile) -> Iterator[Side]:
    folder.mkdir()
    with (
        serving(upper_file, folder, n_positions, TOKEN) as upper,
        running(("127.0.0.1", upper.port), profile) as link,
    ):
        yield Side(upper, link)


class Reader:
    """Answers one after the other, read token by token."""

    def __init__(self, device: Path, sides: list[Side], how: Collab) -> None:
        credentials = Credentials(token=TOKEN)
        self.llm = LLM.open(device, threads=1, upper=[s.url for s in sides], collab=how, credentials=credentials)
        self._stream: Stream | None = None
        self._n = 0

    def next(self) -> TokenEvent:
        while True:
            if self._stream is None:
                self._stream = self._begin()
            event = next(self._stream, None)
            if event is not None:
                return event
            self._stream = None

    def _begin(self) -> Stream:
        self._n += 1
        prompt, sampling = OPENINGS[self._n % len(OPENINGS)], Sampling(temperature=1.0, seed=self._n)
        return self.llm.stream(prompt, max_tokens=256, sampling=sampling)

    def steady_ms(self, n: int = STEADY) -> float:
        """Mean time between tokens, of `n` that follow the first one of a new answer."""
        self._stream = self._begin()
        self.next()
        began = time.perf_counter()
        for _ in range(n):
            self.next()
        return 1000 * (time.perf_counter() - began) / n

    def until_ms(self, began: float) -> tuple[float, TokenEvent]:
        """From then to the next token."""
        event = self.next()
        return 1000 * (time.perf_counter() - began), event

    def replayed(self) -> int:
        """Rows of this answer that were sent again."""
        assert self._stream is not None
        shared = self._stream.completion.stats.shared
        return 0 if shared is None else shared.replayed

    def end(self) -> None:
        """Give the answer up."""
        assert self._stream is not None
        self._stream.close()
        self._stream = None


def drops(device: Path, at: Side, n: int) -> dict[str, Any]:
    """The link is gone and the device goes on alone."""
    waits, between = [], []
    for _ in range(n):
        reader = Reader(device, [at], Collab(lost="finish"))
        with reader.llm:
            between.append(reader.steady_ms())
            began = time.perf_counter()
            at.link.inject(Fault(0, "reset"))
            at.link.inject(Fault(0, "blackout", DROP_S))
            ms, event = reader.until_ms(began)
            while event.where != "device":  # final before the drop
                ms, event = reader.until_ms(began)
            waits.append(ms)
            reader.end()
        time.sleep(max(0.0, began + DROP_S - time.perf_counter()))
    return {"n": n, "next_token_ms": waits, "tbt_ms": median(between)}


def blackouts(device: Path, at: Side, n: int, dark_s: float) -> dict[str, Any]:
    """Nothing arrives for a while, then everything does."""
    waits, replayed = [], []
    for _ in range(n):
        reader = Reader(device, [at], Collab())
        with reader.llm:
            reader.steady_ms()
            began = time.perf_counter()
            at.link.inject(Fault(0, "blackout", dark_s))
            event_at = began
            while event_at < began + dark_s:  # tokens that had arrived
                reader.next()
                event_at = time.perf_counter()
            waits.append(1000 * (event_at - began - dark_s))
            replayed.append(reader.replayed())
            reader.end()
    return {"n": n, "dark_s": dark_s, "next_token_ms": waits, "replayed": replayed}


def kills(device: Path, sides: list[Side], n: int) -> dict[str, Any]:
    """The server in use dies; the other one takes over."""
    waits, replayed = [], []
    reader = Reader(device, sides, Collab())
    with reader.llm:
        while len(waits) < n:
            reader.steady_ms()
            used = [s for s in sides if s.upper.gauges()["device_sessions.connected"]]
            began = time.perf_counter()
            used[0].upper.inject(Fault(0, "kill", AWAY_S))
            ms, _ = reader.until_ms(began)
            while not (rows := reader.replayed()):  # tokens that were final before the kill
                ms, _ = reader.until_ms(began)
            waits.append(ms)
            replayed.append(rows)
            reader.end()
            for s in sides:
                s.upper.wait()
    return {"n": n, "next_token_ms": waits, "replayed": replayed}


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def report(result: dict[str, Any]) -> str:
    rtt = result["rtt_ms"]
    lines = [f"{result['model']}, cut at layer {result['cut']}, {result['profile']} ({rtt:g} ms), {result['cpu']}"]
    for name in ("drop", "blackout", "kill"):
        facts = result[name]
        if not (waits := facts["next_token_ms"]):
            continue
        text = f"{name}: next token after p50 {median(waits):.0f}, p95 {quantile(waits, 0.95):.0f} ms, n = {len(waits)}"
        if "tbt_ms" in facts:
            text += f"; between tokens before it {facts['tbt_ms']:.1f} ms"
        if "replayed" in facts:
            text += f"; rows sent again p50 {median(facts['replayed']):g}"
        lines.append(text)
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
