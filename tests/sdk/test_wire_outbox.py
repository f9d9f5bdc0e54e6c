"""What waits to leave: order, credit, and what a cut or the end takes back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nearfar.wire.messages import Ask, Close, Commit, Credit, Cut, Ids, Ping, Rows, Up
from nearfar.wire.outbox import Outbox, row_bytes
from nearfar.wire.rtt import RoundTrips


def rows(pos0: int, n_bytes: int, gen: int = 0) -> Rows:
    return Rows(gen, pos0, (bytes(n_bytes),), (0,))


def ask(pos: int, gen: int = 0) -> Ask:
    return Ask(1 + pos, gen, pos, pos)


def drained(box: Outbox, now: float = 0.0) -> list[Up]:
    out = []
    while (message := box.pop(now)) is not None:
        out.append(message)
    return out


def test_messages_leave_in_their_order_and_are_counted() -> None:
    box, sent = Outbox(1000), [rows(0, 10), ask(0), Commit(1)]
    for message in sent:
        box.push(message)
    assert drained(box) == sent
    assert box.n_sent == 3


def test_rows_wait_for_credit_and_what_is_behind_them_waits_with_them() -> None:
    box = Outbox(100)
    for message in (rows(0, 80), rows(1, 80), ask(1)):
        box.push(message)
    assert drained(box) == [rows(0, 80)]
    box.acked(1)
    assert drained(box) == [rows(1, 80), ask(1)]
    assert box.under_way == 80


def test_rows_wait_since_credit_was_missing_until_none_are_left() -> None:
    box = Outbox(100)
    for pos in range(3):
        box.push(rows(pos, 80))
    drained(box, now=1.0)
    drained(box, now=2.0)
    assert box.since == 1.0
    box.acked(1)
    drained(box, now=3.0)
    assert box.since == 1.0  # the last row waits
    box.acked(2)
    drained(box, now=4.0)
    assert box.since is None
    box.push(rows(3, 80))
    drained(box, now=5.0)
    assert box.since == 5.0
    box.on_credit(Credit(0, retry_after_ms=2000), now=6.0)  # the other side wants them to wait
    drained(box, now=6.0)
    assert box.since is None


def test_a_row_larger_than_all_credit_goes_alone() -> None:
    box = Outbox(100)
    box.push(rows(0, 500))
    box.push(rows(1, 1))
    assert drained(box) == [rows(0, 500)]
    box.acked(1)
    assert drained(box) == [rows(1, 1)]


def test_asks_and_cuts_need_no_credit() -> None:
    box = Outbox(10)
    box.push(rows(0, 10))
    drained(box)
    for message in (ask(0), Cut(1, 0), Commit(0)):
        box.push(message)
    assert drained(box) == [Cut(1, 0), Commit(0)]  # the cut took the ask back


def test_no_credit_is_a_pause_of_the_rows_and_of_nothing_else() -> None:
    box = Outbox(100)
    box.on_credit(Credit(0, retry_after_ms=2000), now=5.0)
    box.push(ask(0))
    box.push(rows(1, 10))
    assert drained(box, now=5.5) == [ask(0)]
    assert box.pause_s(5.5) == 1.5
    assert drained(box, now=7.0) == [rows(1, 10)]
    box.on_credit(Credit(0, retry_after_ms=2000), now=8.0)
    box.push(rows(2, 10))
    box.on_credit(Credit(50), now=8.1)
    assert drained(box, now=8.1) == [rows(2, 10)]


def test_a_cut_takes_back_what_it_voids_and_keeps_the_rest() -> None:
    box = Outbox(1000)
    for message in (rows(3, 1), rows(7, 1), ask(7), Ids(0, 9, (1,)), Commit(2), Cut(1, 7), rows(7, 2, gen=1)):
        box.push(message)
    assert drained(box) == [rows(3, 1), Commit(2), Cut(1, 7), rows(7, 2, gen=1)]


def test_the_end_of_an_answer_waits_for_nothing() -> None:
    box = Outbox(10)
    for message in (rows(0, 10), rows(1, 10), Close()):
        box.push(message)
    assert drained(box) == [Close()]


def test_a_ping_passes_rows_that_wait() -> None:
    box = Outbox(10)
    box.push(rows(0, 10))
    drained(box)
    box.push(rows(1, 10))
    box.push(Ping(1))
    assert drained(box) == [Ping(1)]


@given(st.lists(st.one_of(st.integers(1, 60).map(lambda n: ("push", n)), st.just(("ack", 0)))), st.integers(1, 100))
def test_never_more_than_the_credit_is_under_way_and_all_of_it_leaves(
    steps: list[tuple[str, int]], credit: int
) -> None:
    box, out, pushed = Outbox(credit), [], []
    for at, (what, n) in enumerate(steps):
        if what == "push":
            pushed.append(rows(at, n))
            box.push(pushed[-1])
        else:
            box.acked(box.n_sent)
        out += drained(box)
        assert box.under_way <= credit or box.under_way == row_bytes(out[-1])
    while box.waiting:
        box.acked(box.n_sent)
        out += drained(box)
    assert out == pushed


def test_a_deadline_is_three_times_the_usual_reply_and_never_below_four_tenths() -> None:
    trips = RoundTrips()
    assert trips.deadline_s == 0.4
    trips.pings.append(1.0)
    assert trips.deadline_s == 3.0
    trips.asks.extend([0.1, 0.2, 9.0])
    assert trips.deadline_s == 3 * 0.2
    trips.asks.extend([0.05] * 32)
    assert trips.deadline_s == 0.4
