"""What `nearfar` promises is what it has."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import nearfar


def names_for_type_checkers() -> set[str]:
    """The imports under TYPE_CHECKING in nearfar/__init__.py."""
    tree = ast.parse(Path(inspect.getfile(nearfar)).read_text())
    guarded = [node for node in tree.body if isinstance(node, ast.If)]
    return {alias.name for node in ast.walk(guarded[0]) if isinstance(node, ast.ImportFrom) for alias in node.names}


def test_the_lazy_table_the_type_checkers_and_all_name_the_same() -> None:
    assert {*nearfar._PUBLIC, "__version__"} == set(nearfar.__all__)
    assert names_for_type_checkers() == set(nearfar._PUBLIC)
    assert dir(nearfar) == sorted(nearfar.__all__)


@pytest.mark.parametrize("name", nearfar.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(nearfar, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__.startswith("nearfar.")
        assert inspect.getdoc(value)
        public = [m for n, m in inspect.getmembers(value, inspect.isfunction) if not n.startswith("_")]
        assert all(inspect.getdoc(method) for method in public)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Client'"):
        nearfar.Client  # noqa: B018
