"""The far side of a world: the network, a session, and somebody who holds its rows and decides."""

from __future__ import annotations

import random
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nearfar.wire.messages import Ask, Down, Need, Open, Up
from nearfar.wire.session import (
    KEPT_VERDICTS,
    MAX_OPEN_ASKS,
    Append,
    Decide,
    Effect,
    End,
    Forget,
    Reply,
    UpperSession,
)
from tests.sdk.world_oracle import Unsound, rows_of, token_of

if TYPE_CHECKING:
    from tests.sdk.ledger_world import World


@dataclass(slots=True, eq=False)
class Stream:
    """One connection: in order, both ways, until it breaks."""

    up: deque[Up] = field(default_factory=deque)
    down: deque[Down] = field(default_factory=deque)
    is_dead: bool = False  # nothing that is sent now arrives, and the device has not noticed


class Network:
    def __init__(self) -> None:
        self.stream: Stream | None = None  # None: the device knows that it has no link
        self.late: list[Stream] = []

    def connect(self, opening: Open) -> None:
        self.stream = Stream(deque([opening]))

    def send(self, message: Up) -> None:
        if self.stream is not None and not self.stream.is_dead:
            self.stream.up.append(message)

    @property
    def n_under_way(self) -> int:
        return 0 if self.stream is None else len(self.stream.up) + len(self.stream.down)

    def die(self, rng: random.Random, is_late: bool) -> None:
        """The stream breaks: a beginning of what is under way may arrive some day."""
        stream = self.stream
        if stream is None or stream.is_dead:
            return
        if is_late:
            up, down = (rng.choice((n, rng.randint(0, n))) for n in (len(stream.up), len(stream.down)))
            late = Stream(deque(list(stream.up)[:up]), deque(list(stream.down)[: min(down, 20)]))
            self.late = [*self.late[-2:], late]  # what is too old has been forgotten on the way
        stream.up.clear()
        stream.down.clear()
        stream.is_dead = True


class Server:
    """A session, and somebody who holds its rows and decides."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.session: UpperSession | None = None
        self.rows: list[bytes] = []  # what the upper layers have, by ids too
        self.ids: list[int] = []
        self.todo: deque[Decide] = deque()
        self.link: Stream | None = None  # of the newest Open
        self.epoch = 0
        self.is_evicted = False  # since the newest Open
        self.decided: Counter[tuple[int, int, int, int]] = Counter()
        self.refused = (0, 0, 1 << 32)  # life, generation and position of the last draft that was
        self.life = 0  # counts what makes a second decision of the same ask right

    def opened(self, message: Open, stream: Stream | None) -> None:
        if self.session is None:
            s = self.world.s
            row_bytes, most = (0 if s.by_ids else 8), s.n_prompt + s.n_tokens + 200
            self.session = UpperSession(message, row_bytes, most, s.n_vocab, max_run=100, epoch=self.epoch)
        self.link, self.is_evicted = stream, False
        self.on(message)

    def on(self, message: Up) -> None:
        if self.session is not None:
            self._do(self.session.on(message))

    def compute(self) -> None:
        """One decision."""
        assert self.session is not None
        todo = self.todo.popleft()
        a, s = todo.ask, self.world.s
        if a.pos >= len(self.rows):
            raise Unsound(f"a decision behind row {a.pos} of {len(self.rows)}")
        self.decided[self.life, a.gen, a.req, a.verify_from] += 1
        if self.decided[self.life, a.gen, a.req, a.verify_from] > 1 and not s.is_late:
            raise Unsound(f"ask {a.req} from row {a.verify_from} is decided twice")
        for n_accept in range(a.pos - a.verify_from + 1):
            token = token_of(self.rows[a.verify_from + n_accept], s.n_vocab)
            if n_accept == len(todo.draft) or token != todo.draft[n_accept]:
                break
        behind = a.verify_from + 1 + n_accept
        if n_accept < a.pos - a.verify_from or (s.by_ids and self.ids[behind : behind + 1] not in ([], [token])):
            self.refused = self.life, a.gen, behind
        if a.run > 1:  # it goes on by itself, unless the text ends here
            self.todo.appendleft(Decide(Ask(a.req, a.gen, a.pos + 1, a.pos + 1, (), a.run - 1), ()))
            self._append((), (token,))
        self._do(self.session.decided(a.req, n_accept, token))
        if a.run > 1 and token < s.n_stops:
            self.todo.clear()
            self._forget(a.pos + 1)

    def fail(self) -> None:
        """Whoever computes cannot."""
        if self.session is not None and self.todo:
            self.life += 1
            self._do(self.session.failed(self.todo.popleft().ask.req, "out of luck"))
            self.todo.clear()

    def evict(self) -> None:
        if self.session is not None:
            self.life += 1
            self.is_evicted = True
            self._do(self.session.evict())

    def restart(self) -> None:
        """Another process: nothing is left."""
        self.session, self.link = None, None
        self.epoch += 1
        self.life += 1
        self.todo.clear()
        self._forget(0)

    def _do(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Reply(message):
                    self._check_reply(message)
                    if self.link is not None and not self.link.is_dead:
                        self.link.down.append(message)
                case Append(pos0, rows, ids):
                    if pos0 != len(self.rows):
                        raise Unsound(f"positions from {pos0} on are appended to {len(self.rows)}")
                    self._append(rows, ids)
                case Forget(keep):
                    self._forget(keep)
                    self.todo.clear()
                case Decide():
                    self._check_decide(effect)
                    self.todo.append(effect)
                case End():
                    self.restart()
        self._check_memory()

    def _append(self, rows: tuple[bytes, ...], ids: tuple[int, ...]) -> None:
        self.rows += rows
        self.rows += rows_of(ids, self.rows[-1] if self.rows else b"")
        self.ids += ids

    def _forget(self, keep: int) -> None:
        del self.rows[keep:], self.ids[keep:]

    def _check_decide(self, d: Decide) -> None:
        """Nobody works on what rests on a refused draft, nor on two asks at once."""
        if self.todo and self.todo[0].ask.req != d.ask.req:
            raise Unsound("two asks are decided at once")
        life, gen, draft = self.refused
        if (life, gen) == (self.life, d.ask.gen) and d.ask.verify_from >= draft:
            raise Unsound(f"row {d.ask.verify_from} is decided, though it rests on the refused draft {draft}")

    def _check_reply(self, message: Down) -> None:
        """In order, and with nothing lost on the way, nothing is ever missing."""
        s = self.world.s
        if isinstance(message, Need) and not (s.is_late or s.is_eager or self.is_evicted):
            raise Unsound(f"rows from {message.from_pos} on are missing: the device did not send them")

    def _check_memory(self) -> None:
        s = self.session
        if s is None:
            return
        most = self.world.s.n_prompt + self.world.s.n_tokens + self.world.s.run + 17
        if len(s.verdicts) > KEPT_VERDICTS or len(s.queue) > MAX_OPEN_ASKS or len(s.hashes) > len(s.crcs):
            raise Unsound(f"the session keeps {len(s.verdicts)} verdicts, {len(s.queue)} asks, {len(s.hashes)} hashes")
        if len(s.crcs) > most or s.absorbed > s.n_rows:
            raise Unsound(f"the session holds {len(s.crcs)} rows, {s.absorbed} absorbed, of {most} at most")
