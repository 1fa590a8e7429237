"""Files of records: JSON lines, JSON, CSV, TSV and Parquet, and what else the `datasets` library has a builder for.

Owns which format a file has. Lines are read in `json_rows` and `table_rows`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from lmtrain.data.records import Record
from lmtrain.data.sources.bad_records import BadRecord, BadRecords
from lmtrain.data.sources.blocks import COMPRESSIONS, readable, reading, without_compression
from lmtrain.data.sources.fields import Bound, Columns, Fields, Rows
from lmtrain.data.sources.files import SourceFile, in_short
from lmtrain.data.sources.json_rows import is_one_value, json_lines, json_value
from lmtrain.data.sources.table_rows import table_rows
from lmtrain.errors import DataError

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "datasets arrow",
}
"""Formats by the ending of file names, that of a compression aside; `datasets NAME` is a builder of the library."""

_BATCH_ROWS = 1_000  # of Parquet at once

_Item = TypeVar("_Item")


@dataclass(frozen=True)
class RecordReader:
    """A file of records."""

    file: SourceFile
    fields: Fields
    kind: str  # as in SUFFIXES
    options: Mapping[str, Any] = field(default_factory=dict)  # of that builder; `sep` of a CSV

    @property
    def files(self) -> tuple[SourceFile, ...]:
        """What is read."""
        return (self.file,)

    @property
    def format(self) -> str:
        """How the bytes become records."""
        return self.kind + json.dumps(self.options, sort_keys=True) if self.options else self.kind

    def records(self, bad: BadRecords) -> Iterator[Record]:
        """The records in order. A row that is none is bad; a file that lacks the columns is a DataError."""
        path = self.file.local()
        bound: Bound | None = None

        def columns(there: Sequence[str]) -> Sequence[str]:
            nonlocal bound
            try:
                bound = self.fields.bind(there)
            except BadRecord as error:
                raise DataError(f"{path} {error}") from error
            return bound.columns

        separator, rows = self._rows(path, columns, bad)
        for number, row in rows:
            try:
                if isinstance(row, BadRecord):
                    raise row
                bound = bound or self.fields.bind(list(row))
                record = bound.record(row)
            except BadRecord as error:
                bad(f"{path}{separator}{number}", error)
            else:
                if record is not None:
                    yield record

    def _rows(self, path: Path, columns: Columns, bad: BadRecords) -> tuple[str, Rows]:
        """The rows, and what stands between the file and the number of a row in a message."""
        match self.kind:
            case "json" if is_one_value(path):
                return ", record ", json_value(path)
            case "json" | "jsonl":
                return ":", json_lines(path, bad)
            case "csv" | "tsv":
                delimiter = self.options.get("sep", "\t" if self.kind == "tsv" else ",")
                return ":", table_rows(path, columns, bad, delimiter)
            case "parquet":
                return ", row ", _guarded(path, _parquet(path, columns))
        return ", record ", _guarded(path, _built(path, self.kind.removeprefix("datasets "), self.options))


def format_of(name: str) -> str | None:
    """The format of a file by its name, if it is one of records."""
    plain = without_compression(name).lower()
    return next((kind for suffix, kind in SUFFIXES.items() if plain.endswith(suffix)), None)


def _guarded(path: Path, items: Iterator[_Item]) -> Iterator[_Item]:
    """Turns whatever a library raises for a damaged file into DataError."""
    with readable(path), path.open("rb"):
        pass  # for what is not there, libraries have many words
    while True:
        try:
            with readable(path):
                item = next(items)
        except StopIteration:
            return
        except DataError:
            raise
        except Exception as error:
            raise DataError(f"{path} is damaged or of another format: {in_short(error)}") from error
        yield item


def _parquet(path: Path, columns: Columns) -> Rows:
    """The rows, of which a few are in memory at once."""
    import pyarrow.parquet

    with ExitStack() as stack:
        # Compressed once more, it cannot be read from its end.
        place = stack.enter_context(_unpacked(path)) if path.suffix.lower() in COMPRESSIONS else path
        file = stack.enter_context(pyarrow.parquet.ParquetFile(place, buffer_size=1 << 20, pre_buffer=False))
        names = columns(file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches(_BATCH_ROWS, columns=list(names)):
            batch.validate(full=True)  # damaged offsets would point anywhere
            values = [batch.column(name).to_pylist() for name in names]
            for row in zip(*values, strict=True):
                number += 1
                yield number, dict(zip(names, row, strict=True))


def _unpacked(path: Path) -> BinaryIO:
    copy = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    with reading(path) as file:
        shutil.copyfileobj(file, copy)
    copy.seek(0)
    return copy


def _built(path: Path, builder: str, options: Mapping[str, Any]) -> Rows:
    """The rows that a builder of the `datasets` library reads."""
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # the Hub need not hear of a file of this machine
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # an error of a file is raised, and told in a line
    with tempfile.TemporaryDirectory() as scratch:
        built = datasets.load_dataset_builder(
            builder, data_files={"train": [str(path)]}, cache_dir=scratch, **dict(options)
        )
        yield from enumerate(built.as_streaming_dataset(split="train"), 1)
