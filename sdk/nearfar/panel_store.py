"""Where packed matrices stay between two openings of a model: beside it, or in a folder of the caller's choice.

    key of the model file -> a panel file of that key? map it, check every byte  ->  "hit"
                          -> else pack matrix by matrix into one, map that       ->  "built"
                          -> no folder, no room, not wanted                      ->  "off": the engine packs into memory

A file that is stale, damaged or of another version is packed again.  The digests find damage and are no signature:
who can write into the folder can change what a model computes, as with the model file itself, but nothing else.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nearfar import env
from nearfar.digest import blake2b
from nearfar.errors import FileError
from nearfar.gguf_reader import GGUFFile
from nearfar.panel_file import Bytes, PanelFile, PanelKey, Panels, PanelWriter, read_key, temporary_prefix

if TYPE_CHECKING:
    from concurrent.futures import Future

AUTO, OFF = "auto", "off"
SUFFIX = ".panels"
_ANY = f"*.[0-9]*-*.[0-9]*-[0-9]*{SUFFIX}"  # the names that `panel_path` makes; a folder may hold other people's too
# Smaller models are packed in the time that looking for a file takes.  A folder that the caller names takes any size.
SMALLEST = 32 << 20  # bytes of matrices
_ABANDONED_S = 3600  # the age at which a temporary file belongs to nobody any more

log = logging.getLogger("nearfar")

Pack = Callable[[str], tuple[Panels, tuple[int, int]]]  # a matrix by its name -> its panels and their checksums
Checksums = Callable[[list[Bytes]], list[int]]


@dataclass(frozen=True, slots=True)
class CacheState:
    """What the store did for one model, and why.  `n_bytes` counts the file."""

    state: Literal["hit", "built", "off"]
    why: str
    path: Path | None = None
    n_bytes: int = 0

    def __str__(self) -> str:
        where = "" if self.path is None else f", {self.n_bytes} bytes: {self.path}"
        return f"{self.state} ({self.why}){where}"


def folders(model: Path, cache: str | Path | None) -> list[Path]:
    """Where panels of `model` may lie, best first: beside it and in the user's cache folder, or in `cache`."""
    if cache is None or cache == AUTO:
        return [model.parent, env.user_cache_dir() / "panels"]
    return [] if cache == OFF else [Path(cache)]


def vouches_for(file: GGUFFile, cache: str | Path | None) -> bool:
    """Whether this very file was packed before, for whatever kernels: then all its scales were found finite.

    A panel file is only written from weights that `Weights.open` let pass, and keeps the file's fingerprint.
    """
    for folder in folders(file.path, cache):
        for path in folder.glob(f"{_stem(folder, file.path)}.*{SUFFIX}"):
            with suppress(FileError):
                if read_key(path).source == file.fingerprint:
                    return True
    return False


def open_panels(
    file: GGUFFile,
    names: list[str],
    layout: str,
    layers: tuple[int, int],
    cache: str | Path | None,
    pack: Pack,
    checksums: Checksums,
    threads: int,
) -> tuple[dict[str, Panels], CacheState]:
    """The matrices `names` of the layers [first, last), mapped from the store; nothing where that is off or cannot be
    written.  `layout` names what the kernels want, `pack` makes it, `checksums` sums up the bytes of several arrays."""
    places = folders(file.path, cache)
    n_bytes = sum(file.tensors[name].n_bytes for name in names)
    if not places:
        return {}, CacheState("off", "not wanted")
    if cache in (None, AUTO) and n_bytes < SMALLEST:
        return {}, CacheState("off", f"{n_bytes / (1 << 20):.1f} MiB are packed at once")
    key = PanelKey(file.fingerprint, layout, *layers)
    paths = [panel_path(folder, file.path, layout, *layers) for folder in places]
    why = "the first time"
    for path in paths:
        try:
            return _found(path, names, key, checksums), CacheState("hit", "packed before", path, path.stat().st_size)
        except FileError as error:
            if path.exists():
                why = str(error)
                log.warning("%s; packed again", error)
    for path in paths:
        try:
            _build(path, names, key, pack, threads, n_bytes)
            return _found(path, names, key, checksums), CacheState("built", why, path, path.stat().st_size)
        except (OSError, FileError) as error:
            why = f"{path.parent} cannot keep panels: {getattr(error, 'strerror', None) or error}"
            log.info("%s", why)
    return {}, CacheState("off", why)


