"""The folder that prepared data is kept in: where it is, how an entry appears in it whole, how it is freed.

What an entry holds is decided in `prepare`; `sources` remembers the sums of files in `fingerprints/`.

`prepared/KEY/` is an entry, `KEY.draft` one being built, `KEY.lock` is held by the process that builds it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock, Timeout

from lmtrain.config.schema import DataConfig
from lmtrain.new_folder import sync


def cache_folder(data: DataConfig) -> Path:
    """Where prepared data is kept; the folder need not exist."""
    named = data.cache_dir or os.environ.get("LMTRAIN_CACHE")
    return Path(named).expanduser() if named else platformdirs.user_cache_path("lmtrain")


def downloads_of(cache: Path) -> Path:
    """Where files from addresses are kept."""
    return cache / "downloads"


@contextmanager
def building(folder: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of an entry; others that want to build it wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        report("waiting for another process that prepares the same data")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def draft_of(folder: Path) -> Iterator[Path]:
    """A folder to build in, with what a build of the same entry that was stopped has left. The caller holds the lock.

    An error removes it; a signal leaves it, to go on from there.
    """
    draft = _draft(folder)
    draft.mkdir(exist_ok=True)
    try:
        yield draft
    except Exception:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def publish(draft: Path, folder: Path) -> None:
    """Make a complete draft the entry, safe against a crash of the machine. Replaces a damaged entry."""
    for path in draft.iterdir():
        sync(path)
    sync(draft)
    if folder.exists():
        shutil.rmtree(folder)
    draft.rename(folder)
    sync(folder.parent)


def manifests(cache: Path) -> Iterator[dict[str, Any]]:
    """What the entries of a cache say of themselves, those that can be read."""
    for path in sorted((cache / "prepared").glob("*/manifest.json")):
        with suppress(OSError, ValueError):
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict):
                yield content


# ------------------------------------------------------------------------------------------- freeing


@dataclass(frozen=True)
class CacheEntry:
    """One entry, or what is left of one that was never completed."""

    folder: Path
    corpus: str | None  # None if it is not whole
    num_bytes: int  # on disk, its draft included


def list_entries(cache: Path) -> list[CacheEntry]:
    """Every entry of a cache; nothing else that may lie in the folder."""
    found = {
        path.with_name(match[1])
        for path in (cache / "prepared").glob("*")
        if (match := re.fullmatch(r"([0-9a-f]{32})(\.draft)?", path.name)) and path.is_dir() and not path.is_symlink()
    }
    return [CacheEntry(folder, _corpus(folder), _size(folder) + _size(_draft(folder))) for folder in sorted(found)]


def remove_entry(entry: CacheEntry) -> bool:
    """Delete an entry; False if another process is building it. Who has it open can read on.

    The lock file stays: another process may be waiting for it.
    """
    try:
        with FileLock(f"{entry.folder}.lock", timeout=0):
            draft = _draft(entry.folder)
            shutil.rmtree(draft, ignore_errors=True)
            if entry.folder.exists():
                entry.folder.rename(draft)  # whole or not there, for readers
                shutil.rmtree(draft)
    except Timeout:
        return False
    return True


def remove_fingerprints(cache: Path) -> None:
    """Forget the sums of files and the commits of data sets: they are found again when asked for."""
    for path in (cache / "fingerprints").glob("*"):
        if re.fullmatch(r"[0-9a-f]{64}(\.\d+)?", path.name):
            path.unlink(missing_ok=True)


def remove_downloads(cache: Path) -> None:
    """Delete what was fetched from addresses."""
    shutil.rmtree(downloads_of(cache), ignore_errors=True)


def size_of_downloads(cache: Path) -> int:
    """Bytes of what was fetched from addresses."""
    return sum(path.stat().st_size for path in downloads_of(cache).rglob("*") if path.is_file())


def _draft(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.draft")


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*"))


def _corpus(folder: Path) -> str | None:
    try:
        return str(json.loads((folder / "manifest.json").read_text())["corpus"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
