"""An upper side beyond the network, behind the face of `Upper`: remote_link.py is the way of one answer.

RemoteUpper ── addresses, credentials, policy, one network thread ── RemoteLink, one for each answer
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from nearfar.cancel import Cancel
from nearfar.errors import UsageError
from nearfar.remote_link import RemoteLink, Tokens
from nearfar.upper import check_sampling
from nearfar.wire.address import Address
from nearfar.wire.dialler import Dialler
from nearfar.wire.egress import Account, Egress, Policy
from nearfar.wire.loop_thread import LoopThread
from nearfar.wire.messages import ClientHello, Open
from nearfar.wire.rtt import RoundTrips
from nearfar.wire.tls import Credentials

MAX_SESSIONS = 256  # whose tokens are remembered

log = logging.getLogger(__name__)


class RemoteUpper:
    """Dials upper sides, the next one where one fails.  `open` and `close` are for one thread."""

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        hello: ClientHello,
        credentials: Credentials | None = None,
        policy: Policy | None = None,
        where: Literal["edge", "cloud"] = "cloud",
        insecure: bool = False,
    ) -> None:
        """Opens no socket yet.  Raises EgressDenied where the policy forbids it, UsageError for a wrong address.

        `insecure`: to other machines without TLS too, so that everybody on the way can read along.
        """
        policy = policy or Policy()
        self.where, self.account = where, Account()
        addresses = [Address.parse(u) for u in ([url] if isinstance(url, str) else url)]
        if not addresses:
            raise UsageError("no address of an upper side: expected at least one, grpcs://host:port")
        for address in addresses:
            Egress(policy).dial(address.host)
            _check_secure(address, insecure)
        hello = replace(hello, region=policy.region or hello.region)
        self._dialler = Dialler(addresses, credentials or Credentials(), policy, self.account, hello, RoundTrips())
        self._network: LoopThread | None = None
        self._links: list[RemoteLink] = []
        self._tokens: OrderedDict[bytes, Tokens] = OrderedDict()  # by session; one may be taken up by a later link

    def open(self, opening: Open, cancel: Cancel | None = None) -> RemoteLink:
        """A link that has said hello.  Raises UpperError, MismatchError, WireError, EgressDenied, UsageError."""
        check_sampling(opening)
        if self._network is None:
            self._network = LoopThread("nearfar-upper")
        link = RemoteLink(self._network, self._dialler, opening, self._tokens_of(opening.session))
        self._links = [*(other for other in self._links if not other.is_over), link]
        link.start(cancel)
        return link

    def _tokens_of(self, session: bytes) -> Tokens:
        tokens = self._tokens.setdefault(session, {})
        self._tokens.move_to_end(session)
        if len(self._tokens) > MAX_SESSIONS:
            self._tokens.popitem(last=False)
        return tokens

    def close(self) -> None:
        """End all links and connections; what was sent before still leaves."""
        if self._network is None:
            return
        for link in self._links:
            self._network.submit(link.finished()).result()
        self._network.submit(self._dialler.close()).result()
        self._network.close()
        self._network, self._links = None, []


def _check_secure(address: Address, insecure: bool) -> None:
    if address.is_secure or address.is_loopback:
        return
    if not insecure:
        raise UsageError(f"{address}: without TLS only to this machine; expected grpcs://{address.authority}")
    log.warning("%s is spoken to without TLS: everybody on the way can read along", address)
