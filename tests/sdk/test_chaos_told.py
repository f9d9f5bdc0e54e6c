"""What the suite holds against a device: each way to break its word is noticed, and said without a token."""

from __future__ import annotations

from typing import Any

import pytest

from nearfar.chaos.told import Told

COUNTS = {"asks": 3}


def tell(*lines: dict[str, Any]) -> Told:
    told = Told()
    for line in lines:
        told.hear(line)
    return told


def token(index: int, id_: int, source: str = "upper", kept: int | None = 99) -> dict[str, Any]:
    return {"index": index, "id": id_, "source": source, "kept": kept}


def test_an_answer_that_is_taken_up_from_its_journal_is_one_answer() -> None:
    begun = [{"begin": 0}, token(0, 11), token(1, 12)]
    again = [{"begin": 3}, token(0, 11, "journal"), token(1, 12, "journal"), token(2, 13, "journal"), token(3, 14)]
    told = tell(*begun, *again, {"end": COUNTS, "journal": [11, 12, 13, 14, 15]})
    told.compare([11, 12, 13, 14])
    assert (told.ids, told.wrong, told.end, told.n_begun) == ([11, 12, 13, 14], [], COUNTS, 2)


def refused(why: str = "no (ours 0a0b0c0d0e0f…, theirs ba98765432f0…)", kept: int = 99) -> dict[str, Any]:
    return {"refused": why, "kept": kept}


def test_who_refuses_other_weights_and_goes_on_later_has_kept_its_word() -> None:
    again = [{"begin": 1}, token(0, 11, "journal"), token(1, 12), {"end": COUNTS, "journal": [11, 12]}]
    told = tell({"begin": 0}, token(0, 11), refused())
    assert not told.is_over
    for line in again:
        told.hear(line)
    told.compare([11, 12])
    assert (told.ids, told.wrong, told.n_refused) == ([11, 12], [], 1)


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        ([token(1, 11)], "index 1 was told where 0 was due"),
        ([token(0, 11), token(0, 11)], "index 0 was told where 1 was due"),
        ([token(0, 11, kept=0)], "before it stood in the journal"),
        ([token(0, 11), {"begin": 0}], "1 tokens were told and 0 stand in the journal"),
        ([token(0, 11), {"begin": 1}, token(0, 12, "journal")], "told again as another one"),
        ([token(0, 11), {"begin": 1}, token(0, 11, "upper")], "not out of the journal"),
        ([token(0, 11), {"begin": 1}, {"end": COUNTS, "journal": [11]}], "ended at index 0, 1 were told before"),
        ([token(0, 11), {"end": COUNTS, "journal": [12]}], "the journal holds other tokens"),
        ([token(0, 11), refused(kept=0)], "1 tokens were told and 0 stand in the journal"),
        ([refused("no (ours 0a0b0c0d0e0f…, theirs unknown)")], "without the fingerprints of both models"),
        ([refused("no (ours 0a0b0c0d0e0f…, theirs 0a0b0c0d0e0f…)")], "without the fingerprints of both models"),
        ([token(0, 11), {"failed": "Diverged: rows differ"}], "Diverged: rows differ"),
    ],
)
def test_a_broken_word_is_noticed(lines: list[dict[str, Any]], wrong: str) -> None:
    told = tell({"begin": 0}, *lines)
    assert any(wrong in said for said in told.wrong)
    assert all("11" not in said and "12" not in said for said in told.wrong)


@pytest.mark.parametrize("right", [[11, 13], [11], [11, 12, 13]])
def test_other_tokens_than_the_oracles_are_wrong(right: list[int]) -> None:
    told = tell({"begin": 0}, token(0, 11), token(1, 12), {"end": COUNTS, "journal": None})
    told.compare(right)
    assert len(told.wrong) == 1
    assert "is not the oracle's" in told.wrong[0]
