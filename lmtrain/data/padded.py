"""Padded batches: a row a document, rows of about equal length together.

Owns which documents become rows and which rows a batch has. What a row holds is decided here for decoders, and in
`sequence_to_sequence` for encoder-decoders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
import torch

from lmtrain.data.batches import Batch, Rows, Source, joined_notes, note_of_limit
from lmtrain.data.documents import Documents
from lmtrain.data.order import Integers, SequenceOrder, key_of, proportional, shuffled
from lmtrain.data.reading import RowReader, in_multiples, padded_width
from lmtrain.errors import DataError

CHUNK_BATCHES = 64
"""Rows of so many consecutive batches are sorted by length."""

BLOCK = 1 << 14
"""Documents looked at together: what is computed of them stays in the processor's caches, which doubles the speed."""


@dataclass(frozen=True)
class Chosen:
    """Documents, by source and number. Both arrays (B,)."""

    sources: Integers
    documents: Integers

    def __getitem__(self, chosen: slice | Integers) -> Chosen:
        return Chosen(self.sources[chosen], self.documents[chosen])


class DocumentRows:
    """Documents as rows of a decoder: all tokens but the last are inputs, all but the first targets, if they count.

    A row holds the first `seq_len` inputs. Documents without a target in their row are left out.
    """

    def __init__(self, sources: Sequence[Source], *, seq_len: int, split: str) -> None:
        """Raises DataError if nothing is left of a source."""
        self.documents = [source.documents for source in sources]
        self.seq_len = seq_len
        self.num_rows = [0] * len(sources)  # by source
        self._split = split
        self._num_inputs = [0] * len(sources)
        self._num_cut = 0
        self._longest = np.zeros(2, np.int64)  # inputs of a row, and tokens before its first target
        self._rows_before: list[Integers] = []  # by source, how many come before each document that is left out
        for number, source in enumerate(sources):
            self._sort_out(number)
            if not self.num_rows[number]:
                text = f"{split} text of {source.name}" if source.name else f"{split} text"
                raise DataError(
                    f"no document of the {text} has a target within data.seq_len={seq_len} tokens; "
                    "use a larger data.seq_len, or other documents"
                )
        self._reader = RowReader(self.documents)

    def _sort_out(self, source: int) -> None:
        """Settle which documents of a source are rows."""
        documents, left_out = self.documents[source], [np.empty(0, np.int64)]
        for begin in range(0, len(documents), BLOCK):  # block by block, as there may be many millions
            block = slice(begin, begin + BLOCK)
            before_begin = documents.ends[begin - 1] if begin else 0
            first = self._first_inputs(documents, block)
            inputs, before = np.diff(documents.ends[block], prepend=before_begin) - 1 - first, first + 1
            first_target = 1 if documents.prompts is None else np.maximum(documents.prompts[block], 1)
            held = np.minimum(inputs, self.seq_len)
            usable = (first >= 0) & (first_target - first <= held)
            if not usable.all():
                left_out.append(begin + np.flatnonzero(~usable))
                inputs, before, held = inputs[usable], before[usable], held[usable]
            self._longest = np.maximum(self._longest, [inputs.max(initial=0), before.max(initial=0)])
            self._num_inputs[source] += int(held.sum())
            self._num_cut += int(np.count_nonzero(np.maximum(inputs, before) > self.seq_len))
        missing = np.concatenate(left_out)
        self.num_rows[source] = len(documents) - len(missing)
        self._rows_before.append(missing - np.arange(len(missing)))

    def numbers(self, source: int, places: Integers) -> Integers:
        """The documents of a source at these places, counted without those that are left out."""
        return places + self._rows_before[source].searchsorted(places, side="right")

    def _first_inputs(self, documents: Documents, numbers: Integers | slice) -> Integers:
        """Which token of each document is the first that is an input and no target."""
        return np.zeros_like(documents.ends[numbers])

    def rows(self, chosen: Chosen) -> Rows:
        """Where inputs and targets of these documents lie."""
        starts, lengths = np.empty((2, len(chosen.documents)), np.int64)
        for source, documents in enumerate(self.documents):
            of_it = chosen.sources == source
            numbers = chosen.documents[of_it]
            starts[of_it] = documents.starts(numbers) + self._first_inputs(documents, numbers)
            lengths[of_it] = np.minimum(documents.ends[numbers] - 1 - starts[of_it], self.seq_len)
        return Rows(chosen.sources, starts, lengths)

    def sizes(self, chosen: Chosen) -> Integers:
        """What rows are sorted by: those of one size are equally wide in a batch."""
        return np.asarray(in_multiples(self.rows(chosen).lengths))

    def read(self, chosen: Chosen) -> Batch:
        """The batch of these documents."""
        rows = self.rows(chosen)
        return self._reader.read(rows, padded_width(rows.lengths, self.seq_len))

    def largest(self, batch_size: int) -> Batch:
        """A batch of so many of the longest rows, of tokens 0."""
        zeros_BT = torch.zeros((batch_size, padded_width(self._longest[:1], self.seq_len)), dtype=torch.int64)
        return Batch(zeros_BT, zeros_BT, num_targets=zeros_BT.numel())

    def mean_targets(self, source: int) -> Fraction:
        """Targets that count, in the mean over the rows of a source."""
        counted, num_rows = self.documents[source].counted, self.num_rows[source]
        if counted is None:
            return Fraction(self._num_inputs[source], num_rows)
        rows = self.rows(Chosen(np.full(num_rows, source), self.numbers(source, np.arange(num_rows))))
        # Sums from each first target to the end of its row, and from there to the next, which are left out.
        bounds = np.stack([rows.starts + 1, rows.starts + 1 + rows.lengths], axis=1).reshape(-1)
        sums = np.add.reduceat(counted, bounds[bounds < len(counted)], dtype=np.int64)
        return Fraction(int(sums[::2].sum()), num_rows)

    @property
    def note(self) -> str:
        """How many documents are left out or cut; empty if none."""
        number = sum(map(len, self.documents))
        left_out = number - sum(self.num_rows)
        told = []
        if left_out:
            told.append(f"left out as they have no target within data.seq_len={self.seq_len} tokens: {left_out:,}")
        if self._num_cut:
            told.append(f"cut to data.seq_len={self.seq_len}: {self._num_cut:,}")
        return f"of {number:,} {self._split} documents, {'; '.join(told)}" if told else ""


