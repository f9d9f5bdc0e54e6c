"""Published traces of real services, in the three forms in which they come; plain, .gz or .xz.

    Azure 2023     TIMESTAMP,ContextTokens,GeneratedTokens       a date with fractions of a second
    BurstGPT       Timestamp,...,Request tokens,Response tokens,...   seconds; answers of 0 tokens failed: left out
    Mooncake       {"timestamp": ms, "input_length", "output_length", "hash_ids": [of blocks of 512 tokens]}

The first line tells which.  Sources: github.com/Azure/AzurePublicDataset, github.com/HPMLL/BurstGPT (arXiv 2401.17644),
github.com/kvcache-ai/Mooncake.
"""

from __future__ import annotations

import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from nearfar.errors import DataError, FileError
from nearfar_cloud.planning.workload import MOST_TOKENS, Workload

LONGEST_LINE = 1 << 20  # bytes
MOST_ROWS = 20_000_000
MOST_SECONDS = 1e10
MOONCAKE_BLOCK = 512  # tokens

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")


class Row(NamedTuple):
    """One request of a file."""

    second: float
    n_prompt: int
    n_output: int
    hashes: tuple[int, ...] = ()


class _Wrong(Exception):
    """What is wrong with a line."""


def load_trace(path: str | Path, most: int | None = None) -> Workload:
    """The requests of a file, sorted by arrival; only its first `most` rows if that is given.

    Raises FileError (missing, damaged), DataError (names the line, what was expected and what was found).
    """
    path = Path(path)
    rows: list[Row] = []
    number, parse = 0, None
    for number, line in enumerate(_lines(path), 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if parse is None:
                parse, is_header = _form(text)
                if is_header:
                    continue
            if text and (row := parse(text)) is not None:
                rows.append(row)
        except UnicodeDecodeError:
            raise DataError(f"{path}:{number}: not UTF-8") from None
        except _Wrong as wrong:
            raise DataError(f"{path}:{number}: {wrong}") from None
        if most is not None and len(rows) >= most:
            break
        if number > MOST_ROWS:
            raise DataError(f"{path}: more than {MOST_ROWS} lines")
    if not rows:
        raise DataError(f"{path}: {number} lines and no request")
    rows.sort(key=lambda row: row.second)
    hashes = tuple(row.hashes for row in rows) if rows[0].hashes else ()
    return Workload(
        path.name.split(".")[0],
        np.array([row.second for row in rows]) - rows[0].second,
        np.array([row.n_prompt for row in rows], np.int64),
        np.array([row.n_output for row in rows], np.int64),
        hashes,
        MOONCAKE_BLOCK if hashes else 0,
    )


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked as its name says."""
    opener = cast(Callable[..., BinaryIO], {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open))
    try:
        with opener(path, "rb") as file:
            for number in range(1, MOST_ROWS + 2):
                line = file.readline(LONGEST_LINE)
                if len(line) == LONGEST_LINE:
                    raise DataError(f"{path}:{number}: a line of {LONGEST_LINE} bytes or more")
                if not line:
                    return
                yield line
    except (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile) as error:
        raise FileError(f"{path}: damaged or cut short ({error})") from None
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from None


def _form(first: str) -> tuple[Callable[[str], Row | None], bool]:
    """How the lines of a file are read, from its first one, and whether that one holds no request."""
    if first.startswith("{"):
        return _mooncake, False
    columns = [name.strip() for name in first.split(",")]
    if tuple(columns) == AZURE:
        return _azure, True
    if set(BURSTGPT) <= set(columns):
        places = [columns.index(name) for name in BURSTGPT]
        return (lambda text: _burstgpt(text, len(columns), places)), True
    raise _Wrong(
        f"found {first[:60]!r}, expected the columns {','.join(AZURE)}, or columns with {', '.join(BURSTGPT)}, "
        'or JSON with "timestamp", "input_length", "output_length", "hash_ids"'
    )


def _azure(text: str) -> Row:
    fields = text.split(",")
    if len(fields) != len(AZURE):
        raise _Wrong(f"{len(fields)} fields, expected {len(AZURE)}")
    try:
        moment = datetime.fromisoformat(fields[0].strip())
    except ValueError:
        raise _Wrong(f"TIMESTAMP {fields[0][:40]!r}, expected a date and time") from None
    second = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    return Row(second, _tokens("ContextTokens", fields[1]), _tokens("GeneratedTokens", fields[2]))


def _burstgpt(text: str, n_columns: int, places: list[int]) -> Row | None:
    fields = text.split(",")
    if len(fields) != n_columns:
        raise _Wrong(f"{len(fields)} fields, expected {n_columns}")
    when, prompt, output = (fields[place] for place in places)
    try:
        second = float(when)
    except ValueError:
        second = -1.0
    n_prompt, n_output = (_tokens(n, x, 0) for n, x in zip(BURSTGPT[1:], (prompt, output), strict=True))
    return Row(_second(second, when), n_prompt, n_output) if n_prompt and n_output else None


def _mooncake(text: str) -> Row:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise _Wrong(f"not JSON ({error})") from None
    if not isinstance(found, dict):
        raise _Wrong(f"{type(found).__name__}, expected an object")
    when, hashes = found.get("timestamp"), found.get("hash_ids")
    n_prompt = _tokens("input_length", found.get("input_length"))
    n_output = _tokens("output_length", found.get("output_length"))
    ms = float(when) if isinstance(when, (int, float)) and not isinstance(when, bool) else -1.0
    second = _second(ms / 1000, when)
    if not isinstance(hashes, list) or not all(type(h) is int and 0 <= h < 1 << 63 for h in hashes):
        raise _Wrong("hash_ids: expected a list of whole numbers")
    if len(hashes) != (n := -(-n_prompt // MOONCAKE_BLOCK)):
        raise _Wrong(f"{len(hashes)} hash_ids for {n_prompt} tokens, expected {n} (blocks of {MOONCAKE_BLOCK})")
    return Row(second, n_prompt, n_output, tuple(hashes))


def _second(second: float, found: object) -> float:
    if not 0 <= second <= MOST_SECONDS:
        raise _Wrong(f"timestamp {str(found)[:40]!r}, expected a number from 0 on")
    return second


def _tokens(name: str, found: object, least: int = 1) -> int:
    """A count of tokens, from a field of text or from JSON."""
    text = found.strip() if isinstance(found, str) else str(found) if type(found) is int else ""
    if not text.isdecimal() or len(text) > 12 or not least <= int(text) <= MOST_TOKENS:
        raise _Wrong(f"{name} {str(found)[:40]!r}, expected a whole number {least}..{MOST_TOKENS}")
    return int(text)
