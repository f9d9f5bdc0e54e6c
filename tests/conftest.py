"""Options of the suite: `--slow` adds the tests that take minutes (builds into fresh environments)."""

from __future__ import annotations

import signal

import pytest


def pytest_configure() -> None:
    """A job in a shell's background ignores Ctrl-C, and so would the tests of it and every process they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: pytest --slow runs it")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
