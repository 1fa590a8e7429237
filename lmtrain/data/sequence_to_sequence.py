"""Rows of encoder-decoders: a document is what it asks and what it answers.

Owns which tokens the encoder and the decoder get. Order, buckets and epochs are those of `padded`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from lmtrain.data.batches import Batch, Source
from lmtrain.data.documents import Documents
from lmtrain.data.order import Integers
from lmtrain.data.padded import Chosen, DocumentRows
from lmtrain.data.reading import in_multiples, padded_width


class SourceTargetRows(DocumentRows):
    """Documents as rows of an encoder-decoder.

    The encoder reads what stands before the first target. The decoder says the rest: its inputs are the end token and
    then its targets, without the last. Both are cut to `seq_len`. Documents that lack one of the two are left out.
    """

    def __init__(self, sources: Sequence[Source], *, seq_len: int, split: str, end_id: int) -> None:
        """Raises DataError if nothing is left of a source."""
        self._end_id = end_id
        super().__init__(sources, seq_len=seq_len, split=split)

    def _first_inputs(self, documents: Documents, numbers: Integers | slice) -> Integers:
        """The last token before the first target, which the end token stands for; -1 if there is none."""
        if documents.prompts is None:
            return np.full_like(documents.ends[numbers], -1)
        return documents.prompts[numbers] - 1

    def sizes(self, chosen: Chosen) -> Integers:
        """By the targets, and among rows of equally many by the sources."""
        targets, sources = super().sizes(chosen), in_multiples(self._source_lengths(chosen))
        return np.asarray(targets * (in_multiples(self.seq_len) + 1) + sources)

    def _source_lengths(self, chosen: Chosen) -> Integers:
        lengths = np.empty_like(chosen.documents)
        for source, documents in enumerate(self.documents):
            of_it = chosen.sources == source
            lengths[of_it] = self._first_inputs(documents, chosen.documents[of_it]) + 1
        return np.minimum(lengths, self.seq_len)

    def read(self, chosen: Chosen) -> Batch:
        """The batch of these documents, with what the encoder reads."""
        batch = super().read(chosen)
        batch.inputs[:, 0] = self._end_id
        lengths = self._source_lengths(chosen)
        sources = np.zeros((len(lengths), padded_width(lengths, self.seq_len)), np.int64)
        for row, (source, number) in enumerate(zip(chosen.sources, chosen.documents, strict=True)):
            sources[row, : lengths[row]] = self.documents[source][int(number)].ids[: lengths[row]]
        mask = np.arange(sources.shape[1]) < lengths[:, None]
        return replace(batch, sources=torch.from_numpy(sources), source_mask=torch.from_numpy(mask))

    def largest(self, batch_size: int) -> Batch:
        """... and of sources."""
        sources_BS = torch.zeros((batch_size, padded_width(self._longest[1:], self.seq_len)), dtype=torch.int64)
        mask_BS = torch.ones_like(sources_BS, dtype=torch.bool)
        return replace(super().largest(batch_size), sources=sources_BS, source_mask=mask_BS)


def document_rows(sources: Sequence[Source], *, seq_len: int, split: str, source_end_id: int | None) -> DocumentRows:
    """A row a document: of an encoder-decoder, whose targets begin after the end token given; of a decoder (None).

    Raises DataError if nothing is left of a source.
    """
    if source_end_id is None:
        return DocumentRows(sources, seq_len=seq_len, split=split)
    return SourceTargetRows(sources, seq_len=seq_len, split=split, end_id=source_end_id)
