"""Batches: addressed by (seed, step), nothing skipped, nothing counted twice in evaluation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data.batches import IGNORED, EvalBatches, TrainBatches, require_sequence
from lmtrain.data.ramps import Ramp
from lmtrain.errors import DataError

TOKENS = np.arange(103, dtype=np.uint16)
# What seed 7 gives, so that a run of today can be repeated with the libraries of tomorrow.
FIRST_TOKENS = [35, 11, 83, 75, 19, 67, 91, 59, 3, 51, 43, 27, 98, 24, 47, 63, 55, 16, 95, 0]


def train_batches(tokens: np.ndarray = TOKENS, *, seq_len: int = 8, batch_size: int = 4, seed: int = 0) -> TrainBatches:
    return TrainBatches(tokens, seq_len=seq_len, batch_size=batch_size, seed=seed)


def sequences(batches: TrainBatches, num_steps: int) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for step in range(num_steps) for row in batches[step].inputs]


def test_a_batch_is_next_token_prediction() -> None:
    batch = train_batches()[0]
    assert batch.inputs.shape == batch.targets.shape == (4, 8)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.is_contiguous()
    assert batch.targets.is_contiguous()
    assert batch.num_targets == 32
    assert torch.equal(batch.targets, (batch.inputs + 1) % 103)


@pytest.mark.parametrize("step", [0, 3, 5, 20])
def test_a_batch_tells_where_its_tokens_lie(step: int) -> None:
    batches = TrainBatches(
        TOKENS,
        seq_len=8,
        batch_size=4,
        seed=0,
        batch_size_ramp=Ramp(initial=1, steps=6),
        seq_len_ramp=Ramp(initial=2, steps=8),
    )
    batch, positions = batches[step], batches.positions(step)
    assert positions.shape == (len(batch.inputs), batch.inputs.shape[1] + 1)
    assert (positions[:, :-1] % 103).tolist() == batch.inputs.tolist()
    assert (positions[:, 1:] % 103).tolist() == batch.targets.tolist()
    assert batches.sequences(step).start == sum(
        len(batches[earlier].inputs) // batches[earlier].rows_per_sequence for earlier in range(step)
    )
    assert len(batches.sequences(step)) * batch.rows_per_sequence == len(batch.inputs)


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
    assert batches.num_windows == -(-num_tokens // seq_len)
    steps = range(epoch * batches.num_windows, (epoch + 1) * batches.num_windows)
    seen = Counter(token for step in steps for token in batches[step].targets.flatten().tolist())
    assert set(seen) == set(range(num_tokens))
    assert max(seen.values()) <= 2
    assert sum(seen.values()) - num_tokens < seq_len  # only the last window overlaps the first


def test_epochs_differ_in_borders_and_order() -> None:
    batches = train_batches(batch_size=1)
    per_epoch = batches.num_windows
    starts = [row[0] for row in sequences(batches, 5 * per_epoch)]
    epochs = [starts[number * per_epoch : (number + 1) * per_epoch] for number in range(5)]
    assert len({frozenset(epoch) for epoch in epochs}) > 1
    assert all(epoch != sorted(epoch) for epoch in epochs)
    assert all(len(set(epoch)) == per_epoch for epoch in epochs)


def test_a_batch_may_span_epochs() -> None:
    large = train_batches(seq_len=50, batch_size=10)
    assert large.num_windows == 3
    assert large.steps_for(sequences=10) == 1
    assert sequences(large, 1) == sequences(train_batches(seq_len=50, batch_size=1), 10)


def test_a_ramp_of_the_batch_size_keeps_the_order_of_sequences() -> None:
    ramped = TrainBatches(TOKENS, seq_len=8, batch_size=4, seed=0, batch_size_ramp=Ramp(initial=1, steps=6))
    assert [len(ramped[step].inputs) for step in range(8)] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [ramped[step].num_targets for step in range(8)] == [8, 8, 16, 16, 24, 24, 32, 32]
    assert sequences(ramped, 8) == sequences(train_batches(), 5)
    assert [tuple(row) for row in ramped[6].inputs.tolist()] == sequences(ramped, 8)[12:16]  # whatever came before


def test_a_ramp_of_the_sequence_length_cuts_the_same_sequences_into_pieces() -> None:
    ramped = TrainBatches(TOKENS, seq_len=8, batch_size=4, seed=0, seq_len_ramp=Ramp(initial=2, steps=5))
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
        (batch,) = EvalBatches(mapped, seq_len=19, batch_size=1)
        assert batch.targets.unique().tolist() == [largest]


def test_text_shorter_than_a_sequence_is_refused() -> None:
    require_sequence(TOKENS, 102, "training")
    with pytest.raises(DataError, match=r"training text has 103 tokens.*data\.seq_len=103 .*seq_len=102 or less"):
        train_batches(seq_len=103)
    with pytest.raises(DataError, match="validation text has 1 token"):
        EvalBatches(TOKENS[:1], seq_len=8, batch_size=2)


# ------------------------------------------------------------------------------------ evaluation


@given(st.integers(2, 80), st.integers(1, 20), st.integers(1, 5))
@settings(deadline=None)
def test_every_token_but_the_first_is_evaluated_exactly_once(num_tokens: int, seq_len: int, batch_size: int) -> None:
    batches = EvalBatches(np.arange(num_tokens), seq_len=seq_len, batch_size=batch_size)
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


def test_evaluation_can_be_repeated() -> None:
    batches = EvalBatches(TOKENS, seq_len=8, batch_size=4)
    assert [b.targets.tolist() for b in batches] == [b.targets.tolist() for b in batches]


def test_ragged_rows_are_filled_up() -> None:
    (batch,) = EvalBatches(TOKENS[:6], seq_len=4, batch_size=4)
    assert batch.inputs.tolist() == [[0, 1, 2, 3], [4, 0, 0, 0]]
    assert batch.targets.tolist() == [[1, 2, 3, 4], [5, IGNORED, IGNORED, IGNORED]]
    assert batch.num_targets == 5
