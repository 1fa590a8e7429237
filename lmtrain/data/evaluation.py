"""Which batches a model is evaluated on: those that training evaluates it on, or sliding windows."""

from __future__ import annotations

from collections.abc import Sequence

from lmtrain.config.schema import DataConfig
from lmtrain.data.batches import EvalBatches, Source
from lmtrain.data.packed import PackedEvalBatches
from lmtrain.data.padded import PaddedEvalBatches
from lmtrain.data.sequence_to_sequence import document_rows
from lmtrain.data.sliding import SlidingEvalBatches

EVAL_BATCH_SEQUENCES = 8
"""Sequences in each of `trainer.eval_batches`: runs of every batch size are evaluated on the same text."""


def eval_batches(
    data: DataConfig,
    sources: Sequence[Source],
    *,
    split: str,
    batch_size: int,
    source_end_id: int | None,
    num_batches: int | None = None,
) -> EvalBatches:
    """All of the sources, as training reads them; or of each its share of the first `num_batches`.

    `split` in words, for messages; `source_end_id` as for `document_rows`. Raises DataError if there is no target.
    """
    max_sequences = None if num_batches is None else num_batches * EVAL_BATCH_SEQUENCES
    if data.batches == "padded":
        rows = document_rows(sources, seq_len=data.seq_len, split=split, source_end_id=source_end_id)
        return PaddedEvalBatches(rows, batch_size=batch_size, max_sequences=max_sequences)
    return PackedEvalBatches(
        sources,
        seq_len=data.seq_len,
        batch_size=batch_size,
        max_sequences=max_sequences,
        separate_documents=data.batches == "packed_documents",
        split=split,
    )


def sliding_batches(
    data: DataConfig, sources: Sequence[Source], *, stride: int, batch_size: int, end_id: int
) -> EvalBatches:
    """Windows inside each document. It begins after an end token where training reads one document after another."""
    return SlidingEvalBatches(
        sources,
        seq_len=data.seq_len,
        stride=stride,
        batch_size=batch_size,
        begin_id=None if data.batches == "padded" else end_id,
        separate_documents=data.batches == "packed_documents",
    )
