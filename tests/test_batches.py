"""A batch: how it is cut, and what a model is called with."""

from __future__ import annotations

import pytest
import torch

from lmtrain.data.batches import Batch


def batch(rows: int = 6, *, rows_per_sequence: int = 1, **more: torch.Tensor) -> Batch:
    inputs = torch.arange(rows * 4).view(rows, 4)
    return Batch(inputs, inputs + 1, inputs.numel(), rows_per_sequence, **more)


@pytest.mark.parametrize(
    ("size", "rows_per_sequence", "expected"),
    [(1, 1, [1] * 6), (4, 1, [4, 2]), (9, 1, [6]), (1, 2, [2, 2, 2]), (2, 2, [4, 2])],
)
def test_parts_are_consecutive_and_of_whole_sequences(size: int, rows_per_sequence: int, expected: list[int]) -> None:
    documents = torch.arange(24).view(6, 4)
    whole = batch(rows_per_sequence=rows_per_sequence, documents=documents)
    parts = list(whole.split(size))
    assert whole.num_sequences == 6 // rows_per_sequence
    assert [len(part.inputs) for part in parts] == expected
    assert torch.equal(torch.cat([part.inputs for part in parts]), whole.inputs)
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
    assert torch.equal(torch.cat([part.context["documents_BT"] for part in parts]), documents)
    assert all(part.num_targets == whole.num_targets for part in parts), "what sums are divided by"


def test_a_model_is_given_what_there_is() -> None:
    assert batch().context == {}
    sources, mask = torch.zeros(6, 3, dtype=torch.int64), torch.ones(6, 3, dtype=torch.bool)
    context = batch(sources=sources, source_mask=mask).context
    assert context.keys() == {"sources_BS", "source_mask_BS"}
    assert context["sources_BS"] is sources


def test_it_is_moved_as_a_whole() -> None:
    moved = batch(documents=torch.zeros(6, 4)).to(torch.device("meta"))
    assert {tensor.device.type for tensor in (moved.inputs, moved.targets, *moved.context.values())} == {"meta"}
    assert moved.num_targets == 24
