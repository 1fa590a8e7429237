"""The first reading of a corpus: which documents there are, which are kept, and where each of them goes.

Owns what is left out and counted. Tokenises nothing; how documents are divided is in `division`.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lmtrain.config.schema import DataConfig
from lmtrain.data.division import CUT, LEFT_OUT, Division, Sides, divide, leave_out_copies, place
from lmtrain.data.prepared import SPLITS, SplitName
from lmtrain.data.records import Conversation, Fragment, Pair, Record
from lmtrain.data.sources import Corpus
from lmtrain.errors import DataError

PIECE_TOKENS = 1 << 20
"""Of an array of tokens that is read at once."""


class Stretch(NamedTuple):
    """A document, or a part of one, with the split it belongs to."""

    split: SplitName
    record: Record  # a fragment's text
    closes: bool  # the document has no more of this split
    ends: bool  # ... and ends here: the end token follows


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Where the documents of a corpus go, in each of its own splits."""

    sides: Sides  # of all documents, in the order they were read; see `Division`
    divisions: dict[SplitName, Division]
    splits: tuple[SplitName, ...]  # that they go to
    num_chars: int  # of all documents
    duplicates: int  # documents equal to an earlier one
    left_out: dict[str, int]  # documents that are in no split, by the reason


def survey(
    corpus: Corpus,
    data: DataConfig,
    report: Callable[[str], None],
    see: Callable[[str, int], None] | None = None,
) -> Survey:
    """Read a corpus once. Raises DataError for what cannot be read, or if a split would be empty.

    `see` is shown every text, with the number of its document.
    """
    left_out: Counter[str] = Counter({f"shorter than data.min_chars={data.min_chars}": 0})
    digests, lengths = array("Q"), array("q")
    numbers: dict[SplitName, range] = {}
    divisible = True
    # Validation comes first: a copy of its documents in the training text is the one that is left out.
    for split in reversed(SPLITS):
        if split not in corpus.splits:
            continue
        first = len(digests)
        hasher, length = hashlib.sha256(), 0
        for record in _kept(corpus, data, split, left_out):
            if see is not None:
                for text in texts_of(record):
                    see(text, len(digests))
            hasher.update(_content(record))
            length += size_of(record)
            if isinstance(record, Fragment) and not record.last:
                continue
            digests.append(int.from_bytes(hasher.digest()[:8]))
            lengths.append(length)
            divisible = divisible and not isinstance(record, Pair | Conversation)
            hasher, length = hashlib.sha256(), 0
            if len(digests) % 100_000 == 0:
                report(f"reading {corpus.name}: {len(digests):,} documents")
        numbers[split] = range(first, len(digests))
        _require_documents(corpus, data, split, len(digests) - first)
    all_digests, all_lengths = np.frombuffer(digests, np.uint64), np.frombuffer(lengths, np.int64)
    own = numbers["train"]
    division = divide(
        all_digests[own.start :],
        all_lengths[own.start :],
        data.split,
        val_fraction=0.0 if "val" in numbers else data.val_fraction,
        test_fraction=0.0 if "test" in numbers else data.test_fraction,
        divisible=divisible,
    )
    sides = np.empty(len(all_digests), np.uint8)
    for split, among in numbers.items():
        sides[among.start : among.stop] = place(split)
    sides[own.start :] = division.sides
    together = Division(sides=sides, cuts={own.start + number: cut for number, cut in division.cuts.items()})
    splits = [name for name in SPLITS if name != "test" or "test" in numbers or data.test_fraction]
    duplicates = len(all_digests) - len(np.unique(all_digests))
    if data.deduplicate:
        together = leave_out_copies(all_digests, together)
        left_out["equal to an earlier one (data.deduplicate)"] = duplicates
        if not np.isin(together.sides, [place("train"), CUT]).any():
            raise DataError(f"every training document of {corpus.name} is one of another split (data.deduplicate)")
    return Survey(
        sides=together.sides,
        divisions={split: _part(together, among) for split, among in numbers.items()},
        splits=tuple(splits),
        num_chars=int(all_lengths.sum()),
        duplicates=duplicates,
        left_out=dict(left_out),
    )


def stretches(corpus: Corpus, data: DataConfig, found: Survey) -> Iterator[Stretch]:
    """Every document that is kept, with its split, in the order of the corpus; always the same ones."""
    for split, division in found.divisions.items():
        number, position = -1, 0
        for record in _kept(corpus, data, split, Counter()):
            if not isinstance(record, Fragment) or record.first:
                number, position = number + 1, 0
            if number >= len(division.sides):
                raise DataError(f"{corpus.name} changed while it was being prepared; start again")
            side = division.sides[number]
            if side == CUT:
                yield from _cut(record, position, division.cuts[number])
            elif side != LEFT_OUT:
                last = not isinstance(record, Fragment) or record.last
                content = record.text if isinstance(record, Fragment) else record
                yield from _in_pieces(Stretch(SPLITS[side], content, last, last))
            position += size_of(record)
        if number + 1 < len(division.sides):
            raise DataError(f"{corpus.name} changed while it was being prepared; start again")


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
        begins = not isinstance(record, Fragment) or record.first
        if begins and not isinstance(record, Fragment) and size_of(record) < data.min_chars:
            left_out[f"shorter than data.min_chars={data.min_chars}"] += 1
            continue
        if begins and kept == data.max_documents:
            return
        kept += begins
        yield record


def _content(record: Record) -> bytes | memoryview:
    match record:
        case str():
            return _utf8(record)
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
    """An array may be the whole corpus, on disk: it is read piece by piece."""
    split, ids, closes, ends = stretch
    if not isinstance(ids, np.ndarray) or len(ids) <= PIECE_TOKENS:
        yield stretch
        return
    for start in range(0, len(ids), PIECE_TOKENS):
        last = start + PIECE_TOKENS >= len(ids)
        yield Stretch(split, ids[start : start + PIECE_TOKENS], closes and last, ends and last)


def _part(division: Division, among: range) -> Division:
    cuts = {number - among.start: cut for number, cut in division.cuts.items() if number in among}
    return Division(sides=division.sides[among.start : among.stop], cuts=cuts)


def _require_documents(corpus: Corpus, data: DataConfig, split: SplitName, count: int) -> None:
    if count == 0:
        which = "" if split == "train" else {"val": "the validation split of ", "test": "the test split of "}[split]
        raise DataError(
            f"{which}{corpus.name} has no document of at least {data.min_chars} characters (data.min_chars)"
        )
