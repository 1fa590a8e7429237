"""Where text comes from: finds the files of a corpus, reads their documents one by one, fingerprints them.

Owns every check of the text itself (missing, empty, binary, not UTF-8). Does not tokenise, split or cache it.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import sys
import sysconfig
import time
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from itertools import groupby, islice
from pathlib import Path
from typing import Literal

from lmtrain.config.schema import DataConfig, PythonStdlibConfig, TextConfig
from lmtrain.errors import DataError

# Folders of the standard library that hold tests (some are broken on purpose) or other people's packages.
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
# A file changed this recently may change again without its modification time showing it.
_SETTLED_SECONDS = 2.0


Document = Literal["file", "paragraph", "line"]


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Files of text, cut into documents.

    A document is a whole `file`, a `paragraph` (lines up to a blank one) or a `line`. Line ends inside a
    document stay as they are in the file; those between documents belong to none, nor do blank lines between
    them and a byte-order mark at the start.
    """

    name: str  # in words, such as "Python 3.11 standard library"
    files: tuple[Path, ...]  # sorted
    document: Document = "file"
    min_chars: int = 1
    max_documents: int | None = None

    def documents(self, on_short: Callable[[str], None] | None = None) -> Iterator[str]:
        """Yield the documents in order, holding no more than one file in memory.

        Documents shorter than `min_chars` are left out and handed to `on_short`. Raises DataError for a file
        that cannot be read as text, and at the end if there was no document at all.
        """
        num_documents = 0
        for text in islice(self._long_enough(on_short), self.max_documents):
            num_documents += 1
            yield text
        if num_documents == 0:
            raise DataError(f"{self.name} has no document of at least {self.min_chars} characters (data.min_chars)")

    def _long_enough(self, on_short: Callable[[str], None] | None) -> Iterator[str]:
        for path in self.files:
            for text in _READERS[self.document](path):
                if len(text) >= self.min_chars:
                    yield text
                elif on_short is not None:
                    on_short(text)

    def fingerprint(self, cache_dir: Path) -> str:
        """The sha256 of the content of all files in order; neither names nor folders matter.

        It is remembered under `cache_dir` by path, size and modification time of every file, so that files
        which did not change are not read again. A cache that cannot be written is no error here.
        """
        states = [(str(path.absolute()), status.st_size, status.st_mtime_ns) for path, status in self._stat()]
        memo = cache_dir / "fingerprints" / hashlib.sha256(json.dumps(states).encode()).hexdigest()
        with suppress(OSError):
            if len(known := memo.read_text()) == 2 * hashlib.sha256().digest_size:  # else cut off by a crash
                return known
        content = hashlib.sha256(b"".join(_file_digest(path) for path in self.files)).hexdigest()
        if max(mtime for _, _, mtime in states) < (time.time() - _SETTLED_SECONDS) * 1e9:
            with suppress(OSError):
                memo.parent.mkdir(parents=True, exist_ok=True)
                draft = memo.with_name(f"{memo.name}.{os.getpid()}")
                draft.write_text(content)
                draft.replace(memo)
        return content

    def _stat(self) -> Iterator[tuple[Path, os.stat_result]]:
        for path in self.files:
            try:
                yield path, path.stat()
            except OSError as error:
                raise DataError(f"cannot read {path}: {error.strerror}") from error


def open_corpus(config: DataConfig) -> Corpus:
    """Find the files that `config` names. Raises DataError if there are none or all are empty."""
    document: Document = "file"
    match config:
        case PythonStdlibConfig():
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            name = f"Python {version} standard library"
            files = _stdlib_files()
        case TextConfig():
            files, document = _text_files(config.path), config.document
            name = config.path if len(files) == 1 else f"{len(files):,} files of {config.path}"
        case _:
            raise TypeError(f"no corpus for {type(config).__name__}")
    corpus = Corpus(
        name=name,
        files=files,
        document=document,
        min_chars=config.min_chars,
        max_documents=config.max_documents,
    )
    if not any(status.st_size for _, status in corpus._stat()):
        raise DataError(f"{name}: empty, there is no text in it")
    return corpus


def _stdlib_files() -> tuple[Path, ...]:
    root = sysconfig.get_paths()["stdlib"]
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise DataError(f"this Python has no source files in {root}; use data=text data.path=... instead")
    return tuple(sorted(files))


def _text_files(path: str) -> tuple[Path, ...]:
    """The files that `path` names: itself, every *.txt below it, or the matches of a glob."""
    place = Path(path).expanduser()
    if path and place.is_file():
        return (place,)
    if path and place.is_dir():
        below = [found for found in sorted(place.rglob("*")) if found.is_file()]
        if files := tuple(found for found in below if found.suffix == ".txt"):
            return files
        suffixes = Counter(found.suffix or "no suffix" for found in below).most_common(3)
        if not below:
            raise DataError(f"data.path={path}: there are no files in this folder")
        there = ", ".join(f"{suffix} ({count})" for suffix, count in suffixes)
        raise DataError(
            f"data.path={path}: no *.txt file in this folder, but {there}; "
            f"name other files by a glob such as '{place / '**' / ('*' + below[0].suffix)}'"
        )
    if path and place.exists():
        raise DataError(f"data.path={path} is neither a file nor a folder")
    if not glob.has_magic(path):
        raise DataError(f"data.path={path}: no such file or folder")
    matches = {Path(match) for match in glob.glob(str(place), recursive=True)}  # noqa: PTH207 (absolute ones)
    if files := tuple(sorted(found for found in matches if found.is_file())):
        return files
    raise DataError(f"data.path={path}: no file matches")


# ------------------------------------------------------------------------------------ reading one file


@contextmanager
def _reading(path: Path) -> Iterator[BufferedReader]:
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _file_digest(path: Path) -> bytes:
    with _reading(path) as file:
        return hashlib.file_digest(file, "sha256").digest()


def _decode(path: Path, raw: bytes, offset: int = 0) -> str:
    """Decode `raw`, which starts at byte `offset` of the file."""
    if (position := raw.find(b"\0")) >= 0:
        raise DataError(f"{path} is binary or UTF-16 (NUL at byte {offset + position}); UTF-8 text is needed")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}; "
            "convert it, for example with iconv -f latin1 -t utf-8"
        ) from error
    return text.removeprefix("\ufeff") if offset == 0 else text


def _read_file(path: Path) -> Iterator[str]:
    with _reading(path) as file:
        raw = file.read()
    try:
        text = _decode(path, raw)
    except DataError:
        if path.suffix != ".py":
            raise
        text = _decode_python(path, raw)
    if text:
        yield text


def _decode_python(path: Path, raw: bytes) -> str:
    """Decode a Python source file that is not UTF-8 by the encoding it declares (PEP 263)."""
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return _decode(path, raw.decode(encoding).encode())
    except (SyntaxError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is neither UTF-8 nor in the encoding it declares: {error}") from error


def _decoded_lines(path: Path) -> Iterator[str]:
    offset = 0
    with _reading(path) as file:
        for raw in file:
            yield _decode(path, raw, offset)
            offset += len(raw)


def _read_lines(path: Path) -> Iterator[str]:
    return (_without_line_end(line) for line in _decoded_lines(path) if line.strip())


def _read_paragraphs(path: Path) -> Iterator[str]:
    for blank, lines in groupby(_decoded_lines(path), key=lambda line: not line.strip()):
        if not blank:
            yield _without_line_end("".join(lines))


def _without_line_end(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")


_READERS: dict[Document, Callable[[Path], Iterator[str]]] = {
    "file": _read_file,
    "paragraph": _read_paragraphs,
    "line": _read_lines,
}
