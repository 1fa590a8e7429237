"""The documents of one array of tokens: where each begins and ends, and which of its tokens a model learns to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

TokenArray = NDArray[np.unsignedinteger[Any]]  # uint16 or uint32


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of one document."""

    document: int
    start: int  # where the first of `ids` lies in the tokens
    ids: TokenArray
    counted: NDArray[np.bool_] | None = None  # which of them are targets; None: all


@dataclass(frozen=True)
class Documents:
    """Tokens and their documents, numbered from 0 in their order. All arrays may be memory maps."""

    tokens: TokenArray  # (N,)
    ends: NDArray[np.int64]  # (D,) the position after each document's last token; the last one is N
    counted: NDArray[np.bool_] | None = None  # (N,) whether a token is a target; None: every one
    prompts: NDArray[np.int64] | None = None  # (D,) tokens of each document before its first target; None: 0

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, its end token included."""
        return np.diff(self.ends, prepend=0)

    def starts(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where the first token of each of these documents lies."""
        return np.where(numbers > 0, self.ends[numbers - 1], 0)

    @property
    def num_targets(self) -> int:
        """Tokens that are targets."""
        return len(self.tokens) if self.counted is None else int(np.count_nonzero(self.counted))

    def __getitem__(self, number: int) -> Piece:
        """A whole document."""
        start = int(self.ends[number - 1]) if number else 0
        return self._piece(number, start, slice(start, self.ends[number]))

    def pieces(self, positions: NDArray[np.int64]) -> list[Piece]:
        """Cut tokens, given by their positions on the ring, where a document ends or the ring does."""
        positions = positions % len(self.tokens)
        numbers = np.searchsorted(self.ends, positions, side="right")
        cuts = 1 + np.flatnonzero((np.diff(numbers) != 0) | (np.diff(positions) != 1))
        return [
            self._piece(int(numbers[first]), int(part[0]), part)
            for first, part in zip([0, *cuts], np.split(positions, cuts), strict=True)
        ]

    def _piece(self, number: int, start: int, where: slice | NDArray[np.int64]) -> Piece:
        return Piece(number, start, self.tokens[where], None if self.counted is None else self.counted[where])
