"""A folder for what is exported or stored: there whole, or not at all. Knows nothing of what is in it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lmtrain.errors import LmtrainError, RunError, RunFolderError


def require_free(folder: Path) -> None:
    """Raise RunFolderError unless there is room for a folder: nothing of its name, or an empty one."""
    if folder.is_dir() and any(folder.iterdir()):
        raise RunFolderError(f"{folder} is not empty: name a new folder, or empty it")
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file: name a new folder")


@contextmanager
def appearing_whole(folder: Path) -> Iterator[Path]:
    """A folder to write in, which takes the place of `folder` when everything went well and else is gone.

    Raises RunError if the disk is full, RunFolderError if it cannot be written otherwise.
    """
    from safetensors import SafetensorError

    draft = folder.with_name(f".{folder.name}.partial")
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    try:
        shutil.rmtree(draft, ignore_errors=True)  # left by a kill
        draft.mkdir(parents=True)
        yield draft
        for path in (*draft.rglob("*"), draft):
            sync(path)
        draft.rename(folder)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        with suppress(OSError):
            for parent in new_parents:
                parent.rmdir()  # unless it holds something


def cannot_write(folder: Path, error: Exception) -> LmtrainError:
    """What to raise for an OSError, or what safetensors raises: RunError if the disk is full, else RunFolderError."""
    no_room = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT)
    kind = RunError if no_room else RunFolderError
    return kind(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive the machine going down."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
