"""Sliding windows: every target of a document once, after as many tokens of it as promised."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data.batches import IGNORED, Source
from lmtrain.data.documents import Documents
from lmtrain.data.sliding import SlidingEvalBatches

BEGIN = 60_000


def documents(lengths: list[int]) -> Documents:
    """Tokens are their positions."""
    return Documents(np.arange(sum(lengths)).astype(np.uint16), np.cumsum(lengths))


def windows(lengths: list[int], *, seq_len: int, stride: int, begin_id: int | None) -> SlidingEvalBatches:
    sources = [Source(documents(lengths))]
    return SlidingEvalBatches(sources, seq_len=seq_len, stride=stride, batch_size=3, begin_id=begin_id)


@st.composite
def sizes(draw: st.DrawFn) -> tuple[list[int], int, int]:
    seq_len = draw(st.integers(1, 12))
    return draw(st.lists(st.integers(1, 40), min_size=1, max_size=8)), seq_len, draw(st.integers(1, seq_len))


@given(sizes(), st.booleans())
@settings(deadline=None, max_examples=150)
def test_a_target_counts_once_after_its_own_document(of: tuple[list[int], int, int], begins: bool) -> None:
    """The inputs of a row are consecutive tokens of one document; a target sees seq_len - stride of them, or all."""
    lengths, seq_len, stride = of
    ends = np.cumsum(lengths)
    batches = windows(lengths, seq_len=seq_len, stride=stride, begin_id=BEGIN if begins else None)
    seen: list[int] = []
    made = list(batches.located())
    assert len(made) == len(batches)
    for rows, batch in made:
        assert batch.num_targets == int((batch.targets != IGNORED).sum())
        assert batch.inputs.shape[1] <= seq_len
        for inputs, targets, (_, start, length) in zip(
            batch.inputs.tolist(), batch.targets.tolist(), rows, strict=True
        ):
            for place, target in enumerate(targets):
                if target == IGNORED:
                    continue
                assert place < length
                assert target == (start + place + 1) % ends[-1]  # rows tell where targets lie
                begin = int(ends[np.searchsorted(ends, target, side="right") - 1]) if target >= ends[0] else 0
                before = [BEGIN] * begins + list(range(begin, target))
                context = inputs[: place + 1]
                assert context == before[len(before) - len(context) :]
                assert len(context) >= min(len(before), seq_len - stride + 1)
                seen.append(target)
    firsts = set() if begins else {0, *ends[:-1].tolist()}
    assert sorted(seen) == [token for token in range(ends[-1]) if token not in firsts]
    assert bool(batches.note) == (not begins)


def test_windows_move_on_by_the_stride() -> None:
    (batch,) = windows([10], seq_len=4, stride=3, begin_id=BEGIN)
    assert batch.inputs.tolist() == [[BEGIN, 0, 1, 2], [2, 3, 4, 5], [5, 6, 7, 8]]
    none = IGNORED
    assert batch.targets.tolist() == [[0, 1, 2, 3], [none, 4, 5, 6], [none, 7, 8, 9]]


def test_disjoint_windows_begin_with_their_own_tokens() -> None:
    (batch,) = windows([9], seq_len=4, stride=4, begin_id=BEGIN)
    assert sorted(batch.inputs[:, 0].tolist()) == [3, 7, BEGIN]


def test_short_windows_come_first() -> None:
    widths = [batch.inputs.size(1) for batch in windows([3, 90, 5, 2, 60, 9], seq_len=32, stride=16, begin_id=None)]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1] == 32


@pytest.mark.parametrize("begin_id", [None, BEGIN])
def test_what_is_only_read_does_not_count(begin_id: int | None) -> None:
    counted = np.array([False] * 6 + [True] * 4)
    source = Source(Documents(np.arange(10).astype(np.uint16), np.array([10]), counted, np.array([6])))
    batches = SlidingEvalBatches([source], seq_len=4, stride=2, batch_size=9, begin_id=begin_id)
    assert sorted(t for batch in batches for t in batch.targets.flatten().tolist() if t != IGNORED) == [6, 7, 8, 9]


def test_documents_trained_apart_do_not_see_what_begins_them() -> None:
    sources = [Source(documents([5]))]
    (batch,) = SlidingEvalBatches(sources, seq_len=4, stride=2, batch_size=9, begin_id=BEGIN, separate_documents=True)
    assert batch.inputs.tolist() == [[BEGIN, 0, 1, 2], [1, 2, 3, 0]]
    assert batch.documents is not None
    assert batch.documents.tolist() == [[0, 1, 1, 1], [0, 0, 0, 0]]
