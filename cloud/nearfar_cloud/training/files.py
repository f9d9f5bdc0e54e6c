"""Files of the data folder, checked while they are read: what is missing or malformed is named with file and line."""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from nearfar.errors import DataError

T = TypeVar("T")
DATA_README = "the README.md of the data folder lists every file with its source"


def open_text(path: Path, use: str) -> io.TextIOBase:
    """The text of `path` (.xz is unpacked); a missing file says what it is for."""
    if not path.is_file():
        raise DataError(f"{path}: missing, needed for {use}; {DATA_README}, or train --without it")
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def json_lines(path: Path, use: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) for each line."""
    with open_text(path, use) as file:
        try:
            for n, line in enumerate(file, 1):
                where = f"{path.name} line {n}"
                try:
                    value = json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"{where}: expected a JSON object, {error}") from None
                if not isinstance(value, dict):
                    raise DataError(f"{where}: expected a JSON object, got {type(value).__name__}")
                yield where, value
        except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"{path.name}: expected text packed with xz, {error}") from None


def json_file(path: Path, use: str, kind: type[dict[Any, Any]] | type[list[Any]]) -> Any:
    """The JSON value of a file.  Raises DataError unless it is one of `kind`."""
    with open_text(path, use) as file:
        try:
            value = json.load(file)
        except (json.JSONDecodeError, lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"{path.name}: expected JSON, {error}") from None
    if not isinstance(value, kind):
        raise DataError(f"{path.name}: expected a JSON {kind.__name__}, got {type(value).__name__}")
    return value


def field(where: str, row: dict[str, Any], key: str, kind: type[T]) -> T:
    """`row[key]`; DataError, with the place, unless it is of `kind`."""
    value = row.get(key)
    if not isinstance(value, kind):
        found = "nothing" if key not in row else f"{type(value).__name__} {str(value)[:40]!r}"
        raise DataError(f"{where}: expected {key!r} as {kind.__name__}, found {found}")
    return value


def pairs(where: str, row: dict[str, Any], key: str = "slots") -> list[tuple[str, str]]:
    """A list of [type, value] pairs; DataError, with the place, for anything else."""
    value = field(where, row, key, list)
    if not all(isinstance(p, list) and len(p) == 2 and all(isinstance(x, str) for x in p) for p in value):
        raise DataError(f"{where}: expected {key!r} as a list of [type, value] pairs of text, found {str(value)[:60]}")
    return [(kind, text) for kind, text in value]


def tar_members(path: Path, use: str, suffix: str) -> dict[str, str]:
    """Name -> text of the members of a .tar.xz that end with `suffix`, in name order."""
    if not path.is_file():
        raise DataError(f"{path}: missing, needed for {use}; {DATA_README}, or train --without it")
    found = {}
    try:
        with tarfile.open(path, "r:xz") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() and member.name.endswith(suffix) else None
                if file is not None:
                    found[member.name.removeprefix("./")] = file.read().decode("utf-8")
    except (tarfile.TarError, lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name}: expected a .tar.xz with UTF-8 text, {error}") from None
    return dict(sorted(found.items()))
