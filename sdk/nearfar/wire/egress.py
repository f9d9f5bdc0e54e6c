"""The one door through which everything leaves for an upper side: what the policy forbids, and an account of the rest.

    text ─> ids or rows ─> queue ─> Egress.out ─> the network

Hidden rows are not privacy: most of the text can be read out of them again (2503.09022).  Private means `local_only`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from nearfar.errors import EgressDenied
from nearfar.wire.messages import Ask, ClientHello, CodecId, Ids, Open, Rows, Up


@dataclass(frozen=True, slots=True)
class Policy:
    """What may leave the device.

    `local_only`: nothing; not even a name is looked up.
    `ids_ok`, `hidden_ok`: token ids, hidden rows.  Drafts are ids: a lossless answer by rows needs both.
    `region`: where the upper side must say that it is.  Empty: anywhere.
    `max_bytes`: of one answer, all its messages together.
    `hosts`: names or addresses that may be dialled; empty: any.
    """

    local_only: bool = False
    ids_ok: bool = True
    hidden_ok: bool = True
    region: str = ""
    max_bytes: int | None = None
    hosts: tuple[str, ...] = ()


@dataclass(slots=True)
class Account:
    """What has left, by receiver and kind of message; it only grows."""

    n_messages: Counter[tuple[str, str]] = field(default_factory=Counter)
    n_bytes: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, to: str, kind: str, n_bytes: int) -> None:
        self.n_messages[to, kind] += 1
        self.n_bytes[to, kind] += n_bytes

    def rows(self) -> list[tuple[str, str, int, int]]:
        """(to whom, kind, messages, bytes) for reports, in the order of their first message."""
        return [(to, kind, n, self.n_bytes[to, kind]) for (to, kind), n in self.n_messages.items()]


@dataclass(slots=True)
class Egress:
    """The door, for one answer.  What it refuses ends the answer: nothing is sent another way instead."""

    policy: Policy
    account: Account = field(default_factory=Account)
    spent: int = 0  # bytes

    def dial(self, host: str) -> None:
        """Before a name is looked up.  Raises EgressDenied."""
        p = self.policy
        if p.local_only:
            raise EgressDenied(f"the policy is local_only: {host} is not dialled; answer without an upper side")
        if p.hosts and host not in p.hosts:
            raise EgressDenied(f"the policy does not name {host}; it names {', '.join(p.hosts)}")

    def settle(self, region: str) -> None:
        """Before any answer: where the other side says that it is.  Raises EgressDenied."""
        if self.policy.region and region != self.policy.region:
            where = repr(region) if region else "nowhere that it says"
            raise EgressDenied(
                f"the upper side is in {where}: the policy allows the region {self.policy.region!r} only"
            )

    def out(self, to: str, message: Up | ClientHello, n_bytes: int) -> None:
        """A message of `n_bytes` is about to leave for `to`.  Raises EgressDenied, and it stays."""
        p = self.policy
        if p.local_only:
            raise EgressDenied("the policy is local_only: nothing leaves this device")
        if not p.ids_ok and _tells_ids(message):
            raise EgressDenied("the policy keeps token ids here (ids_ok=False): send rows, and no drafts beside them")
        if not p.hidden_ok and _tells_rows(message):
            raise EgressDenied("the policy keeps hidden rows here (hidden_ok=False): send ids, or answer alone")
        if p.max_bytes is not None and self.spent + n_bytes > p.max_bytes:
            raise EgressDenied(f"{self.spent + n_bytes} bytes of one answer: the policy allows {p.max_bytes}")
        self.spent += n_bytes
        self.account.add(to, type(message).__name__, n_bytes)


def _tells_ids(message: Up | ClientHello) -> bool:
    """Whether it holds ids, or opens a session that will send some: that is refused before it begins."""
    match message:
        case Open(codec=codec):
            return codec.id == CodecId.IDS
        case Ask(draft=draft):
            return bool(draft)
        case _:
            return isinstance(message, Ids)


def _tells_rows(message: Up | ClientHello) -> bool:
    if isinstance(message, Open):
        return message.codec.id != CodecId.IDS
    return isinstance(message, Rows)
