"""A device half beside what is above it: whose tokens count, and whose exits are measured along them.

rows    device layers -> codec -> upper layers     the oracle is both together, codec included (lower_composed.py)
ids     device layers     whole model              the oracle is the whole model; the device's rows only draft

Where rows leave below the device's last layers, these only draft, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nearfar.engine import Engine
from nearfar.errors import UsageError
from nearfar.eval.exits import engine_of
from nearfar.halves import check_pair
from nearfar.llm import LLM
from nearfar.lower import open_lower
from nearfar.lower_composed import Composed
from nearfar.options import EngineOptions
from nearfar.weights import Weights
from nearfar.wire.codec import Codec
from nearfar.wire.fingerprint import FOR_IDS, FOR_ROWS, outliers
from nearfar.wire.messages import GROUPS, CodecId, CodecSpec


@dataclass(frozen=True, slots=True)
class Pair:
    """`oracle` answers at full depth; `heads` runs along its answers and has the exits."""

    oracle: LLM
    heads: Engine


def open_pair(
    llm: LLM,
    device: Path,
    upper: Path,
    codec: CodecId,
    *,
    backend: str | None = None,
    options: EngineOptions | None = None,
) -> Pair:
    """`llm` is the open device half.  `upper`: its other half, or the whole model, which ids need.

    Raises UsageError (files of other roles), MismatchError (halves of two pairs), and what opening a file raises.
    """
    below, weights = engine_of(llm), Weights.open(upper)
    with Weights.open(device) as half:
        check_pair(half, weights, FOR_IDS if codec is CodecId.IDS else FOR_ROWS)
        cut, channels = half.config.row_layer, outliers(half.file, half.config)
    if codec is CodecId.IDS and weights.config.role != "full":
        raise UsageError(f"{upper} is an upper half, which takes no ids: expected the whole model, or a codec of rows")
    lower = open_lower(weights, backend, options)
    if codec is not CodecId.IDS:
        spec = CodecSpec(codec, outliers=channels if GROUPS[codec] else ())
        lower = Composed(below.lower, lower, cut, Codec.of(spec, lower.config.d_model).round_trip)
    engine = Engine(lower, below.max_len, below.kv_dtype, below.kv_policy)
    name, config = f"{llm.backend} beside its upper layers", lower.config
    oracle = LLM(engine, llm.tokenizer, llm.metadata, max_len=llm.max_len, backend=name, config=config)
    has_all = codec is not CodecId.IDS and cut == below.lower.config.split_layer
    return Pair(oracle, engine if has_all else below)
