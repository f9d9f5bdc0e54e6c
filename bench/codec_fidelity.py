"""What a codec of hidden rows costs a model: greedy tokens that stay the same, perplexity, error of the rows.

python bench/codec_fidelity.py DATA
python bench/codec_fidelity.py DATA --passages 100 --json

Held-out passages run to layer k, their rows are packed and unpacked, and the layers above them foretell the next token
twice: from the rows as they were (f32 on the wire) and from those that came back.  Outlier channels come from other
passages.  A model that rounds its own activations to int8 changes tokens at the slightest touch, so rows off by 2^-20
stand beside the codecs and show how much of a loss is that.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from line import machine
from nearfar import forms
from nearfar.cli.verbs import SHIPPED, model_path
from nearfar.corpora import data_folder
from nearfar.eval.language import dialogues, stories
from nearfar.eval.perplexity import start_ids
from nearfar.importers import import_model
from nearfar.lower import Lower, open_lower
from nearfar.options import EngineOptions
from nearfar.tokenizer import Tokenizer, tokenizer_from_metadata
from nearfar.weights import Weights
from nearfar.wire.codec import Codec, outlier_channels
from nearfar.wire.messages import CodecId, CodecSpec

Rows = NDArray[np.float32]
Ids = NDArray[np.int32]

NOISE = 2.0**-20
COLUMNS = {  # heading -> the way, and whether channels travel apart
    "f32, off by 2^-20": ("f32", False),
    "fp16": ("fp16", False),
    "int8_os": ("int8_os", False),
    "int8_os, apart": ("int8_os", True),
    "int4_os": ("int4_os", False),
    "int4_os, apart": ("int4_os", True),
}


@dataclass(frozen=True, slots=True)
class Split:
    """A model cut at layer k, and the text that it is asked to foretell."""

    model: str
    text: str
    k: int


SPLITS = [Split("nano", text, k) for text in ("dialogues", "stories") for k in (2, 4)]
SPLITS += [Split("stories260K", "stories", k) for k in (2, 4)]


@dataclass(frozen=True, slots=True)
class Foretold:
    """Of every position: the greedy token, its lead over the next one in logits, and -log p of the text's own token."""

    greedy: NDArray[np.int64]
    lead: NDArray[np.float64]
    losses: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Way:
    """How rows come to the other side: `carry` gives what arrives, f32 [T, D] for f32 [T, D]."""

    name: str
    outliers: tuple[int, ...]
    row_bytes: int
    carry: Callable[[Rows], Rows]


