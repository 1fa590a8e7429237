"""Padded batches: whole documents, similar lengths together, every document once an epoch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.config.compose import compose_config
from lmtrain.config.explain import REQUEST_ERRORS, explain
from lmtrain.data import padded
from lmtrain.data.batches import IGNORED, Batch, Source
from lmtrain.data.documents import Documents
from lmtrain.data.padded import DocumentRows, PaddedBatches, PaddedEvalBatches
from lmtrain.errors import DataError

lengths_of_documents = st.lists(st.integers(2, 40), min_size=1, max_size=60)


def source(lengths: list[int], *, first: int = 0, weight: float = 1.0, prompts: list[int] | None = None) -> Source:
    """Documents whose tokens are their positions, counted from `first`."""
    ends = np.cumsum(lengths)
    tokens = np.arange(first, first + ends[-1])
    if prompts is None:
        return Source(Documents(tokens, ends), weight)
    places = np.concatenate([np.arange(length) for length in lengths])
    counted = places >= np.repeat(prompts, lengths)
    return Source(Documents(tokens, ends, counted, np.array(prompts)), weight)


def train_batches(*sources: Source, seq_len: int = 100, batch_size: int = 4, seed: int = 0) -> PaddedBatches:
    rows = DocumentRows(sources, seq_len=seq_len, split="training")
    return PaddedBatches(rows, [one.weight for one in sources], batch_size=batch_size, seed=seed)


def first_tokens(batch: Batch) -> list[int]:
    return [int(row[0]) for row in batch.inputs]


# ------------------------------------------------------------------------------------ rows


def test_a_row_is_a_document() -> None:
    """Its first target is its second token, its last the end."""
    (batch,) = PaddedEvalBatches(DocumentRows([source([3, 5, 2])], seq_len=100, split="validation"), batch_size=8)
    assert batch.inputs.tolist() == [
        [0, 1, 0, 0, 0, 0, 0, 0],
        [3, 4, 5, 6, 0, 0, 0, 0],
        [8, 0, 0, 0, 0, 0, 0, 0],
    ]
    assert batch.targets[:, :4].tolist() == [[1, 2, IGNORED, IGNORED], [4, 5, 6, 7], [9, IGNORED, IGNORED, IGNORED]]
    assert (batch.targets[:, 4:] == IGNORED).all()
    assert batch.num_targets == 7


@given(lengths_of_documents, st.integers(1, 50), st.integers(1, 7))
@settings(deadline=None)
def test_rows_are_cut_and_filled_up_to_a_multiple_of_eight(lengths: list[int], seq_len: int, batch_size: int) -> None:
    batches = train_batches(source(lengths), seq_len=seq_len, batch_size=batch_size)
    starts = np.cumsum([0, *lengths])
    for step in range(6):
        batch = batches[step]
        rows = [
            min(lengths[int(np.searchsorted(starts, first, "right")) - 1] - 1, seq_len) for first in first_tokens(batch)
        ]
        assert batch.inputs.shape[1] == min(-(-max(rows) // 8) * 8, seq_len)
        assert len(batch.inputs) == batch_size
        for inputs, targets, length in zip(batch.inputs, batch.targets, rows, strict=True):
            assert torch.equal(inputs[:length] + 1, targets[:length])
            assert torch.equal(inputs[:length], inputs[0] + torch.arange(length))
            assert (inputs[length:] == 0).all()
            assert (targets[length:] == IGNORED).all()
        assert batch.num_targets == sum(rows)


def test_only_what_counts_is_a_target() -> None:
    (batch,) = PaddedEvalBatches(
        DocumentRows([source([4, 6], prompts=[2, 0])], seq_len=4, split="validation"), batch_size=8
    )
    assert batch.targets.tolist() == [[IGNORED, 2, 3, IGNORED], [5, 6, 7, 8]]
    assert batch.num_targets == 6


def test_documents_without_a_target_in_their_row_are_left_out_and_told() -> None:
    documents = [source([10, 5, 9, 20, 6, 1], prompts=[4, 5, 8, 9, 0, 0])]
    rows = DocumentRows(documents, seq_len=8, split="training")
    # The second has no target, the fourth none within eight tokens of the first, the last no token but one.
    assert rows.num_rows == [3]
    assert rows.numbers(0, np.arange(3)).tolist() == [0, 2, 4]
    assert rows.note == (
        "of 6 training documents, left out as they have no target within data.seq_len=8 tokens: 3; "
        "cut to data.seq_len=8: 1"
    )
    assert train_batches(source([5, 6])).note == ""
    with pytest.raises(DataError, match=r"no document of the training text has a target within data\.seq_len=8"):
        train_batches(source([20], prompts=[9]), seq_len=8)
    train_batches(source([20], prompts=[8]), seq_len=8)


def test_a_batch_tells_where_its_tokens_lie() -> None:
    batches = train_batches(source([5, 9, 3]), source([7, 30], first=1000), seq_len=12)
    for step in range(10):
        batch = batches[step]
        for (number, start, length), inputs in zip(batches.rows(step), batch.inputs.tolist(), strict=True):
            assert inputs[:length] == list(range(1000 * number + start, 1000 * number + start + length))


# ------------------------------------------------------------------------------------ order


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    lengths = list(range(2, 60))
    batches, again, other = (train_batches(source(lengths), seed=seed) for seed in (3, 3, 4))
    for step in (50, 3, 0, 50, 17):
        assert torch.equal(again[step].inputs, batches[step].inputs)
    assert first_tokens(batches[0]) != first_tokens(other[0])
    with pytest.raises(IndexError, match="negative"):
        batches[-1]


@given(lengths_of_documents, st.integers(1, 9), st.integers(1, 5), st.integers(0, 3), st.integers(0, 5))
@settings(deadline=None)
def test_the_steps_of_an_epoch_hold_every_document(
    lengths: list[int], batch_size: int, chunk: int, epochs: int, seed: int
) -> None:
    """After the steps of n epochs each was there n times, and some of the next epoch, to fill the last batch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(padded, "CHUNK_BATCHES", chunk)
        batches = train_batches(source(lengths), batch_size=batch_size, seed=seed)
        assert batches.epoch_size == len(lengths)
        num_steps = batches.steps_for(sequences=epochs * batches.epoch_size)
        seen = Counter(first for step in range(num_steps) for first in first_tokens(batches[step]))
    times = [seen[int(start)] for start in np.cumsum([0, *lengths[:-1]])]
    assert sum(times) == sum(seen.values()) == num_steps * batch_size
    assert all(epochs <= number for number in times)
    assert sum(number - epochs for number in times) < batch_size


