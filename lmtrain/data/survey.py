"""The first reading of a corpus: which documents there are, which are kept, and where each of them goes.

Owns what is left out and counted. Tokenises nothing; how documents are divided is in `division`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmtrain.config.schema import DataConfig
from lmtrain.data.division import (
    CUT,
    LEFT_OUT,
    MIN_DOCUMENTS,
    Division,
    Sides,
    divide,
    leave_out_copies,
    place,
    sorted_once,
)
from lmtrain.data.prepared import SPLITS, SplitName
from lmtrain.data.records import Conversation, Fragment, Pair, Record
from lmtrain.data.sources import Corpus
from lmtrain.errors import DataError

PIECE = 1 << 20
"""Characters, or tokens of an array, that are encoded at once."""


class Stretch(NamedTuple):
    """A document, or a part of one, with the split it belongs to."""

    split: SplitName
    record: Record  # a fragment's text
    closes: bool  # the document has no more of this split
    ends: bool  # ... and ends here: the end token follows


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Where the documents of a corpus go, in each of its own splits."""

    divisions: dict[SplitName, Division]  # in the order they were read
    splits: tuple[SplitName, ...]  # that they go to
    num_chars: int  # of all documents
    duplicates: int  # documents equal to an earlier one
    left_out: dict[str, int]  # documents that are in no split, by the reason

    @property
    def sides(self) -> Sides:
        """Those of all documents."""
        return np.concatenate([division.sides for division in self.divisions.values()])


def survey(
    corpus: Corpus,
    data: DataConfig,
    report: Callable[[str], None],
    see: Callable[[str, int], None] | None = None,
    *,
    make_splits: bool = True,
) -> Survey:
    """Read a corpus once. Raises DataError for what cannot be read, or if a split would be empty.

    `see` is shown every text, with the number of its document. Without
    `make_splits`, the splits are those that the corpus has of its own.
    """
    left_out: Counter[str] = Counter({f"shorter than data.min_chars={data.min_chars}": 0})
    found = _Listing(data)
    numbers: dict[SplitName, range] = {}
    # Validation comes first: a copy of its documents in the training text is the one that is left out.
    for split in reversed(SPLITS):
        if split in corpus.splits:
            first = found.begin(split)
            for record in _kept(corpus, data, split, left_out):
                if see is not None:
                    for text in texts_of(record):
                        see(text, len(found.digests))
                found.add(record)
                if len(found.digests) % 100_000 == 0:
                    report(f"reading {corpus.name}: {len(found.digests):,} documents")
            numbers[split] = range(first, len(found.digests))
            _require_documents(corpus, data, split, len(numbers[split]), left_out)
    digests = np.frombuffer(found.digests, np.uint64)
    wanted: dict[SplitName, float] = {"val": data.val_fraction, "test": data.test_fraction}
    fractions = {split: 0.0 if split in numbers or not make_splits else wanted[split] for split in wanted}
    division = divide(
        digests[numbers["train"].start :],
        np.frombuffer(found.lengths, np.int64),
        data.split,
        val_fraction=fractions["val"],
        test_fraction=fractions["test"],
        divisible=found.divisible,
    )
    together = _with_given(division, numbers)
    duplicates = len(digests) - (division.different if len(numbers) == 1 else len(sorted_once(digests)))
    if data.deduplicate:
        together = leave_out_copies(digests, together)
        left_out["equal to an earlier one (data.deduplicate)"] = duplicates
        if not np.isin(together.sides, [place("train"), CUT]).any():
            raise DataError(f"every training document of {corpus.name} is one of another split (data.deduplicate)")
    return Survey(
        divisions={split: _part(together, among) for split, among in numbers.items()},
        splits=tuple(name for name in SPLITS if name in numbers or fractions[name]),
        num_chars=found.num_chars,
        duplicates=duplicates,
        left_out=dict(left_out),
    )


class _Listing:
    """A digest of every document, and the lengths of training documents as long as they may be needed."""

    def __init__(self, data: DataConfig) -> None:
        self.digests, self.lengths = array("Q"), array("q")
        self.num_chars = 0
        self.divisible = True  # no document must stay whole
        self._mode = data.split
        self._different: set[int] = set()
        self._hasher, self._length = hashlib.sha256(), 0  # of the document that is being read

    def begin(self, split: SplitName) -> int:
        """What comes is of this split; returns the number of its first document."""
        self._measures = split == "train" and self._mode != "document"
        return len(self.digests)

    def add(self, record: Record) -> None:
        self._hasher.update(_content(record))
        self._length += size_of(record)
        if isinstance(record, Fragment) and not record.last:
            return
        digest, length = int.from_bytes(self._hasher.digest()[:8]), self._length
        self._hasher, self._length = hashlib.sha256(), 0
        self.digests.append(digest)
        self.num_chars += length
        if isinstance(record, Pair | Conversation):
            self.divisible = False
        if self._measures:
            self.lengths.append(length)
            if self._mode == "auto":  # with enough documents, whole ones are divided
                self._different.add(digest)
                self._measures = len(self._different) < MIN_DOCUMENTS


def _with_given(division: Division, numbers: Mapping[SplitName, range]) -> Division:
    """The division of the training documents, with those of the splits that are given before them."""
    sides = np.empty(max(among.stop for among in numbers.values()), np.uint8)
    for split, among in numbers.items():
        sides[among.start : among.stop] = place(split)
    own = numbers["train"].start
    sides[own:] = division.sides
    cuts = {own + number: cut for number, cut in division.cuts.items()}
    return Division(sides=sides, cuts=cuts, different=division.different)


