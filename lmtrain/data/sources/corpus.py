"""A corpus: the records of the files of one source, split by split, and a fingerprint of its content."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, Protocol

from lmtrain.data.prepared import SPLITS, SplitName
from lmtrain.data.records import Record
from lmtrain.data.sources.bad_records import BadRecords
from lmtrain.data.sources.files import LocalFile, SourceFile, read_note, write_note


class Reader(Protocol):
    """Reads the records of one file, or of files that belong together."""

    @property
    def files(self) -> Sequence[SourceFile]:
        """What is read."""

    @property
    def format(self) -> str:
        """How the bytes become records, as far as the settings do not say it."""

    def records(self, bad: BadRecords) -> Iterator[Record]:
        """The records in order, in bounded memory, always the same. Raises DataError for what cannot be read."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The records of one source."""

    name: str  # in words, such as "Python 3.11 standard library"
    readers: Mapping[SplitName, Sequence[Reader]]  # of every split that is given; of training always
    on_bad_record: Literal["error", "skip"] = "error"

    @property
    def splits(self) -> tuple[SplitName, ...]:
        """Train, and those that are given beside it."""
        return tuple(split for split in SPLITS if split in self.readers)

    @property
    def num_bytes(self) -> int:
        """Size of the files of this machine, compressed as they are; those not fetched yet are not counted."""
        return sum(file.state()[1] for file in self._files() if isinstance(file, LocalFile))

    def records(self, split: SplitName = "train", on_skip: Callable[[str], None] | None = None) -> Iterator[Record]:
        """Every record of a split in order, in bounded memory; the same ones each time.

        A text is never empty; one too large for memory comes as fragments. `on_skip` gets the reason of every record
        that is left out under `data.on_bad_record=skip`. Files are opened, and fetched, when their turn comes. Raises
        DataError for what cannot be read, naming file and line.
        """
        bad = BadRecords(skipped=self.on_bad_record == "skip", on_skip=on_skip)
        return chain.from_iterable(reader.records(bad) for reader in self.readers[split])

    def fingerprint(self, cache_dir: Path) -> str:
        """The sha256 of the content of all files in order; neither names nor folders matter.

        It is noted under `cache_dir` by path, size and modification time of every file, so that files which did not
        change are not read again. Files of the Hub are known by their commit and not fetched.
        """
        formats = [[split, [reader.format for reader in self.readers[split]]] for split in self.splits]
        states = [file.state() for file in self._files()]
        key = ["content", formats, states]
        known = read_note(cache_dir, key)
        if known is not None and len(known) == 2 * hashlib.sha256().digest_size:  # else cut off by a crash
            return known
        content = hashlib.sha256()
        for split in self.splits:
            # Training text alone, in plain files, is the sum of their sums.
            content.update(b"" if self.splits == ("train",) else split.encode())
            for reader in self.readers[split]:
                content.update(b"".join(file.digest() for file in reader.files) + reader.format.encode())
        write_note(cache_dir, key, content.hexdigest(), states)
        return content.hexdigest()

    def _files(self) -> Iterator[SourceFile]:
        for split in self.splits:
            for reader in self.readers[split]:
                yield from reader.files
