"""The ways to share an answer that are compared, and the other side's process that most of them ask.

device only         the device half alone, its last exit forced
cloud-only          ids go up, tokens stream down
resend              the whole context's rows for every token: no cache on the other side
split               one fp16 row and one round trip for every token, caches on both sides
lossy tau           a sure exit decides at once (CE-CoLLM, 2411.02829), the others one round trip
drafts ids          the device drafts a fixed number of tokens, the upper side checks them, the device waits for it
lossless rows, ids  the same with as many drafts as pay off, and drafting goes on meanwhile
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nearfar.bench.collab.measure import System
from nearfar.bench.collab.paced import Paced, Rate
from nearfar.collab import Collaboration
from nearfar.collab_options import Collab
from nearfar.engine import Engine
from nearfar.errors import NearfarError
from nearfar.llm import LLM
from nearfar.lower import open_lower
from nearfar.lower_composed import Composed
from nearfar.weights import Weights
from nearfar.wire.codec import Codec
from nearfar.wire.messages import CodecId, CodecSpec, Mode

FP16, INT8, INT4, IDS = (CodecSpec(i) for i in CodecId)
N_DRAFTS = 5  # of `drafts ids`: a usual number (2211.17192 has 3 to 7)


@dataclass(frozen=True, slots=True)
class Files:
    """A model and its halves."""

    full: Path
    device: Path
    upper: Path


@dataclass(frozen=True, slots=True)
class Serving:
    """The other side: where its halves answer."""

    rows_url: str  # of the upper half
    ids_url: str  # of the full model


@contextmanager
def serving(model: Path, rate: Rate | None, threads: int = 1) -> Iterator[int]:
    """`nearfar cloud serve` in a process of its own; the port that it takes devices on.  Raises NearfarError."""
    command = [sys.executable, "-m", "nearfar.cli.main", "cloud", "serve", str(model), "--port", "0"]
    command += ["--collab-port", "0", "--threads", str(threads), "--json"]
    command += ["--no-prefix-cache"]  # no system gains by what another one has computed, nor one that resends by itself
    if rate is not None:
        command += ["--at-least", f"{rate.step_ms},{rate.row_ms}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise NearfarError(f"the server for {model} did not start; `nearfar cloud serve {model}` says why")
            yield int(json.loads(line)["collab"].rpartition(":")[2])
        finally:
            process.terminate()
            process.wait(timeout=30)


def open_device(path: Path, rate: Rate | None, upper: str | None = None, how: Collab | None = None) -> LLM:
    """A device with that rate; with `upper` it shares its answers."""
    llm = LLM.open(path, threads=1, upper=upper, collab=how)
    if rate is not None:
        stepper = llm.stepper
        engine = stepper.engine if isinstance(stepper, Collaboration) else stepper
        assert isinstance(engine, Engine)
        engine.lower = Paced(engine.lower, rate)
    return llm


def systems(files: Files, at: Serving, rate: Rate | None, rows_at: int, n_layers: int) -> list[System]:
    """The rows of the table; hidden rows enter layer `rows_at`."""

    def shared(url: str, how: Collab) -> partial[LLM]:
        return partial(open_device, files.device, rate, url, how)

    rows, ids = n_layers - rows_at, n_layers
    return [
        System("device only", partial(open_device, files.device, rate), IDS, 0),
        System("cloud-only", shared(at.ids_url, Collab(Mode.CLOUD_ONLY, IDS)), IDS, ids),
        System("resend", shared(at.rows_url, Collab(Mode.LOSSY, FP16, 1.0)), FP16, rows, resend=True),
        System("split", shared(at.rows_url, Collab(Mode.LOSSY, FP16, 1.0)), FP16, rows),
        System("lossy .8", shared(at.rows_url, Collab(Mode.LOSSY, INT8, 0.8)), INT8, rows),
        System("lossy .9", shared(at.rows_url, Collab(Mode.LOSSY, INT8, 0.9)), INT8, rows),
        System("lossy ids .8", shared(at.ids_url, Collab(Mode.LOSSY, IDS, 0.8)), IDS, ids),
        System("drafts ids", shared(at.ids_url, Collab(Mode.LOSSLESS, IDS, window=N_DRAFTS, in_flight=1)), IDS, ids),
        System("lossless int8", shared(at.rows_url, Collab(Mode.LOSSLESS, INT8)), INT8, rows),
        System("lossless fp16", shared(at.rows_url, Collab(Mode.LOSSLESS, FP16)), FP16, rows),
        System("lossless ids", shared(at.ids_url, Collab(Mode.LOSSLESS, IDS)), IDS, ids),
    ]


def oracle(files: Files, codec: CodecSpec) -> LLM:
    """The whole model in this process, with rows that go through the codec where they leave the device."""
    if codec.id == CodecId.IDS:
        return LLM.open(files.full, threads=1)
    llm = LLM.open(files.device, threads=1)
    assert isinstance(llm.stepper, Engine)
    below, above = llm.stepper.lower, open_lower(Weights.open(files.upper))
    c = below.config
    composed = Composed(below, above, c.row_layer, Codec.of(codec, c.d_model).round_trip)
    return LLM(Engine(composed, llm.max_len), llm.tokenizer, llm.metadata, max_len=llm.max_len, backend="composed")
