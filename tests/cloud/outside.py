"""Devices in front of the core, and the device's engine that says what each answer has to be."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

from nearfar.halves import split
from nearfar.lower import Lower, open_lower
from nearfar.options import EngineOptions
from nearfar.sampling import Sampling, sample
from nearfar.weights import Weights
from nearfar_cloud.engine import Engine
from nearfar_cloud.model.packed import Packed, pack_gguf
from nearfar_cloud.outside import ArrayRows, Question
from nearfar_cloud.types import Objective, Output, Request
from tests.cloud.serving import SIZES
from tests.tiny import write_tiny

N_VOCAB, MAX_LEN = 320, 512


@cache
def file(arch: str, weight_type: str) -> Path:
    """A random model of four layers, wide enough for blocks of 256."""
    sizes = SIZES | {"d_model": 256, "d_ff": 256}
    return Path(
        write_tiny(Path(mkdtemp()) / f"{arch}-{weight_type}.gguf", arch, weight_type, seed=3, exits=(2,), **sizes)
    )


@cache
def packed(arch: str, weight_type: str) -> Packed:
    return pack_gguf(file(arch, weight_type))


@cache
def upper_half(arch: str, weight_type: str) -> Packed:
    """Layers [2, 4) and the head."""
    with Weights.open(file(arch, weight_type)) as whole:
        return pack_gguf(split(whole, 2, Path(mkdtemp())).upper)


@cache
def lower_of(path: Path) -> Lower:
    """The engine of the device."""
    return open_lower(Weights.open(path), "native", EngineOptions(threads=1))


class Reference:
    """One text in the device's engine at full depth, a row at a time or many: what is decided behind each row.

    Keeps what a text has in common with the one before.
    """

    def __init__(self, path: Path, sampling: Sampling, entry: int) -> None:
        self.lower, self.sampling, self.entry = lower_of(path), sampling, entry
        self.kv = self.lower.new_kv(MAX_LEN)
        self.text: list[int] = []
        d = self.lower.config.d_model
        self.rows, self.last = (
            np.empty((0, d), np.float32),
            np.empty((0, d), np.float32),
        )  # at `entry`; of the last layer
        self.logits = np.empty((0, N_VOCAB), np.float32)

    def read(self, text: Sequence[int]) -> None:
        """Compute all rows of `text`."""
        n = next((i for i, (a, b) in enumerate(zip(self.text, text, strict=False)) if a != b), None)
        n = min(len(self.text), len(text)) if n is None else n
        self.kv.truncate(n)
        new = np.asarray(text[n:], np.int32)
        rows = last = np.empty((0, self.lower.config.d_model), np.float32)
        logits = self.logits[:0]
        if len(new):
            rows = self.lower.embed(new)
            if self.entry:
                rows = self.lower.forward(rows, self.kv, 0, self.entry)
            last = self.lower.forward(rows, self.kv, self.entry, self.lower.config.n_layers)
            logits = self.lower.logits(last)
        self.text = list(text)
        self.rows, self.last = np.vstack([self.rows[:n], rows]), np.vstack([self.last[:n], last])
        self.logits = np.vstack([self.logits[:n], logits])

    def decides(self, row: int) -> int:
        """The token behind a row of the text that was read."""
        return sample(self.logits[row], self.sampling, row + 1, self.text[: row + 1])

    def margin(self, row: int) -> float:
        second, first = np.sort(self.logits[row])[-2:]
        return float(first - second)


class Device:
    """Sends, asks, takes back, by chance; knows what each answer has to be, and checks it."""

    def __init__(self, rng: random.Random, e: Engine, path: Path, *, entry: int, n_asks: int, tenant: str = "") -> None:
        self.rng, self.e, self.entry, self.left = rng, e, entry, n_asks
        sampling = Sampling(temperature=rng.choice((0.0, 0.8)), top_k=rng.choice((0, 20)), seed=rng.randrange(99))
        if not entry and rng.random() < 0.3:
            sampling = Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.2, seed=rng.randrange(99))
        self.reference = Reference(path, sampling, entry)
        # Few beginnings, so that some are those of others.
        prompt = random.Random(f"prompt {rng.randrange(3)}")
        self.text = [prompt.randrange(N_VOCAB) for _ in range(rng.choice((1, 2, 17, 63, 64, 65, 130)))]
        self.early = rng.choice((0.0, 0.0, 0.5, 1.0))  # how often what it sends may run before it asks
        self.stop_ids = frozenset(rng.sample(range(N_VOCAB), 30)) if rng.random() < 0.3 else frozenset()
        n = rng.choice((0, len(self.text)))
        self.reference.read(self.text)
        self.seq = e.submit(
            Request(
                ids=() if entry else tuple(self.text[:n]),
                rows=ArrayRows(self.reference.rows[:n]) if entry and n else None,
                entry=entry,
                outside=True,
                sampling=sampling,
                stop_ids=self.stop_ids,
                objective=Objective(tenant=tenant, priority=rng.randint(0, 1)),
            )
        )
        self.n_sent = n
        self.asked: Question | None = None
        self.n_answers = self.req = 0
        self.next_row = len(self.text) - 1  # rows below it have decided

    def act(self) -> None:
        """Something that a device might do now."""
        self._send()
        if self.asked is not None:
            if self.rng.random() < 0.05:
                self._cut(self.rng.randint(0, self.n_sent))
            return
        if not self.left or self.rng.random() < 0.3:
            return
        self._draft()
        self._send(whole=True)
        if self.rng.random() < 0.2:
            self._cut(self.rng.randint(0, self.n_sent))
        if self.n_sent and self.n_sent == len(self.text):
            self._ask()

    def _draft(self) -> None:
        """Go on with right and wrong tokens."""
        for _ in range(self.rng.choice((0, 1, 1, 4, 9))):
            self.reference.read(self.text)
            right = self.reference.decides(len(self.text) - 1)
            self.text.append(right if self.rng.random() < 0.85 else self.rng.randrange(N_VOCAB))

    def _send(self, *, whole: bool = False) -> None:
        while self.n_sent < len(self.text) and (whole or self.rng.random() < 0.5):
            if self.asked is not None and self.asked.run > 1:
                return
            end = self.rng.randint(self.n_sent + 1, len(self.text))
            if self.entry:
                self.reference.read(self.text)
                rows = ArrayRows(self.reference.rows[self.n_sent : end])
                self.e.append(self.seq, rows=rows, early=self.rng.random() < self.early)
            else:
                self.e.append(self.seq, ids=self.text[self.n_sent : end], early=self.rng.random() < self.early)
            self.n_sent = end

    def _cut(self, keep: int) -> None:
        self.e.cut(self.seq, keep)
        self.asked = None
        self.text, self.n_sent = self.text[: max(1, keep)], keep
        self.next_row = min(self.next_row, len(self.text) - 1)

    def _ask(self) -> None:
        pos = self.rng.choice((self.n_sent - 1, self.rng.randrange(self.n_sent)))
        verify_from = min(pos, self.rng.choice((self.next_row, self.next_row, self.rng.randrange(self.n_sent))))
        verify_from = max(verify_from, pos - 40)
        run = self.rng.randint(2, 6) if pos == self.n_sent - 1 and not self.entry and self.rng.random() < 0.3 else 1
        draft = tuple(self.text[verify_from + 1 : pos + 1]) if self.entry else ()
        self.req += 1
        self.asked = Question(self.req, pos, verify_from, draft, run, wants_hidden=self.rng.random() < 0.3)
        self.expected = (pos, verify_from, run)
        self.e.ask(self.seq, self.asked)

    def hear(self, out: Output) -> None:
        """Check an output; one to what was cut since may still be on its way."""
        assert not out.error, out
        if out.early is not None:
            assert self.early
            assert 0 < out.early.n <= out.early.upto
            return
        answer = out.answer
        assert answer is not None
        if self.asked is None or answer.req != self.req:
            return
        pos, verify_from, run = self.expected
        self.reference.read(self.text[: pos + 1])
        n, decided = 0, self.reference.decides(verify_from)
        while verify_from + n < pos and decided == self.text[verify_from + n + 1]:
            n += 1
            decided = self.reference.decides(verify_from + n)
        behind = verify_from + n
        assert (answer.pos0, answer.n_accept) == (verify_from + 1, n)
        assert out.ids == (*self.text[verify_from + 1 : behind + 1], decided)
        assert answer.margin == self.reference.margin(behind)
        if answer.hidden is not None:
            np.testing.assert_array_equal(answer.hidden, self.reference.last[behind])
        self.n_answers += 1
        self.next_row = behind + 1
        if run > 1 and behind == pos and decided not in self.stop_ids:
            self.text.append(decided)
            self.n_sent += 1
            self.expected = (pos + 1, pos + 1, run - 1)
            return
        self.asked, self.left = None, self.left - 1
        if behind < pos:  # what the protocol does, or, now and then, nothing
            if self.rng.random() < 0.9:
                self._cut(behind + 1)
                self.text.append(decided)
        elif pos == len(self.text) - 1:
            self.text.append(decided)
        self.next_row = min(self.next_row, len(self.text) - 1)
