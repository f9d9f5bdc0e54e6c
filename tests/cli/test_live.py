"""Provisional text on a terminal, seen by a small terminal."""

from __future__ import annotations

import io
import re
from random import Random

import pytest

from nearfar.cli.live import LiveText
from nearfar.cli.terminal import Paint
from nearfar.llm import TokenEvent

WIDTH = 20


class Screen:
    """Rows of characters; knows colours, `K` and `D`, and wraps when the next character comes, as terminals do."""

    def __init__(self, width: int) -> None:
        self.width, self.rows, self.x = width, [""], 0

    def write(self, text: str) -> None:
        for code, c in re.findall(r"\x1b\[(\d*[mKD])|(.|\n)", text):
            if c:
                self._put(c)
            elif code == "K":
                assert self.x < self.width, "erasing at the edge takes the last character along"
                self.rows[-1] = self.rows[-1][: self.x]
            elif code.endswith("D"):
                self.x -= int(code[:-1])

    def _put(self, c: str) -> None:
        if c == "\n" or self.x == self.width:
            self.rows.append("")
            self.x = 0
        if c != "\n":
            self.rows[-1] = self.rows[-1][: self.x] + c + self.rows[-1][self.x + 1 :]
            self.x += 1


def wrapped(text: str) -> list[str]:
    screen = Screen(WIDTH)
    screen.write(text)
    return screen.rows


def event(index: int, text: str, *, final: bool) -> TokenEvent:
    return TokenEvent(index, 7, text, "verified.2", 0.9, 1.0, state="final" if final else "provisional")


@pytest.mark.parametrize("seed", range(20))
def test_the_screen_ends_with_the_final_text_and_shows_it_all_the_time(seed: int) -> None:
    chance, out = Random(seed), io.StringIO()
    live = LiveText(Paint([2], 4, on=True), out, WIDTH)
    final, ahead = "", 0
    n = 0
    for _ in range(120):
        screen = Screen(WIDTH)
        screen.write(out.getvalue())
        behind = wrapped(final)
        assert screen.rows[: len(behind) - 1] == behind[:-1]
        assert len(screen.rows) == len(behind)
        assert screen.rows[-1][: screen.x] == behind[-1]
        what = chance.choice(("draft", "draft", "draft", "final", "retract", "say"))
        if what == "draft":
            live.on(event(n + ahead, chance.choice(("ab", " c", "\n", "long word ", "")), final=False))
            ahead += 1
        elif what == "final":
            piece = chance.choice(("ab", " c", "\nx", "0123456789", ""))
            final, n, ahead = final + piece, n + 1, max(0, ahead - 1)
            live.on(event(n - 1, piece, final=True))
        elif what == "retract":
            ahead = chance.randint(0, ahead)
            live.retract(n + ahead)
        elif chance.random() < 0.2:
            final += "[late]"
            live.say("[late]")
    live.close()
    screen = Screen(WIDTH)
    screen.write(out.getvalue())
    assert screen.rows == wrapped(final)


def test_provisional_text_is_dimmed_and_replaced() -> None:
    out = io.StringIO()
    live = LiveText(Paint([2], 4, on=True), out, WIDTH)
    live.on(event(0, "one ", final=False))
    live.on(event(1, "tow", final=False))
    assert out.getvalue().endswith("\x1b[2mone tow\x1b[0m\x1b[7D")
    live.retract(1)
    live.on(event(0, "one ", final=True))
    live.on(event(1, "two", final=True))
    screen = Screen(WIDTH)
    screen.write(out.getvalue())
    assert screen.rows == ["one two"]
    assert "\x1b[2mtwo" not in out.getvalue()


def test_wide_characters_take_two_columns() -> None:
    out = io.StringIO()
    live = LiveText(Paint([2], 4, on=True), out, WIDTH)
    live.on(event(0, "日本語" * 4, final=False))
    assert out.getvalue().endswith(f"{('日本語' * 4)[:9]}\x1b[0m\x1b[18D")
