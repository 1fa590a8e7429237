"""Rows of CSV and TSV, by Python's csv: a builder of the `datasets` library cannot say in which line a bad row is."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from lmtrain.data.sources.bad_records import BadRecord, BadRecords
from lmtrain.data.sources.blocks import LONGEST_LINE, has_flaw, told, whole_lines
from lmtrain.data.sources.fields import Columns, Rows
from lmtrain.errors import DataError


def table_rows(path: Path, columns: Columns, bad: BadRecords, delimiter: str) -> Rows:
    """The rows below the first line, which names the columns. Quotes must be as RFC 4180 wants them."""
    csv.field_size_limit(LONGEST_LINE)  # of the whole process: Python has no other
    lines = _TableLines(path, bad)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    places: dict[str, int] = {}
    end = 0
    while True:
        number = end + 1
        try:
            cells = next(reader)
            flaw = BadRecord("not UTF-8", "is not UTF-8") if lines.flawed and any(map(has_flaw, cells)) else None
        except StopIteration:
            return
        except csv.Error as error:
            if lines.ended:
                raise DataError(f"{path}:{number} opens a quote that is never closed") from error
            cells, flaw = [], BadRecord("not valid CSV", f"is not valid CSV: {error}")
        end = reader.line_num
        if header is None and (cells or flaw):
            if flaw:
                raise DataError(f"{path}:{number}, which should name the columns, {flaw}")
            header = cells
            places = {name: _place(path, header, name) for name in columns(header)}
        elif flaw:
            yield number, flaw
        elif header is not None and cells and len(cells) != len(header):
            message = f"has {len(cells)} cells, and the first line names {len(header)} columns"
            yield number, BadRecord("wrong number of cells", message)
        elif cells:
            yield number, {name: cells[place] for name, place in places.items()}


class _TableLines:
    """The lines of a file with their ends, as the csv module wants them."""

    def __init__(self, path: Path, bad: BadRecords) -> None:
        self.flawed = False  # some block so far was not UTF-8
        self.ended = False
        self._path = path
        self._bad = bad

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self._blocks())

    def _blocks(self) -> Iterator[Iterable[str]]:
        for block in told(self._path, whole_lines(self._path), self._bad):
            self.flawed = self.flawed or block.flaw is not None
            yield io.StringIO(block.text, newline="\n")
        self.ended = True


def _place(path: Path, header: Sequence[str], name: str) -> int:
    if header.count(name) > 1:
        raise DataError(f"{path} has several columns {name!r}")
    return header.index(name)
