"""Pairs in two files whose lines belong together, such as train.de and train.en."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from lmtrain.data.records import Pair
from lmtrain.data.sources.bad_records import BadRecord, BadRecords
from lmtrain.data.sources.blocks import COMPRESSIONS, has_flaw, lines_of, told, whole_lines, without_compression
from lmtrain.data.sources.fields import pair_of
from lmtrain.data.sources.files import LocalFile, SourceFile
from lmtrain.errors import DataError


@dataclass(frozen=True)
class AlignedReader:
    """Two files: the lines of one are answered by those of the other."""

    source: SourceFile
    target: SourceFile

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """What is read."""
        return (self.source, self.target)

    @property
    def format(self) -> str:
        """How the bytes become records."""
        return "aligned"

    def records(self, bad: BadRecords) -> Iterator[Pair]:
        """The pairs in order. One with an empty side is bad; different numbers of lines are a DataError."""
        source, target = self.source.local(), self.target.local()
        number = 0
        lines = zip_longest(_lines(source, bad), _lines(target, bad))
        for number, (left, right) in enumerate(lines, 1):
            if left is None or right is None:
                shorter = number - 1
                longer = number + sum(1 for _ in lines)
                counts = (shorter, longer) if left is None else (longer, shorter)
                raise DataError(
                    f"the lines of {source} and {target} do not belong together: "
                    f"there are {counts[0]:,} and {counts[1]:,} of them"
                )
            try:
                yield pair_of(_sound(left), _sound(right))
            except BadRecord as error:
                if left or right:
                    bad(f"{source}:{number}", error)


def _lines(path: Path, bad: BadRecords) -> Iterator[str | BadRecord]:
    """Every line, the blank ones too; in place of one that cannot be decoded, what is wrong with it."""
    for block in told(path, whole_lines(path), bad):
        if block.flaw is None:
            yield from lines_of(block.text)
        else:
            yield from (block.flaw if has_flaw(line) else line for line in lines_of(block.text))


def _sound(line: str | BadRecord) -> str:
    if isinstance(line, BadRecord):
        raise line
    return line


def has_ending(name: str, ending: str) -> bool:
    """Whether a file name ends so, the ending of a compression aside: de for train.de.gz."""
    return without_compression(name).endswith(f".{ending}")


def counterpart(file: SourceFile, ending: str, other: str) -> LocalFile | None:
    """The file beside this one that has another ending, with any compression."""
    assert isinstance(file, LocalFile)
    stem = without_compression(file.name).removesuffix(ending)
    beside = (file.path.with_name(f"{stem}{other}{compression}") for compression in ("", *COMPRESSIONS))
    return next((LocalFile(path) for path in beside if path.is_file()), None)
