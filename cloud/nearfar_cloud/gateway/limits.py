"""Who may ask, and how much: keys, their quotas, and what the whole server holds at a time.

    {"keys": [{"tenant": "alice", "sha256": "<hex digest of the key>", "requests_per_minute": 60,
               "tokens_per_minute": 20000, "concurrent": 8, "priority": 0, "metrics": false,
               "sessions": 4, "session_positions": 8192, "session_bytes": 33554432}]}

The file holds digests, so it gives no key away.  A limit that is left out does not exist.  Limits are the tenant's: all
its keys share them.  Tokens are counted when a request comes, prompt and the most that may be answered; what was not
used is given back at its end.  Sessions are answers of devices that ask (contexts.py): each counts as a request, and
the positions that are computed for them as tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nearfar.errors import FileError
from nearfar_cloud.gateway.fields import Fields
from nearfar_cloud.gateway.refusal import Refusal

MOST = 1 << 40
MAX_PRIORITY = 100


@dataclass(frozen=True, slots=True)
class Key:
    """A tenant and what it may do; None: as much as it likes."""

    tenant: str = ""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent: int | None = None  # sequences at a time
    priority: int = MAX_PRIORITY  # the highest that it may ask for
    metrics: bool = True  # may read /metrics
    sessions: int | None = None  # of devices, at a time, and what they hold together
    session_positions: int | None = None
    session_bytes: int | None = None  # packed rows


class Keys:
    """Keys by digest.  Without a file there is one tenant, who needs no key."""

    def __init__(self, keys: dict[str, Key] | None = None) -> None:
        self._keys = keys

    @classmethod
    def read(cls, path: str | Path) -> Keys:
        """Raises FileError with the entry at fault."""
        try:
            top = Fields(json.loads(Path(path).read_bytes()))
            keys: dict[str, Key] = {}
            of_tenant: dict[str, Key] = {}
            for i, item in enumerate(top.items("keys", 1_000_000) or []):
                digest, key = _entry(Fields(item, f"keys[{i}]"))
                if digest in keys:
                    raise FileError(f"{path}: keys[{i}]: its sha256 stands there twice")
                if of_tenant.setdefault(key.tenant, key) != key:
                    raise FileError(f"{path}: keys[{i}]: the same tenant has other limits in another entry")
                keys[digest] = key
            top.done()
        except OSError as error:
            raise FileError(f"{path}: {error.strerror or error}; expected a file of keys") from None
        except (ValueError, RecursionError) as error:
            raise FileError(f"{path}: not JSON: {error}") from None
        except Refusal as refusal:
            raise FileError(f"{path}: {refusal.message}") from None
        if not keys:
            raise FileError(f"{path}: expected at least one key in {{'keys': [...]}}")
        return cls(keys)

    def of(self, tenant: str) -> Key:
        """What a device may do whose certificate says that name: as a tenant of that name, or as much as it likes."""
        named = (key for key in (self._keys or {}).values() if key.tenant == tenant)
        return next(named, Key(tenant, metrics=False))

    def find(self, authorization: str | None) -> Key:
        """The key of an Authorization header.  Raises Refusal (401)."""
        if self._keys is None:
            return Key()
        kind, _, secret = (authorization or "").partition(" ")
        if kind.lower() == "bearer" and secret.strip():
            digest = hashlib.sha256(secret.strip().encode("utf-8", "replace")).hexdigest()
            if digest in self._keys:  # a digest tells nothing about the others, however long the look-up takes
                return self._keys[digest]
        raise Refusal(401, "invalid_api_key", "expected the header Authorization: Bearer KEY with a key of this server")


def _entry(f: Fields) -> tuple[str, Key]:
    digest = f.needed("sha256", 64).lower()
    if not re.fullmatch("[0-9a-f]{64}", digest):
        raise f.refuse("sha256", "64 hexadecimal digits")
    key = Key(
        tenant=f.needed("tenant", 200),
        requests_per_minute=f.whole("requests_per_minute", 1, MOST),
        tokens_per_minute=f.whole("tokens_per_minute", 1, MOST),
        concurrent=f.whole("concurrent", 1, MOST),
        priority=f.whole("priority", -MAX_PRIORITY, MAX_PRIORITY, 0) or 0,
        metrics=f.flag("metrics"),
        sessions=f.whole("sessions", 1, MOST),
        session_positions=f.whole("session_positions", 1, MOST),
        session_bytes=f.whole("session_bytes", 1, MOST),
    )
    f.done()
    return digest, key


class Bucket:
    """`per_minute` units a minute, at most a minute's worth at once (a token bucket)."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.size, self.level, self.then = float(per_minute), float(per_minute), now

    def wait_s(self, n: float, now: float) -> float:
        """Seconds until `n` units are there; 0: they are."""
        self.level = min(self.size, self.level + (now - self.then) * self.size / 60)
        self.then = now
        return max(0.0, n - self.level) * 60 / self.size

    def take(self, n: float) -> None:
        self.level = min(self.size, self.level - n)