def test_rows_of_a_batch_are_about_equally_long_and_batches_come_in_any_order() -> None:
    lengths = np.random.default_rng(0).integers(2, 200, 4000).tolist()
    batches = train_batches(source(lengths), seq_len=200, batch_size=16)
    made = [batches[step] for step in range(250)]
    targets, room = sum(batch.num_targets for batch in made), sum(batch.inputs.numel() for batch in made)
    assert targets / room > 0.94
    widths = [batch.inputs.shape[1] for batch in made]
    assert abs(np.corrcoef(widths[:-1], widths[1:])[0, 1]) < 0.2
    epochs = [[tuple(sorted(first_tokens(batches[step]))) for step in range(start, start + 250)] for start in (0, 250)]
    assert not set(epochs[0]) & set(epochs[1]), "other companions in the next epoch"


def test_a_mixture_gives_every_source_its_share() -> None:
    sources = [source([5] * 30), source([8] * 100, first=1000, weight=3)]
    batches = train_batches(*sources, batch_size=10)
    rows = [first for step in range(64) for first in first_tokens(batches[step])]
    assert abs(sum(first < 1000 for first in rows) - len(rows) / 4) < 2
    assert batches.mean_targets == (4 + 3 * 7) / 4


@pytest.mark.parametrize("prompts", [None, [2, 0, 11, 9]])
def test_the_mean_of_targets_is_that_of_an_epoch(prompts: list[int] | None) -> None:
    batches = train_batches(source([5, 9, 30, 10], prompts=prompts), seq_len=12, batch_size=1)
    targets = sum(batches[step].num_targets for step in range(batches.epoch_size))
    assert batches.mean_targets * batches.epoch_size == targets


def test_the_largest_batch_is_as_large_as_any() -> None:
    for seq_len, width in ((100, 32), (12, 12)):
        batches = train_batches(source([5, 9, 30, 10]), seq_len=seq_len)
        assert batches.largest.inputs.shape == (4, width)
        assert max(batches[step].inputs.shape[1] for step in range(20)) == width


# ------------------------------------------------------------------------------------ evaluation


def test_every_document_is_evaluated_once_from_short_to_long() -> None:
    lengths = np.random.default_rng(0).integers(2, 90, 50).tolist()
    rows = DocumentRows([source(lengths), source([3, 4], first=9000)], seq_len=100, split="validation")
    batches = PaddedEvalBatches(rows, batch_size=8)
    made = list(batches)
    assert len(made) == len(batches) == 7
    seen = [first for batch in made for first in first_tokens(batch)]
    assert sorted(seen) == [*np.cumsum([0, *lengths[:-1]]).tolist(), 9000, 9003]
    widths = [batch.inputs.shape[1] for batch in made]
    assert widths == sorted(widths)
    assert sum(batch.num_targets for batch in made) == sum(lengths) - 50 + 5


def test_evaluation_tells_where_its_targets_lie_and_what_it_leaves_out() -> None:
    rows = DocumentRows([source([9, 1, 40]), source([5, 7], first=1000)], seq_len=20, split="validation")
    batches = PaddedEvalBatches(rows, batch_size=2)
    for (places, batch), same in zip(batches.located(), batches, strict=True):
        assert torch.equal(batch.targets, same.targets)
        for targets, (which, start, length) in zip(batch.targets.tolist(), places, strict=True):
            assert targets[:length] == list(range(start + 1 + 1000 * which, start + 1 + 1000 * which + length))
    first = "the first token of a document is predicted from nothing"
    assert rows.note
    assert batches.note == f"{first}; {rows.note}"
    few = PaddedEvalBatches(rows, batch_size=2, max_sequences=3)
    assert few.note == f"{first}; {rows.note}; only the first 3 of 4 documents are read, as trainer.eval_batches says"
    answers = DocumentRows([source([9, 8], prompts=[3, 2])], seq_len=20, split="validation")
    assert PaddedEvalBatches(answers, batch_size=2).note == ""


def test_the_first_documents_are_evaluated_if_not_all_are() -> None:
    rows = DocumentRows([source([9] * 20), source([5] * 60, first=1000)], seq_len=100, split="validation")
    (batch,) = PaddedEvalBatches(rows, batch_size=100, max_sequences=8)
    assert sorted(first_tokens(batch)) == [0, 9, *(1000 + 5 * number for number in range(6))]


# ------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("ramp", ["trainer.seq_len_warmup_steps=10", "trainer.batch_size_warmup_steps=10"])
def test_ramps_are_refused(ramp: str) -> None:
    words = ["data.batches=padded", "trainer.initial_seq_len=32"]
    compose_config(words)
    with pytest.raises(REQUEST_ERRORS) as raised:
        compose_config([*words, ramp])
    assert "data.batches=padded" in explain(raised.value)
    assert ramp.split("=")[0] in explain(raised.value)
