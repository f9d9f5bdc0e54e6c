"""How well a model foretells running text: bits per character, teacher-forced, so that tokenizers compare.

    stories   TinyStories' validation slice
    books     the twentieth of 14 children's books that training holds out (nearfar.splits)
    SGD       the utterances of SGD dev dialogues

Stories and dialogues are cut into passages of about 600 characters at ends of lines or turns, books into the pieces
that training makes; each starts afresh, and every token after its start counts. A model of nearfar's rows reads a
dialogue in its row form: the tokens that name the speakers cost it bits, the characters counted are those of the
utterances, as for every model.
"""

from __future__ import annotations

import lzma
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from nearfar import corpora, forms, splits
from nearfar.errors import MissingDataError
from nearfar.eval.calls import DAY
from nearfar.eval.intervals import bootstrap
from nearfar.eval.metrics import ratio
from nearfar.eval.perplexity import losses_after, start_ids
from nearfar.eval.tasks import Figure, Model, Prediction, Row, Task, lower_of, speaks_rows
from nearfar.forms import Parts, Turn

T = TypeVar("T")
STORIES, BOOKS, SGD = TEXTS = "stories", "books", "SGD"
MAX_CHARS = 600  # about 170 tokens at 4,096 words, 300 at 512
N_PASSAGES = 300  # of each text, spread evenly
USUAL_ROWS = 240  # of all together
REFERENCE = "stories260K"
_WEIGHTS = Path("weights") / f"{REFERENCE}.bin"


@dataclass(frozen=True, slots=True)
class Passage:
    """A text as anybody reads it, and as a row: `before` is given, `row` is foretold."""

    text: str
    before: Parts
    row: Parts
    n_chars: int


