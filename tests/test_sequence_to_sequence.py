"""Batches of encoder-decoders, on pairs made by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lmtrain.data.batches import IGNORED, Source
from lmtrain.data.documents import Documents
from lmtrain.data.padded import PaddedBatches, PaddedEvalBatches
from lmtrain.data.sequence_to_sequence import SourceTargetRows
from lmtrain.errors import DataError

END = 1
PAIRS = [([10, 11], [20, 21, 22]), ([12, 13, 14], [23]), ([15], [24, 25])]


def documents(pairs: list[tuple[list[int], list[int]]], counted: list[bool] | None = None) -> Documents:
    """As they are prepared: source, end token, target, end token."""
    pieces = [[*source, END, *target, END] for source, target in pairs]
    prompts = np.array([len(source) + 1 for source, _ in pairs])
    tokens = np.concatenate([np.array(piece) for piece in pieces])
    return Documents(tokens, np.cumsum([len(piece) for piece in pieces]), counted and np.array(counted), prompts)


def rows(of: Documents, *, seq_len: int = 100) -> SourceTargetRows:
    return SourceTargetRows([Source(of)], seq_len=seq_len, split="training", end_id=END)


def test_the_decoder_says_the_target_after_the_end_token() -> None:
    (batch,) = PaddedEvalBatches(rows(documents(PAIRS)), batch_size=8)
    width = 8
    assert batch.inputs.tolist() == [
        [END, 20, 21, 22, *[0] * 4],
        [END, 23, *[0] * 6],
        [END, 24, 25, *[0] * 5],
    ]
    assert batch.targets.tolist() == [
        [20, 21, 22, END, *[IGNORED] * 4],
        [23, END, *[IGNORED] * 6],
        [24, 25, END, *[IGNORED] * 5],
    ]
    assert batch.num_targets == 9
    assert batch.context.keys() == {"sources_BS", "source_mask_BS"}
    sources = [[10, 11, END], [12, 13, 14, END], [15, END]]
    assert batch.context["sources_BS"].tolist() == [source + [0] * (width - len(source)) for source in sources]
    mask = batch.context["source_mask_BS"]
    assert mask.dtype == torch.bool
    assert mask.sum(dim=1).tolist() == [3, 4, 2]
    assert (mask.int().diff(dim=1) <= 0).all(), "padding lies at the right"


def test_both_sides_are_cut() -> None:
    pair = (list(range(10, 20)), list(range(20, 30)))
    made = rows(documents([pair, ([7], [8])]), seq_len=4)
    (batch,) = PaddedEvalBatches(made, batch_size=2)
    assert batch.inputs.tolist() == [[END, 20, 21, 22], [END, 8, 0, 0]]
    assert batch.targets.tolist() == [[20, 21, 22, 23], [8, END, IGNORED, IGNORED]]
    assert batch.context["sources_BS"].tolist() == [[10, 11, 12, 13], [7, END, 0, 0]]
    assert made.note == "of 2 training documents, cut to data.seq_len=4: 1"


def test_a_document_that_lacks_a_side_is_left_out() -> None:
    one = documents(PAIRS)
    assert one.prompts is not None
    lacking = Documents(one.tokens, one.ends, prompts=np.array([0, 4, 5]))  # nothing before, nothing behind
    made = rows(lacking)
    assert made.num_rows == [1]
    assert made.numbers(0, np.arange(1)).tolist() == [1]
    with pytest.raises(DataError, match="no document"):
        rows(Documents(one.tokens, one.ends))


def test_an_answer_that_does_not_count_is_only_read() -> None:
    """Of a conversation the decoder says everything after the first question; the answers count."""
    tokens = np.array([5, 6, 30, 31, 7, 32, END])
    counted = np.array([False, False, True, True, False, True, False])
    made = rows(Documents(tokens, np.array([7]), counted, np.array([2])))
    (batch,) = PaddedEvalBatches(made, batch_size=1)
    assert batch.inputs[0, :5].tolist() == [END, 30, 31, 7, 32]
    assert batch.targets[0, :5].tolist() == [30, 31, IGNORED, 32, IGNORED]
    assert batch.num_targets == 3


def test_rows_alike_in_both_lengths_come_together_and_every_pair_once() -> None:
    generator = np.random.default_rng(0)
    pairs = [
        ([100 + number] * int(generator.integers(1, 60)), [5] * int(generator.integers(1, 60)))
        for number in range(1200)
    ]
    made = rows(documents(pairs))
    batches, again = (PaddedBatches(made, [1.0], batch_size=8, seed=2) for _ in range(2))
    seen, tokens, room = [], 0, 0
    for step in range(150):
        batch = batches[step]
        sources, mask = batch.context["sources_BS"], batch.context["source_mask_BS"]
        seen += sources[:, 0].tolist()
        tokens += batch.num_targets + int(mask.sum())
        room += batch.inputs.numel() + sources.numel()
    assert sorted(seen) == list(range(100, 1300))
    assert tokens / room > 0.8, "both are random here: of independent lengths, half would be padding"
    assert torch.equal(again[77].inputs, batches[77].inputs)
    assert torch.equal(again[77].context["sources_BS"], batches[77].context["sources_BS"])
    assert batches.mean_targets * 1200 == sum(len(target) + 1 for _, target in pairs)
    largest = batches.largest
    assert (largest.inputs.shape, largest.context["sources_BS"].shape) == ((8, 64), (8, 64))
