"""Which document a token is from."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.data import documents as documents_module
from lmtrain.data.documents import Documents

END = 9
TOKENS = np.array([1, 2, END, END, 3, END, 4, 5, 6], np.uint16)


def test_a_document_reaches_to_its_end_token() -> None:
    documents = Documents(TOKENS, END)
    assert documents.lengths.tolist() == [3, 1, 2, 3]
    assert [documents[number].ids.tolist() for number in range(4)] == [[1, 2, END], [END], [3, END], [4, 5, 6]]
    assert [documents[number].start for number in range(4)] == [0, 3, 4, 6]
    assert Documents(TOKENS[:6], END).lengths.tolist() == [3, 1, 2], "no empty document at the end"
    assert Documents(TOKENS[:2], END).lengths.tolist() == [2]


def test_pieces_are_cut_at_documents_and_at_the_end_of_the_ring() -> None:
    pieces = Documents(TOKENS, END).pieces(np.arange(5, 12))
    assert [(piece.document, piece.start, piece.ids.tolist()) for piece in pieces] == [
        (2, 5, [END]),
        (3, 6, [4, 5, 6]),
        (0, 0, [1, 2, END]),
    ]
    (first, second) = Documents(TOKENS[6:], END).pieces(np.arange(1, 5))
    assert (first.document, second.document) == (0, 0), "one document, around the ring"
    assert (first.start, second.start) == (1, 0)


@given(st.lists(st.integers(8, 9), min_size=1, max_size=40), st.integers(0, 100), st.integers(1, 60), st.integers(1, 7))
def test_pieces_are_the_tokens_in_order(tokens: list[int], start: int, number: int, chunk: int) -> None:
    array = np.array(tokens, np.uint16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents_module, "_CHUNK_TOKENS", chunk)
        documents = Documents(array, END)
    positions = np.arange(start, start + number)
    pieces = documents.pieces(positions)
    assert np.concatenate([piece.ids for piece in pieces]).tolist() == array.take(positions, mode="wrap").tolist()
    assert all(END not in piece.ids[:-1] for piece in pieces)
    assert documents.lengths.sum() == len(array)
    assert len(documents) == len(documents.lengths)
    for piece in pieces:
        whole = documents[piece.document]
        inside = piece.start - whole.start
        assert whole.ids[inside : inside + len(piece.ids)].tolist() == piece.ids.tolist()