@dataclass(frozen=True, slots=True)
class Fidelity:
    """One way on one split, beside f32 on the wire."""

    model: str
    text: str
    k: int
    way: str
    outliers: tuple[int, ...]
    row_bytes: int
    n_tokens: int
    error: float  # relative, of the rows
    agreement: float  # share of positions whose greedy token is the same
    lead: float  # median, in logits, that a greedy token had had which became another one; 0 if none did
    perplexity: float
    rise: float  # of the perplexity over that of f32, relative


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="the folder of the corpora (default: NEARFAR_DATA)")
    parser.add_argument("--passages", type=int, default=40, help="measured, of each text (default %(default)s)")
    parser.add_argument("--calibration", type=int, default=20, help="passages beside them (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="a JSON line for each way instead of the table")
    args = parser.parse_args()
    folder = data_folder(args.data)
    if not args.json:
        show_heading()
    with tempfile.TemporaryDirectory() as place:
        for name, path in models(folder, Path(place)):
            with Weights.open(path) as weights:
                lower = open_lower(weights, options=EngineOptions(args.threads, cache="off"))
                tokenizer = tokenizer_from_metadata(weights.file.metadata)
                for split in (s for s in SPLITS if s.model == name):
                    ids = texts(folder, tokenizer, split.text, args.calibration + args.passages)
                    outliers = calibrate(lower, split, ids[: args.calibration])
                    ways = list(all_ways(lower.config.d_model, outliers))
                    show(list(measure(lower, split, ways, ids[args.calibration :])), as_json=args.json)


def models(folder: Path, place: Path) -> Iterator[tuple[str, Path]]:
    """Name and file of nano, and of stories260K where its weights are there."""
    yield "nano", model_path(SHIPPED)
    source = folder / "weights" / "stories260K.bin"
    if source.is_file():
        import_model(source, place / "stories260K.gguf")
        yield "stories260K", place / "stories260K.gguf"


def texts(folder: Path, tokenizer: Tokenizer, kind: str, n: int) -> list[Ids]:
    """The first `n` held-out passages of stories as running text, or of dialogues in nano's row form.  i32 [T] each"""
    if kind == "dialogues":
        found = islice(dialogues(folder), n)
        return [np.array(forms.encode([*p.before, *p.row], tokenizer), np.int32) for p in found]
    start = start_ids(tokenizer)
    plain = (p.text for p in islice(stories(folder), n))
    return [np.array([*start, *tokenizer.encode(text, add_bos=False)], np.int32) for text in plain]


def calibrate(lower: Lower, split: Split, texts: Sequence[Ids]) -> tuple[int, ...]:
    return outlier_channels(np.concatenate([rows_at(lower, ids, split.k) for ids in texts]))


def measure(lower: Lower, split: Split, ways: Sequence[Way], texts: Sequence[Ids]) -> Iterator[Fidelity]:
    """Each way beside the rows as they were."""
    rows = [rows_at(lower, ids, split.k) for ids in texts]
    exact = foretell(lower, rows, texts, split.k)
    sent = np.concatenate(rows)
    for way in ways:
        arrived = [way.carry(part) for part in rows]
        near = foretell(lower, arrived, texts, split.k)
        changed = near.greedy != exact.greedy
        yield Fidelity(
            split.model,
            split.text,
            split.k,
            way.name,
            way.outliers,
            way.row_bytes,
            len(sent),
            float(np.linalg.norm(np.concatenate(arrived) - sent) / np.linalg.norm(sent)),
            float(1 - changed.mean()),
            float(np.median(exact.lead[changed])) if changed.any() else 0.0,
            float(np.exp(near.losses.mean())),
            float(np.exp(near.losses.mean() - exact.losses.mean()) - 1),
        )


def all_ways(d: int, outliers: tuple[int, ...]) -> Iterator[Way]:
    """Every codec, without and with channels apart; before them rows whose last bits are other ones."""
    rng = np.random.default_rng(1)
    yield Way("f32", (), 4 * d, lambda x: (x * (1 + rng.choice([-NOISE, NOISE], x.shape))).astype(np.float32))
    specs = [CodecSpec(CodecId.FP16), CodecSpec(CodecId.INT8_OS), CodecSpec(CodecId.INT4_OS)]
    if outliers:
        specs += [CodecSpec(codec_id, outliers=outliers) for codec_id in (CodecId.INT8_OS, CodecId.INT4_OS)]
    for spec in sorted(specs, key=lambda spec: spec.id):
        codec = Codec.of(spec, d)
        yield Way(spec.id.name.lower(), spec.outliers, codec.row_bytes, codec.round_trip)


def rows_at(lower: Lower, ids: Ids, k: int) -> Rows:
    """i32 [T] -> f32 [T - 1, D]: the rows that foretell a token of the text, at the input of layer k."""
    return lower.forward(lower.embed(ids[:-1]), lower.new_kv(len(ids), "f32"), 0, k)


def foretell(lower: Lower, rows: Sequence[Rows], texts: Sequence[Ids], k: int) -> Foretold:
    """What layers k and above make of the rows of each text."""
    parts = []
    for x, ids in zip(rows, texts, strict=True):
        h = lower.forward(x, lower.new_kv(len(x), "f32"), k, lower.config.n_layers)
        z = lower.logits(h).astype(np.float64)  # [T - 1, V]
        second, top = np.partition(z, -2, axis=1)[:, -2:].T
        losses = top + np.log(np.exp(z - top[:, None]).sum(axis=1)) - z[np.arange(len(z)), ids[1:]]
        parts.append((z.argmax(axis=1), top - second, losses))
    return Foretold(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def show_heading() -> None:
    """In each cell: greedy tokens that stayed the same, perplexity over that of f32 on the wire."""
    print("| model, text, rows at layer | tokens | channels apart |", *(f" {name} |" for name in COLUMNS), sep="")
    print("|---" * (3 + len(COLUMNS)) + "|")


def show(found: Sequence[Fidelity], *, as_json: bool) -> None:
    """The lines of one split, or its row of the table."""
    if as_json:
        for f in found:
            print(json.dumps(asdict(f) | {"machine": machine()}), flush=True)
        return
    cells = {(f.way, bool(f.outliers)): f"{f.agreement:.2%}, {f.rise:+.2%}" for f in found}
    last = found[-1]
    print(
        f"| {last.model}, {last.text}, {last.k} | {last.n_tokens:,} | {len(last.outliers) or 'none pays'} |",
        *(f" {cells.get(cell, '-')} |" for cell in COLUMNS.values()),
        sep="",
        flush=True,
    )


if __name__ == "__main__":
    main()