def load(folder: Path) -> list[Task]:
    """Passages of the three texts, as many of each.  Raises DataError."""
    texts = {STORIES: list(stories(folder)), BOOKS: list(books(folder)), SGD: list(dialogues(folder))}
    n = min(N_PASSAGES, *map(len, texts.values()))
    rows: list[Row] = []
    for kind, found in texts.items():
        spread = (i * len(found) // n for i in range(n))
        rows += [Row(f"{kind} {at}", found[at].text, {}, kind, context=found[at]) for at in spread]
    return [
        Task(
            name="language",
            split="Running text",
            rows=rows,
            prompt=lambda row: row.context.before,
            schema=None,
            score=score,
            instruction="",
            usual_rows=USUAL_ROWS,
            ask=read,
            notes=packed_note,
        )
    ]


def stories(folder: Path) -> Iterator[Passage]:
    """The validation slice of TinyStories."""
    with corpora.open_text(folder / "text" / "tinystories_valid_slice.txt.xz", "running text") as file:
        for lines in _filled((line for line in file if line.strip()), len):
            text = "".join(lines).strip()[: 2 * MAX_CHARS]  # a line may be a whole story
            yield Passage(text, (), forms.plain(text, end=False), len(text))


def books(folder: Path) -> Iterator[Passage]:
    """The held-out pieces of the books."""
    paths = sorted((folder / "text" / "books").glob("*.txt.xz"))
    if not paths:
        raise MissingDataError(folder / "text" / "books" / "*.txt.xz", "running text", corpora.README)
    for path in paths:
        with corpora.open_text(path, "running text") as file:
            found = splits.pieces(file.read())
        for text in (piece.strip() for piece in found if splits.split_residue(piece) == splits.DEV):
            yield Passage(text, (), forms.plain(text, end=False), len(text))


def dialogues(folder: Path) -> Iterator[Passage]:
    """The utterances of SGD dev, whole turns."""
    for where, line in corpora.json_lines(folder / "dialogue" / "sgd_dev.jsonl.xz", "dialogues"):
        turns = [
            Turn(corpora.field(where, turn, "s", str), corpora.field(where, turn, "t", str))
            for turn in corpora.field(where, line, "turns", list)
        ]
        for part in _filled(turns, lambda turn: len(turn.text)):
            text = "\n".join(f"{'User' if turn.speaker == 'u' else 'Assistant'}: {turn.text}" for turn in part)
            n_chars = sum(len(turn.text) for turn in part)
            yield Passage(text, forms.dialogue(DAY, ()), forms.dialogue("", part), n_chars)


def _filled(items: Iterable[T], size: Callable[[T], int]) -> Iterator[list[T]]:
    """Runs of items of at most MAX_CHARS together, at least one each; a short rest is left out."""
    run: list[T] = []
    used = 0
    for item in items:
        if run and used + size(item) > MAX_CHARS:
            yield run
            run, used = [], 0
        run.append(item)
        used += size(item)
    if used >= MAX_CHARS // 2:
        yield run


def read(model: Model, row: Row) -> Prediction:
    """The bits that a passage costs, under `scores`.  Raises ContextError."""
    passage, tokenizer = row.context, model.tokenizer
    context = start_ids(tokenizer)
    if speaks_rows(model) and passage.before:
        context, ids = forms.encode(passage.before, tokenizer), forms.encode(passage.row, tokenizer)
    else:
        ids = tokenizer.encode(passage.text, add_bos=False)
    if not context:
        context, ids = ids[:1], ids[1:]
    nats = float(losses_after(lower_of(model), context, [ids])[0].sum())
    return Prediction(row.id, "", n_tokens=len(ids), scores={"bits": nats / math.log(2)})


def score(rows: Sequence[Row], predictions: Sequence[Prediction]) -> list[Figure]:
    """Bits per character of each text; the bootstrap draws passages.  What did not fit the context does not count."""
    figures = []
    for kind in TEXTS:
        pairs = zip(rows, predictions, strict=True)
        counts = [(p.scores["bits"], row.context.n_chars) for row, p in pairs if row.kind == kind and p.scores]
        interval = bootstrap(np.array(counts).reshape(-1, 2), ratio)
        figures.append(Figure(f"bits per character, {kind}", interval, unit=""))
    return figures


# ---------------------------------------------------------------- the baselines


def packed(rows: Sequence[Row]) -> list[Prediction]:
    """What xz makes of each text, all its passages in one file: the bits are spread over them by length."""
    bits: dict[str, float] = {}
    for kind in {row.kind for row in rows}:
        mine = [row for row in rows if row.kind == kind]
        size = 8 * len(lzma.compress("\n".join(row.text for row in mine).encode(), preset=9 | lzma.PRESET_EXTREME))
        n_chars = sum(row.context.n_chars for row in mine)
        bits |= {row.id: size * row.context.n_chars / n_chars for row in mine}
    return [Prediction(row.id, "", scores={"bits": bits[row.id]}) for row in rows]


def has_reference(folder: Path) -> bool:
    """Whether stories260K can stand beside the stories."""
    return (folder / _WEIGHTS).is_file()


def reference(rows: Sequence[Row], folder: Path) -> list[Prediction]:
    """stories260K, llama2.c's smallest, on the stories; none where the folder lacks it."""
    from nearfar.importers import import_model
    from nearfar.llm import LLM

    if not has_reference(folder):
        return []
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / f"{REFERENCE}.gguf"
        import_model(folder / _WEIGHTS, path)
        with LLM.open(path, cache="off") as llm:
            return [read(llm, row) for row in rows if row.kind == STORIES]


def floor(rows: Sequence[Row], folder: Path) -> list[Prediction]:
    """stories260K on the stories where it is there, xz on the rest."""
    known = {p.id: p for p in reference(rows, folder)}
    return [known.get(p.id, p) for p in packed(rows)]


def packed_note(rows: Sequence[Row]) -> list[str]:
    """xz beside all, for the stories have another baseline."""
    shares = ", ".join(
        f"{f.metric.split(', ')[1]} {f.interval.value:.2f}" for f in score(rows, packed(rows)) if f.interval.n
    )
    return [f"xz -9e on the same passages in one file: {shares} bits per character"]
