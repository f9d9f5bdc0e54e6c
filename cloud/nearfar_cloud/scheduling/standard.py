"""The chain that a server uses unless told otherwise, the least important question first."""

from __future__ import annotations

from collections.abc import Mapping

from nearfar_cloud.scheduling.budget import Arrival, ChunkedPrefill, Priority
from nearfar_cloud.scheduling.fair import FairShare
from nearfar_cloud.scheduling.policy import Policy
from nearfar_cloud.scheduling.urgency import Urgency


def standard(n_rows: int = 256, shares: Mapping[str, float] | None = None) -> tuple[Policy, ...]:
    """Priority decides, then promises, then what a tenant has had, then arrival; next tokens before prompts."""
    return Arrival(), FairShare(shares), Urgency(), Priority(), ChunkedPrefill(n_rows)
