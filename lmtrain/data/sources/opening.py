"""Settings → corpus: which files a source has and which splits they make. Reads no record."""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from lmtrain.config.schema import DataConfig, FilesConfig, PythonStdlibConfig
from lmtrain.data.cache import cache_folder, downloads_of
from lmtrain.data.prepared import SplitName
from lmtrain.data.sources.corpus import Corpus, Reader
from lmtrain.data.sources.fields import listed
from lmtrain.data.sources.files import LocalFile, SourceFile
from lmtrain.data.sources.finding import find, local_path
from lmtrain.data.sources.hub import is_hub_folder, resolve
from lmtrain.data.sources.kinds import Kind, kind_of
from lmtrain.data.sources.splits import by_name
from lmtrain.data.sources.text import TextReader
from lmtrain.errors import DataError

log = logging.getLogger(__name__)

# Folders of the standard library that hold tests (some are broken on purpose) or other people's packages.
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def open_corpus(config: DataConfig) -> Corpus:
    """Find the files that `config` names. Raises DataError if there are none, or all are empty."""
    try:
        match config:
            case PythonStdlibConfig():
                files = [TextReader(LocalFile(path)) for path in _stdlib_files()]
                version = f"{sys.version_info.major}.{sys.version_info.minor}"
                return Corpus(name=f"Python {version} standard library", readers={"train": files})
            case FilesConfig():
                return _open_files(config)
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise DataError(f"cannot read {error.filename}: {error.strerror or error}") from error
    raise TypeError(f"no corpus for {type(config).__name__}")


def _stdlib_files() -> list[Path]:
    root = sysconfig.get_paths()["stdlib"]
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise DataError(f"this Python has no source files in {root}; use data=text data.path=... instead")
    return sorted(files)


def _open_files(config: FilesConfig) -> Corpus:
    cache = cache_folder(config)
    downloads = downloads_of(cache)
    kind = kind_of(config, downloads)
    place = None if config.path is None else local_path(config.path)
    readers: dict[SplitName, list[Reader]]
    if config.path is None or (place is not None and is_hub_folder(place)):
        data = resolve(config, place, cache)
        readers = {split: [kind.read_hub(file, data) for file in files] for split, files in data.files(config).items()}
        name = data.name(config)
    else:
        files_of = _files_by_split(config.path, config, kind, downloads)
        readers = {split: [kind.read(file, split) for file in files] for split, files in files_of.items()}
        count = sum(len(reader.files) for split in readers for reader in readers[split])
        name = config.path if count == 1 else f"{count:,} files of {config.path}"
    given: dict[SplitName, str | None] = {"val": config.val_path, "test": config.test_path}
    for split, path in given.items():
        if path is not None:
            files = find(path, f"data.{split}_path", kind.wanted, downloads).files
            readers[split] = [kind.read(file, split) for file in files]
    readers["train"] = _without(readers["train"], [reader for split in given for reader in readers.get(split, ())])
    corpus = Corpus(name=name, readers=readers, on_bad_record=config.on_bad_record)
    if not readers["train"]:
        raise DataError(f"{name}: every file is one of data.val_path or data.test_path, none is left to train on")
    _require_content(name, readers["train"])
    return corpus


def _files_by_split(
    path: str, config: FilesConfig, kind: Kind, downloads: Path
) -> dict[SplitName, Sequence[SourceFile]]:
    """The files that a path names; of a folder, split by their names if those say which are for training."""
    if config.hub_split is not None:
        raise DataError(f"data.hub_split={config.hub_split}: data.path={path} is no data set with splits of its own")
    place = local_path(path)
    # A copy of a data set without its card: a configuration is usually a folder.
    if config.hub_config and place is not None and (place / config.hub_config).is_dir():
        path = str(place / config.hub_config)
    found = find(path, "data.path", kind.wanted, downloads)
    splits = by_name(found.relative) if found.folder is not None else {}
    if not splits:
        return {"train": found.files}
    used = {number for numbers in splits.values() for number in numbers}
    if unused := [str(name) for number, name in enumerate(found.relative) if number not in used]:
        counts = ", ".join(f"{split} {len(numbers)}" for split, numbers in splits.items())
        log.info("%s: files are split by their names (%s); not used: %s", path, counts, listed(unused))
    return {split: [found.files[number] for number in numbers] for split, numbers in splits.items()}


def _without(readers: Sequence[Reader], others: Sequence[Reader]) -> list[Reader]:
    """The readers of other files than these others: what was named for validation is not trained on."""

    def paths(reader: Reader) -> set[Path]:
        return {file.path.resolve() for file in reader.files if isinstance(file, LocalFile)}

    held_out = set().union(*map(paths, others))
    return [reader for reader in readers if not paths(reader) & held_out]


def _require_content(name: str, readers: Sequence[Reader]) -> None:
    files = [file for reader in readers for file in reader.files]
    if all(isinstance(file, LocalFile) and file.state()[1] == 0 for file in files):
        raise DataError(f"{name}: empty, there is no text in it")
