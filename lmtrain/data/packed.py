"""Packed batches: rows of equal length cut from the stream of documents, wherever these end.

Owns the windows. Tells where documents end if rows must not be seen across, but leaves that to the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
import torch

from lmtrain.data.batches import Batch, Rows, Source, joined_notes, note_of_limit
from lmtrain.data.documents import Documents
from lmtrain.data.order import SequenceOrder, proportional
from lmtrain.data.ramps import BatchSizes, Ramp, sequence_length
from lmtrain.data.reading import RowReader
from lmtrain.errors import DataError


def require_sequence(source: Source, seq_len: int, split: str) -> None:
    """Raise DataError unless the documents have one sequence and the target of its last token."""
    num_tokens = len(source.documents.tokens)
    if num_tokens <= seq_len:
        text = f"{split} text of {source.name}" if source.name else f"{split} text"
        raise DataError(
            f"the {text} has {num_tokens:,} tokens, too few for a sequence of data.seq_len={seq_len} "
            f"and its last target; use more text, or data.seq_len={max(1, num_tokens - 1)} or less"
        )


class PackedBatches:
    """Training batches of windows; a `TrainBatches`.

    Sequences are numbered through: row r of step s is sequence s · batch_size + r, so the order of sequences
    does not depend on the batch size. Each epoch of a source lays a grid of windows over its tokens closed to a ring,
    starting at a random token, and visits the windows in a random order: every token is a target at least once an
    epoch, unless it does not count, and windows begin elsewhere in the next one.

    A ramp of the batch size changes how many sequences a step takes, not their order. A ramp of the sequence length
    cuts the sequences into shorter rows, so that a step holds the same tokens and none is lost.
    """

    note = ""  # everything is trained on

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        separate_documents: bool = False,
        batch_size_ramp: Ramp | None = None,
        seq_len_ramp: Ramp | None = None,
    ) -> None:
        """With `separate_documents`, a batch tells which tokens are of one document.

        Raises DataError if a source is shorter than one sequence.
        """
        for source in sources:
            require_sequence(source, seq_len, "training")
        self._documents = [source.documents for source in sources]
        self._num_tokens = np.array([len(documents.tokens) for documents in self._documents])
        num_windows = [-(-len(documents.tokens) // seq_len) for documents in self._documents]
        self._order = SequenceOrder(num_windows, [source.weight for source in sources], seed)
        self._reader = RowReader(self._documents)
        self._seq_len = seq_len
        self._separate_documents = separate_documents
        self._sizes = BatchSizes(batch_size, batch_size_ramp)
        self._seq_len_ramp = seq_len_ramp

    @property
    def epoch_size(self) -> int:
        """Windows of all sources."""
        return self._order.epoch_size

    @property
    def mean_targets(self) -> Fraction:
        """The sequence length, but for tokens that do not count."""
        counted = [Fraction(documents.num_targets, len(documents.tokens)) for documents in self._documents]
        return self._seq_len * self._order.mean(counted)

    @property
    def largest(self) -> Batch:
        """A batch after all ramps, of tokens 0."""
        zeros_BT = torch.zeros((self._sizes.full, self._seq_len), dtype=torch.int64)
        documents_BT = zeros_BT if self._separate_documents else None
        return Batch(zeros_BT, zeros_BT, num_targets=zeros_BT.numel(), documents=documents_BT)

    def steps_for(self, *, sequences: int) -> int:
        """The smallest number of steps that hold so many sequences."""
        return self._sizes.steps_for(sequences)

    def __getitem__(self, step: int) -> Batch:
        length = sequence_length(step, self._seq_len, self._seq_len_ramp)
        return self._reader.read(
            self.rows(step),
            length,
            rows_per_sequence=self._seq_len // length,
            separate_documents=self._separate_documents,
        )

    def sequences(self, step: int) -> range:
        """The numbers of a step's sequences, counted from the beginning of the run."""
        if step < 0:
            raise IndexError(f"step must not be negative, got {step}")
        return range(self._sizes.before(step), self._sizes.before(step + 1))

    def rows(self, step: int) -> Rows:
        """Where the rows of a step lie, sequence by sequence."""
        length = sequence_length(step, self._seq_len, self._seq_len_ramp)
        items = self._order.locate(self.sequences(step))
        num_tokens = self._num_tokens[items.sources]
        offsets = (items.draws % num_tokens.astype(np.uint64)).astype(np.int64)
        pieces = np.arange(0, self._seq_len, length)
        starts = (offsets + items.numbers * self._seq_len)[:, None] + pieces
        return Rows(
            sources=np.repeat(items.sources, len(pieces)),
            starts=(starts % num_tokens[:, None]).reshape(-1),
            lengths=np.full(starts.size, length),
        )


class PackedEvalBatches:
    """Consecutive windows over every source: each token but a source's first is a target exactly once.

    The last window of a source is filled up; the last batch may have fewer rows.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seq_len: int,
        batch_size: int,
        max_sequences: int | None = None,
        separate_documents: bool = False,
        split: str = "validation",
    ) -> None:
        """Of more than `max_sequences`, the first so many, of each source in proportion to its own.

        Raises DataError if a source has fewer than two tokens.
        """
        for source in sources:
            require_sequence(source, 1, split)
        windows = [_windows(number, source.documents, seq_len) for number, source in enumerate(sources)]
        sizes = [len(rows) for rows in windows]
        counts = sizes if max_sequences is None else proportional(sizes, max_sequences)
        self.note = joined_notes(
            "the first token of a text is predicted from nothing", note_of_limit(sum(counts), sum(sizes), "windows")
        )
        self._rows = Rows.joined([rows[:count] for rows, count in zip(windows, counts, strict=True)])
        self._reader = RowReader([source.documents for source in sources])
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._separate_documents = separate_documents

    @property
    def num_sequences(self) -> int:
        """Of all batches."""
        return len(self._rows)

    def __len__(self) -> int:
        return -(-self.num_sequences // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return (batch for _, batch in self.located())

    def located(self) -> Iterator[tuple[Rows, Batch]]:
        """Every batch, with where its rows lie."""
        for first in range(0, len(self._rows), self._batch_size):
            rows = self._rows[first : first + self._batch_size]
            yield rows, self._reader.read(rows, self._seq_len, separate_documents=self._separate_documents)


def _windows(source: int, documents: Documents, seq_len: int) -> Rows:
    starts = np.arange(0, len(documents.tokens) - 1, seq_len)
    return Rows(
        sources=np.full(len(starts), source),
        starts=starts,
        lengths=np.minimum(len(documents.tokens) - 1 - starts, seq_len),
    )
