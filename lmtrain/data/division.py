"""Which document trains, validates or tests. Decides from digests and lengths; reads, tokenises and stores nothing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.prepared import SPLITS, SplitName
from lmtrain.errors import DataError

Digests = NDArray[np.uint64]
Sides = NDArray[np.uint8]

LEFT_OUT, CUT = len(SPLITS), len(SPLITS) + 1
"""Beside the places in SPLITS: a document of no split, and one that is cut where the training text ends."""

CHUNK = 1 << 20
"""Digests looked at at once."""

MIN_DOCUMENTS = 20
"""With fewer different documents than this, `auto` cuts the text itself: whole documents would be too coarse."""


@dataclass(frozen=True, kw_only=True)
class Division:
    """Where every document of a text goes."""

    sides: Sides  # (D,) a place in SPLITS, LEFT_OUT or CUT
    cuts: dict[int, tuple[int, int]]  # of each document that is CUT: characters before validation, before the test
    different: int  # documents that differ from all others


def place(split: SplitName) -> int:
    """The number of a split in `Division.sides`."""
    return SPLITS.index(split)


def divide_by_document(digests: Digests, different: Digests, *, val_fraction: float, test_fraction: float) -> Division:
    """Whole documents, the different ones in the order of their digests: the first validate, the next test.

    So equal documents are on one side, whatever the order of the files. At least one document for each fraction above
    zero. `different` are the digests sorted, each once. Raises DataError if nothing is left to train on.
    """
    num_val, num_test = (max(1, round(f * len(different))) if f else 0 for f in (val_fraction, test_fraction))
    if num_val + num_test >= len(different):
        needed = 1 + (val_fraction > 0) + (test_fraction > 0)
        if len(different) < needed:
            raise DataError(
                f"data.split=document needs {needed} different documents, found {len(different)}; use data.split=tail"
            )
        num_val, num_test = min(num_val, len(different) - needed + 1), min(num_test, 1)
    sides = np.zeros(len(digests), np.uint8)
    ends = np.append(different, np.uint64(2**64 - 1))  # none is below the last one but by chance of 2**-64
    sides[digests < ends[num_val + num_test]] = place("test")
    sides[digests < ends[num_val]] = place("val")
    return Division(sides=sides, cuts={}, different=len(different))


def divide_tail(
    digests: Digests, lengths: NDArray[np.int64], *, val_fraction: float, test_fraction: float, divisible: bool
) -> Division:
    """The end of the text, by characters; the document that the cut falls into is cut, if it is `divisible`.

    Equal documents count once and are treated alike, so that no copy of a training text is validated on. Raises
    DataError if there is too little text to have every part.
    """
    _, first, inverse = np.unique(digests, return_index=True, return_inverse=True)
    originals = np.sort(first)
    sizes = lengths[originals] if divisible else np.ones(len(originals), np.int64)
    total = int(sizes.sum())
    parts = 1 + (val_fraction > 0) + (test_fraction > 0)
    if total < parts:
        what = f"{total} character{'s' if total != 1 else ''}" if divisible else f"{total} different documents"
        raise DataError(f"the text has {what}: too little to train and to validate")
    # In decimals, as they were typed: 0.55 of 200 is 110.
    val, test = (Fraction(str(fraction)) for fraction in (val_fraction, test_fraction))
    test_start = min(int(total * (1 - test)), total - 1) if test else total
    val_start = min(max(1, int(total * (1 - val - test))), test_start - 1) if val else test_start
    starts = np.empty(len(digests), np.int64)
    starts[originals] = np.cumsum(sizes) - sizes
    starts = starts[first[inverse]]  # copies lie where their original does
    ends = starts + (lengths if divisible else 1)
    sides = np.select(
        [ends <= val_start, (starts >= val_start) & (ends <= test_start), starts >= test_start],
        [place("train"), place("val"), place("test")],
        default=CUT,
    ).astype(np.uint8)
    cut = np.flatnonzero(sides == CUT)
    return Division(
        sides=sides,
        cuts={int(n): (max(0, val_start - int(starts[n])), test_start - int(starts[n])) for n in cut},
        different=len(originals),
    )


def divide(
    digests: Digests,
    lengths: NDArray[np.int64],
    mode: Literal["auto", "document", "tail"],
    *,
    val_fraction: float,
    test_fraction: float,
    divisible: bool,
) -> Division:
    """Divide as `mode` says; `auto`: by documents if there are enough different ones, else the tail.

    `lengths` are needed for the tail only.
    """
    different = sorted_once(digests)
    if val_fraction == test_fraction == 0:  # the data have splits of their own
        return Division(sides=np.zeros(len(digests), np.uint8), cuts={}, different=len(different))
    if mode == "document" or (mode == "auto" and len(different) >= MIN_DOCUMENTS):
        return divide_by_document(digests, different, val_fraction=val_fraction, test_fraction=test_fraction)
    return divide_tail(digests, lengths, val_fraction=val_fraction, test_fraction=test_fraction, divisible=divisible)


def sorted_once(digests: Digests) -> Digests:
    """What `np.unique` gives, in a third of the memory: there may be very many."""
    ordered = np.sort(digests)
    length = 0
    for start in range(0, len(ordered), CHUNK):
        part = ordered[start : start + CHUNK]
        before = ordered[length - 1 : length] if length else ~part[:1]
        kept = part[np.concatenate([before, part[:-1]]) != part]
        ordered[length : length + len(kept)] = kept
        length += len(kept)
    return ordered[:length]


def leave_out_copies(digests: Digests, division: Division) -> Division:
    """The same without documents that are equal to an earlier one."""
    _, first = np.unique(digests, return_index=True)
    sides = np.full(len(digests), LEFT_OUT, np.uint8)
    sides[first] = division.sides[first]
    cuts = {number: cut for number, cut in division.cuts.items() if sides[number] == CUT}
    return dataclasses.replace(division, sides=sides, cuts=cuts)
