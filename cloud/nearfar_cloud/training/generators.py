"""The sources without end, by name: requests to the home, requests with intents, journals, skills."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from nearfar_cloud.training.homes import HomeGenerator
from nearfar_cloud.training.intents import IntentGenerator
from nearfar_cloud.training.journals import JournalGenerator
from nearfar_cloud.training.rows import Row
from nearfar_cloud.training.skills import SkillGenerator


class Generator(Protocol):
    """Rows by number."""

    def row(self, i: int) -> Row:
        """The i-th row: a pure function of the generator's seed and i."""


def generators(data: Path, seed: int, names: Sequence[str]) -> dict[str, Generator]:
    """Those of `names` that are generators."""
    made: dict[str, Generator] = {}
    if "intents" in names:
        made["intents"] = IntentGenerator(data, seed)
    if "home" in names:
        made["home"] = HomeGenerator(data, seed)
    if "journals" in names:
        made["journals"] = JournalGenerator(data, seed)
    if "skills" in names:
        made["skills"] = SkillGenerator(seed)
    return made