class PaddedBatches:
    """Training batches of whole documents; a `TrainBatches`.

    Each epoch of a source visits its documents in a random order. Of consecutive sequences, as many as CHUNK_BATCHES
    batches hold, those of about equal length make a batch, and these batches come in a random order. A chunk ends where
    an epoch does: when the steps of an epoch are made, every document was there.
    """

    def __init__(self, rows: DocumentRows, weights: Sequence[float], *, batch_size: int, seed: int) -> None:
        self._rows = rows
        self._order = SequenceOrder(rows.num_rows, weights, seed)
        self._batch_size = batch_size
        self._seed = seed
        self._chunk = lru_cache(maxsize=1)(self._sort_chunk)  # the next step is of the same one

    @property
    def epoch_size(self) -> int:
        """Documents of all sources that are rows."""
        return self._order.epoch_size

    @property
    def mean_targets(self) -> Fraction:
        """Reads which tokens count, of all documents, if not all do."""
        return self._order.mean([self._rows.mean_targets(source) for source in range(len(self._rows.documents))])

    @property
    def largest(self) -> Batch:
        """Of the longest documents."""
        return self._rows.largest(self._batch_size)

    @property
    def note(self) -> str:
        """How many documents are left out or cut."""
        return self._rows.note

    def steps_for(self, *, sequences: int) -> int:
        """The smallest number of steps that hold so many sequences."""
        return -(-sequences // self._batch_size)

    def sequences(self, step: int) -> range:
        """Numbers that are a step's share; which of its chunk's documents it holds goes by their lengths."""
        if step < 0:
            raise IndexError(f"step must not be negative, got {step}")
        return range(step * self._batch_size, (step + 1) * self._batch_size)

    def rows(self, step: int) -> Rows:
        """Where the rows of a step lie."""
        return self._rows.rows(self._chosen(step))

    def __getitem__(self, step: int) -> Batch:
        return self._rows.read(self._chosen(step))

    def _chosen(self, step: int) -> Chosen:
        first, stop = self._chunk_of(self.sequences(step).start)
        return self._chunk(first, stop)[(step - first) * self._batch_size : (step - first + 1) * self._batch_size]

    def _chunk_of(self, sequence: int) -> tuple[int, int]:
        """The first step of a chunk and the one after its last.

        An epoch has the steps from the first that begins in it to the last that does.
        """
        epoch, size = sequence // self.epoch_size, self._batch_size
        of_epoch = [self.steps_for(sequences=number * self.epoch_size) for number in (epoch, epoch + 1)]
        chunk = (sequence // size - of_epoch[0]) // CHUNK_BATCHES
        first = of_epoch[0] + chunk * CHUNK_BATCHES
        return first, min(first + CHUNK_BATCHES, of_epoch[1])

    def _sort_chunk(self, first: int, stop: int) -> Chosen:
        """The documents of these steps. Which of equally long ones are together is random already."""
        num_steps = stop - first
        items = self._order.locate(range(first * self._batch_size, stop * self._batch_size))
        documents = np.empty_like(items.numbers)
        for source in range(len(self._rows.documents)):
            of_it = items.sources == source
            documents[of_it] = self._rows.numbers(source, items.numbers[of_it])
        chosen = Chosen(items.sources, documents)
        by_length = np.argsort(self._rows.sizes(chosen), kind="stable").reshape(num_steps, self._batch_size)
        keys = np.repeat(key_of(self._seed, first), num_steps)
        visits = shuffled(np.arange(num_steps), np.full(num_steps, num_steps), keys)
        return chosen[by_length[visits].reshape(-1)]


class PaddedEvalBatches:
    """Every document once, from short to long; the last batch may have fewer rows."""

    def __init__(self, rows: DocumentRows, *, batch_size: int, max_sequences: int | None = None) -> None:
        """Of more than `max_sequences` documents the first so many, of each source in proportion to its own."""
        counts = rows.num_rows if max_sequences is None else proportional(rows.num_rows, max_sequences)
        chosen = Chosen(
            np.repeat(np.arange(len(counts)), counts),
            np.concatenate([rows.numbers(source, np.arange(count)) for source, count in enumerate(counts)]),
        )
        self._chosen = chosen[np.argsort(rows.sizes(chosen), kind="stable")]
        counts_first = any(documents.counted is None for documents in rows.documents)
        self.note = joined_notes(
            "the first token of a document is predicted from nothing" if counts_first else "",
            rows.note,
            note_of_limit(sum(counts), sum(rows.num_rows), "documents"),
        )
        self._rows = rows
        self._batch_size = batch_size

    @property
    def num_sequences(self) -> int:
        """Of all batches."""
        return len(self._chosen.documents)

    def __len__(self) -> int:
        return -(-self.num_sequences // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return (batch for _, batch in self.located())

    def located(self) -> Iterator[tuple[Rows, Batch]]:
        """Every batch, with where its rows lie."""
        for first in range(0, len(self._chosen.documents), self._batch_size):
            chosen = self._chosen[first : first + self._batch_size]
            yield self._rows.rows(chosen), self._rows.read(chosen)
