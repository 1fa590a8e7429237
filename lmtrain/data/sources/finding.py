"""What a path names: a file, the files of a folder, the matches of a glob, or an address.

Owns the messages about paths that name nothing. Opens no file.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmtrain.data.sources.files import LocalFile, SourceFile, UrlFile
from lmtrain.errors import DataError

# What `datasets` takes for no data, too.
_NO_DATA = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_ADDRESS = re.compile(r"(?P<protocol>[a-zA-Z][a-zA-Z0-9+.-]+)://")


@dataclass(frozen=True)
class Wanted:
    """Which files of a folder are taken, and how to say that there is none."""

    none: str  # such as "no *.txt file"
    choose: Callable[[Sequence[Path]], list[Path]]
    hidden: bool = False  # whether names that begin with a dot or two underscores count


@dataclass(frozen=True)
class Found:
    """Files, and the folder they were found in if one was named."""

    files: tuple[SourceFile, ...]
    folder: Path | None = None

    @property
    def relative(self) -> list[Path]:
        """Their paths below the folder."""
        assert self.folder is not None
        return [file.path.relative_to(self.folder) for file in self.files if isinstance(file, LocalFile)]


def local_path(path: str) -> Path | None:
    """The path on this machine; None for an address."""
    if (match := _ADDRESS.match(path)) is None:
        return Path(path).expanduser()
    return Path(path[match.end() :]) if match["protocol"] == "file" else None


def find(path: str, setting: str, wanted: Wanted, downloads: Path) -> Found:
    """The files that `path`, the value of a setting, names. Raises DataError if there are none."""
    place = local_path(path)
    if place is None:
        return Found((UrlFile(path, downloads),))
    if path and place.is_file():
        return Found((LocalFile(place),))
    if path and place.is_dir():
        return Found(tuple(map(LocalFile, _in_folder(path, place, setting, wanted))), place)
    if path and place.exists():
        raise DataError(f"{setting}={path} is neither a file nor a folder")
    if not glob.has_magic(path):
        raise DataError(f"{setting}={path}: no such file or folder")
    matches = {Path(match) for match in glob.glob(str(place), recursive=True)}  # noqa: PTH207 (absolute ones)
    if files := sorted(found for found in matches if found.is_file()):
        return Found(tuple(map(LocalFile, files)))
    raise DataError(f"{setting}={path}: no file matches")


def _in_folder(path: str, place: Path, setting: str, wanted: Wanted) -> list[Path]:
    below = files_below(place, hidden=wanted.hidden)
    if files := wanted.choose([found for found in below if found.name not in _NO_DATA]):
        return files
    if not below:
        raise DataError(f"{setting}={path}: there are no files in this folder")
    suffixes = Counter(found.suffix or "no suffix" for found in below).most_common(3)
    there = ", ".join(f"{suffix} ({count})" for suffix, count in suffixes)
    raise DataError(
        f"{setting}={path}: {wanted.none} in this folder, but {there}; "
        f"name other files by a glob such as '{place / '**' / ('*' + below[0].suffix)}'"
    )


def files_below(folder: Path, *, hidden: bool) -> list[Path]:
    """Every file below a folder, sorted. Raises DataError if a folder cannot be listed."""

    def refuse(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error

    def counts(name: str) -> bool:
        return hidden or not name.startswith((".", "__"))

    files = []
    for place, subfolders, names in os.walk(folder, onerror=refuse):
        subfolders[:] = filter(counts, subfolders)
        files += [Path(place, name) for name in names if counts(name)]
    return sorted(file for file in files if file.is_file())
