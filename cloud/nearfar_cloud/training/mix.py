"""The mix: rows of every source in seeded order, packed into sequences.  Last stop before the trainer.

Which source comes next, which of its rows, and where in the sequence it lands depend on the seed and on how much was
drawn so far, on nothing else: the same state gives the same batches.  File sources are tokenised once per (data,
tokenizer) and kept in a cache folder; generated rows are made in blocks as they are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from nearfar import forms, splits
from nearfar.errors import ConfigError, DataError
from nearfar_cloud.training import held_out, rows
from nearfar_cloud.training.generators import Generator, generators
from nearfar_cloud.training.rows import Row
from nearfar_cloud.training.tokenizer import RowTokenizer

Phase = Literal["stable", "decay"]
NO_TARGET = -100  # the index that torch's cross entropy leaves out
PROMPT_WEIGHT = 0.1  # of a token that the user or a tool wrote, in the decay phase
CHARS_PER_TOKEN = (
    2.75  # of the densest rows; rows are cut into pieces that fit a sequence, pieces too long lose their end
)
BLOCK = 512  # generated rows made at once
LOOKAHEAD = 24  # rows waiting for a place in a sequence; the longest that fits goes first


@dataclass(frozen=True)
class Shares:
    """Percent of the tokens from each source, in the two phases.  Normalised over the sources in use."""

    stable: Mapping[str, float]
    decay: Mapping[str, float]

    def of(self, phase: Phase, without: Sequence[str]) -> dict[str, float]:
        """Source -> share, sum 1, without those named."""
        table = {
            k: v for k, v in (self.stable if phase == "stable" else self.decay).items() if k not in without and v > 0
        }
        total = sum(table.values())
        if not total:
            raise ConfigError(f"the mix of the {phase} phase is empty without {', '.join(without)}")
        return {k: v / total for k, v in table.items()}


def _shares(**table: tuple[float, float]) -> Shares:
    return Shares({k: v for k, (v, _) in table.items() if v}, {k: v for k, (_, v) in table.items() if v})


# source = (stable %, decay %).  For long runs (two hours and more): books and stories are there for the language.
LONG_RUN = _shares(
    sgd=(40, 25),
    intents=(10, 25),
    home=(17, 22),
    journals=(3, 10),
    skills=(3, 5),
    books=(10, 5),
    stories=(2, 2),
    coffee=(5, 4),
    persona=(5, 2),
    gsm8k=(2, 0),
    support=(3, 0),
)
# The files of the data folder that each source reads.
FILES: dict[str, tuple[str, ...]] = {
    "intents": ("intents/hwu64_train.jsonl.xz", "intents/snips_train.jsonl.xz", "intents/clinc150_train_val.json.xz"),
    "sgd": ("dialogue/sgd_train.jsonl.xz", "dialogue/sgd_train_schema.json"),
    "books": ("text/books/*.txt.xz",),
    "stories": ("text/tinystories_train_slice.txt.xz",),
    "coffee": ("dialogue/taskmaster4_coffee_train.jsonl.xz",),
    "persona": ("dialogue/synthetic_persona_chat_valid.jsonl.xz",),
    "gsm8k": ("math/gsm8k_train.jsonl.xz",),
    "support": ("intents/banking77_train.csv.xz", "intents/restaurant8k_train.jsonl.xz"),
    "home": (
        "smart_home/home_assistant_intents_en.tar.xz",
        "smart_home/home_llm_piles_en.tar.xz",
        "intents/clinc150_train_val.json.xz",
        "intents/clinc150_domains.json",
    ),
    "journals": ("smart_home/home_llm_piles_en.tar.xz",),
    "skills": (),
}
CALLS_ONLY_IN_DECAY = ("sgd", "coffee")
SHORT_ROWS = ("intents", "home", "journals", "skills", "support")  # sources whose rows are mostly under 100 tokens


@dataclass(frozen=True)
class Batch:
    """Packed rows; B sequences of T tokens.  Tokens of one row share `doc`, and attention stays inside a row."""

    ids: NDArray[np.int64]  # [B, T]
    targets: NDArray[np.int64]  # [B, T]  the next token of the same row, or NO_TARGET
    weights: NDArray[np.float32]  # [B, T]  loss weight of each target
    pos: NDArray[np.int64]  # [B, T]  place in the row, from 0
    doc: NDArray[np.int64]  # [B, T]  number of the row within its sequence; padding is one of its own


@dataclass(frozen=True)
class Source:
    """One row of the model card: where tokens come from."""

    name: str
    licence: str
    credit: str


SOURCES = {
    s.name: s
    for s in (
        Source(
            "intents",
            "CC BY 4.0 (HWU64), CC0-1.0 (SNIPS), CC BY 3.0 (CLINC150)",
            "HWU64: Liu, Eshghi, Swietojanski, Rieser, github.com/xliuhw/NLU-Evaluation-Data @ f6071b496b; SNIPS: "
            "github.com/sonos/nlu-benchmark @ b86ac7f157; CLINC150: Larson et al., clinc/oos-eval @ 828f809393",
        ),
        Source(
            "sgd",
            "CC BY-SA 4.0",
            "Schema-Guided Dialogue: Rastogi et al., "
            "github.com/google-research-datasets/dstc8-schema-guided-dialogue @ e852981ae3, compact form",
        ),
        Source(
            "home",
            "CC BY 4.0 (templates), MIT (names), CC BY 3.0 (requests that no home can meet)",
            "generated from github.com/home-assistant/intents @ aa550032a5, github.com/acon96/home-llm @ 5f627cae5b "
            "and CLINC150",
        ),
        Source("journals", "Apache-2.0", "generated by a grammar of this project; names from acon96/home-llm (MIT)"),
        Source("skills", "Apache-2.0", "generated by a grammar of this project"),
        Source("books", "US public domain texts, CC0-1.0 editions", "fourteen children's books of Standard Ebooks"),
        Source("stories", "CDLA-Sharing-1.0", "TinyStories: Eldan and Li, a 944 kB slice of the train split"),
        Source(
            "coffee",
            "CC BY 4.0",
            "Taskmaster-4 coffee orders: github.com/google-research-datasets/Taskmaster @ d92cb6af30, trimmed",
        ),
        Source("persona", "CC BY 4.0", "github.com/google-research-datasets/Synthetic-Persona-Chat @ 1f367a0f05"),
        Source("gsm8k", "MIT", "GSM8K: Cobbe et al., github.com/openai/grade-school-math @ 3101c7d507"),
        Source(
            "support",
            "CC BY 4.0",
            "banking77 and restaurant8k: github.com/PolyAI-LDN/task-specific-datasets @ 57ec275d80",
        ),
    )
}


class _Files:
    """Tokenised rows of one file source: flat arrays and offsets."""

    def __init__(self, ids: NDArray[np.uint16], written: NDArray[np.bool_], starts: NDArray[np.int64]) -> None:
        self.ids, self.written, self.starts = ids, written, starts  # starts [rows + 1]
        self._with_calls: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, i: int) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
        a, b = self.starts[i], self.starts[i + 1]
        return self.ids[a:b], self.written[a:b]

    def with_calls(self, call_id: int) -> NDArray[np.int64]:
        """The rows in which the model makes a call."""
        if self._with_calls is None:
            places = np.flatnonzero(self.ids == call_id)
            self._with_calls = np.unique(np.searchsorted(self.starts, places, side="right") - 1)
        return self._with_calls


class _Generated:
    """Rows of a generator, tokenised in blocks; the last few blocks are kept."""

    def __init__(self, generator: Generator, tokenizer: RowTokenizer) -> None:
        self.generator, self.tokenizer = generator, tokenizer
        self.blocks: dict[int, list[tuple[NDArray[np.uint16], NDArray[np.bool_]]]] = {}

    def row(self, i: int) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
        block = i // BLOCK
        if block not in self.blocks:
            made: list[Row] = [self.generator.row(j) for j in range(block * BLOCK, (block + 1) * BLOCK)]
            self.blocks[block] = self.tokenizer.encode_rows(made)
            while len(self.blocks) > 3:
                del self.blocks[min(self.blocks)]
        return self.blocks[block][i % BLOCK]


class Mix:
    """Batches without end from the data folder.

    `seq_len` is the width of the sequences, `short_len` that of the sequences of sources with short rows: attention
    costs the square of the width, and sequences of both widths come in turn at the trainer's bidding.
    Raises DataError when a source is missing or malformed, ConfigError when `without` names no source.
    """

    def __init__(
        self,
        data: Path,
        tokenizer: RowTokenizer,
        *,
        seq_len: int,
        short_len: int | None = None,
        seed: int,
        without: Sequence[str] = (),
        shares: Shares = LONG_RUN,
        cache: Path | None = None,
        prompt_weights: tuple[float, float] = (1.0, PROMPT_WEIGHT),
    ) -> None:
        known = sorted({*shares.stable, *shares.decay})
        unknown = [name for name in without if name not in known]
        if unknown:
            raise ConfigError(f"without {', '.join(unknown)}: expected sources of {', '.join(known)}")
        names = [name for name in known if name not in without]
        self.tokenizer, self.seq_len, self.seed, self.without = tokenizer, seq_len, seed, tuple(without)
        self.widths = {name: short_len if short_len and name in SHORT_ROWS else seq_len for name in names}
        self.prompt_weights = prompt_weights  # of tokens that the user or a tool wrote: stable, decay
        self.shares: dict[Phase, dict[str, float]] = {
            "stable": shares.of("stable", without),
            "decay": shares.of("decay", without),
        }
        self.data_sha256 = data_hash(data, names)
        made = generators(data, seed, names)
        self._sources: dict[str, _Files | _Generated] = {
            name: _Generated(made[name], tokenizer)
            if name in made
            else _tokenised(data, name, tokenizer, self.data_sha256, self.widths[name], cache)
            for name in names
        }
        self._drawn: dict[str, int] = {}  # "source phase-order" -> rows taken
        self._tokens: dict[str, dict[str, int]] = {"stable": dict.fromkeys(names, 0), "decay": dict.fromkeys(names, 0)}
        # width -> (source, row): drawn, not yet placed
        self._waiting: dict[int, list[tuple[str, int]]] = {width: [] for width in {*self.widths.values(), seq_len}}
        self._orders: dict[str, tuple[int, NDArray[np.int64]]] = {}  # "source phase-order" -> (epoch, rows in order)

    # ------------------------------------------------------------ batches

    def next_batch(self, n_sequences: int, phase: Phase, width: int | None = None) -> Batch:
        """The next `n_sequences` sequences of `width` tokens (`seq_len` unless said) from the sources of that width.

        Targets that the model writes weigh 1, the others the phase's `prompt_weights`.
        """
        shape = (n_sequences, width or self.seq_len)
        batch = Batch(
            ids=np.full(shape, self.tokenizer.pad_id, np.int64),
            targets=np.full(shape, NO_TARGET, np.int64),
            weights=np.zeros(shape, np.float32),
            pos=np.zeros(shape, np.int64),
            doc=np.zeros(shape, np.int64),
        )
        for b in range(n_sequences):
            self._fill(batch, b, phase)
        return batch

    def _fill(self, batch: Batch, b: int, phase: Phase) -> None:
        """Sequence b: the longest waiting row that fits, again and again; what is left over is padding."""
        at = n_rows = 0
        width = batch.ids.shape[1]
        waiting = self._waiting[width]
        while at < width:
            while len(waiting) < LOOKAHEAD:
                waiting.append(self._draw(phase, width))
            lengths = [min(len(self._sources[name].row(i)[0]), width) for name, i in waiting]
            fitting = [i for i, n in enumerate(lengths) if n <= width - at]
            if not fitting:
                break
            # The oldest row opens a sequence, so that no row waits for ever.
            choice = 0 if at == 0 else max(fitting, key=lambda i: (lengths[i], -i))
            name, row = waiting.pop(choice)
            ids, written = self._sources[name].row(row)
            n = lengths[choice]
            ids, written = ids[:n], written[:n]
            batch.ids[b, at : at + n] = ids
            batch.pos[b, at : at + n] = np.arange(n)
            batch.doc[b, at : at + n] = n_rows
            batch.targets[b, at : at + n - 1] = ids[1:]
            batch.weights[b, at : at + n - 1] = np.where(written[1:], 1.0, self.prompt_weights[phase == "decay"])
            at, n_rows = at + n, n_rows + 1
        batch.doc[b, at:] = n_rows
        batch.pos[b, at:] = np.arange(width - at)

    def _draw(self, phase: Phase, width: int) -> tuple[str, int]:
        """The next row of the source that is furthest behind its share of this phase's tokens of that width."""
        shares = {name: s for name, s in self.shares[phase].items() if self.widths[name] == width}
        if not shares:
            raise ConfigError(f"the mix of the {phase} phase has no source of sequences of {width} tokens")
        tokens = self._tokens[phase]
        total, whole = sum(tokens[name] for name in shares), sum(shares.values())
        name = max(shares, key=lambda k: (shares[k] / whole * total - tokens[k], shares[k]))
        row = self._next_row(name, phase)
        tokens[name] += min(len(self._sources[name].row(row)[0]), width)
        return name, row

    def _next_row(self, name: str, phase: Phase) -> int:
        source = self._sources[name]
        calls_only = phase == "decay" and name in CALLS_ONLY_IN_DECAY
        key = f"{name} calls" if calls_only else name
        n = self._drawn.get(key, 0)
        self._drawn[key] = n + 1
        if isinstance(source, _Generated):
            return n
        candidates = source.with_calls(self.tokenizer.controls[forms.CALL]) if calls_only else np.arange(len(source))
        epoch, place = divmod(n, len(candidates))
        if self._orders.get(key, (-1,))[0] != epoch:
            order = np.random.default_rng([self.seed, epoch, *key.encode()]).permutation(candidates)
            self._orders[key] = epoch, order
        return int(self._orders[key][1][place])

    # ------------------------------------------------------------ position

    def state(self) -> dict[str, Any]:
        """The position, as JSON: `restore` continues with the very batches that would have come."""
        return {
            "data_sha256": self.data_sha256,
            "seed": self.seed,
            "drawn": dict(self._drawn),
            "tokens": {phase: dict(count) for phase, count in self._tokens.items()},
            "waiting": {str(width): [list(key) for key in rows] for width, rows in self._waiting.items()},
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a position; DataError when it belongs to other data or another seed."""
        for key, mine in (("data_sha256", self.data_sha256), ("seed", self.seed)):
            if state.get(key) != mine:
                raise DataError(f"the saved position has {key} {state.get(key)}, this mix {mine}: train from the start")
        self._drawn = dict(state["drawn"])
        self._tokens = {phase: dict(count) for phase, count in state["tokens"].items()}
        self._waiting = {int(w): [(name, int(row)) for name, row in rows] for w, rows in state["waiting"].items()}
        self._orders = {}

    # ------------------------------------------------------------ for the card

    def description(self) -> list[dict[str, Any]]:
        """Per source: licence, credit, tokens there are (None: no end), tokens drawn and share in each phase."""
        return [
            {
                "source": name,
                "licence": SOURCES[name].licence,
                "credit": SOURCES[name].credit,
                "tokens_there_are": len(source.ids) if isinstance(source, _Files) else None,
                "tokens_seen": {phase: count[name] for phase, count in self._tokens.items()},
                "share": {phase: round(table.get(name, 0.0), 4) for phase, table in self.shares.items()},
            }
            for name, source in self._sources.items()
        ]


def data_hash(data: Path, names: Sequence[str]) -> str:
    """sha256 over the files that these sources read and the version of the rows made of them."""
    digest = sha256(f"{forms.ROWS_VERSION} {rows.VERSION} {' '.join(names)}".encode())
    for path in sorted({p for name in names for pattern in FILES[name] for p in data.glob(pattern)}):
        digest.update(path.relative_to(data).as_posix().encode() + sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _tokenised(
    data: Path, name: str, tokenizer: RowTokenizer, data_sha256: str, seq_len: int, cache: Path | None
) -> _Files:
    """The train rows of a file source as ids, from the cache where they are."""
    modules = (rows, held_out, forms, splits)
    readers = "".join(Path(str(module.__file__)).read_text(encoding="utf-8") for module in modules)
    max_chars = min(int(CHARS_PER_TOKEN * seq_len), rows.MAX_ROW_CHARS)
    key = sha256(f"{name} {max_chars} {data_sha256} {tokenizer.sha256} {readers}".encode()).hexdigest()[:16]
    path = cache / f"{name}-{key}.npz" if cache else None
    if path and path.is_file():
        with np.load(path) as stored:
            return _Files(stored["ids"], stored["written"], stored["starts"])
    encoded = tokenizer.encode_rows(list(rows.FILE_SOURCES[name](data, "train", max_chars)))
    if not encoded:
        raise DataError(f"source {name}: expected rows, found none in {data}")
    files = _Files(
        np.concatenate([ids for ids, _ in encoded]),
        np.concatenate([written for _, written in encoded]),
        np.cumsum([0, *(len(ids) for ids, _ in encoded)], dtype=np.int64),
    )
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(part, ids=files.ids, written=files.written, starts=files.starts)
        part.replace(path)
    return files
