"""Rows read from where they lie into the tensors of a batch.

Owns what is an input and a target where. Which rows a batch has is decided in `packed` and `padded`. Works in NumPy
alone: PyTorch's threads of a second Python thread would take the processors from those that train.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from lmtrain.data.batches import IGNORED, Batch, Rows
from lmtrain.data.documents import Documents

PADDING_MULTIPLE = 8
"""Rows are filled up to a multiple of so many tokens: what matrix units like, and fewer different shapes."""

_Any = TypeVar("_Any", bound=np.generic)


class RowReader:
    """Reads rows of the documents of several sources."""

    def __init__(self, sources: Sequence[Documents]) -> None:
        # A slice of a memory map costs ten times one of the array behind it.
        self._tokens: list[NDArray[np.unsignedinteger[Any]]] = [np.asarray(one.tokens) for one in sources]
        self._ends = [np.asarray(one.ends) for one in sources]
        self._counted = [None if one.counted is None else np.asarray(one.counted) for one in sources]

    def read(self, rows: Rows, width: int, *, rows_per_sequence: int = 1, separate_documents: bool = False) -> Batch:
        """A batch [len(rows), width]; with `separate_documents` it tells which tokens are of one document."""
        inputs = np.zeros((len(rows), width), np.int64)
        targets = np.full((len(rows), width), IGNORED)
        num_targets = int(rows.lengths.sum())
        for row, (source, start, length) in enumerate(rows):
            ids = _stretch(self._tokens[source], start, length + 1)
            inputs[row, :length], targets[row, :length] = ids[:-1], ids[1:]
            if (counted := self._counted[source]) is not None:
                counts = _stretch(counted, start, length + 1)[1:]
                targets[row, :length] = np.where(counts, targets[row, :length], IGNORED)
                num_targets -= length - int(np.count_nonzero(counts))
        return Batch(
            torch.from_numpy(inputs),
            torch.from_numpy(targets),
            num_targets,
            rows_per_sequence,
            documents=torch.from_numpy(self._documents(rows, width)) if separate_documents else None,
        )

    def _documents(self, rows: Rows, width: int) -> NDArray[np.int64]:
        """Which document of its row each input is of, counted from 0; padding counts with the last one."""
        begins = np.zeros((len(rows), width), np.int64)
        for row, (source, start, length) in enumerate(rows):
            ends, size = self._ends[source], len(self._tokens[source])
            begins[row, ends[_between(ends, start, start + length)] - start] = 1
            if start + length > size:  # goes on at the beginning of the tokens
                begins[row, ends[_between(ends, 0, start + length - size)] + size - start] = 1
        return begins.cumsum(axis=1)


def _stretch(values: NDArray[_Any], start: int, length: int) -> NDArray[_Any]:
    """So many values of the ring that `values` are."""
    stretch = values[start : start + length]
    missing = length - len(stretch)
    return np.concatenate([stretch, values[:missing]]) if missing else stretch


def _between(ends: NDArray[np.int64], low: int, high: int) -> slice:
    """Where the ends above `low` and below `high` are."""
    return slice(int(ends.searchsorted(low, "right")), int(ends.searchsorted(high, "left")))


def padded_width(lengths: NDArray[np.int64], limit: int) -> int:
    """The width of rows of these lengths in one batch, at most `limit`, which none exceeds."""
    return min(int(in_multiples(lengths.max())) * PADDING_MULTIPLE, limit)


def in_multiples(lengths: Any) -> Any:
    """Lengths in multiples of PADDING_MULTIPLE, rounded up."""
    return -(-lengths // PADDING_MULTIPLE)