def stretches(corpus: Corpus, data: DataConfig, found: Survey) -> Iterator[Stretch]:
    """Every document that is kept, with its split, in the order of the corpus; always the same ones."""
    changed = DataError(f"{corpus.name} changed while it was being prepared; start again")
    for split, division in found.divisions.items():
        sides = division.sides.tobytes()  # looked up one by one, which arrays are slow at
        number, position = -1, 0
        for record in _kept(corpus, data, split, Counter()):
            if not isinstance(record, Fragment) or record.first:
                number, position = number + 1, 0
            if number >= len(sides):
                raise changed
            side = sides[number]
            if side == CUT:
                yield from _cut(record, position, division.cuts[number])
            elif side != LEFT_OUT:
                if isinstance(record, str) and len(record) <= PIECE:
                    yield Stretch(SPLITS[side], record, True, True)
                    continue
                last = not isinstance(record, Fragment) or record.last
                content = record.text if isinstance(record, Fragment) else record
                yield from _in_pieces(Stretch(SPLITS[side], content, last, last))
            position += size_of(record)
        if number + 1 < len(sides):
            raise changed


def texts_of(record: Record) -> Sequence[str]:
    """What is to be tokenised."""
    match record:
        case str():
            return (record,)
        case Fragment():
            return (record.text,)
        case Pair():
            return record.source, record.target
        case Conversation():
            return [message.content for message in record.messages]
    return ()


def size_of(record: Record) -> int:
    """Characters of a document, or tokens if it is tokenised."""
    if isinstance(record, str):  # most are
        return len(record)
    match record:
        case Fragment():
            return len(record.text)
        case Pair():
            return len(record.source) + len(record.target)
        case Conversation():
            return sum(len(message.content) for message in record.messages)
    return len(record)


def _kept(corpus: Corpus, data: DataConfig, split: SplitName, left_out: Counter[str]) -> Iterator[Record]:
    """The records of the documents that are long enough, up to `data.max_documents`."""

    def skip(reason: str) -> None:
        left_out[f"{reason} (data.on_bad_record=skip)"] += 1

    kept = 0
    for record in corpus.records(split, skip):
        if not isinstance(record, Fragment):
            if size_of(record) < data.min_chars:
                left_out[f"shorter than data.min_chars={data.min_chars}"] += 1
                continue
            begins = True
        else:
            begins = record.first  # what comes in fragments is long enough
        if begins and kept == data.max_documents:
            return
        kept += begins
        yield record


def _content(record: Record) -> bytes | memoryview:
    if isinstance(record, str):
        return _utf8(record)
    match record:
        case Fragment():
            return _utf8(record.text)
        case Pair():
            return _utf8(json.dumps([record.source, record.target]))
        case Conversation():
            return _utf8(json.dumps([[message.role, message.content] for message in record.messages]))
    return np.ascontiguousarray(record).data  # no copy of an array on disk


def _utf8(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _cut(record: Record, position: int, cuts: tuple[int, int]) -> Iterator[Stretch]:
    """The parts of a document, or of a fragment that begins at `position`, by the places it is cut at."""
    text = record.text if isinstance(record, Fragment) else record
    assert not isinstance(text, Pair | Conversation)
    last = not isinstance(record, Fragment) or record.last
    end = position + len(text)
    for split, start, stop in zip(SPLITS, (0, *cuts), (*cuts, None), strict=True):
        stop_here = end if stop is None else min(stop, end)
        part = text[max(start - position, 0) : max(stop_here - position, 0)]
        if len(part):
            finished = last and stop_here == end
            yield from _in_pieces(Stretch(split, part, closes=finished or stop == stop_here, ends=finished))


def _in_pieces(stretch: Stretch) -> Iterator[Stretch]:
    """A text that is longer than a piece is cut after line ends; an array may be the whole corpus, on disk."""
    split, record, closes, ends = stretch
    if isinstance(record, Pair | Conversation | Fragment) or len(record) <= PIECE:
        yield stretch
        return
    start = 0
    while start < len(record):
        stop = min(start + PIECE, len(record))
        if isinstance(record, str) and stop < len(record):
            stop = record.rfind("\n", start, stop) + 1 or stop
        last = stop == len(record)
        yield Stretch(split, record[start:stop], closes and last, ends and last)
        start = stop


def _part(division: Division, among: range) -> Division:
    cuts = {number - among.start: cut for number, cut in division.cuts.items() if number in among}
    return dataclasses.replace(division, sides=division.sides[among.start : among.stop], cuts=cuts)


def _require_documents(
    corpus: Corpus, data: DataConfig, split: SplitName, count: int, left_out: Mapping[str, int]
) -> None:
    if count:
        return
    path = getattr(data, f"{split}_path", None)
    name = corpus.name if split == "train" else f"the {split} split of {corpus.name}"
    name = name if path is None else f"data.{split}_path={path}"
    reasons = [f"{number:,} {reason}" for reason, number in left_out.items() if number]
    what = f"; left out: {', '.join(reasons)}" if reasons else ""
    raise DataError(f"{name} has no document of at least {data.min_chars} characters (data.min_chars){what}")
