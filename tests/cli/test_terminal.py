"""What a person sees of a token: its colour, or its mark."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from nearfar.cli.answer import notices
from nearfar.cli.terminal import Paint, alarm, colours_wanted, marks, print_marks, printable, shares, speed
from nearfar.llm import Stats, TokenEvent
from nearfar.sequence import Notice, SharedStats

SOURCES = ("exit.2", "full", "exit.4")


def events(*pieces: str) -> list[TokenEvent]:
    return [TokenEvent(i, i, text, SOURCES[i % 3], 0.9, 0.1) for i, text in enumerate(pieces)]


def stats(**by_source: int) -> Stats:
    counts = {name.replace("_", "."): n for name, n in by_source.items()}
    return Stats(9, 0, sum(counts.values()), 2.25, 1234.5, counts)


def test_each_mark_stands_under_the_first_character_of_its_token() -> None:
    assert marks(events('{"', "intent", '":')) == ('{"intent":', "2·f·····4·")


def test_a_token_without_text_has_no_mark() -> None:
    assert marks(events("ab", "", "c")) == ("abc", "2·4")


def test_a_foreseen_token_has_the_mark_of_its_exit() -> None:
    drafts = [TokenEvent(0, 0, "abc", "draft.2", 1, 1), TokenEvent(1, 1, "d", "full", 1, 1)]
    assert marks(drafts) == ("abcd", "2··f")
    assert (
        Paint([2], 6, on=False).decided(stats(draft_2=3, full=1)) == "draft 2: 3 · full depth (6 layers): 1 of 4 tokens"
    )


def test_an_exit_of_two_digits_keeps_the_columns() -> None:
    text, below = marks([TokenEvent(0, 0, "abc", "exit.12", 1, 1), TokenEvent(1, 1, "d", "exit.12", 1, 1)])
    assert (text, below) == ("abcd", "12·1")


def test_marks_that_do_not_fit_the_line_repeat_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    out = io.StringIO()
    print_marks(events("0123456789", "abcdefghij", "xyz"), out, text_is_shown=True)
    assert out.getvalue().splitlines() == ["0123456789abcdefghij", "2·········f·········", "xyz", "4··"]


def test_colours_differ_by_head_and_end_with_the_token() -> None:
    paint = Paint([2, 4], 6, on=True)
    painted = [paint.token(e) for e in events("a", "b", "c")]
    assert len({p.split("m")[0] for p in painted}) == 3
    assert all(p.endswith("\x1b[0m") for p in painted)
    assert Paint([2, 4], 6, on=False).token(events("a")[0]) == "a"


def test_the_count_by_head_adds_up() -> None:
    line = Paint([2, 4], 6, on=False).decided(stats(exit_4=2, full=3, exit_2=5))
    assert line == "exit 2: 5 · exit 4: 2 · full depth (6 layers): 3 of 10 tokens"
    assert speed(stats(full=1)) == "1,234 tokens/s · 2.2 ms to the first token"


def test_model_text_cannot_send_escape_sequences() -> None:
    assert printable("a\x1b[2Jb\r\nc\td") == "a�[2Jb�\nc\td"


def test_colours_are_for_people_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert colours_wanted(Screen())
    assert not colours_wanted(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not colours_wanted(Screen())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colours_wanted(Screen())


def test_each_side_of_a_shared_answer_has_its_colour_and_its_mark() -> None:
    sources = ("exit.2", "verified.2", "verified.full", "upper")
    shared = [TokenEvent(i, i, "ab", source, 0.9, 1) for i, source in enumerate(sources)]
    painted = [Paint([2], 6, on=True).token(event) for event in shared]
    assert len({p.split("ab")[0] for p in painted}) == 4
    assert marks(shared) == ("abababab", "2·2·f·u·")
    counts = Stats(9, 0, 4, 2.0, 100.0, {"verified.2": 3, "upper": 1})
    assert Paint([2], 6, on=False).decided(counts) == "verified 2: 3 · upper: 1 of 4 tokens"


def test_a_shared_answer_says_what_it_took() -> None:
    took = SharedStats(3, 9, 12_345, 678, 40.0, 35.0, 120.4, 9, 7, 2, 0, 0, 0)
    assert shares(took, 10) == ("0.30 asks/token · 12.3 kB up, 0.7 kB down · device 40 ms, link 120 ms, upper 35 ms")
    assert shares(replace(took, reopened=2, replayed=5), 10).endswith("link lost 2 times, 5 rows sent again")


def test_an_alarm_says_what_to_do_and_audits_what_they_took() -> None:
    took = SharedStats(3, 9, 12_345, 678, 40.0, 35.0, 120.4, 9, 7, 2, 0, 0, 0, audits=2, audit_bytes=140)
    assert shares(took, 10).endswith("upper 35 ms · 2 audits, 0.1 kB")
    assert "nearfar calibrate --upper" in alarm(replace(took, alarm=True, disagreement=0.125))
    assert "12.5 %" in alarm(replace(took, alarm=True, disagreement=0.125))


def test_a_person_hears_why_no_token_comes(capsys: pytest.CaptureFixture[str]) -> None:
    say = notices(Paint([], 6, on=False))
    assert say is not None
    for notice in (Notice("waiting", 812), Notice("degraded"), Notice("retract", 4), Notice("back")):
        say(notice)
    assert capsys.readouterr().err == "[the upper side is late: 812 ms][the link is lost][the link is back]"
    assert notices(None) is None
