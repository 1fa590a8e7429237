"""Files of this machine and of an address, the latter fetched when they are first needed.

Also keeps notes: what was found out about files and does not change while they do not.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from filelock import FileLock

from lmtrain.data.sources.blocks import readable
from lmtrain.errors import DataError

# A file changed this recently may change again without its modification time showing it.
_SETTLED_SECONDS = 2.0

State = tuple[str, int, int]
"""Name, size and modification time: what tells whether a file is still the same."""


class SourceFile(Protocol):
    """A file to read, wherever it is."""

    @property
    def name(self) -> str:
        """What its format is told by."""

    def local(self) -> Path:
        """Where it can be read, fetched if need be. Raises DataError if it cannot be fetched."""

    def state(self) -> State:
        """Changes when the content does. Raises DataError if there is no such file."""

    def digest(self) -> bytes:
        """Stands for the content."""


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine."""

    path: Path

    @property
    def name(self) -> str:
        """What its format is told by."""
        return self.path.name

    def local(self) -> Path:
        """Where it can be read."""
        return self.path

    def state(self) -> State:
        """Changes when the content does. Raises DataError if there is no such file."""
        with readable(self.path):
            status = self.path.stat()
        return str(self.path.absolute()), status.st_size, status.st_mtime_ns

    def digest(self) -> bytes:
        """The sha256 of the content."""
        return file_digest(self.path)


@dataclass(frozen=True)
class UrlFile:
    """A file of an address, which is fetched once and then kept in `folder`."""

    url: str
    folder: Path

    @property
    def name(self) -> str:
        """What its format is told by."""
        return posixpath.basename(unquote(urlsplit(self.url).path)) or "download"

    def local(self) -> Path:
        """Where it can be read. Raises DataError if it cannot be fetched."""
        place = self.folder / hashlib.sha256(self.url.encode()).hexdigest()[:32]
        if not place.exists():
            lock = Path(f"{place}.lock")
            try:
                place.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(lock):
                    if not place.exists():
                        self._fetch(place)
            except DataError:
                lock.unlink(missing_ok=True)
                with suppress(OSError):
                    self.folder.rmdir()  # if nothing else was ever fetched
                raise
            except OSError as error:
                raise DataError(
                    f"cannot keep {self.url} in {self.folder}: {error.strerror or error}; "
                    "name another folder by data.cache_dir=... or LMTRAIN_CACHE"
                ) from error
        return place / self.name

    def _fetch(self, place: Path) -> None:
        """Make the folder that holds the file: it is whole or not there."""
        from datasets.utils.file_utils import cached_path

        draft = place.with_name(f"{place.name}.draft")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            (draft / "kept").mkdir(parents=True)
            try:
                fetched = Path(cached_path(self.url, cache_dir=draft, use_etag=False))
            except Exception as error:  # whatever the protocol's library raises
                reason = in_short(error.__cause__ or error)
                raise DataError(
                    f"cannot fetch {self.url} ({reason}); without network, name a local copy by data.path=PATH"
                ) from error
            bring = shutil.move if fetched.is_relative_to(draft.absolute()) else shutil.copyfile  # else another's cache
            bring(fetched, draft / "kept" / self.name)
            (draft / "kept").rename(place)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def state(self) -> State:
        """Changes when the content does."""
        return LocalFile(self.local()).state()

    def digest(self) -> bytes:
        """The sha256 of the content."""
        return file_digest(self.local())


def file_digest(path: Path) -> bytes:
    """The sha256 of the bytes of a file. Raises DataError if it cannot be read."""
    with readable(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def in_short(error: BaseException) -> str:
    """What an error of some library says, in one line."""
    text = re.sub(r" at 0x[0-9a-f]+", "", str(error))  # where an object lay in memory
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2])[:300] or type(error).__name__


# ---------------------------------------------------------------------------------------------- notes


def read_note(cache: Path, key: Sequence[Any]) -> str | None:
    """What was noted under this key, if anything."""
    with suppress(OSError, UnicodeDecodeError):
        return _note(cache, key).read_text(encoding="utf-8")
    return None


def write_note(cache: Path, key: Sequence[Any], content: str, states: Sequence[State] = ()) -> None:
    """Note something that holds while these files do not change; not if one of them may just be changing.

    A cache that cannot be written is no error here.
    """
    if max((changed for _, _, changed in states), default=0) > (time.time() - _SETTLED_SECONDS) * 1e9:
        return
    note = _note(cache, key)
    with suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        draft = note.with_name(f"{note.name}.{os.getpid()}")
        draft.write_text(content, encoding="utf-8")
        draft.replace(note)


def _note(cache: Path, key: Sequence[Any]) -> Path:
    return cache / "fingerprints" / hashlib.sha256(json.dumps(key).encode()).hexdigest()
