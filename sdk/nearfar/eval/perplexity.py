"""How well a model foretells a text, and whether a rounding that is near and not exact may stand in for it.

Perplexity is exp of the mean -log p(token | tokens before it), over windows of the text that start afresh.
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nearfar.errors import FileError, UsageError

if TYPE_CHECKING:
    from nearfar.lower import Lower
    from nearfar.tokenizer import Tokenizer

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


def token_losses(lower: Lower, ids: NDArray[np.int32], window: int = WINDOW) -> NDArray[np.float64]:
    """ids i32 [T] -> -log p of each token that has one before it in its window, f64."""
    if window < 2 or len(ids) < 2:
        raise UsageError(f"{len(ids)} tokens in windows of {window}: expected 2 or more of both")
    last, losses = lower.config.n_layers, []
    for start in range(0, len(ids) - 1, window):
        part = ids[start : start + window]
        h = lower.forward(lower.embed(part), lower.new_kv(len(part), "f32"), 0, last)
        z = lower.logits(h[:-1]).astype(np.float64)  # [T - 1, V]
        top = z.max(axis=-1)
        log_sum = top + np.log(np.exp(z - top[:, None]).sum(axis=-1))
        losses.append(log_sum - z[np.arange(len(z)), part[1:]])
    return np.concatenate(losses)


def perplexity(lower: Lower, ids: NDArray[np.int32], window: int = WINDOW) -> float:
    return float(np.exp(token_losses(lower, ids, window).mean()))


def text_ids(tokenizer: Tokenizer, text: str, n_tokens: int | None = None) -> NDArray[np.int32]:
    """The first tokens of a text, i32 [T]."""
    return np.array(tokenizer.encode(text)[:n_tokens], np.int32)


def lut_gate(exact: Lower, fast: Lower, ids: NDArray[np.int32]) -> LutGate:
    """One model twice, without and with lookups, on the same tokens."""
    return LutGate(len(ids), perplexity(exact, ids), perplexity(fast, ids))