class Tenant:
    """What a tenant has used."""

    def __init__(self, key: Key, now: float) -> None:
        self.requests = None if key.requests_per_minute is None else Bucket(key.requests_per_minute, now)
        self.tokens = None if key.tokens_per_minute is None else Bucket(key.tokens_per_minute, now)
        self.n_running = 0


@dataclass(slots=True)
class Ticket:
    """A request that was let in; `close` it once with the tokens that it used."""

    tenant: Tenant
    n_seqs: int
    n_tokens: int
    is_open: bool = True


class Limits:
    """What is under way.  At most `max_queued` sequences and `max_tokens` of their tokens at a time.

    `tokens_per_s`: how fast work gets done, as measured; what clients are told to wait for depends on it.
    """

    def __init__(
        self,
        max_queued: int = 1024,
        max_tokens: int = 1 << 22,
        tokens_per_s: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_queued, self.max_tokens = max_queued, max_tokens
        self.tokens_per_s, self.clock = tokens_per_s, clock
        self.n_seqs = self.n_tokens = 0
        self._tenants: dict[str, Tenant] = {}

    def check(self) -> None:
        """Before a body is looked at.  Raises Refusal (503) while the server is full."""
        if self.n_seqs >= self.max_queued:
            raise self._full(f"{self.n_seqs} sequences are under way, the most that this server takes")

    def admit(self, key: Key, n_seqs: int, n_tokens: int) -> Ticket:
        """Let a request in.  Raises Refusal: 503 where the server is full, 429 where the key's own limits say no."""
        if self.n_seqs + n_seqs > self.max_queued:
            raise self._full(f"{self.n_seqs} sequences are under way, this server takes {self.max_queued}")
        if self.n_tokens + n_tokens > self.max_tokens and self.n_seqs:
            raise self._full(f"{self.n_tokens} tokens are under way, this server takes {self.max_tokens}")
        now, tenant = self.clock(), self._tenant(key)
        if key.concurrent is not None and tenant.n_running + n_seqs > key.concurrent:
            raise _over(f"{tenant.n_running} answers are under way, this key has {key.concurrent}", self._drain_s())
        for bucket, n, what in ((tenant.requests, 1, "requests"), (tenant.tokens, n_tokens, "tokens")):
            if bucket is None:
                continue
            if n > bucket.size:
                raise _over(
                    f"{n} {what} asked for at once, this key has {bucket.size:.0f} a minute: ask for less", None
                )
            if wait := bucket.wait_s(n, now):
                raise _over(f"this key has {bucket.size:.0f} {what} a minute", wait)
        for bucket, n in ((tenant.requests, 1), (tenant.tokens, n_tokens)):
            if bucket is not None:
                bucket.take(n)
        tenant.n_running += n_seqs
        self.n_seqs += n_seqs
        self.n_tokens += n_tokens
        return Ticket(tenant, n_seqs, n_tokens)

    def close(self, ticket: Ticket, used: int) -> None:
        """The request has ended; `used` of its tokens were computed."""
        if not ticket.is_open:
            return
        ticket.is_open = False
        self.n_seqs -= ticket.n_seqs
        self.n_tokens -= ticket.n_tokens
        ticket.tenant.n_running -= ticket.n_seqs
        if ticket.tenant.tokens is not None:
            ticket.tenant.tokens.take(used - ticket.n_tokens)

    # ------------------------------------------------------------ devices

    def count_request(self, key: Key) -> None:
        """A session that begins.  Raises Refusal (429)."""
        self.check_debt(key)
        requests = self._tenant(key).requests
        if requests is not None:
            if wait := requests.wait_s(1, self.clock()):
                raise _over(f"this key has {requests.size:.0f} requests a minute", wait)
            requests.take(1)

    def check_debt(self, key: Key) -> None:
        """Raises Refusal (429) while the tenant's tokens are used up."""
        tokens = self._tenant(key).tokens
        if tokens is not None and (wait := tokens.wait_s(1, self.clock())):
            raise _over(f"this key has {tokens.size:.0f} tokens a minute", wait)

    def is_in_debt(self, key: Key) -> bool:
        """Whether `check_debt` would refuse."""
        tokens = self._tenant(key).tokens
        return tokens is not None and tokens.wait_s(1, self.clock()) > 0

    def charge(self, key: Key, n_tokens: int) -> None:
        """Positions that were computed; what is too much delays the next ones."""
        tokens = self._tenant(key).tokens
        if tokens is not None:
            tokens.take(n_tokens)

    def _tenant(self, key: Key) -> Tenant:
        return self._tenants.setdefault(key.tenant, Tenant(key, self.clock()))

    def _full(self, message: str) -> Refusal:
        return Refusal(503, "overloaded", message, retry_after_s=self._drain_s())

    def _drain_s(self) -> float:
        """How long half of what is under way may take, as fast as work got done so far; 1..60 s."""
        speed = self.tokens_per_s()
        return min(60.0, max(1.0, self.n_tokens / 2 / speed)) if speed > 0 else 1.0


def _over(message: str, wait_s: float | None) -> Refusal:
    return Refusal(429, "rate_limit_exceeded", message, retry_after_s=wait_s)
