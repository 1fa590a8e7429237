"""Packed batches: addressed by (seed, step), nothing skipped, and told where documents end."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data.batches import IGNORED, Batch, Source
from lmtrain.data.documents import Documents
from lmtrain.data.packed import PackedBatches, PackedEvalBatches, require_sequence
from lmtrain.data.ramps import Ramp
from lmtrain.errors import DataError

TOKENS = np.arange(103, dtype=np.uint16)
# What seed 7 gives, so that a run of today can be repeated with the libraries of tomorrow.
FIRST_TOKENS = [5, 84, 68, 100, 92, 29, 45, 21, 76, 13, 52, 37, 60, 10, 42, 66, 98, 82, 58, 18]


def one_document(tokens: np.ndarray) -> Source:
    return Source(Documents(tokens, np.array([len(tokens)])))


def train_batches(
    tokens: np.ndarray = TOKENS, *, seq_len: int = 8, batch_size: int = 4, seed: int = 0, **ramps: Ramp
) -> PackedBatches:
    return PackedBatches([one_document(tokens)], seq_len=seq_len, batch_size=batch_size, seed=seed, **ramps)


def sequences(batches: PackedBatches, num_steps: int) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for step in range(num_steps) for row in batches[step].inputs]


def test_a_batch_is_next_token_prediction() -> None:
    batch = train_batches()[0]
    assert batch.inputs.shape == batch.targets.shape == (4, 8)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.is_contiguous()
    assert batch.targets.is_contiguous()
    assert batch.num_targets == 32
    assert torch.equal(batch.targets, (batch.inputs + 1) % 103)
    assert batch.documents is None


@pytest.mark.parametrize("step", [0, 3, 5, 20])
def test_a_batch_tells_where_its_tokens_lie(step: int) -> None:
    batches = train_batches(
        batch_size_ramp=Ramp(initial=1, steps=6),
        seq_len_ramp=Ramp(initial=2, steps=8),
    )
    batch, rows = batches[step], batches.rows(step)
    assert len(rows) == len(batch.inputs)
    for (source, start, length), inputs in zip(rows, batch.inputs.tolist(), strict=True):
        assert source == 0
        assert start < 103
        assert [(start + place) % 103 for place in range(length)] == inputs
    assert batches.sequences(step).start == sum(batches[earlier].num_sequences for earlier in range(step))
    assert len(batches.sequences(step)) == batch.num_sequences


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    batches, again = train_batches(), train_batches()
    in_any_order = {step: again[step].inputs for step in (50, 3, 0, 50, 17)}
    for step, inputs in in_any_order.items():
        assert torch.equal(inputs, batches[step].inputs)
    assert not torch.equal(batches[3].inputs, batches[4].inputs)
    assert not torch.equal(batches[3].inputs, train_batches(seed=1)[3].inputs)
    assert torch.equal(train_batches(seed=2**63 - 1)[0].inputs, train_batches(seed=2**63 - 1)[0].inputs)


def test_the_order_is_the_same_in_every_version() -> None:
    assert [row[0] for row in sequences(train_batches(seed=7), 5)] == FIRST_TOKENS


@given(st.integers(1, 9), st.integers(1, 9))
def test_the_order_of_sequences_does_not_depend_on_the_batch_size(one: int, other: int) -> None:
    first = sequences(train_batches(batch_size=one), 36 // one)
    second = sequences(train_batches(batch_size=other), 36 // other)
    shared = min(len(first), len(second))
    assert first[:shared] == second[:shared]


@given(st.integers(2, 60), st.integers(1, 12), st.integers(0, 5), st.integers(0, 3))
@settings(deadline=None)
def test_every_token_is_a_target_at_least_once_an_epoch(num_tokens: int, seq_len: int, seed: int, epoch: int) -> None:
    seq_len = min(seq_len, num_tokens - 1)
    batches = train_batches(np.arange(num_tokens), seq_len=seq_len, batch_size=1, seed=seed)
    assert batches.epoch_size == -(-num_tokens // seq_len)
    steps = range(epoch * batches.epoch_size, (epoch + 1) * batches.epoch_size)
    seen = Counter(token for step in steps for token in batches[step].targets.flatten().tolist())
    assert set(seen) == set(range(num_tokens))
    assert max(seen.values()) <= 2
    assert sum(seen.values()) - num_tokens < seq_len  # only the last window overlaps the first


def test_epochs_differ_in_borders_and_order() -> None:
    batches = train_batches(batch_size=1)
    per_epoch = batches.epoch_size
    starts = [row[0] for row in sequences(batches, 5 * per_epoch)]
    epochs = [starts[number * per_epoch : (number + 1) * per_epoch] for number in range(5)]
    assert len({frozenset(epoch) for epoch in epochs}) == 5
    assert all(epoch != sorted(epoch) for epoch in epochs)
    assert all(len(set(epoch)) == per_epoch for epoch in epochs)


def test_a_batch_may_span_epochs() -> None:
    large = train_batches(seq_len=50, batch_size=10)
    assert large.epoch_size == 3
    assert large.steps_for(sequences=10) == 1
    assert sequences(large, 1) == sequences(train_batches(seq_len=50, batch_size=1), 10)


def test_a_ramp_of_the_batch_size_keeps_the_order_of_sequences() -> None:
    ramped = train_batches(batch_size_ramp=Ramp(initial=1, steps=6))
    assert [len(ramped[step].inputs) for step in range(8)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [ramped[step].num_targets for step in range(8)] == [8, 8, 16, 16, 24, 24, 32, 32]
    assert sequences(ramped, 8) == sequences(train_batches(), 5)
    assert [tuple(row) for row in ramped[6].inputs.tolist()] == sequences(ramped, 8)[12:16]  # whatever came before


def test_a_ramp_of_the_sequence_length_cuts_the_same_sequences_into_pieces() -> None:
    ramped = train_batches(seq_len_ramp=Ramp(initial=2, steps=5))
    plain = train_batches()
    assert [ramped[step].inputs.shape[1] for step in range(7)] == [2, 2, 2, 4, 4, 8, 8]
    assert [ramped[step].rows_per_sequence for step in range(7)] == [4, 4, 4, 2, 2, 1, 1]
    for step in range(7):
        cut, whole = ramped[step], plain[step]
        assert torch.equal(cut.inputs.view(4, 8), whole.inputs)
        assert torch.equal(cut.targets.view(4, 8), whole.targets)
        assert cut.num_targets == whole.num_targets == 32


def test_a_negative_step_is_refused() -> None:
    with pytest.raises(IndexError, match="negative"):
        train_batches()[-1]


def test_memory_mapped_tokens_of_either_type(tmp_path: Path) -> None:
    for dtype, largest in ((np.uint16, 65_535), (np.uint32, 2**32 - 1)):
        tokens = np.full(20, largest, dtype)
        tokens.tofile(tmp_path / "tokens.bin")
        mapped = np.memmap(tmp_path / "tokens.bin", dtype, "r")
        assert train_batches(mapped)[0].inputs.unique().tolist() == [largest]
        (batch,) = PackedEvalBatches([one_document(mapped)], seq_len=19, batch_size=1)
        assert batch.targets.unique().tolist() == [largest]


def test_text_shorter_than_a_sequence_is_refused() -> None:
    require_sequence(one_document(TOKENS), 102, "training")
    with pytest.raises(DataError, match=r"training text has 103 tokens.*data\.seq_len=103 .*seq_len=102 or less"):
        train_batches(seq_len=103)
    named = [one_document(TOKENS), Source(Documents(TOKENS[:5], np.array([5])), name="poems")]
    with pytest.raises(DataError, match="the training text of poems has 5 tokens"):
        PackedBatches(named, seq_len=8, batch_size=2, seed=0)
    with pytest.raises(DataError, match="validation text has 1 token"):
        PackedEvalBatches([one_document(TOKENS[:1])], seq_len=8, batch_size=2)


# ------------------------------------------------------------------------------------ mixtures


def mixture(*sizes: int) -> list[Source]:
    """Sources whose tokens tell them apart: those of source n begin at 1000 n. The n-th has the weight n + 1."""
    return [
        Source(Documents(np.arange(1000 * number, 1000 * number + size), np.array([size])), number + 1.0)
        for number, size in enumerate(sizes)
    ]


def test_a_mixture_gives_every_source_its_share_whatever_the_batch_size() -> None:
    sources = mixture(60, 400, 90)
    batches = PackedBatches(sources, seq_len=8, batch_size=5, seed=0)
    assert batches.epoch_size == 8 + 50 + 12
    rows = sequences(batches, 60)
    assert all(row[0] // 1000 == row[-1] // 1000 for row in rows), "no window reaches into another source"
    counts = Counter(row[0] // 1000 for row in rows)
    assert all(abs(counts[source] - 300 * (source + 1) / 6) < 2 for source in range(3))
    assert rows == sequences(PackedBatches(sources, seq_len=8, batch_size=60, seed=0), 5)


def test_the_order_within_a_source_does_not_depend_on_the_others() -> None:
    sources = mixture(60, 400)
    mixed = sequences(PackedBatches(sources, seq_len=8, batch_size=6, seed=5), 20)
    alone = sequences(PackedBatches(sources[:1], seq_len=8, batch_size=1, seed=5), 40)
    assert [row for row in mixed if row[0] < 1000] == alone


# ------------------------------------------------------------------------------------ targets that count


def test_tokens_that_do_not_count_are_no_targets() -> None:
    counted = np.arange(103) % 3 == 0
    source = Source(Documents(TOKENS, np.array([103]), counted=counted))
    batches, plain = PackedBatches([source], seq_len=8, batch_size=4, seed=0), train_batches()
    for step in range(20):
        batch, all_targets = batches[step], plain[step].targets
        assert torch.equal(batch.inputs, plain[step].inputs)
        expected = torch.where(torch.from_numpy(counted)[all_targets], all_targets, IGNORED)
        assert torch.equal(batch.targets, expected)
        assert batch.num_targets == (expected != IGNORED).sum()
    assert batches.mean_targets == pytest.approx(8 * 35 / 103)
    assert plain.mean_targets == 8


# ------------------------------------------------------------------------------------ documents


def lengths_of_documents() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, 12), min_size=3, max_size=12)


def expected_documents(batch: Batch, ends: np.ndarray) -> list[list[int]]:
    """The document of each token, counted from that of the first of its row. Tokens are their positions here."""
    rows = []
    for row in batch.inputs.tolist():
        begins = [0, *((before + 1) in ends for before in row[:-1])]
        rows.append(np.cumsum(begins).tolist())
    return rows


@given(lengths_of_documents(), st.integers(2, 20), st.integers(0, 3))
@settings(deadline=None)
def test_a_batch_tells_the_documents_of_its_tokens(lengths: list[int], seq_len: int, seed: int) -> None:
    ends = np.cumsum(lengths)
    tokens = np.arange(ends[-1])
    seq_len = min(seq_len, len(tokens) - 1)
    source = Source(Documents(tokens, ends))
    batches = PackedBatches([source], seq_len=seq_len, batch_size=3, seed=seed, separate_documents=True)
    plain = PackedBatches([source], seq_len=seq_len, batch_size=3, seed=seed)
    for step in range(6):
        batch = batches[step]
        assert torch.equal(batch.inputs, plain[step].inputs)
        assert torch.equal(batch.targets, plain[step].targets), "the same windows and targets"
        assert batch.documents is not None
        assert batch.documents.tolist() == expected_documents(batch, ends)
    for batch in PackedEvalBatches([source], seq_len=seq_len, batch_size=3, separate_documents=True):
        assert batch.documents is not None
        counted = batch.targets != IGNORED
        expected = torch.tensor(expected_documents(batch, ends))
        assert torch.equal(batch.documents[counted], expected[counted])


def test_pieces_of_a_ramp_tell_their_documents_too() -> None:
    source = Source(Documents(TOKENS, np.array([5, 6, 50, 103])))
    ramp = Ramp(initial=2, steps=5)
    batches = PackedBatches([source], seq_len=8, batch_size=40, seed=0, separate_documents=True, seq_len_ramp=ramp)
    batch = batches[0]
    assert batch.documents is not None
    assert batch.documents.shape == batch.inputs.shape == (160, 2)
    assert batch.documents.tolist() == expected_documents(batch, np.array([5, 6, 50, 103]))


def test_the_largest_batch_is_as_large_as_any() -> None:
    for separate in (False, True):
        batches = PackedBatches(
            [one_document(TOKENS)],
            seq_len=8,
            batch_size=4,
            seed=0,
            separate_documents=separate,
            batch_size_ramp=Ramp(initial=1, steps=6),
        )
        assert batches.largest.inputs.shape == (4, 8)
        assert batches.largest.context.keys() == batches[9].context.keys()


# ------------------------------------------------------------------------------------ evaluation


@given(st.integers(2, 80), st.integers(1, 20), st.integers(1, 5))
@settings(deadline=None)
def test_every_token_but_the_first_is_evaluated_exactly_once(num_tokens: int, seq_len: int, batch_size: int) -> None:
    batches = PackedEvalBatches([one_document(np.arange(num_tokens))], seq_len=seq_len, batch_size=batch_size)
    targets: list[int] = []
    made = list(batches)
    for batch in made:
        counted = batch.targets != IGNORED
        assert batch.inputs.shape == batch.targets.shape
        assert batch.inputs.shape[1] == seq_len
        assert batch.num_targets == counted.sum()
        assert torch.equal(batch.inputs[counted] + 1, batch.targets[counted])
        assert (batch.inputs[~counted] == 0).all()
        targets += batch.targets[counted].tolist()
    assert targets == list(range(1, num_tokens))
    assert len(batches) == len(made)
    assert all(len(batch.inputs) == batch_size for batch in made[:-1])


def test_evaluation_tells_where_its_targets_lie() -> None:
    batches = PackedEvalBatches([one_document(TOKENS), one_document(TOKENS + 1000)], seq_len=8, batch_size=4)
    for (rows, batch), same in zip(batches.located(), batches, strict=True):
        assert torch.equal(batch.targets, same.targets)
        for targets, (source, start, length) in zip(batch.targets.tolist(), rows, strict=True):
            assert targets[:length] == list(range(start + 1 + 1000 * source, start + 1 + 1000 * source + length))


def test_evaluation_notes_what_it_leaves_out() -> None:
    first = "the first token of a text is predicted from nothing"
    assert PackedEvalBatches([one_document(TOKENS)], seq_len=8, batch_size=4).note == first
    few = PackedEvalBatches([one_document(TOKENS)], seq_len=8, batch_size=4, max_sequences=6)
    assert few.note == f"{first}; only the first 6 of 13 windows are read, as trainer.eval_batches says"


def test_evaluation_can_be_repeated() -> None:
    batches = PackedEvalBatches([one_document(TOKENS)], seq_len=8, batch_size=4)
    assert [b.targets.tolist() for b in batches] == [b.targets.tolist() for b in batches]


def test_ragged_rows_are_filled_up() -> None:
    (batch,) = PackedEvalBatches([one_document(TOKENS[:6])], seq_len=4, batch_size=4)
    assert batch.inputs.tolist() == [[0, 1, 2, 3], [4, 0, 0, 0]]
    assert batch.targets.tolist() == [[1, 2, 3, 4], [5, IGNORED, IGNORED, IGNORED]]
    assert batch.num_targets == 5


def test_the_first_windows_are_evaluated_if_not_all_are() -> None:
    few = list(PackedEvalBatches([one_document(TOKENS)], seq_len=8, batch_size=4, max_sequences=6))
    whole = list(PackedEvalBatches([one_document(TOKENS)], seq_len=8, batch_size=4))
    assert [len(batch.inputs) for batch in few] == [4, 2]
    assert torch.equal(few[0].targets, whole[0].targets)
    assert torch.equal(few[1].targets, whole[1].targets[:2])


def test_all_sources_are_evaluated() -> None:
    sources = mixture(41, 161)
    targets = [
        token
        for batch in PackedEvalBatches(sources, seq_len=8, batch_size=3)
        for token in batch.targets[batch.targets != IGNORED].tolist()
    ]
    assert targets == [*range(1, 41), *range(1001, 1161)]
    (few,) = PackedEvalBatches(sources, seq_len=8, batch_size=30, max_sequences=10)
    assert few.inputs[:, 0].tolist() == [0, 8, *(1000 + 8 * number for number in range(8))]
