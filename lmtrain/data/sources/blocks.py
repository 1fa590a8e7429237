"""Files as blocks of decoded text: decompression, UTF-8, and what is wrong with the bytes.

Owns the largest piece of a file that is in memory at once. Knows no records.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import zstandard

from lmtrain.data.sources.bad_records import BadRecord, BadRecords
from lmtrain.errors import DataError

BLOCK_BYTES = 4_000_000
LONGEST_LINE = 64_000_000
"""Bytes of a line that is a record and so must be held whole."""

_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError)


@dataclass(frozen=True, slots=True)
class Block:
    """Whole lines of a file; or a piece of a line that is larger than a block."""

    text: str
    line: int  # number of its first line, from 1
    begins: bool = True  # False: goes on with a line
    ends: bool = True  # False: the line goes on in the next block
    flaw: BadRecord | None = None
    """The bytes are not UTF-8, or binary. Those that are not UTF-8 stand in the text as lone surrogates."""


class _ZstdStream(io.RawIOBase):
    """Decompresses one frame after another. The library's own stream ends silently where a file was cut off."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._inside = False  # a frame has begun and not ended
        self._compressed = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._ready:
            if not self._compressed and not (chunk := self._file.read(16_384)):
                if self._inside:
                    raise EOFError("the last frame is not complete")
                return 0
            compressed = self._compressed or chunk
            self._ready = memoryview(self._frame.decompress(compressed))
            self._compressed, self._inside = b"", not self._frame.eof
            if self._frame.eof:
                self._compressed = self._frame.unused_data
                self._frame = zstandard.ZstdDecompressor().decompressobj()
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


_DECOMPRESSED: dict[str, Callable[[BinaryIO], BinaryIO]] = {
    ".gz": lambda file: cast(BinaryIO, gzip.GzipFile(fileobj=file)),
    ".bz2": lambda file: cast(BinaryIO, bz2.BZ2File(file)),
    ".xz": lambda file: cast(BinaryIO, lzma.LZMAFile(file)),  # noqa: SIM115 (`reading` closes it)
    ".zst": lambda file: cast(BinaryIO, io.BufferedReader(_ZstdStream(file), 1 << 20)),
}
COMPRESSIONS = tuple(_DECOMPRESSED)
"""Endings of compressed files."""


def without_compression(name: str) -> str:
    """`a.jsonl` for `a.jsonl.gz`."""
    return next((name[: -len(ending)] for ending in COMPRESSIONS if name.lower().endswith(ending)), name)


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed by its ending. Raises DataError for what cannot be read, inside too."""
    unpack = _DECOMPRESSED.get(path.suffix.lower())
    with readable(path), path.open("rb", buffering=1 << 20) as file:
        if unpack is None:
            yield file
        else:
            with unpack(file) as unpacked:
                yield unpacked


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns the errors of reading a file into DataError."""
    try:
        yield
    except _DAMAGED as error:
        raise DataError(f"{path} is damaged or cut off: {error}; get the file again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def blocks(path: Path) -> Iterator[Block]:
    """Decode a file block by block. A byte-order mark at its start is dropped."""
    offset, line, begins = 0, 1, True
    for raw, ends in _pieces(path):
        text, flaw = _decode(raw, offset, line)
        if offset == 0:
            text = text.removeprefix("\ufeff")
        yield Block(text, line, begins, ends, flaw)
        offset += len(raw)
        line += raw.count(b"\n")
        begins = ends


def whole_lines(path: Path) -> Iterator[Block]:
    """The same, but no line is cut. Raises DataError for a line that is longer than LONGEST_LINE."""
    parts: list[Block] = []
    num_chars = 0
    for block in blocks(path):
        if block.begins and block.ends:
            yield block
            continue
        parts.append(block)
        num_chars += len(block.text)
        if num_chars > LONGEST_LINE:
            raise DataError(
                f"{path}:{parts[0].line} goes on for more than {LONGEST_LINE // 1_000_000} MB without an end"
            )
        if block.ends:
            flaw = next((part.flaw for part in parts if part.flaw), None)
            yield Block("".join(part.text for part in parts), parts[0].line, flaw=flaw)
            parts, num_chars = [], 0


def told(path: Path, found: Iterator[Block], bad: BadRecords) -> Iterator[Block]:
    """The same blocks; a flaw is told here, with its place in the file, unless the records with one are left out."""
    for block in found:
        if block.flaw and not bad.skipped:
            bad(str(path), block.flaw)
        yield block


def lines_of(text: str) -> list[str]:
    """The lines of a block without their ends, `\\n` or `\\r\\n`."""
    lines = text.removesuffix("\n").split("\n")
    return [line.removesuffix("\r") for line in lines] if "\r" in text else lines


def has_flaw(text: str) -> bool:
    """Whether a part of a block with a flaw has one."""
    return "\0" in text or not is_unicode(text)


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no half of a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _pieces(path: Path) -> Iterator[tuple[bytes, bool]]:
    """The bytes of each block, and whether it ends with its last line."""
    rest, inside = b"", False  # inside a line that is larger than a block
    with reading(path) as file:
        while chunk := file.read(BLOCK_BYTES - len(rest)):
            raw = rest + chunk
            if len(raw) < BLOCK_BYTES:
                rest = raw  # the end of the file
                continue
            # The line that is too large ends a block of its own.
            cut = 1 + (raw.find(b"\n") if inside else raw.rfind(b"\n"))
            inside = not cut
            cut = cut or _last_character(raw)
            yield raw[:cut], not inside
            rest = raw[cut:]
    if inside and 0 < (cut := 1 + rest.find(b"\n")) < len(rest):
        yield rest[:cut], True
        rest = rest[cut:]
    if rest:
        yield rest, True


def _last_character(raw: bytes) -> int:
    """Where the last character begins."""
    start = len(raw) - 1
    while start > len(raw) - 4 and raw[start] & 0xC0 == 0x80:
        start -= 1
    return start


def _decode(raw: bytes, offset: int, line: int) -> tuple[str, BadRecord | None]:
    """Decode `raw`, which starts at byte `offset` of the file and in this line."""

    def line_of(position: int) -> int:
        return line + raw.count(b"\n", 0, position)

    if (position := raw.find(b"\0")) >= 0:
        message = f"is binary or UTF-16 (NUL at byte {offset + position}) in line {line_of(position)}"
        flaw = BadRecord("binary or UTF-16", f"{message}; UTF-8 text is needed")
        return raw.decode(errors="surrogateescape"), flaw
    try:
        return raw.decode(), None
    except UnicodeDecodeError as error:
        where = f"offset {offset + error.start}, line {line_of(error.start)}"
        message = f"is not UTF-8: byte 0x{raw[error.start]:02x} at {where}"
        flaw = BadRecord("not UTF-8", f"{message}; convert it, for example with iconv -f latin1 -t utf-8")
        return raw.decode(errors="surrogateescape"), flaw
