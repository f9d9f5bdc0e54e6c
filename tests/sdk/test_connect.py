"""Attempts to connect side by side: whoever is not taken is closed, also where nobody waits for them any more."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("grpc", reason="grpcio is not installed (extra [collab])")

from nearfar.wire import connect as side_by_side
from nearfar.wire.address import Address
from nearfar.wire.tls import Credentials


class Attempt:
    """Stands when it is told to; takes a moment to close."""

    def __init__(self) -> None:
        self.stands, self.is_closing, self.is_closed = asyncio.Event(), asyncio.Event(), False

    async def settled(self) -> None:
        await self.stands.wait()

    async def close(self) -> None:
        self.is_closing.set()
        await asyncio.sleep(0.02)
        self.is_closed = True


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Attempt]:
    made: list[Attempt] = []

    class Dialled:
        @staticmethod
        def dial(address: Address, credentials: Credentials) -> Attempt:
            made.append(Attempt())
            return made[-1]

    monkeypatch.setattr(side_by_side, "Connection", Dialled)
    return made


async def begun(attempts: list[Attempt], n: int) -> asyncio.Task[object]:
    """`n` attempts are under way."""
    address = Address.parse("grpc://127.0.0.1:1")
    task: asyncio.Task[object] = asyncio.create_task(side_by_side.connect(address, Credentials(), 60.0, 0.01))
    while len(attempts) < n:
        await asyncio.sleep(0.001)
    return task


def test_the_first_that_stands_is_taken_and_the_others_are_closed(attempts: list[Attempt]) -> None:
    async def run() -> None:
        task = await begun(attempts, 3)
        attempts[1].stands.set()
        assert await task is attempts[1]
        assert [a.is_closed for a in attempts] == [a is not attempts[1] for a in attempts]

    asyncio.run(run())


@pytest.mark.parametrize("is_late", [False, True], ids=["while none stands", "while the others are closed"])
def test_where_nobody_waits_any_more_all_are_closed(attempts: list[Attempt], is_late: bool) -> None:
    async def run() -> None:
        task = await begun(attempts, 3)
        if is_late:
            attempts[1].stands.set()
            await attempts[0].is_closing.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert all(a.is_closed for a in attempts)

    asyncio.run(run())
