"""Stop strings in a stream that comes in arbitrary pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nearfar.errors import UsageError
from nearfar.stop import StopMatcher


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    text = "".join(matcher.push(piece) for piece in pieces)
    return text + matcher.flush(), matcher.stopped


def test_text_before_the_stop_string_is_kept_and_the_rest_is_dropped() -> None:
    assert run(["END"], ["abcE", "N", "Dxyz"]) == ("abc", True)


def test_a_beginning_that_turns_out_otherwise_is_shown_after_all() -> None:
    assert run(["END"], ["abcEN", "oDE"]) == ("abcENoDE", False)


def test_the_earliest_of_several_stops_wins() -> None:
    assert run(["world", "lo"], ["hello world"]) == ("hel", True)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UsageError, match="empty"):
        StopMatcher([""])


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_streaming_equals_cutting_the_whole_text(pieces: list[str], stops: list[str]) -> None:
    whole = "".join(pieces)
    found = [at for stop in stops if (at := whole.find(stop)) >= 0]
    text, stopped = run(stops, pieces)
    assert stopped == bool(found)
    if not found:
        assert text == whole
    else:
        assert any(whole.startswith(text + stop) for stop in stops)
