"""What a lane does when its device refuses the server: the one thing of it that wants no server."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("grpc", reason="grpcio is not installed (extra [collab])")

from nearfar.chaos.lane import Lane
from nearfar.chaos.plan import Task
from nearfar.chaos.schedule import Fault, Schedule

REFUSED = {"refused": "no (ours 0a0b0c0d0e0f…, theirs 1a1b1c1d1e1f…)", "kept": 1}
FIRST = [{"begin": 0}, {"index": 0, "id": 7, "source": "upper", "kept": 1}]
REST = [
    {"begin": 1},
    {"index": 0, "id": 7, "source": "journal", "kept": 1},
    {"index": 1, "id": 8, "source": "upper", "kept": 2},
    {"end": {"asks": 2}, "journal": [7, 8]},
]


class Phone:
    """Says what is written here, and counts what is done to it."""

    def __init__(self, lines: list[dict[str, Any]], last: list[dict[str, Any]] | None = None) -> None:
        self.lines, self.n_asked, self.n_killed = list(lines), 0, 0
        self.last = last or []  # what it had said when it was killed

    def ask(self, task: dict[str, Any]) -> None:
        self.n_asked += 1

    def next(self, timeout_s: float) -> dict[str, Any]:
        return self.lines.pop(0)

    def kill(self) -> list[dict[str, Any]]:
        self.n_killed += 1
        return self.last


class Upper:
    """A server that `n` swaps have begun for; they are over when somebody has waited for it."""

    def __init__(self, n: int) -> None:
        self.victim = SimpleNamespace(n_swaps=n, n_swapped_back=0)

    def wait(self) -> None:
        self.victim.n_swapped_back = self.victim.n_swaps


def lane(phone: Phone, upper: Upper, tmp_path: Path) -> Lane:
    nobody: Any = None
    made: Any = (phone, nobody, upper, nobody, tmp_path / "journal")
    return Lane(*made)


def task(number: int, *faults: Fault) -> Task:
    return Task(number, (1, 2), 2, 0.0, 0, Schedule(0, "token", faults))


@pytest.mark.parametrize("number", [0, 1])
def test_a_device_that_refused_is_asked_again_as_it_is_or_as_a_new_process(number: int, tmp_path: Path) -> None:
    phone = Phone([*FIRST, REFUSED, *REST])
    told = lane(phone, Upper(1), tmp_path).answer(task(number))
    assert (told.ids, told.wrong, told.n_refused) == ([7, 8], [], 1)
    assert (phone.n_asked, phone.n_killed) == (2, number)


def test_a_device_that_refuses_the_right_weights_is_wrong(tmp_path: Path) -> None:
    phone = Phone([*FIRST, REFUSED])
    told = lane(phone, Upper(0), tmp_path).answer(task(0))
    assert told.wrong == ["the device refused the server although nobody had swapped its weights"]


def test_one_swap_is_no_excuse_for_two_refusals(tmp_path: Path) -> None:
    phone = Phone([*FIRST, REFUSED, REST[0], REFUSED])
    told = lane(phone, Upper(1), tmp_path).answer(task(0))
    assert (told.n_refused, len(told.wrong)) == (2, 1)


def test_a_device_that_is_killed_behind_its_last_token_has_answered(tmp_path: Path) -> None:
    """Its journal went with the answer, so nobody can take it up; what was told is compared as ever."""
    last = [{"index": 1, "id": 8, "source": "upper", "kept": 2}]
    phone = Phone(FIRST, last)
    told = lane(phone, Upper(0), tmp_path).answer(task(0, Fault(1, "device")))
    assert (told.ids, told.wrong, phone.n_asked) == ([7, 8], [], 1)
    told.compare([7, 8, 9])
    assert told.wrong == ["token 2 is not the oracle's (2 tokens, the oracle has 3)"]


def test_a_device_that_is_killed_in_the_middle_goes_on_from_its_journal(tmp_path: Path) -> None:
    phone = Phone([*FIRST, *REST])
    one = lane(phone, Upper(0), tmp_path)
    phone.kill = lambda: one.journal.touch() or []  # type: ignore[func-returns-value,method-assign]
    told = one.answer(task(0, Fault(1, "device")))
    assert (told.ids, told.wrong, phone.n_asked) == ([7, 8], [], 2)
