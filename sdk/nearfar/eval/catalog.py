"""Every task of the table by name, in the table's order: `nearfar eval` and the stored baselines read it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nearfar.eval import actions, calls, choices, home, intents, journal, language
from nearfar.eval.tasks import Task

Loader = Callable[[Path], list[Task]]


def _alone(loader: Callable[[Path], Task]) -> Loader:
    return lambda folder: [loader(folder)]


LOADERS: dict[str, Loader] = {
    **intents.LOADERS,
    "sgd": calls.load,
    "home": home.load,
    "actions": actions.load,
    "journal": journal.load,
    "language": language.load,
    **{name: _alone(loader) for name, loader in choices.LOADERS.items()},
}
