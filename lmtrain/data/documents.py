"""Which document a token of prepared data is from. Reads the tokens alone: the end tokens tell."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmtrain.data.tokenizer import TokenArray

_CHUNK_TOKENS = 1 << 24  # searched at once


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one document."""

    document: int
    start: int  # where the first of `ids` lies in the tokens
    ids: TokenArray


class Documents:
    """The documents of one array of tokens, numbered from 0 in their order."""

    def __init__(self, tokens: TokenArray, end_id: int) -> None:
        """`tokens` is one-dimensional; what follows the last end token is a document too."""
        starts = range(0, len(tokens), _CHUNK_TOKENS)
        found = [start + 1 + np.flatnonzero(tokens[start : start + _CHUNK_TOKENS] == end_id) for start in starts]
        cut = [] if len(tokens) == 0 or tokens[-1] == end_id else [len(tokens)]
        self._tokens = tokens
        self._ends = np.concatenate([*found, np.array(cut, np.int64)])

    def __len__(self) -> int:
        return len(self._ends)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, its end token included."""
        return np.diff(self._ends, prepend=0)

    def __getitem__(self, number: int) -> Piece:
        """A whole document."""
        start = int(self._ends[number - 1]) if number else 0
        return Piece(number, start, self._tokens[start : self._ends[number]])

    def pieces(self, positions: NDArray[np.int64]) -> list[Piece]:
        """Cut tokens, given by their positions on the ring, where a document ends or the ring does."""
        positions = positions % len(self._tokens)
        numbers = np.searchsorted(self._ends, positions, side="right")
        cuts = 1 + np.flatnonzero((np.diff(numbers) != 0) | (np.diff(positions) != 1))
        return [
            Piece(int(numbers[first]), int(part[0]), self._tokens[part])
            for first, part in zip([0, *cuts], np.split(positions, cuts), strict=True)
        ]
