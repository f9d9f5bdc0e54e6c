"""Files of the data folder, checked while they are read: the first stop of training and of evaluation.  Ground floor.

Everything that is missing or in the wrong form becomes a DataError that names the file, the line and what was expected.
"""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from nearfar import env
from nearfar.errors import DataError, MissingDataError

T = TypeVar("T")

README = "the README.md of the data folder says where each file comes from"


def data_folder(given: str | Path | None) -> Path:
    """`given`, else NEARFAR_DATA.  Raises DataError where there is no such folder."""
    name = given or env.data_dir()
    if name is None:
        raise DataError("no data folder: expected --data DIR or the environment variable NEARFAR_DATA")
    folder = Path(name)
    if not folder.is_dir():
        raise DataError(f"{folder}: expected the folder of the corpora, found no such folder")
    return folder


def _check_file(path: Path, use: str) -> None:
    if not path.is_file():
        go_on = "`nearfar train` goes on --without its source, `nearfar eval` with other --tasks"
        raise MissingDataError(path, use, f"{README}; {go_on}")


def open_text(path: Path, use: str) -> io.TextIOBase:
    """The text of `path`; .xz is unpacked.  `use` tells in the error what the file is for."""
    _check_file(path, use)
    return lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8")


def json_lines(path: Path, use: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each line."""
    with open_text(path, use) as file:
        n = 0
        try:
            for n, line in enumerate(file, 1):
                value = json.loads(line)
                if not isinstance(value, dict):
                    raise DataError(f"{path.name} line {n}: expected a JSON object, found {type(value).__name__}")
                yield f"{path.name} line {n}", value
        except (lzma.LZMAError, EOFError) as error:
            raise DataError(f"{path.name}: expected text packed with xz, {error}") from None
        except ValueError as error:
            raise DataError(f"{path.name} line {n}: expected a JSON object, {error}") from None


def json_file(path: Path, use: str, kind: type[T]) -> T:
    """The one JSON value of a file."""
    with open_text(path, use) as file:
        try:
            value = json.load(file)
        except (ValueError, lzma.LZMAError, EOFError) as error:
            raise DataError(f"{path.name}: expected JSON, {error}") from None
    if not isinstance(value, kind):
        raise DataError(f"{path.name}: expected a JSON {kind.__name__}, found {type(value).__name__}")
    return value


def tar_texts(path: Path, use: str, suffix: str) -> dict[str, str]:
    """name -> text of the members of a .tar.xz whose names end with `suffix`, by name."""
    _check_file(path, use)
    texts: dict[str, str] = {}
    try:
        with tarfile.open(path, "r:xz") as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() and member.name.endswith(suffix) else None
                if file is not None:
                    texts[member.name.removeprefix("./")] = file.read().decode("utf-8")
    except (tarfile.TarError, lzma.LZMAError, EOFError, ValueError) as error:
        raise DataError(f"{path.name}: expected a .tar.xz of UTF-8 text, {error}") from None
    return dict(sorted(texts.items()))


def field(where: str, row: dict[str, Any], key: str, kind: type[T]) -> T:
    """`row[key]`, which must be a `kind`."""
    value = row.get(key)
    if not isinstance(value, kind):
        found = f"{type(value).__name__} {str(value)[:40]!r}" if key in row else "nothing"
        raise DataError(f"{where}: expected {key!r} as {kind.__name__}, found {found}")
    return value


def pairs(where: str, row: dict[str, Any], key: str = "slots") -> list[tuple[str, str]]:
    """`row[key]` as (type, value) pairs of text."""
    found = field(where, row, key, list)
    if not all(isinstance(p, list) and len(p) == 2 and all(isinstance(x, str) for x in p) for p in found):
        raise DataError(f"{where}: expected {key!r} as a list of [type, value] pairs of text, found {str(found)[:60]}")
    return [(kind, value) for kind, value in found]
