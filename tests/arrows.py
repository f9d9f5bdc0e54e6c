"""Reads who imports whom out of the source text, without importing anything.  Used by test_import_arrows.py."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOUSES = {  # import package -> its source root
    "nearfar": ROOT / "sdk",
    "nearfar_cloud": ROOT / "cloud",
    "nearfar_native": ROOT / "native",
}


@dataclass(frozen=True)
class Import:
    """`importer` mentions `imported`; `at_import_time` is false inside functions and under TYPE_CHECKING."""

    importer: str
    imported: str
    at_import_time: bool

    def __str__(self) -> str:
        return f"{self.importer} imports {self.imported}"


def house(module: str) -> str:
    return module.split(".")[0]


def modules() -> dict[str, Path]:
    """Every module of ours and its file."""
    found = {}
    for package, source_root in HOUSES.items():
        for path in sorted((source_root / package).rglob("*.py")):
            parts = path.relative_to(source_root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, source: str, known: Iterable[str]) -> Iterator[Import]:
    """The imports in `source`; `from package import name` means package.name where that is one of `known`."""
    known = set(known)
    for node, at_import_time in _walk(ast.parse(source), True):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(f"{module}: relative import; write the whole name")
            base = node.module or ""
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names]
        else:
            continue
        yield from (Import(module, name, at_import_time) for name in dict.fromkeys(names))


def _walk(node: ast.AST, at_import_time: bool) -> Iterator[tuple[ast.AST, bool]]:
    yield node, at_import_time
    for child in ast.iter_child_nodes(node):
        lazy = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or _is_type_checking(node)
        yield from _walk(child, at_import_time and not lazy)


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def all_imports() -> list[Import]:
    found = modules()
    return [i for name, path in found.items() for i in imports_of(name, path.read_text(), found)]


def circle(imports: Iterable[Import]) -> list[str]:
    """Modules that import each other in a circle while being imported, or nothing."""
    below: dict[str, set[str]] = {}
    for i in imports:
        if i.at_import_time and i.importer != i.imported:
            below.setdefault(i.importer, set()).add(i.imported)
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(below.get(module, ())):
            if found := visit(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(below) if (found := visit(module, []))), [])
