"""Which text trains and which validates. Decides from the text alone; reads, tokenises and stores nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from lmtrain.errors import DataError

# With fewer different documents than this, `auto` cuts the text itself: whole documents would be too coarse.
_MIN_DOCUMENTS = 20


@dataclass(frozen=True, kw_only=True)
class Split:
    """For every different document, how many of its leading characters are for training.

    Equal documents have equal text on each side, so that no copy of a training text is validated on.
    """

    train_chars: dict[bytes, int]  # digest of the document → characters
    duplicates: int  # documents equal to an earlier one
    num_chars: int  # of all documents, duplicates too

    def parts(self, text: str) -> tuple[str, str]:
        """The training and the validation part; one is empty unless the document is cut."""
        cut = self.train_chars.get(_digest(text))
        if cut is None:
            raise DataError("a file changed while it was being prepared; start again")
        return text[:cut], text[cut:]


def split_documents(documents: Iterable[str], mode: Literal["auto", "document", "tail"], val_fraction: float) -> Split:
    """Choose about `val_fraction` for validation, at least one document or character, and not everything.

    `document`: the different documents in the order of their sha256, whatever the order of the files; the
    first are for validation. `tail`: the end of the text by characters, a document being cut where it falls.
    `auto`: `document` if there are 20 different documents, else `tail`. Raises DataError if there is
    too little text to have both parts.
    """
    lengths: dict[bytes, int] = {}
    num_documents = num_chars = 0
    for text in documents:
        lengths.setdefault(_digest(text), len(text))
        num_documents += 1
        num_chars += len(text)
    by_document = mode == "document" or (mode == "auto" and len(lengths) >= _MIN_DOCUMENTS)
    return Split(
        train_chars=(_by_document if by_document else _tail)(lengths, val_fraction),
        duplicates=num_documents - len(lengths),
        num_chars=num_chars,
    )


def _by_document(lengths: dict[bytes, int], val_fraction: float) -> dict[bytes, int]:
    if len(lengths) < 2:
        raise DataError("data.split=document needs two different documents, found one; use data.split=tail")
    num_val = min(max(1, round(val_fraction * len(lengths))), len(lengths) - 1)
    return lengths | dict.fromkeys(sorted(lengths)[:num_val], 0)


def _tail(lengths: dict[bytes, int], val_fraction: float) -> dict[bytes, int]:
    num_chars = sum(lengths.values())
    if num_chars < 2:
        raise DataError(f"the text has {num_chars} character: too little to train and to validate")
    share = 1 - Fraction(str(val_fraction))  # in decimals, as it was typed: 0.55 of 200 is 110
    left = min(max(1, int(num_chars * share)), num_chars - 1)
    train_chars = {}
    for digest, length in lengths.items():
        train_chars[digest] = min(length, left)
        left -= train_chars[digest]
    return train_chars


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:16]
