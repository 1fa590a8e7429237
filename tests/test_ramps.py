"""Ramps: sizes of steps by hand, and the count of what came before against a plain sum."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.data.ramps import BatchSizes, Ramp, sequence_length


def sizes(batch_sizes: BatchSizes, num_steps: int) -> list[int]:
    return [batch_sizes.before(step + 1) - batch_sizes.before(step) for step in range(num_steps)]


def test_batch_sizes_of_a_ramp() -> None:
    assert sizes(BatchSizes(8, Ramp(initial=2, steps=3)), 6) == [2, 4, 6, 8, 8, 8]
    assert sizes(BatchSizes(3, Ramp(initial=1, steps=6)), 8) == [1, 1, 1, 2, 2, 2, 3, 3]
    assert sizes(BatchSizes(5, Ramp(initial=5, steps=2)), 3) == [5, 5, 5]
    assert sizes(BatchSizes(5), 3) == [5, 5, 5]


@given(full=st.integers(1, 40), share=st.floats(0, 1), steps=st.integers(1, 50), wanted=st.integers(1, 3000))
def test_steps_for_is_the_smallest_number_that_suffices(full: int, share: float, steps: int, wanted: int) -> None:
    ramp = Ramp(initial=max(1, int(share * full)), steps=steps)
    for batch_sizes in (BatchSizes(full, ramp), BatchSizes(full)):
        steps_made = batch_sizes.steps_for(wanted)
        assert sum(sizes(batch_sizes, steps_made)) == batch_sizes.before(steps_made) >= wanted
        assert batch_sizes.before(steps_made - 1) < wanted


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        (Ramp(initial=32, steps=6), [32, 32, 64, 64, 128, 128, 256, 256]),
        (Ramp(initial=64, steps=5), [64, 64, 64, 128, 128, 256, 256, 256]),
        (Ramp(initial=32, steps=2), [32, 64, 256, 256, 256, 256, 256, 256]),  # too short for every length
        (Ramp(initial=256, steps=4), [256] * 8),
        (None, [256] * 8),
    ],
)
def test_lengths_of_a_ramp(ramp: Ramp | None, expected: list[int]) -> None:
    assert [sequence_length(step, 256, ramp) for step in range(8)] == expected
