"""Which document a token is from, and which tokens are targets."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.data.documents import Documents

END = 9
TOKENS = np.array([1, 2, END, END, 3, END, 4, 5, 6], np.uint16)
ENDS = np.array([3, 4, 6, 9])


def test_documents_begin_where_those_before_end() -> None:
    documents = Documents(TOKENS, ENDS)
    assert len(documents) == 4
    assert documents.lengths.tolist() == [3, 1, 2, 3]
    assert documents.starts(np.array([3, 0, 2])).tolist() == [6, 0, 4]
    assert [documents[number].ids.tolist() for number in range(4)] == [[1, 2, END], [END], [3, END], [4, 5, 6]]
    assert [documents[number].start for number in range(4)] == [0, 3, 4, 6]


def test_targets_are_all_tokens_or_those_that_count() -> None:
    assert Documents(TOKENS, ENDS).num_targets == 9
    documents = Documents(TOKENS, ENDS, counted=TOKENS == END)
    assert documents.num_targets == 3
    counted = documents[0].counted
    assert counted is not None
    assert counted.tolist() == [False, False, True]
    assert Documents(TOKENS, ENDS)[0].counted is None


def test_pieces_are_cut_at_documents_and_at_the_end_of_the_ring() -> None:
    pieces = Documents(TOKENS, ENDS, counted=TOKENS > 3).pieces(np.arange(5, 12))
    assert [(piece.document, piece.start, piece.ids.tolist()) for piece in pieces] == [
        (2, 5, [END]),
        (3, 6, [4, 5, 6]),
        (0, 0, [1, 2, END]),
    ]
    assert [None if piece.counted is None else piece.counted.tolist() for piece in pieces] == [
        [True],
        [True, True, True],
        [False, False, True],
    ]
    (first, second) = Documents(TOKENS[6:], np.array([3])).pieces(np.arange(1, 5))
    assert (first.document, second.document) == (0, 0), "one document, around the ring"
    assert (first.start, second.start) == (1, 0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(0, 100), st.integers(1, 60))
def test_pieces_are_the_tokens_in_order(lengths: list[int], start: int, number: int) -> None:
    tokens, ends = np.arange(sum(lengths), dtype=np.uint16), np.cumsum(lengths)
    documents, positions = Documents(tokens, ends), np.arange(start, start + number)
    pieces = documents.pieces(positions)
    assert np.concatenate([piece.ids for piece in pieces]).tolist() == tokens.take(positions, mode="wrap").tolist()
    for piece in pieces:
        whole = documents[piece.document]
        inside = piece.start - whole.start
        assert whole.ids[inside : inside + len(piece.ids)].tolist() == piece.ids.tolist()
