"""Many devices on one server: how long an ask takes where 1, 8 or 32 ask, and whether the tokens stay the same.

python bench/collab_clients.py                    # nano, rows as int8
python bench/collab_clients.py --codec ids --at-least 37,0.05

The server is `nearfar cloud serve`, as fast as it can or as slow as a larger model would be (`--at-least`).  Devices
are tasks of this process: what their lower layers would take is waited (`--think-ms` for each ask), their rows were
made before.  Each ask brings `--drafts` drafts, of which each is right with probability `--accept`.  A token that is
not the one device's alone ends the run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from urllib.request import urlopen
from zlib import crc32

import numpy as np

from line import machine, plain_env, say
from nearfar.lower import Lower, open_lower
from nearfar.options import EngineOptions
from nearfar.upper import Decider
from nearfar.weights import Weights
from nearfar.wire.address import Address
from nearfar.wire.codec import Codec
from nearfar.wire.dial import Call, Connection
from nearfar.wire.fingerprint import Split, model_fp, parts
from nearfar.wire.messages import (
    Ask,
    ClientHello,
    Close,
    CodecId,
    CodecSpec,
    Cut,
    Down,
    Ids,
    Mode,
    Open,
    Opened,
    Rows,
    Up,
    Verdict,
)
from nearfar.wire.pack import pack_client_hello, pack_up
from nearfar.wire.tls import Credentials

NANO = Path(__file__).parent.parent / "sdk" / "nearfar" / "models" / "nano.gguf"
CODECS = {"int8": CodecId.INT8_OS, "fp16": CodecId.FP16, "int4": CodecId.INT4_OS, "ids": CodecId.IDS}
REPLY_S = 60.0  # to a hello: the first one waits until the server has read its file
N_TEXTS = 8  # that devices share; each begins with a token of its own


@dataclass(frozen=True)
class Text:
    """What is right: ids, prompt included, and the packed row of each; no rows with ids."""

    ids: list[int]
    rows: list[bytes]
    n_prompt: int


@dataclass(frozen=True)
class Figures:
    """Of one number of devices; milliseconds."""

    devices: int
    asks: int
    p50: float
    p95: float
    p99: float
    tokens_per_s: float
    rows_per_step: float
    server_ms: float  # of a core, for each ask


# ---------------------------------------------------------------- what is right


def write_text(lower: Lower, opening: Open, first: int, n_prompt: int, n: int) -> Text:
    """A prompt of chance behind the id `first`, and `n` tokens that this process decides alone."""
    ids = [first, *Random(first).choices(range(lower.config.n_vocab), k=n_prompt - 1)]
    decider = Decider(lower, opening, n_prompt + n)
    codec = None if opening.row_layer == 0 else Codec.of(opening.codec, lower.config.d_model)
    kv, rows = lower.new_kv(n_prompt + n), list[bytes]()
    for at in range(n_prompt - 1, n_prompt + n - 1):
        new = ids[len(rows) if codec else len(decider.ids) : at + 1]
        if codec is None:
            decider.append((), tuple(new))
        else:
            h = lower.forward(lower.embed(np.asarray(new, np.int32)), kv, 0, opening.row_layer)
            rows += codec.encode(h)
            decider.append(tuple(rows[-len(new) :]), ())
        ids.append(decider.decide(at, at, ()).token)
    return Text(ids, rows, n_prompt)


# ---------------------------------------------------------------- a device


class Device:
    """One answer: `text` is what has to come out."""

    def __init__(self, call: Call, text: Text, args: argparse.Namespace, chance: Random) -> None:
        self.call, self.text, self.args, self.chance = call, text, args, chance
        self.seconds: list[float] = []  # of each ask
        self._n = self._gen = self._sent = self._req = 0

    async def answer(self, opening: Open) -> None:
        await self.say(replace(opening, session=self.chance.randbytes(16)))
        await self.hear(Opened)
        ids, at = self.text.ids, self.text.n_prompt  # tokens below `at` are final
        while at < len(ids):
            await asyncio.sleep(self.args.think_ms / 1000 * self.chance.uniform(0.5, 1.5))
            at = await self.ask(at, min(self.args.drafts, len(ids) - 1 - at))
        await self.say(Close())
        await self.call.done_writing()

    async def ask(self, at: int, n: int) -> int:
        """Have `n` drafts behind position `at` - 1 checked; how many tokens are final then."""
        ids = self.text.ids
        n_right = next((i for i in range(n) if self.chance.random() > self.args.accept), n)
        draft = ids[at : at + n_right] + [(ids[i] + 1) % 256 for i in range(at + n_right, at + n)]
        await self.send([*ids[:at], *draft], at + n)
        self._req += 1
        by_ids = not self.text.rows
        started = time.perf_counter()
        await self.say(Ask(self._req, self._gen, at + n - 1, at - 1, () if by_ids else tuple(draft)))
        verdict = await self.hear(Verdict)
        self.seconds.append(time.perf_counter() - started)
        q = verdict.pos0 + verdict.n_accept
        if q != at + n_right or verdict.ids != (ids[q],):
            sys.exit(f"position {q}: the server says {verdict.ids}, one device alone {ids[q]}")
        if q < at + n:
            self._gen, self._sent = self._gen + 1, q
            await self.say(Cut(self._gen, q))
        return q + 1

    async def send(self, ids: Sequence[int], end: int) -> None:
        """Positions that the other side lacks, below `end`; a row is at most 16 KiB with its neighbours."""
        while self._sent < end:
            first = self._sent
            if not self.text.rows:
                self._sent = end
                await self.say(Ids(self._gen, first, tuple(ids[first:end])))
                continue
            rows = self.text.rows[first : min(end, first + max(1, (16 << 10) // len(self.text.rows[0])))]
            self._sent += len(rows)
            await self.say(Rows(self._gen, first, tuple(rows), tuple(map(crc32, rows))))

    async def say(self, message: Up) -> None:
        self._n += 1
        await self.call.write(pack_up(self._n, message))

    async def hear(self, kind: type[Down]) -> Down:
        message: Down | None = None
        while message is None:
            _, message, _ = await self.call.read()
        assert isinstance(message, kind), message
        return message


# ---------------------------------------------------------------- runs


async def run(
    n: int, texts: list[Text], hello: ClientHello, opening: Open, facts: dict[str, str], args: argparse.Namespace
) -> Figures:
    """`n` devices at a time, each with one answer after the other until `--seconds` have passed."""
    address = Address.parse(facts["collab"])
    connections = [Connection.dial(address, Credentials()) for _ in range(n)]
    for connection in connections:
        if not (server := await connection.hello(pack_client_hello(hello), REPLY_S)).match:
            sys.exit(f"the server does not fit: {server.why}")
    before, started = counts(facts["url"]), time.perf_counter()
    seconds: list[float] = []
    n_tokens = 0

    async def one(i: int) -> None:
        nonlocal n_tokens
        chance = Random(100 * n + i)
        await asyncio.sleep(2 * i / n)  # prompts do not all come at once
        while time.perf_counter() - started < args.seconds:
            text = texts[chance.randrange(len(texts))]
            device = Device(connections[i].session(), text, args, chance)
            await device.answer(opening)
            seconds.extend(device.seconds)
            n_tokens += len(text.ids) - text.n_prompt

    await asyncio.gather(*(one(i) for i in range(n)))
    took, after = time.perf_counter() - started, counts(facts["url"])
    for connection in connections:
        await connection.close()
    p50, p95, p99 = (float(x) for x in 1000 * np.percentile(seconds, (50, 95, 99)))
    rows, n_steps, cpu_s = (b - a for a, b in zip(before, after, strict=True))
    return Figures(n, len(seconds), p50, p95, p99, n_tokens / took, rows / max(1, n_steps), 1000 * cpu_s / len(seconds))


def counts(url: str) -> tuple[float, float, float]:
    """(rows, steps, seconds of a core) of the server so far."""
    with urlopen(url.removesuffix("/v1") + "/metrics") as response:
        lines = dict(line.rsplit(" ", 1) for line in response.read().decode().splitlines() if line[:1] != "#")
    rows, n_steps = "nearfar_cloud_step_rows_sum", "nearfar_cloud_step_rows_count"
    return float(lines[rows]), float(lines[n_steps]), float(lines["process_cpu_seconds_total"])


@contextmanager
def server(args: argparse.Namespace) -> Iterator[dict[str, str]]:
    command = [sys.executable, "-m", "nearfar.cli.main", "cloud", "serve", str(args.model), "--json", "--port", "0"]
    command += ["--collab-port", "0", "--threads", str(args.threads), "--no-prefix-cache"]  # clients have few texts
    command += [] if args.at_least is None else ["--at-least", args.at_least]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=plain_env()) as process:
        assert process.stdout is not None
        try:
            yield json.loads(process.stdout.readline())
        finally:
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=NANO, help="a whole GGUF file (default: the shipped model)")
    parser.add_argument("--devices", default="1,8,32", help="numbers of them (default %(default)s)")
    parser.add_argument("--codec", choices=CODECS, default="int8")
    parser.add_argument("--drafts", type=int, default=7, help="of each ask (default %(default)s)")
    parser.add_argument("--accept", type=float, default=0.8, help="how often a draft is right (default %(default)s)")
    parser.add_argument("--think-ms", type=float, default=250, help="between asks (default %(default)s)")
    parser.add_argument("--prompt", type=int, default=20, help="tokens (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=100, help="of an answer (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=15, help="of each number of devices (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of the server (default %(default)s)")
    parser.add_argument("--at-least", metavar="STEP,ROW", help="milliseconds of a step of n rows: STEP + n ROW")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each number of devices")
    args = parser.parse_args()
    weights = Weights.open(args.model)
    lower = open_lower(weights, "native", EngineOptions(threads=1))
    codec = CodecSpec(CODECS[args.codec])
    row_layer = 0 if args.codec == "ids" else max(1, lower.config.n_layers // 2)
    opening = Open(b"." * 16, 0, Mode.LOSSLESS, codec, row_layer)
    found = parts(weights, Split(row_layer, row_layer))
    hello = ClientHello(model_fp(found), found, (codec,))
    texts = [write_text(lower, opening, first, args.prompt, args.tokens) for first in range(300, 300 + N_TEXTS)]
    say(f"{args.model.name}, {args.codec}, rows of layer {row_layer}, {machine()}")
    with server(args) as facts:
        asyncio.run(run(1, texts, hello, opening, facts, argparse.Namespace(**vars(args) | {"seconds": 2})))  # warms up
        alone = None
        for n in map(int, args.devices.split(",")):
            f = asyncio.run(run(n, texts, hello, opening, facts, args))
            alone = alone or f
            times = f.p95 / alone.p95
            print(json.dumps(vars(f) | {"codec": args.codec, "p95_by_alone": times}) if args.json else told(f, times))


def told(f: Figures, times: float) -> str:
    return (
        f"{f.devices:4} devices  {f.asks:6} asks  p50 {f.p50:6.1f}  p95 {f.p95:6.1f} ms ({times:.2f} x)  "
        f"p99 {f.p99:6.1f}  {f.tokens_per_s:7.0f} tokens/s  {f.rows_per_step:5.1f} rows a step  "
        f"{f.server_ms:5.2f} ms of a core for each ask"
    )


if __name__ == "__main__":
    main()
