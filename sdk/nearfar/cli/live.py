"""An answer on a terminal while it is made: final text, and dimmed behind it what is not final yet.

The cursor always stands behind the final text, so that erasing what is provisional is erasing to the end of the line.
Only as much of it is shown as fits this line: what has scrolled away could not be taken back.
"""

from __future__ import annotations

import shutil
from typing import TextIO
from unicodedata import combining, east_asian_width

from nearfar.cli.terminal import Paint, printable
from nearfar.llm import TokenEvent

_TAB = 8


class LiveText:
    """Give it every event of `stream(..., provisional=True)`, every retraction, and `close` it before anything else."""

    def __init__(self, paint: Paint, out: TextIO, width: int | None = None) -> None:
        self._paint, self._out = paint, out
        self._width = width or max(20, shutil.get_terminal_size((80, 24)).columns)
        self._column = 0  # of the cursor; `width`: the next character begins a line
        self._n_final = 0
        self._pieces: list[str] = []  # provisional, from `_n_final` on
        self._n_shown = 0  # columns of it

    def on(self, event: TokenEvent) -> None:
        """Show a token, final or not."""
        if event.state == "provisional":
            self._pieces.append(event.text)
            self._draw("")
            return
        self._pieces = self._pieces[1:]
        self._n_final += 1
        for c in printable(event.text):
            self._column = _behind(c, self._column, self._width)
        self._draw(self._paint.token(event))

    def retract(self, index: int) -> None:
        """What stands at `index` and behind it is void."""
        del self._pieces[max(0, index - self._n_final) :]
        self._draw("")

    def close(self) -> None:
        """Nothing provisional is shown any more."""
        self._pieces = []
        self._draw("")

    def say(self, words: str) -> None:
        """Words between the tokens."""
        pieces, self._pieces = self._pieces, []
        self._draw(self._paint.dim(words))
        for c in words:
            self._column = _behind(c, self._column, self._width)
        self._pieces = pieces
        self._draw("")

    def _draw(self, final: str) -> None:
        """Write `final`, which `_column` has gone behind already or will, and the provisional text."""
        erase = "\x1b[K" if self._n_shown else ""
        shown, self._n_shown = self._fitting()
        back = f"\x1b[{self._n_shown}D" if self._n_shown else ""
        self._out.write(f"{erase}{final}{self._paint.dim(shown)}{back}")
        self._out.flush()

    def _fitting(self) -> tuple[str, int]:
        """As much of the provisional text as the line has room for, one column short of its end; its columns."""
        shown, column = "", self._column
        for c in printable("".join(self._pieces)):
            if c in "\n\t" or column + _columns(c) >= self._width:
                break
            shown, column = shown + c, column + _columns(c)
        return shown, column - self._column


def _columns(c: str) -> int:
    if combining(c):
        return 0
    return 2 if east_asian_width(c) in "WF" else 1


def _behind(c: str, column: int, width: int) -> int:
    """Where the cursor stands after a character."""
    if c == "\n":
        return 0
    if c == "\t":
        return min(width - 1, column - column % _TAB + _TAB)
    n = _columns(c)
    return column + n if column + n <= width else n
