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
from lmtrain.data.tokenizer import TokenArray
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
        if step < 0:
            raise IndexError(f"step must not be negative, got {step}")
        first, end = self._sizes.before(step), self._sizes.before(step + 1)
        starts = np.array([self._start(sequence) for sequence in range(first, end)])
        positions = starts[:, None] + np.arange(self._seq_len + 1)
        windows = torch.from_numpy(self._tokens.take(positions, mode="wrap").astype(np.int64))
        length = sequence_length(step, self._seq_len, self._seq_len_ramp)
        return Batch(
            windows[:, :-1].contiguous().view(-1, length),
            windows[:, 1:].contiguous().view(-1, length),
            num_targets=(end - first) * self._seq_len,
            rows_per_sequence=self._seq_len // length,
        )

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

    def __init__(self, tokens: TokenArray, *, seq_len: int, batch_size: int, max_batches: int | None = None) -> None:
        """`tokens` is one-dimensional, at least two (DataError). `max_batches`: only the first so many."""
        require_sequence(tokens, 1, "validation")
        num_batches = -(-(len(tokens) - 1) // (seq_len * batch_size))
        self._tokens = tokens
        self._seq_len = seq_len
        self._batch_size = batch_size
        self._num_batches = num_batches if max_batches is None else min(num_batches, max_batches)

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
