"""Byte-level BPE for nano: trained on train files only, stored beside the run, written into the GGUF by `export`.

Second stop of the training walk.  The pre-tokenizer is llama.cpp's "smollm": every digit alone, then GPT-2's pattern,
so that numbers are copied digit by digit.  Ids 0..6 are the controls of `nearfar.forms`, then 256 bytes, then merges.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.trainers import BpeTrainer

from nearfar import forms
from nearfar.errors import TokenizerError
from nearfar.forms import Part
from nearfar_cloud.training import rows
from nearfar_cloud.training.generators import generators
from nearfar_cloud.training.rows import Row

VOCAB_SIZE = 4096
PRE_TOKENIZER = "smollm"  # the value of tokenizer.ggml.pre
SEED = 7
# How many rows of each source the merges are counted on: near the mix, so that the product's words get tokens.
SAMPLE = {"intents": 60_000, "sgd": 6_000, "books": 800, "stories": 600, "coffee": 500, "persona": 600, "gsm8k": 800}
GENERATED = {"home": 20_000, "journals": 4_000, "skills": 2_000}


class RowTokenizer:
    """Text to ids and back, and rows to ids with the flag "the model writes this"."""

    def __init__(self, text: str) -> None:
        """`text` is the JSON of the `tokenizers` package."""
        try:
            self._bpe = Tokenizer.from_str(text)
        except Exception as error:  # the package raises bare Exception on bad JSON
            raise TokenizerError(f"expected the JSON of a trained tokenizer: {error}") from None
        self.text = text
        self.n_vocab: int = self._bpe.get_vocab_size(with_added_tokens=True)
        self.controls = {name: int(self._bpe.token_to_id(name) or 0) for name in forms.CONTROLS}
        if list(self.controls.values()) != list(range(len(forms.CONTROLS))):
            raise TokenizerError(f"expected the controls as ids 0..{len(forms.CONTROLS) - 1}, found {self.controls}")
        self.pad_id, self.eos_id = self.controls[forms.PAD], self.controls[forms.END]

    @classmethod
    def load(cls, path: Path) -> RowTokenizer:
        """Read what `save` wrote."""
        try:
            return cls(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise TokenizerError(f"{path}: expected a trained tokenizer, {error.strerror}") from None
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from None

    def save(self, path: Path) -> None:
        """Write the JSON of the `tokenizers` package, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(self.text, encoding="utf-8")
        part.replace(path)

    @property
    def sha256(self) -> str:
        """Fingerprint of vocabulary and merges."""
        return blake2b(self.text.encode(), digest_size=32).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; a control token's name in it is text like any other."""
        return list(self._bpe.encode(forms.neutral(text), add_special_tokens=False).ids)

    def encode_parts(self, parts: Iterable[Part]) -> list[int]:
        """Ids of a prompt or row in parts."""
        return [i for p in parts for i in ([self.controls[p.text]] if p.control else self.encode(p.text))]

    def encode_rows(self, rows: Sequence[Row]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids uint16 [n], written bool [n]) of each row, encoded together because that is several times faster."""
        texts = [p.text for row in rows for p in row.parts if not p.control]
        encoded = iter(self._bpe.encode_batch_fast(texts, add_special_tokens=False))
        found = []
        for row in rows:
            ids: list[int] = []
            written: list[bool] = []
            for part in row.parts:
                new = [self.controls[part.text]] if part.control else next(encoded).ids
                ids += new
                written += [part.answer] * len(new)
            found.append((np.array(ids, np.uint16), np.array(written, bool)))
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, controls by their names."""
        return str(self._bpe.decode(list(ids), skip_special_tokens=False))

    def gguf(self) -> tuple[list[str], list[str], list[int]]:
        """(tokens in the byte alphabet, merges "left right", types: 3 control, 1 normal) as GGUF files store them."""
        model = json.loads(self.text)["model"]
        vocab = sorted({**model["vocab"], **self.controls}.items(), key=lambda item: item[1])
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        return [t for t, _ in vocab], merges, [3 if t in self.controls else 1 for t, _ in vocab]


def train(texts: Iterator[str], vocab_size: int = VOCAB_SIZE) -> RowTokenizer:
    """Count pairs in `texts`, merge the most frequent; the same texts in the same order give the same file."""
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = PreTokenizers([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    bpe.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(forms.CONTROLS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer=trainer)
    return RowTokenizer(bpe.to_str())


def training_texts(data: Path, without: Sequence[str] = ()) -> Iterator[str]:
    """The texts that merges are counted on: a fixed sample of every train file and generator."""
    for source, read in rows.FILE_SOURCES.items():
        if source in without or source not in SAMPLE:
            continue
        all_rows = list(read(data, "train", rows.MAX_ROW_CHARS))
        random.Random(f"{SEED} {source}").shuffle(all_rows)
        yield from _texts(all_rows[: SAMPLE[source]])
    for source, generator in generators(data, SEED, [name for name in GENERATED if name not in without]).items():
        yield from _texts(generator.row(i) for i in range(GENERATED[source]))


def _texts(rows: Iterable[Row]) -> Iterator[str]:
    return (part.text for row in rows for part in row.parts if not part.control)


def load_or_train(data: Path, path: Path, vocab_size: int = VOCAB_SIZE, without: Sequence[str] = ()) -> RowTokenizer:
    """The tokenizer at `path`; trained from the data folder and stored there if the file is not there yet."""
    if path.is_file():
        return RowTokenizer.load(path)
    tokenizer = train(training_texts(data, without), vocab_size)
    tokenizer.save(path)
    return tokenizer
