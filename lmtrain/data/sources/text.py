"""Text files as documents: a file, a paragraph or a line each."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Literal

from lmtrain.data.records import Fragment
from lmtrain.data.sources.bad_records import BadRecord, BadRecords
from lmtrain.data.sources.blocks import BLOCK_BYTES, Block, blocks, has_flaw, lines_of, reading, told
from lmtrain.data.sources.files import SourceFile
from lmtrain.errors import DataError

Document = Literal["file", "paragraph", "line"]

_BLANK_LINES = re.compile(r"(?:[^\S\n]*\n)+")
_GAP = re.compile(r"\n(?:[^\S\n]*\n)+")  # the end of a line and the blank ones after it


@dataclass(frozen=True)
class TextReader:
    """A file of UTF-8 text.

    A document is the whole `file`, a `paragraph` (lines up to a blank one) or a `line`; one that is larger than a block
    comes as fragments. Line ends inside a document stay as they are in the file; those between documents belong to
    none, nor do blank lines between them and a byte-order mark at the start.
    """

    file: SourceFile
    document: Document = "file"

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """What is read."""
        return (self.file,)

    @property
    def format(self) -> str:
        """How the bytes become records; plain text has no name, as its fingerprints are older than other formats."""
        return ""

    def records(self, bad: BadRecords) -> Iterator[str | Fragment]:
        """The documents in order. What is left out as bad is a line, a paragraph or a file that cannot be decoded."""
        path = self.file.local()
        match self.document:
            case "file":
                return _whole(path, bad)
            case "paragraph":
                return _paragraphs(path, bad)
            case "line":
                return chain.from_iterable(_lines(path, bad))


def _whole(path: Path, bad: BadRecords) -> Iterator[str | Fragment]:
    previous, first = None, True
    for block in blocks(path):
        if previous is not None:
            yield Fragment(_sound(path, previous), first=first, last=False)
            first = False
        previous = block
    if previous is None:
        return
    if not first:
        yield Fragment(_sound(path, previous), first=False, last=True)
    elif previous.flaw and path.suffix == ".py":
        yield from _python(path, bad)
    elif previous.flaw:
        bad(str(path), previous.flaw)
    elif previous.text:
        yield previous.text


def _sound(path: Path, block: Block) -> str:
    """The text of a fragment. Others of its document have been handed out, so it is too late to leave that out."""
    if block.flaw:
        raise DataError(f"{path} {block.flaw}") from block.flaw
    return block.text


def _python(path: Path, bad: BadRecords) -> Iterator[str]:
    """A Python source file that is not UTF-8, by the encoding it declares (PEP 263)."""
    with reading(path) as file:
        raw = file.read()
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        text = raw.decode(encoding)
    except (SyntaxError, UnicodeDecodeError) as error:
        bad(str(path), BadRecord("not UTF-8", f"is neither UTF-8 nor in the encoding it declares: {error}"))
        return
    if "\0" in text:
        bad(str(path), BadRecord("binary or UTF-16", "is binary or UTF-16; UTF-8 text is needed"))
    else:
        yield text


def _lines(path: Path, bad: BadRecords) -> Iterator[list[str] | list[Fragment]]:
    """The lines of a block at once."""
    for block in told(path, blocks(path), bad):
        if not (block.begins and block.ends):
            text = _sound(path, block)
            text = _without_line_end(text) if block.ends else text
            yield [Fragment(text, first=block.begins, last=block.ends)]
            continue
        lines = lines_of(block.text)
        if block.flaw:
            lines = list(_unflawed(path, lines, block, bad))
        yield [line for line in lines if line and not line.isspace()]


def _unflawed(path: Path, texts: Sequence[str], block: Block, bad: BadRecords) -> Iterator[str]:
    assert block.flaw
    for text in texts:
        if has_flaw(text):
            bad(str(path), block.flaw)
        else:
            yield text


@dataclass
class _Paragraph:
    """Lines that are collected up to a blank one."""

    path: Path
    bad: BadRecords
    parts: list[Block] = field(default_factory=list)
    fragments: int = 0  # handed out already

    def add(self, text: str, block: Block) -> Iterator[Fragment]:
        """Collect a part of this block; hand out what was collected before if there would be too much."""
        if sum(len(part.text) for part in self.parts) + len(text) > BLOCK_BYTES:
            for part in self.parts:
                yield Fragment(_sound(self.path, part), first=self.fragments == 0, last=False)
                self.fragments += 1
            self.parts = []
        if text:
            self.parts.append(replace(block, text=text))

    def close(self) -> Iterator[str | Fragment]:
        """Hand out the end of the paragraph, if there is one."""
        parts, fragments = self.parts, self.fragments
        self.parts, self.fragments = [], 0
        text = _without_line_end("".join(part.text for part in parts))
        flaw = next((part.flaw for part in parts if part.flaw), None)
        if flaw and has_flaw(text):
            if fragments:
                raise DataError(f"{self.path} {flaw}") from flaw
            self.bad(str(self.path), flaw)
        elif fragments:
            yield Fragment(text, first=False, last=True)
        elif text:
            yield text


def _paragraphs(path: Path, bad: BadRecords) -> Iterator[str | Fragment]:
    paragraph = _Paragraph(path, bad)
    for block in told(path, blocks(path), bad):
        text = block.text
        if block.begins and (blank := _BLANK_LINES.match(text)):
            yield from paragraph.close()
            text = text[blank.end() :]
        if block.ends and not text.endswith("\n"):  # the end of the file
            head, end_of_line, last_line = text.rpartition("\n")
            text = head + end_of_line if last_line.isspace() and (block.begins or end_of_line) else text
        first, *others = _GAP.split(text)
        yield from paragraph.add(first, block)
        if others:
            yield from paragraph.close()
            whole = [_without_line_end(part) for part in others[:-1]]
            yield from _unflawed(path, whole, block, bad) if block.flaw else whole
            yield from paragraph.add(others[-1], block)
    yield from paragraph.close()


def _without_line_end(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")
