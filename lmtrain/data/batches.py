"""Sequences cut from prepared tokens: addressed batches to train on, consecutive ones to evaluate on.

Owns which token is an input or a target where. Does not tokenise, and keeps no position: what a batch holds
follows from its number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lmtrain.data.ramps import BatchSizes, Ramp, sequence_length
from lmtrain.data.documents import TokenArray
from lmtrain.errors import DataError

IGNORED = -100  # target of a position that does not count; the default of torch's cross entropy


@dataclass(frozen=True)
class Batch:
    """Next-token prediction: `targets[b, t]` follows `inputs[b, t]`."""

    inputs: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, IGNORED where not counted
    num_targets: int  # targets that count
    rows_per_sequence: int = 1  # more while sequences still grow: a row is then a piece of one of full length


def require_sequence(tokens: TokenArray, seq_len: int, split: str) -> None:
    """Raise DataError unless `tokens` has one sequence and the target of its last token."""
    if len(tokens) <= seq_len:
        raise DataError(
            f"the {split} text has {len(tokens):,} tokens, too few for a sequence of data.seq_len={seq_len} "
            f"and its last target; use more text, or data.seq_len={max(1, len(tokens) - 1)} or less"
        )


class TrainBatches:
    """`batches[step]` for any step ≥ 0, as a function of (tokens, seed, step) alone.

    Sequences are numbered through: row r of step s is sequence s · batch_size + r, so the order of sequences
    does not depend on the batch size. An epoch is `num_windows` sequences. Each epoch lays a grid of windows
    over the tokens closed to a ring, starting at a random token, and visits the windows in a random order:
    every token is a target at least once an epoch, and windows begin elsewhere in the next one.

    A ramp of the batch size changes how many sequences a step takes, not their order. A ramp of the sequence length
    cuts the sequences into shorter rows, so that a step holds the same tokens and none is lost.
    """

    def __init__(
        self,
        tokens: TokenArray,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        batch_size_ramp: Ramp | None = None,
        seq_len_ramp: Ramp | None = None,
    ) -> None:
        """`tokens` is one-dimensional. Raises DataError if it is shorter than one sequence."""
        require_sequence(tokens, seq_len, "training")
        self.num_windows = -(-len(tokens) // seq_len)
        self._tokens = tokens
        self._seq_len = seq_len
        self._sizes = BatchSizes(batch_size, batch_size_ramp)
        self._seq_len_ramp = seq_len_ramp
        self._seed = seed
        # A batch spans few epochs, and the next batch the same ones.
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def steps_for(self, *, sequences: int) -> int:
        """The smallest number of steps that hold so many sequences."""
        return self._sizes.steps_for(sequences)

    def __getitem__(self, step: int) -> Batch:
        windows = torch.from_numpy(self._tokens.take(self.positions(step), mode="wrap").astype(np.int64))
        rows, length = windows.shape[0], windows.shape[1] - 1
        return Batch(
            windows[:, :-1].contiguous(),
            windows[:, 1:].contiguous(),
            num_targets=rows * length,
            rows_per_sequence=self._seq_len // length,
        )

    def sequences(self, step: int) -> range:
        """The numbers of a step's sequences, counted from the beginning of the run."""
        if step < 0:
            raise IndexError(f"step must not be negative, got {step}")
        return range(self._sizes.before(step), self._sizes.before(step + 1))

    def positions(self, step: int) -> NDArray[np.int64]:
        """Where a step's tokens lie on the ring, (B, T + 1): the inputs of each row and its last target."""
        length = sequence_length(step, self._seq_len, self._seq_len_ramp)
        starts = np.array([self._start(sequence) for sequence in self.sequences(step)])
        rows = starts[:, None] + np.arange(0, self._seq_len, length)
        return rows.reshape(-1, 1) + np.arange(length + 1)

    def _start(self, sequence: int) -> int:
        epoch, place = divmod(sequence, self.num_windows)
        offset, order = self._epoch(epoch)
        return (offset + int(order[place]) * self._seq_len) % len(self._tokens)

    def _draw_epoch(self, epoch: int) -> tuple[int, NDArray[np.int64]]:
        """The first token of the grid and the order of its windows.

        Sorts raw random words, as NumPy keeps the stream of a bit generator the same in all versions, but not
        that of `Generator.permutation`.
        """
        words = np.random.PCG64(np.random.SeedSequence([self._seed, epoch])).random_raw(self.num_windows + 1)
        return int(words[0] % len(self._tokens)), np.argsort(words[1:], kind="stable")


class EvalBatches:
    """Consecutive windows over all tokens: each token but the first is a target exactly once.

    The last window is filled up with inputs 0 and targets IGNORED; the last batch may have fewer rows.
    """

    def __init__(self, tokens: TokenArray, *, seq_len: int, batch_size: int) -> None:
        """`tokens` is one-dimensional, at least two (DataError)."""
        require_sequence(tokens, 1, "validation")
        self._tokens = tokens
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._num_batches = -(-(len(tokens) - 1) // (seq_len * batch_size))

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        return map(self._batch, range(self._num_batches))

    def _batch(self, number: int) -> Batch:
        size = self._seq_len * self._batch_size
        piece = torch.from_numpy(self._tokens[number * size : (number + 1) * size + 1].astype(np.int64))
        num_targets = len(piece) - 1
        shape = (-(-num_targets // self._seq_len), self._seq_len)
        inputs = torch.zeros(shape, dtype=torch.int64)
        targets = torch.full(shape, IGNORED)
        inputs.view(-1)[:num_targets] = piece[:-1]
        targets.view(-1)[:num_targets] = piece[1:]
        return Batch(inputs, targets, num_targets)
