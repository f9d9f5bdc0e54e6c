"""The questions to a policy, and the answers that change nothing: a policy overrides those that it cares for.

`compose` asks a chain of them.  All but `observe` are functions of the view and of what `observe` has told: planning
changes no policy.
"""

from __future__ import annotations

from collections.abc import Sequence

from nearfar_cloud.scheduling.view import EngineView
from nearfar_cloud.types import Seq, Served, Work


class Policy:
    """Base of all policies."""

    def order(self, seqs: Sequence[Seq], view: EngineView) -> Sequence[Seq]:
        """Who matters more, which decides about memory: who stands behind gives way to who stands before.

        A stable sort, so that policies earlier in the chain weigh less.
        """
        return seqs

    def rows(self, seqs: Sequence[Seq], view: EngineView) -> Sequence[Seq]:
        """Who gets rows first: as in `order`, unless a policy tells the two apart.  A stable sort."""
        return self.order(seqs, view)

    def admit(self, s: Seq, view: EngineView) -> bool:
        """Whether a waiting sequence may hold memory now; all policies must agree."""
        return True

    def budget(self, view: EngineView) -> int | None:
        """Rows of the whole step, each through all layers; None: no opinion.  The smallest counts."""
        return None

    def shape(self, work: Work, s: Seq, left: int, view: EngineView) -> Work | None:
        """What to run of `work` with `left` rows of the budget: the same or less of it, or nothing."""
        return work

    def observe(self, served: Sequence[Served], view: EngineView) -> None:
        """A step has been done; the view is the one after it."""
