"""How tokens look: coloured by the head that decided them, or, where colours are off, marked on a line below."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from typing import TextIO

from nearfar import env
from nearfar.llm import Stats, TokenEvent
from nearfar.sequence import SharedStats

RESET, BOLD, DIM, UNDERLINE = "\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[4m"
_EXIT_COLOURS = ("\x1b[32m", "\x1b[36m", "\x1b[34m", "\x1b[35m")  # green first: the earliest exit
_FULL_COLOUR = "\x1b[33m"
_UPPER_COLOUR = "\x1b[31m"


class Paint:
    """Colours for the heads of one model.  `exits` are its exit layers, lowest first."""

    def __init__(self, exits: Sequence[int], n_layers: int, on: bool) -> None:
        self.n_layers, self.on = n_layers, on
        colours = [(e, _EXIT_COLOURS[i % len(_EXIT_COLOURS)]) for i, e in enumerate(exits)]
        self._colour = {f"{kind}.{e}": colour for kind in ("exit", "draft") for e, colour in colours}
        self._colour |= {f"verified.{e}": UNDERLINE + colour for e, colour in colours}
        self._colour |= {"verified.full": UNDERLINE + _FULL_COLOUR, "full": _FULL_COLOUR, "upper": _UPPER_COLOUR}

    def token(self, event: TokenEvent) -> str:
        return self.style(printable(event.text), self._colour.get(event.source, ""))

    def style(self, text: str, code: str) -> str:
        return f"{code}{text}{RESET}" if self.on and text else text

    def dim(self, text: str) -> str:
        return self.style(text, DIM)

    def legend(self, sources: Iterable[str]) -> str:
        """`exit 2 · full depth (6 layers)` in their colours."""
        return " · ".join(self.style(self._spelled(s), self._colour[s]) for s in self._colour if s in set(sources))

    def decided(self, stats: Stats) -> str:
        """`exit 2: 5 · exit 4: 9 · full depth: 3 of 17 tokens`"""
        counts = [
            self.style(f"{self._spelled(source)}: {stats.by_source[source]}", colour)
            for source, colour in self._colour.items()
            if stats.by_source.get(source)
        ]
        return f"{' · '.join(counts)} of {stats.n_generated} tokens"

    def _spelled(self, source: str) -> str:
        return f"full depth ({self.n_layers} layers)" if source == "full" else source.replace(".", " ")


def speed(stats: Stats) -> str:
    return f"{stats.tokens_per_s:,.0f} tokens/s · {stats.first_token_ms:.1f} ms to the first token"


def shares(shared: SharedStats, n_tokens: int) -> str:
    """`0.31 asks/token · 12.3 kB up, 0.9 kB down · device 40 ms, link 120 ms, upper 35 ms`"""
    parts = [
        f"{shared.asks / max(1, n_tokens):.2f} asks/token",
        f"{shared.bytes_up / 1000:,.1f} kB up, {shared.bytes_down / 1000:,.1f} kB down",
        f"device {shared.device_ms:,.0f} ms, link {shared.link_ms:,.0f} ms, upper {shared.upper_ms:,.0f} ms",
    ]
    if shared.reopened:
        parts.append(f"link lost {shared.reopened} times, {shared.replayed} rows sent again")
    if shared.audits:
        parts.append(f"{shared.audits} audits, {shared.audit_bytes / 1000:,.1f} kB")
    return " · ".join(parts)


def alarm(shared: SharedStats) -> str:
    """What to do about exits that are sure of what the upper side would not say."""
    return (
        f"the exits are sure too often: {100 * shared.disagreement:.1f} % of what they were sure of is not the upper "
        "side's, more than calibrated; `nearfar calibrate --upper` chooses thresholds for this pair"
    )


def marks(events: Iterable[TokenEvent]) -> tuple[str, str]:
    """The text and, under each token's first character, its exit's layer or f for full depth.

    With drafts the layer is that of the exit that had foreseen the token; u is the upper side.

    A token without text of its own (the middle of a character, a control token) has no column and no mark.
    """
    text, below = "", ""
    for event in events:
        shown = printable(event.text).replace("\n", "⏎")
        mark = event.source.rpartition(".")[2].replace("full", "f").replace("upper", "u")
        text += shown
        below += mark[: len(shown)].ljust(len(shown), "·")
    return text, below


def print_marks(events: Sequence[TokenEvent], out: TextIO, *, text_is_shown: bool) -> None:
    """The line of marks; with the text again, piece by piece, where it does not fit one line of the terminal."""
    text, below = marks(events)
    width = max(20, shutil.get_terminal_size((120, 24)).columns)
    if len(text) <= width and text_is_shown:
        print(below, file=out)
        return
    for start in range(0, len(text), width):
        print(text[start : start + width], below[start : start + width], sep="\n", file=out)


def printable(text: str) -> str:
    """Model text without control characters (an escape sequence could repaint the terminal); newlines and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def colours_wanted(out: TextIO) -> bool:
    """Only for a person: a terminal that is not dumb, and no NO_COLOR (no-color.org)."""
    return out.isatty() and not env.no_color() and os.environ.get("TERM") != "dumb"
