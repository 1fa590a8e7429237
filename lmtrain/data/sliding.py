"""Sliding windows: every token of a document evaluated with as much of the document before it as the model can see.

Owns which windows a document has and which targets of each count. Nothing is trained on them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from lmtrain.data.batches import IGNORED, Batch, Rows, Source
from lmtrain.data.documents import Documents
from lmtrain.data.reading import RowReader, in_multiples, padded_width


class SlidingEvalBatches:
    """Windows of `seq_len` tokens inside each document, each `stride` tokens after the one before.

    Of the first window of a document all targets count, of each further one those that the windows before it do not
    hold, which are `stride` of them, or fewer at the end. So a target is predicted from at least seq_len - stride
    tokens, or all that its document has before it, and counts once (as in "Perplexity of fixed-length models" of the
    transformers documentation). From short to long; the last batch may have fewer rows.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seq_len: int,
        stride: int,
        batch_size: int,
        begin_id: int | None,
        separate_documents: bool = False,
    ) -> None:
        """`begin_id`: what the first token of a document is predicted from; None: it is not a target.

        With `separate_documents` the rest of a document does not see it.
        """
        assert 1 <= stride <= seq_len
        self.note = "" if begin_id is not None else "the first token of a document is predicted from nothing"
        self._windows = _Windows.joined(
            [
                _windows(number, source.documents, seq_len, stride, begins=begin_id is not None)
                for number, source in enumerate(sources)
            ]
        )
        self._reader = RowReader([source.documents for source in sources])
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._begin_id = begin_id
        self._separate_documents = separate_documents

    @property
    def num_sequences(self) -> int:
        """Of all batches."""
        return len(self._windows.rows)

    def __len__(self) -> int:
        return -(-self.num_sequences // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return (batch for _, batch in self.located())

    def located(self) -> Iterator[tuple[Rows, Batch]]:
        """Every batch, with where its rows lie."""
        for first in range(0, len(self._windows.rows), self._batch_size):
            windows = self._windows[slice(first, first + self._batch_size)]
            yield windows.rows, self._read(windows)

    def _read(self, windows: _Windows) -> Batch:
        batch = self._reader.read(windows.rows, padded_width(windows.rows.lengths, self._seq_len))
        columns, num_seen = torch.arange(batch.targets.size(1)), torch.from_numpy(windows.num_seen)
        targets = batch.targets.masked_fill(columns < num_seen.unsqueeze(1), IGNORED)
        documents = None
        if self._begin_id is not None:
            begins = torch.from_numpy(windows.numbers == 0)
            batch.inputs[begins, 0] = self._begin_id
            if self._separate_documents:
                documents = torch.zeros_like(batch.inputs)
                documents[begins, 1:] = 1
        return Batch(batch.inputs, targets, int((targets != IGNORED).sum()), documents=documents)


@dataclass(frozen=True)
class _Windows:
    """Windows of documents. All arrays (B,)."""

    rows: Rows
    numbers: NDArray[np.int64]  # within their document
    num_seen: NDArray[np.int64]  # targets at their beginning that windows before them hold

    def __getitem__(self, chosen: slice | NDArray[np.int64]) -> _Windows:
        return _Windows(self.rows[chosen], self.numbers[chosen], self.num_seen[chosen])

    @staticmethod
    def joined(parts: Sequence[_Windows]) -> _Windows:
        """Those of several sources, from short to long."""
        together = _Windows(
            Rows.joined([part.rows for part in parts]),
            np.concatenate([part.numbers for part in parts]),
            np.concatenate([part.num_seen for part in parts]),
        )
        return together[np.argsort(in_multiples(together.rows.lengths), kind="stable")]


def _windows(source: int, documents: Documents, seq_len: int, stride: int, *, begins: bool) -> _Windows:
    """Those of a source; with `begins`, the first input of a document stands before it."""
    first = documents.ends - documents.lengths - begins
    num_targets = documents.ends - 1 - first
    counts = np.where(num_targets > 0, 1 + -(-np.maximum(num_targets - seq_len, 0) // stride), 0)
    of = np.repeat(np.arange(len(counts)), counts)
    numbers = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = (first[of] + numbers * stride) % len(documents.tokens)  # before the first token of all is the last
    lengths = np.minimum(num_targets[of] - numbers * stride, seq_len)
    num_seen = np.where(numbers > 0, seq_len - stride, 0)
    return _Windows(Rows(np.full(len(of), source), starts, lengths), numbers, num_seen)