def _found(path: Path, names: list[str], key: PanelKey, checksums: Checksums) -> dict[str, Panels]:
    """The matrices of a panel file that is whole and made for `key`.  Raises FileError."""
    found = PanelFile.open(path)
    if found.key != key:
        what = "the model" if found.key.source != key.source else "other kernels or layers"
        raise FileError(f"{path} is stale: {what} changed")
    if missing := set(names) - set(found.matrices):
        raise FileError(f"{path} is damaged: {sorted(missing)[0]} is missing")
    found.verify(checksums)
    return found.matrices


def _build(path: Path, names: list[str], key: PanelKey, pack: Pack, threads: int, n_bytes: int) -> None:
    """Pack into the file; at most two matrices a thread are in memory.  Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _forget_abandoned(path)
    if shutil.disk_usage(path.parent).free < n_bytes:
        raise OSError(f"less than {n_bytes} bytes are free")
    with PanelWriter(path, key, len(names)) as writer:
        for name, (panels, sums) in zip(names, _in_parallel(pack, names, threads), strict=True):
            writer.add(name, panels, sums)
        writer.finish()


def _in_parallel(pack: Pack, names: Iterable[str], threads: int) -> Iterator[tuple[Panels, tuple[int, int]]]:
    """pack(name) for each name, in order, each thread at most one ahead."""
    from concurrent.futures import ThreadPoolExecutor  # 10 ms that a hit does not pay

    waiting: list[Future[tuple[Panels, tuple[int, int]]]] = []
    with ThreadPoolExecutor(threads) as pool:
        try:
            for name in names:
                waiting.append(pool.submit(pack, name))
                if len(waiting) > threads:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def _forget_abandoned(path: Path) -> None:
    """Remove what a builder of `path` that was killed has left."""
    for temporary in path.parent.glob(f"{_literal(temporary_prefix(path))}*.tmp"):
        with suppress(OSError):
            if temporary.stat().st_mtime < time.time() - _ABANDONED_S:
                temporary.unlink()


def panel_path(folder: Path, model: Path, layout: str, first: int, last: int) -> Path:
    """Where the panels of a model lie in a folder."""
    return folder / f"{model_name(folder, model)}.{layout}.{first}-{last}{SUFFIX}"


def model_name(folder: Path, model: Path) -> str:
    """Beside the model its own name does; elsewhere its full path is part of it, so that namesakes get along."""
    if folder == model.parent:
        return model.name
    digest = blake2b(str(model.resolve()).encode("utf-8", "surrogateescape"), digest_size=6).hexdigest()
    return f"{model.name}-{digest}"


def _stem(folder: Path, model: Path) -> str:
    return _literal(model_name(folder, model))


def _literal(name: str) -> str:
    """The name as a pattern that matches nothing else."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


@dataclass(frozen=True, slots=True)
class Stored:
    """One file of the store as it lies there; `key` is None where it is damaged or of another version."""

    path: Path
    n_bytes: int
    key: PanelKey | None


def stored(places: Iterable[Path]) -> list[Stored]:
    """The panel files in folders, or those of one model where a place is a model's file."""
    found: dict[Path, Stored] = {}
    for place in places:
        if place.is_dir():
            paths = [*place.glob(_ANY), *place.glob(f".{_ANY}.*.tmp")]
        else:
            paths = [p for folder in folders(place, AUTO) for p in folder.glob(f"{_stem(folder, place)}.*{SUFFIX}")]
        for path in sorted(paths):
            key = None
            with suppress(FileError):
                key = read_key(path)
            with suppress(OSError):  # gone since
                found[path.resolve()] = Stored(path, path.stat().st_size, key)
    return list(found.values())
