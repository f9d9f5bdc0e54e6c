"""How well a model foretells a text, and whether a rounding that is near and not exact may stand in for it.

Perplexity is exp of the mean -log p(token | tokens before it), over windows of the text that start afresh.
"""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import ContextError, FileError, UsageError

if TYPE_CHECKING:
    from nearfar.lower import Lower
    from nearfar.tokenizer import Tokenizer

CHUNK = 64  # rows whose logits are held at once
WINDOW = 256  # tokens that see one another
MAX_LUT_RISE = 0.005  # of perplexity: a model for which lookups cost more than this runs without them


@dataclass(frozen=True, slots=True)
class LutGate:
    """Perplexity of one text with the exact products and by lookup."""

    n_tokens: int
    exact: float
    fast: float

    @property
    def rise(self) -> float:
        """Relative: 0.01 is one percent worse."""
        return self.fast / self.exact - 1

    @property
    def passed(self) -> bool:
        return self.rise < MAX_LUT_RISE


def read_text(path: Path, n_chars: int | None = None) -> str:
    """The first characters of a text file; `.xz` is unpacked."""
    try:
        with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as file:
            return file.read(-1 if n_chars is None else n_chars)
    except (OSError, UnicodeDecodeError, lzma.LZMAError) as error:
        raise FileError(f"{path}: {error}; expected a text in UTF-8, plain or as .xz") from None


def start_ids(tokenizer: Tokenizer) -> list[int]:
    """What stands before a text: the model's first token, else the one that ends a text, as between documents."""
    start = tokenizer.bos_id if tokenizer.add_bos else tokenizer.eos_id
    return [] if start is None else [start]


def losses_after(lower: Lower, context: Sequence[int], options: Sequence[Sequence[int]]) -> list[NDArray[np.float64]]:
    """-log p of every token of each option, f64 [len(option)], after `context`, which is run once.

    Raises UsageError for an empty context or option, ContextError beyond the positions the model was trained for.
    """
    if not context or not all(options):
        raise UsageError("a likelihood needs at least one token before the text and one of it")
    longest, last = len(context) + max(map(len, options)), lower.config.layers[1]
    if longest > lower.config.n_ctx:
        raise ContextError(f"{longest} tokens; the model was trained for {lower.config.n_ctx}")
    kv = lower.new_kv(longest, "f32")
    before = lower.forward(lower.embed(np.asarray(context, np.int32)), kv, 0, last)[-1:]  # [1, D]
    found = []
    for ids in options:
        rows = before
        if len(ids) > 1:
            inner = lower.forward(lower.embed(np.asarray(ids[:-1], np.int32)), kv, 0, last)
            rows = np.concatenate([before, inner])  # [T, D]
            kv.truncate(len(context))
        found.append(_losses(lower, rows, np.asarray(ids)))
    return found


def _losses(lower: Lower, rows: NDArray[np.float32], ids: NDArray[Any]) -> NDArray[np.float64]:
    """rows [T, D], ids [T] -> -log p of each id where its row foretells it, f64 [T]."""
    losses = []
    for start in range(0, len(ids), CHUNK):
        part = slice(start, start + CHUNK)
        z = lower.logits(np.ascontiguousarray(rows[part]), lower.config.last_head).astype(np.float64)  # [T, V]
        top = z.max(axis=-1)
        log_sum = top + np.log(np.exp(z - top[:, None]).sum(axis=-1))
        losses.append(log_sum - z[np.arange(len(z)), ids[part]])
    return np.concatenate(losses)


def token_losses(lower: Lower, ids: NDArray[np.int32], window: int = WINDOW) -> NDArray[np.float64]:
    """ids i32 [T] -> -log p of each token that has one before it in its window, f64."""
    if window < 2 or len(ids) < 2:
        raise UsageError(f"{len(ids)} tokens in windows of {window}: expected 2 or more of both")
    last, losses = lower.config.layers[1], []
    for start in range(0, len(ids) - 1, window):
        part = ids[start : start + window]
        h = lower.forward(lower.embed(part), lower.new_kv(len(part), "f32"), 0, last)
        losses.append(_losses(lower, h[:-1], part[1:]))
    return np.concatenate(losses)


def perplexity(lower: Lower, ids: NDArray[np.int32], window: int = WINDOW) -> float:
    return float(np.exp(token_losses(lower, ids, window).mean()))


def text_ids(tokenizer: Tokenizer, text: str, n_tokens: int | None = None) -> NDArray[np.int32]:
    """The first tokens of a text, i32 [T]."""
    return np.array(tokenizer.encode(text)[:n_tokens], np.int32)


def lut_gate(exact: Lower, fast: Lower, ids: NDArray[np.int32]) -> LutGate:
    """One model twice, without and with lookups, on the same tokens."""
    return LutGate(len(ids), perplexity(exact, ids), perplexity(fast, ids))
